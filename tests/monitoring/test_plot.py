"""The picture, and when it is drawn."""
import sn_function  # isort: skip  # before chainer, which it repairs

import os

import pytest
from chainer import serializers

from sn_function._monitoring import plot

assert sn_function  # it is imported for what it does


def history_of(values):
    """Reports of many layers, one of them late and one without a hook."""
    return [
        {**{f'sigma/layer{i}': value + i for i in range(25)},
         'iteration': 10 * k, 'sigma/late': 3., 'true_sigma/plain': 2.,
         'residual/late': 0.1, 'lipschitz_bound': 1.}
        for k, value in enumerate(values)]


def test_many_layers_and_values_that_are_no_numbers(tmp_path):
    history = history_of((1., float('nan'), 0., 1e8))
    plot.draw(history[:1], str(tmp_path / 'one.png'))
    plot.draw(history, str(tmp_path / 'all.png'))
    assert (tmp_path / 'all.png').stat().st_size > 20000
    assert sorted(os.listdir(tmp_path)) == ['all.png', 'one.png']


@pytest.mark.parametrize(('kinds', 'panels'), [
    (['sigma'], ['sigma']),
    (['sigma', 'residual'], ['sigma', 'residual']),
    (['residual', 'true_sigma', 'norm', 'sigma'], ['sigma', 'norm']),
    (['sigma', 'residual', 'certified_norm'], ['sigma', 'certified_norm'])])
def test_panels_and_names(kinds, panels):
    """The names are in the order of the reports, each once."""
    history = [
        {f'{kind}/{name}': 1. for name in names for kind in kinds}
        for names in (['b', 'block/a'], ['late', 'b'])]
    assert plot._contents(history) == (panels, ['b', 'block/a', 'late'])


@pytest.fixture
def drawn(monkeypatch):
    """The iterations in each picture, instead of the picture."""
    found = []
    monkeypatch.setattr(plot, 'draw', lambda history, path: found.append(
        (path, [entry['iteration'] for entry in history])))
    return found


class TestPicture:

    def test_without_a_file(self, drawn):
        picture = plot.Picture(None)
        picture.add('out', 1, {'sigma/a': 1.})
        picture.draw()
        assert picture.history == drawn == []

    def test_the_time_that_it_takes(self, drawn, monkeypatch):
        """After a second of drawing it rests for nine."""
        clock = iter([100, 100, 101, 109, 110, 110, 110])
        monkeypatch.setattr(plot.time, 'perf_counter', lambda: next(clock))
        picture = plot.Picture('sigma.png')
        path = os.path.join('out', 'sigma.png')
        picture.add('out', 1, {})
        picture.add('out', 2, {})
        assert drawn == [(path, [1])]
        picture.add('out', 3, {})
        assert drawn[1:] == [(path, [1, 2, 3])]
        picture.draw()
        assert len(drawn) == 2

    def test_snapshots(self, drawn):
        picture, other = plot.Picture('sigma.png'), plot.Picture(None)
        picture.add('out', 1, {'sigma/a': float('nan'), 'norm/a': 1.})
        target = {}
        picture.serialize(serializers.DictionarySerializer(target))
        other.serialize(serializers.NpzDeserializer(target))
        assert repr(other.history) == repr(picture.history)
