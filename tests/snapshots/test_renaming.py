"""Paths that users rename, in what is converted and baked."""
import sn_function  # isort: skip  # before chainer, which it repairs
import os

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

from sn_function import SpectralNormalization, errors, snapshot

W1, W2 = np.diag([3., 1]).astype('f'), np.diag([5., 1]).astype('f')
U = np.array([1, 0], 'f')
B = np.array([6, 7], 'f')


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    assert sn_function
    monkeypatch.chdir(tmp_path)


def write(prefix='', **others):
    """A Sequential of PyTorch, which numbers its functions, too."""
    arrays = {}
    for i, W in (0, W1), (2, W2):
        arrays.update({
            f'{prefix}main.{i}.weight_orig': W,
            f'{prefix}main.{i}.weight_u': U,
            f'{prefix}main.{i}.weight_v': U, f'{prefix}main.{i}.bias': B})
    np.savez('in.npz', **arrays, **others)


def write_chainer():
    np.savez('in.npz', **{
        'main/0/W': W1, 'main/0/W_u': U, 'main/0/b': B, 'main/2/W': W2,
        'main/2/W_u': U, 'main/2/b': B})


def convert(rename, to='chainer', **kwargs):
    snapshot.convert('in.npz', 'out.npz', to, rename=rename, overwrite=True,
                     **kwargs)
    return names()


def names():
    with np.load('out.npz') as file:
        return set(file)


def layer(path):
    return {f'{path}/{name}' for name in ('W', 'W_u', 'b')}


def test_loads_into_a_sequential_and_into_a_chain():
    write()
    convert({'main.0': 'l1', 'main.2': 'l2'})
    hook = SpectralNormalization()
    chain = chainer.Chain(
        l1=L.Linear(2, 2).add_hook(hook), l2=L.Linear(2, 2).add_hook(hook))
    serializers.load_npz('out.npz', chain)
    np.testing.assert_array_equal(chain.l1.W.array, W1)
    np.testing.assert_array_equal(chain.l2.W.array, W2)
    np.testing.assert_array_equal(chain.l2.b.array, B)
    with chainer.using_config('train', False):
        np.testing.assert_allclose(
            hook.normalize_weight(chain.l1).array, W1 / 3, rtol=1e-6)
    convert({'main': '', 'main.2': '1'})
    sequential = chainer.Sequential(
        L.Linear(2, 2).add_hook(hook), L.Linear(2, 2).add_hook(hook))
    serializers.load_npz('out.npz', sequential)
    np.testing.assert_array_equal(sequential[1].W.array, W2)


@pytest.mark.parametrize(('rename', 'first', 'second'), [
    ({'main.0': 'l1'}, 'l1', 'main/2'),
    ({'main/0': 'l1'}, 'l1', 'main/2'),
    ({'main.0.': '/l1/'}, 'l1', 'main/2'),
    ({'main.0': 'a.b/c'}, 'a/b/c', 'main/2'),
    ({'main': 'net'}, 'net/0', 'net/2'),
    ({'main': ''}, '0', '2'),
    ({'': 'dis'}, 'dis/main/0', 'dis/main/2'),
    ({'main.0': 'main.2', 'main.2': 'main.0'}, 'main/2', 'main/0'),
    ({'main': 'net', 'main.2': 'last'}, 'net/0', 'last'),
    ({'main.2': 'last', 'main': 'net'}, 'net/0', 'last'),
], ids=str)
@pytest.mark.parametrize('make', [write, write_chainer])
def test_whole_parts_and_the_longest(make, rename, first, second):
    make()
    assert convert(rename) == layer(first) | layer(second)
    with np.load('out.npz') as file:
        np.testing.assert_array_equal(file[f'{first}/W'], W1)
        np.testing.assert_array_equal(file[f'{second}/W'], W2)


def test_to_pytorch_and_back():
    write_chainer()
    renamed = convert({'main/0': 'layers/a'}, 'torch')
    assert {f'layers.a.{name}' for name in (
        'weight_orig', 'weight_u', 'weight_v', 'bias')} < renamed
    write()
    assert 'a.parametrizations.weight.original' in convert(
        {'main.0': 'a'}, 'torch-parametrized')
    assert {'a.weight_orig', 'a.bias'} < convert({'main.0': 'a'}, 'torch')


