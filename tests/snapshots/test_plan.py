"""What a plan makes of a file, without any weight in it."""
import numpy as np
import pytest

from sn_function import errors
from sn_function._snapshots import readers
from sn_function._snapshots.plan import Plan


@pytest.fixture
def reader(tmp_path):
    path = tmp_path / 'in.npz'
    np.savez(path, **{f'a/{i}': np.full(2, i) for i in range(4)}, b=np.ones(2))
    with readers.open_snapshot(path) as reader:
        yield reader


def written(plan, reader, tmp_path, progress=iter):
    path = tmp_path / 'out.npz'
    assert plan.write(reader, str(path), None, progress) == []
    with np.load(path) as file:
        return {key: file[key].tolist() for key in file}


def test_nothing_planned_is_a_copy(reader, tmp_path):
    assert list(written(Plan(), reader, tmp_path).items()) == [
        ('a/0', [0, 0]), ('a/1', [1, 1]), ('a/2', [2, 2]), ('a/3', [3, 3]),
        ('b', [1, 1])]


def test_each_entry_in_its_place(reader, tmp_path):
    plan = Plan()
    plan.drop(['a/0', 'b'])
    plan.put('a/1', np.array([7]))
    plan.rename('a/2', 'c')
    plan.replace('a/3', lambda *keys: [(key, np.ones(1)) for key in keys],
                 'd', 'e')
    assert [key in plan for key in ('a/0', 'a/1', 'a/2', 'a/3', 'b')] == [
        True, True, False, True, True]
    assert list(written(plan, reader, tmp_path).items()) == [
        ('a/1', [7]), ('c', [2, 2]), ('d', [1]), ('e', [1])]


def test_prefix(reader, tmp_path):
    plan = Plan('a/')
    plan.rename('a/2', 'a.x')
    assert plan.name_of('a/W') == 'W'
    assert list(written(plan, reader, tmp_path)) == ['0', '1', 'x', '3']


def test_entries_are_made_when_it_is_their_turn(reader, tmp_path):
    events = []
    plan = Plan()
    for key in 'a/1', 'b':
        def make(key=key):
            events.append(f'make {key}')
            return [(key, np.ones(1))]

        plan.replace(key, make)

    def progress(keys):
        for key in keys:
            events.append(key)
            yield key

    written(plan, reader, tmp_path, progress)
    assert events == ['a/0', 'a/1', 'make a/1', 'a/2', 'a/3', 'b', 'make b']


@pytest.mark.parametrize('plan_one', [
    lambda plan: plan.rename('b', 'a/0'),
    lambda plan: plan.replace('b', lambda: [('a/0', np.ones(1))])])
def test_two_entries_of_one_name(reader, tmp_path, plan_one):
    plan = Plan()
    plan_one(plan)
    with pytest.raises(errors.SnapshotNameError, match="'a/0' and 'b'"):
        written(plan, reader, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ['in.npz']
