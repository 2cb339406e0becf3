"""Snapshots of models with several vectors for each weight."""
import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

from sn_function import SpectralNormalization, errors, snapshot
from tests import reference

NAME = 'SpectralNormalization'


class Model(chainer.Chain):

    def __init__(self, n_vectors=3, **settings):
        super().__init__()

        def hooked(link):
            return link.add_hook(SpectralNormalization(
                n_vectors=n_vectors, **settings))

        with self.init_scope():
            self.linear = hooked(L.Linear(5, 7))
            self.deconv = hooked(L.Deconvolution2D(4, 6, 3))
            self.row = hooked(L.Linear(5, 1))
            self.plain = L.Linear(5, 1)

    def normalized(self):
        with chainer.using_config('train', False):
            return {path[1:]: hook.normalize_weight(link).array
                    for path, link in self.namedlinks()
                    for hook in getattr(link, 'local_link_hooks', {}).values()}

    def train(self, n=1):
        for _ in range(n):
            for link in self.linear, self.deconv, self.row:
                link.local_link_hooks[NAME].normalize_weight(link)
        return self


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    assert sn_function
    monkeypatch.chdir(tmp_path)
    np.random.seed(0)


def saved(path='in.npz', **settings):
    model = Model(**{'n_warmup': 0, **settings}).train(2)
    save = (serializers.save_npz if path.endswith('npz')
            else serializers.save_hdf5)
    save(path, model)
    return model


def contents(path):
    with np.load(path) as file:
        return dict(file)


def change(path, **arrays):
    found = contents(path)
    for key, array in arrays.items():
        found[key.replace('__', '/')] = array
    np.savez(path, **found)


def span_norm(W, U):
    return reference.span_norm(W.astype('d'), U.astype('d'))[2].real


def vectors_of(arrays, path='linear'):
    return np.concatenate([
        arrays[f'{path}/W_u'][None], arrays[f'{path}/W_us']])


def test_inspect_uses_all_of_them():
    model = saved()
    reports = {report.key: report for report in snapshot.inspect('in.npz')}
    assert set(reports) == {'deconv/W', 'linear/W', 'plain/W', 'row/W'}
    arrays = contents('in.npz')
    report = reports['linear/W']
    assert report.note == '3 vectors'
    assert report.healthy
    U = vectors_of(arrays)
    alone = reference.power_iteration(model.linear.W.array, U[0])[2]
    expected = span_norm(arrays['linear/W'], U)
    assert expected > alone * (1 + 1e-6)
    of_test_mode = arrays['linear/W'] / model.normalized()['linear']
    # Test mode iterates until the vectors have settled.
    np.testing.assert_allclose(report.sigma, reference.true_norm(
        arrays['linear/W']), rtol=1e-6)
    assert alone < expected <= report.estimate * (1 + 1e-6)
    np.testing.assert_allclose(of_test_mode, expected, rtol=1e-5)
    assert reports['row/W'].note == ''


@pytest.mark.parametrize('path', ['in.npz', 'in.h5'])
@pytest.mark.parametrize('settings', [
    {}, {'n_power_iteration': 2}, {'n_warmup': 15}, {'factor': 0.7},
    {'n_vectors': 20}])
def test_bake_has_the_weights_of_test_mode(path, settings):
    model = saved(path, **settings)
    options = {'n_warmup': 0, **settings}
    options.pop('n_vectors', None)
    out = path.replace('in', 'out')
    snapshot.bake(path, out, **options)
    baked = Model(1)
    for link in baked.linear, baked.deconv, baked.row:
        link.delete_hook(NAME)
    load = (serializers.load_npz if path.endswith('npz')
            else serializers.load_hdf5)
    load(out, baked)
    for path, expected in model.normalized().items():
        np.testing.assert_array_equal(baked[path].W.array, expected)
    if out.endswith('npz'):
        assert not [key for key in contents(out) if 'W_u' in key]