def test_entries_by_their_names():
    write(**{'scale.alpha': B, 'scale.beta': B})
    outcome = snapshot.convert('in.npz', 'out.npz', 'chainer', rename={
        'scale.alpha': 'prelu/W', 'main.0.weight': 'l1.H'})
    assert outcome.unknown == ['scale.beta']
    assert names() == layer('main/2') | {
        'l1/H', 'l1/H_u', 'main/0/b', 'prelu/W', 'scale/beta'}
    report = snapshot.inspect('out.npz')[0]
    assert (report.key, report.status) == ('l1/H', 'ok')


@pytest.mark.parametrize('rename', [
    {'main.0': 'l1'}, {'module.main.0': 'l1'},
    {'module._orig_mod.main.0': 'l1'}])
def test_with_and_without_what_wraps_the_model(rename):
    write('module._orig_mod.')
    assert convert(rename) == layer('l1') | layer('main/2')


def test_layer_in_a_wrapper():
    np.savez('in.npz', **{
        'main.0.module.weight_bar': W1, 'main.0.module.weight_u': U,
        'main.0.module.weight_v': U, 'main.0.module.bias': B})
    for old in 'main.0', 'main.0.module':
        assert convert({old: 'l1'}) == layer('l1')
    assert convert({'main': 'net'}) == layer('net/0')


def test_for_pytorch_a_wrapper_is_a_part_as_any():
    write('module.')
    assert 'main.0.weight_orig' in convert({'module': ''}, 'torch')


def test_below_a_model():
    write('dis.', **{'gen.l.weight': W1})
    assert convert({'main.0': 'l1'}, model='dis') == (
        layer('l1') | layer('main/2'))


def test_bake():
    write()
    snapshot.bake('in.npz', 'out.npz', rename={'main.0': 'l1/x'})
    assert names() == {
        'l1.x.weight', 'l1.x.bias', 'main.2.weight', 'main.2.bias'}
    write_chainer()
    outcome = snapshot.bake('in.npz', 'out.npz', rename={'main.0': 'l1'},
                            overwrite=True)
    assert [each.key for each in outcome.weights] == ['l1/W', 'main/2/W']
    assert names() == {'l1/W', 'l1/b', 'main/2/W', 'main/2/b'}
    with np.load('out.npz') as file:
        np.testing.assert_allclose(file['l1/W'], W1 / 3, rtol=1e-6)


def test_only_the_kind_changes_without_a_rename():
    write_chainer()
    outcome = snapshot.convert('in.npz', 'out.npz', 'chainer')
    assert {each.action for each in outcome.weights} == {'kept'}
    np.savez('in.npz', **{'l/weight': W1, 'l/weight_u': U})
    assert convert({}, converge=True) == {'l/weight', 'l/weight_u'}


@pytest.mark.parametrize('command', [
    lambda rename: convert(rename), lambda rename: convert(rename, 'torch'),
    lambda rename: snapshot.bake('in.npz', 'out.npz', rename=rename)])
class TestErrors:

    def refused(self, command, rename, error, match):
        with pytest.raises(error, match=match) as e:
            command(rename)
        assert str(e.value).startswith('in.npz')
        assert os.listdir('.') == ['in.npz']

    @pytest.mark.parametrize('old', [
        'main.1', 'mai', 'ain.0', 'main.0.weight_orig', 'MAIN', 'main.0.0'])
    def test_nothing_of_that_path(self, command, old):
        write()
        self.refused(
            command, {'main.0': 'a', old: 'b'}, errors.SnapshotRenameError,
            rf"'{old}' cannot be renamed: no entry.*'main\.0', 'main\.2'")

    def test_path_given_twice(self, command):
        write()
        self.refused(command, {'main.0': 'a', 'main/0': 'b'},
                     errors.SnapshotRenameError, r"so is 'main\.0'")

    def test_nothing_left(self, command):
        write()
        self.refused(command, {'main.0.bias': ''},
                     errors.SnapshotRenameError, 'nothing is left')

    def test_two_entries_of_one_name(self, command):
        write()
        self.refused(
            command, {'main.0': 'l', 'main.2': 'l'},
            errors.SnapshotNameError, r"'main\.0\.\w+' and 'main\.2\.\w+'")
