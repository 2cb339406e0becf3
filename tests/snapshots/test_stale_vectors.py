"""Vectors that are not of their weight, as hooks of this package see them.

In test mode such a hook iterates before its iterations, and stores nothing; a
snapshot has the same weights then only if what reads it does so as well.
"""
import sn_function  # isort: skip  # before chainer, which it repairs
import inspect

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

from sn_function import SpectralNormalization, errors, snapshot
from sn_function.link_hooks import output_axis
from tests import reference


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    assert sn_function
    monkeypatch.chdir(tmp_path)
    np.random.seed(0)


class Model(chainer.Chain):

    def __init__(self, **settings):
        super().__init__()
        hook = SpectralNormalization(**settings)
        with self.init_scope():
            self.linear = L.Linear(64, 48).add_hook(hook)
            self.conv = L.Convolution2D(8, 24, 3).add_hook(hook)
            self.deconv = L.Deconvolution2D(8, 24, 3).add_hook(hook)

    def normalized(self):
        with chainer.using_config('train', False):
            return {link.name: hook.normalize_weight(link).array
                    for link in self.children()
                    for hook in link.local_link_hooks.values()}


def contents(path):
    with np.load(path) as file:
        return dict(file)


def write_stale(path='in.npz', **settings):
    """Writes a snapshot with weights that were replaced."""
    serializers.save_npz(path, Model(**settings))
    arrays = contents(path)
    for key, W in arrays.items():
        if key.endswith('/W'):
            arrays[key] = np.random.normal(size=W.shape).astype(W.dtype)
        if key.endswith('gamma'):
            arrays[key] = np.array(1.7, W.dtype)
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize('k', [1, 3])
@pytest.mark.parametrize('n_warmup', [15, 4, 0])
@pytest.mark.parametrize('others', [
    {}, {'use_gamma': True}, {'factor': 2.5}, {'cap': .7}], ids=str)
def test_bake_is_bit_for_bit_what_the_hook_uses(n_warmup, k, others):
    settings = {'n_power_iteration': k, 'n_warmup': n_warmup}
    arrays = write_stale(**others)
    model = Model(**settings, **others)
    serializers.load_npz('in.npz', model)
    expected = model.normalized()
    others.pop('use_gamma', None)
    outcome = snapshot.bake('in.npz', 'out.npz', **settings, **others)
    baked = contents('out.npz')
    for name, Y in expected.items():
        np.testing.assert_array_equal(baked[f'{name}/W'], Y)
    for change in outcome.weights:
        axis = int('deconv' in change.key)
        W = arrays[change.key].astype('d')
        u = arrays[f'{change.key}_u'].astype('d')
        u = reference.settled(W, u, k, axis, n_warmup=n_warmup)
        assert change.sigma == pytest.approx(
            reference.power_iteration(W, u, k, axis)[2], rel=1e-4)


@pytest.mark.parametrize('dtype', [np.float16, np.float64])
def test_bake_in_other_dtypes(dtype):
    with chainer.using_config('dtype', dtype):
        write_stale()
        model = Model()
    serializers.load_npz('in.npz', model)
    snapshot.bake('in.npz', 'out.npz')
    for name, Y in model.normalized().items():
        baked = contents('out.npz')[f'{name}/W']
        assert baked.dtype == dtype
        np.testing.assert_array_equal(baked, Y)


def test_bake_brings_norms_to_1():
    write_stale()
    for n_warmup, expected in ((15, pytest.approx(1, rel=.04)),
                               (0, pytest.approx(2, rel=.4))):
        snapshot.bake('in.npz', 'out.npz', n_warmup=n_warmup, overwrite=True)
        for key, Y in contents('out.npz').items():
            if key.endswith('/W'):
                assert reference.true_norm(
                    Y, int('deconv' in key)) == expected