BAD = {
    'NaN': lambda us: us * np.nan, 'Inf': lambda us: us + np.inf,
    'zero': lambda us: us * [[0], [1]],
    'not independent': lambda us: us[[0, 0]],
    'of shape (2, 4) instead of (2, 7)': lambda us: us[:, :4],
    'of shape (7,) instead of (0, 7)': lambda us: us[0],
    'of dtype int64': lambda us: us.astype('i8')}


@pytest.mark.parametrize('what', BAD)
def test_what_is_wrong_with_them(what):
    saved()
    before = contents('in.npz')
    bad = BAD[what](before['linear/W_us'])
    change('in.npz', linear__W_us=bad.astype(
        'i8' if 'dtype' in what else 'f'))
    with np.errstate(all='ignore'):
        report = {each.key: each for each in snapshot.inspect('in.npz')}[
            'linear/W']
    assert report.status == f'{what} in W_us'
    assert not report.healthy
    for function in snapshot.bake, lambda *x: snapshot.convert(
            *x, 'torch', fill=False):
        with pytest.raises(errors.SnapshotVectorError) as caught:
            function('in.npz', 'out.npz')
        assert "'linear/W_us'" in str(caught.value)
        assert what in str(caught.value)
    outcome = snapshot.repair('in.npz', 'out.npz')
    assert {each.key: each.action for each in outcome.weights} == {
        'deconv/W': 'kept', 'linear/W': 'repaired', 'row/W': 'kept'}
    assert f'its vector was {what} in W_us' in [
        each.note for each in outcome.weights]
    after = contents('out.npz')
    n = 1 if 'shape (7,)' in what else 3
    first = np.linalg.svd(before['linear/W'].astype('d'))[0][:, :n].T
    U = vectors_of(after)
    assert U.shape == (n, 7)
    assert U.dtype == np.float32
    np.testing.assert_allclose(
        abs(np.sum(first * U, axis=1)), 1, rtol=1e-5)
    del after['linear/W_us'], before['linear/W_us']
    del after['linear/W_u'], before['linear/W_u']
    for key, array in before.items():
        np.testing.assert_array_equal(array, after[key])
    serializers.load_npz('out.npz', Model())


def test_repair_of_the_leading_one_makes_them_all():
    saved()
    change('in.npz', deconv__W_u=np.full(6, np.nan, 'f'))
    snapshot.repair('in.npz', 'out.npz')
    after = contents('out.npz')
    W = np.moveaxis(after['deconv/W'].astype('d'), 1, 0).reshape(6, -1)
    first = np.linalg.svd(W)[0][:, :3].T
    np.testing.assert_allclose(abs(np.sum(
        first * vectors_of(after, 'deconv'), axis=1)), 1, rtol=1e-5)


@pytest.mark.parametrize('equal', [False, True])
def test_repair_all(equal):
    """Also of equal singular values, which have no vectors of their own."""
    model = saved()
    if equal:
        change('in.npz', linear__W=np.eye(7, 5, dtype='f'))
    snapshot.repair('in.npz', 'out.npz', all=True)
    serializers.load_npz('out.npz', model)
    for path, W in model.normalized().items():
        axis = sn_function.link_hooks.output_axis(model[path])
        np.testing.assert_allclose(
            reference.true_norm(W, axis), 1, rtol=1e-5)
    U = vectors_of(contents('out.npz'))
    np.testing.assert_allclose(U @ U.T, np.eye(3), atol=1e-6)
    assert contents('out.npz')['row/W_us'].shape == (0, 1)


def test_those_of_a_lazy_link_stay_none():
    model = chainer.Sequential(L.Linear(None, 6).add_hook(
        SpectralNormalization(n_vectors=3)))
    serializers.save_npz('in.npz', model)
    assert snapshot.inspect('in.npz')[0].status == 'not initialized'
    snapshot.repair('in.npz', 'out.npz')
    serializers.load_npz('out.npz', model)
    model(np.ones((2, 5), 'f'))


@pytest.mark.parametrize('layout', ['torch', 'torch-parametrized'])
@pytest.mark.parametrize('K', [1, 3])
def test_pytorch_gets_the_vectors_that_they_come_to(layout, K):
    model = saved(n_power_iteration=K)
    outcome = snapshot.convert(
        'in.npz', 'out.npz', layout, fill=False, n_power_iteration=K)
    notes = {each.key.split('.')[0]: each.note for each in outcome.weights}
    assert notes['linear'] == (
        f"'linear/W_us' is dropped, as {layout} has no place for it")
    assert max(each.difference for each in outcome.weights) < 1e-6
    arrays = contents('out.npz')
    assert not [key for key in arrays if key.endswith('us')]
    names = ('weight_orig', 'weight_u', 'weight_v') if layout == 'torch' else (
        'parametrizations.weight.original', 'parametrizations.weight.0._u',
        'parametrizations.weight.0._v')
    W, u, v = (arrays[f'linear.{name}'] for name in names)
    np.testing.assert_allclose(
        W / (u @ W @ v), model.normalized()['linear'], rtol=1e-5)
    # And back: others are drawn where they are missing.
    snapshot.convert('out.npz', 'back.npz', 'chainer', axes={})
    assert 'linear/W_us' not in contents('back.npz')
    other = Model()
    serializers.load_npz('back.npz', other)
    other.train()
    assert other.linear.W_us.shape == (2, 7)


def test_another_layout_of_chainer_keeps_the_leading_one():
    model = chainer.Chain(l=L.Linear(5, 7).add_hook(
        SpectralNormalization(n_vectors=3)))
    model.l(np.ones((2, 5), 'f'))
    serializers.save_npz('in.npz', model)
    change_, = snapshot.convert(
        'in.npz', 'out.npz', 'sngan-projection').weights
    arrays = contents('out.npz')
    assert set(arrays) == {'l/W', 'l/b', 'l/u'}
    np.testing.assert_array_equal(arrays['l/u'][0], model.l.W_u)
    W = model.l.W.array.astype('d')
    U = np.array([model.l.W_u, *model.l.W_us])
    sigma = reference.power_iteration(W, U[0])[2]
    assert change_.sigma == pytest.approx(sigma, rel=1e-5)
    assert change_.difference == pytest.approx(
        1 - sigma / span_norm(W, U), abs=1e-5)
    assert 'dropped' in change_.note


@pytest.mark.parametrize('rename', [{}, {'linear': 'first'}])
def test_chainer_keeps_them(rename):
    saved()
    snapshot.convert(
        'in.npz', 'out.npz', 'chainer', fill=False, rename=rename)
    before, after = map(contents, ('in.npz', 'out.npz'))
    assert len(before) == len(after)
    for key, array in before.items():
        np.testing.assert_array_equal(
            array, after[key.replace('linear', rename.get(
                'linear', 'linear'))])


def test_converge():
    saved()
    snapshot.convert(
        'in.npz', 'out.npz', 'chainer', converge=True, fill=False)
    arrays = contents('out.npz')
    first = np.linalg.svd(arrays['linear/W'].astype('d'))[0][:, :3].T
    np.testing.assert_allclose(abs(np.sum(
        first * vectors_of(arrays), axis=1)), 1, rtol=1e-5)


def test_a_trainer_s_snapshot():
    saved()
    np.savez('trainer.npz', **{
        f'updater/model:dis/{key}': x for key, x in contents('in.npz').items()
    }, **{'updater/optimizer:dis/t': np.array(3)})
    reports = snapshot.inspect('trainer.npz', model='dis')
    assert sorted(report.note for report in reports) == [
        '', '', '3 vectors', '3 vectors']
    snapshot.bake('trainer.npz', 'out.npz', model='dis', n_warmup=0)
    expected = snapshot.bake('in.npz', 'plain.npz', n_warmup=0)
    assert expected.weights
    one, other = contents('out.npz'), contents('plain.npz')
    assert set(one) == set(other)
    np.testing.assert_array_equal(one['linear/W'], other['linear/W'])