@pytest.mark.parametrize('layout', ['sngan-projection', 'torch-wrapper'])
def test_other_libraries_have_exactly_their_iterations(layout):
    W = np.random.normal(size=(48, 64)).astype('f')
    u = np.random.normal(size=48).astype('f')
    key, arrays = {
        'sngan-projection': ('l/W', {'l/W': W, 'l/u': u[None]}),
        'torch-wrapper': ('l.weight', {
            'l.module.weight_bar': W, 'l.module.weight_u': u,
            'l.module.weight_v': np.ones(64, 'f')}),
    }[layout]
    np.savez('in.npz', **arrays)
    sigma = reference.power_iteration(W.astype('d'), u)[2]
    report, = snapshot.inspect('in.npz')
    assert (report.layout, report.status) == (layout, 'lags')
    assert report.estimate == pytest.approx(sigma, rel=1e-5)
    snapshot.bake('in.npz', 'out.npz', n_warmup=15)
    np.testing.assert_allclose(contents('out.npz')[key], W / sigma, rtol=1e-5)


def test_inspect_shows_them():
    arrays = write_stale()
    for report in snapshot.inspect('in.npz'):
        W, axis = arrays[report.key].astype('d'), report.axis
        assert report.estimate == pytest.approx(
            reference.true_norm(W, axis), rel=.04)
        u = arrays[f'{report.key}_u'].astype('d')
        of_u = reference.power_iteration(W, u, axis=axis)[2]
        assert report.status == 'stale'
        assert report.healthy
        assert report.note == (
            f'u is of another weight, and gives {of_u:#.6g} by itself: '
            f'repair --all makes it anew')
    outcome = snapshot.repair('in.npz', 'kept.npz')
    assert [each.action for each in outcome.weights] == ['kept'] * 3
    assert {each.key: each.sigma for each in outcome.weights} == {
        each.key: each.estimate for each in snapshot.inspect('kept.npz')}
    snapshot.repair('in.npz', 'out.npz', all=True)
    for report in snapshot.inspect('out.npz'):
        assert (report.status, report.note) == ('ok', '')
        assert report.estimate == pytest.approx(report.sigma, rel=1e-6)


def test_inspect_where_a_warm_up_is_not_enough():
    # u is all but orthogonal to the first singular vector.
    np.savez('in.npz', W=np.diag([3., 1.5, 1]), W_u=np.array([1e-9, .3, 1]))
    report, = snapshot.inspect('in.npz')
    assert report.status == 'lags'
    assert 'u is of another weight, and gives 1.1' in report.note
    assert report.estimate == pytest.approx(1.5, rel=1e-2)


def test_the_default_is_that_of_the_hook():
    for function in SpectralNormalization, snapshot.bake:
        default = inspect.signature(function).parameters['n_warmup'].default
        assert default == snapshot.N_WARMUP


def test_count_out_of_range():
    write_stale()
    with pytest.raises(errors.IterationCountError, match='n_warmup'):
        snapshot.bake('in.npz', 'out.npz', n_warmup=-1)


@pytest.mark.parametrize('source', ['plain', 'torch'])
def test_norms_of_a_default_hook_that_loads_them(source):
    model = Model()
    if source == 'plain':
        weights = {f'{link.name}/W': 3 * np.random.normal(
            size=link.W.shape).astype('f') for link in model.children()}
        np.savez('in.npz', **weights)
        serializers.load_npz('in.npz', model, strict=False)
    else:
        arrays = {}
        for link in model.children():
            W = 3 * np.random.normal(size=link.W.shape).astype('f')
            u, v, _ = reference.power_iteration(
                W, np.random.normal(size=link.W_u.shape), axis=output_axis(
                    link))  # after one call, far from converged
            arrays.update({
                f'{link.name}.weight_orig': W,
                f'{link.name}.weight_u': u.astype('f'),
                f'{link.name}.weight_v': v.astype('f'),
                f'{link.name}.bias': link.b.array})
        np.savez('torch.npz', **arrays)
        snapshot.convert('torch.npz', 'in.npz', 'chainer')
        serializers.load_npz('in.npz', model)
    for name, Y in model.normalized().items():
        assert reference.true_norm(
            Y, output_axis(model[name])) == pytest.approx(1, rel=.04)
