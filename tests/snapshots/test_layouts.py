"""Layouts of PyTorch that are met in the wild, made here by their formulas.

The oracle is the formula of each repository, in float64: what a layer of it
divides its weight by in test mode.
"""
import sn_function  # isort: skip  # before chainer, which it repairs
import os

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

from sn_function import SpectralNormalization, errors, snapshot
from tests import reference

SHAPES = {'l1': (7, 5), 'block.0': (6, 3, 3, 3), 'embed': (8, 4)}
KINDS = ['npz', 'safetensors', 'pt']


def unit(x):
    return x / np.linalg.norm(x)


def rows(W):
    return W.reshape(len(W), -1)


def vectors(W, n=2):
    """The u and v after n iterations: near, and not converged."""
    return reference.power_iteration(
        W.astype('d'), np.random.normal(size=len(W)), n)[:2]


def one_iteration(W, u):
    v = unit(rows(W).T @ u)
    return np.linalg.norm(rows(W) @ v)


# The entries of a layer in each layout, and the sigma of its test mode.

def old(path, W, u, v):
    return {f'{path}.weight_orig': W, f'{path}.bias': bias(W),
            f'{path}.weight': (W / 3).astype('f'), f'{path}.weight_u': u}


def old_without_buffer(path, W, u, v):
    entries = old(path, W, u, v)
    del entries[f'{path}.weight']
    return entries


def old_sigma(W, u, v):
    matrix = rows(W)
    return u @ matrix @ unit(matrix.T @ u)


def stale(path, W, u, v):
    return {**old(path, W, u, v), f'{path}.weight_v': v}


def stale_sigma(W, u, v):
    return u @ rows(W) @ v


def wrapper(path, W, u, v):
    return {f'{path}.module.bias': bias(W), f'{path}.module.weight_u': u,
            f'{path}.module.weight_v': v, f'{path}.module.weight_bar': W}


def biggan(path, W, u, v):
    return {f'{path}.weight': W, f'{path}.bias': bias(W),
            f'{path}.u0': u[None], f'{path}.sv0': np.ones(1, 'f')}


def biggan_of_two(path, W, u, v):
    return {**biggan(path, W, u, v), f'{path}.u1': u[None][:, ::-1].copy(),
            f'{path}.sv1': np.ones(1, 'f')}


def first_iteration(W, u, v):
    return one_iteration(W, u)


def bias(W):
    return np.arange(len(W), dtype='f')


LAYOUTS = {
    'old': ('torch-0.4', old, old_sigma),
    'old without the buffer': ('torch-0.4', old_without_buffer, old_sigma),
    'stale buffer': ('torch', stale, stale_sigma),
    'wrapper': ('torch-wrapper', wrapper, first_iteration),
    'biggan': ('biggan', biggan, first_iteration),
    'biggan of two': ('biggan', biggan_of_two, first_iteration)}


class State:
    """The state dict of a model, and what its weights are in test mode."""

    def __init__(self, name, prefix=''):
        self.layout, entries, sigma = LAYOUTS[name]
        self.arrays, self.W, self.Y, self.sigma = {}, {}, {}, {}
        for path, shape in SHAPES.items():
            W = np.random.normal(size=shape).astype('f')
            u, v = (x.astype('f') for x in vectors(W))
            self.arrays.update(entries(prefix + path, W, u, v))
            self.W[path] = W
            self.sigma[path] = sigma(
                W.astype('d'), u.astype('d'), v.astype('d'))
            self.Y[path] = W / self.sigma[path]
        self.arrays.update({
            f'{prefix}norm.weight': np.full(6, 2, 'f'),
            f'{prefix}norm.bias': np.full(6, 3, 'f'),
            f'{prefix}norm.running_mean': np.full(6, 4, 'f'),
            f'{prefix}norm.running_var': np.full(6, 5, 'f'),
            f'{prefix}norm.num_batches_tracked': np.array(2)})

    def key(self, path, end):
        key, = (key for key in self.arrays
                if f'{path}.' in key and key.endswith(end))
        return key

    def write(self, path):
        if path.endswith('.npz'):
            np.savez(path, **self.arrays)
        elif path.endswith('.safetensors'):
            pytest.importorskip('safetensors.numpy').save_file(
                self.arrays, path)
        else:
            torch = pytest.importorskip('torch')
            torch.save({key: torch.from_numpy(np.array(x))
                        for key, x in self.arrays.items()}, path)
        return path


class Model(chainer.Chain):

    def __init__(self, **settings):
        super().__init__()

        def link(link):
            return link.add_hook(SpectralNormalization(**settings))

        with self.init_scope():
            self.l1 = link(L.Linear(5, 7))
            self.block = chainer.Sequential(link(L.Convolution2D(3, 6, 3)))
            self.embed = link(L.EmbedID(8, 4))
            self.norm = L.BatchNormalization(6)

    def normalized(self):
        with chainer.using_config('train', False):
            return {
                path[1:].replace('/', '.'): hook.normalize_weight(link).array
                for path, link in self.namedlinks()
                for hook in getattr(link, 'local_link_hooks', {}).values()}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    assert sn_function
    monkeypatch.chdir(tmp_path)
    np.random.seed(0)


def loaded(n_warmup=0):
    """The model with the numbers of Chainer's hook, unless it warms up."""
    model = Model(n_warmup=n_warmup)
    serializers.load_npz('out.npz', model)  # strict
    return model


def contents(path='out.npz'):
    with np.load(path) as file:
        return dict(file)


def of_l1(weights):
    """What is said of the weight of ``l1``."""
    found, = (each for each in weights if each.key.startswith('l1.'))
    return found


def assert_close(actual, expected):
    assert set(actual) == set(expected)
    for path, Y in expected.items():
        np.testing.assert_allclose(actual[path], Y, rtol=2e-6, atol=1e-7)


@pytest.fixture(params=LAYOUTS)
def name(request):
    return request.param


@pytest.mark.parametrize('kind', KINDS)
def test_inspect(name, kind):
    state = State(name)
    reports = {each.key: each for each in snapshot.inspect(
        state.write(f'in.{kind}'))}
    assert len(reports) == len(SHAPES)
    for path, W in state.W.items():
        report, = (each for key, each in reports.items()
                   if key.startswith(f'{path}.'))
        assert state.arrays[report.key] is W
        assert (report.layout, report.axis) == (state.layout, 0)
        assert report.sigma == pytest.approx(
            reference.true_norm(W.astype('d')), rel=1e-6)
        assert report.estimate == pytest.approx(state.sigma[path], rel=1e-6)
        assert report.healthy
        has_buffer = name in ('old', 'stale buffer')
        assert report.note == has_buffer * (
            f"'{path}.weight' is of an earlier step, and not used")


@pytest.mark.parametrize('kind', KINDS)
def test_convert_to_chainer(name, kind):
    state = State(name)
    outcome = snapshot.convert(
        state.write(f'in.{kind}'), 'out.npz', 'chainer')
    assert outcome.unknown == outcome.left_out == []
    assert all(bool(each.note) == (name in ('old', 'stale buffer'))
               for each in outcome.weights)
    assert max(each.difference for each in outcome.weights) < 1e-6
    model = loaded()
    assert_close(model.normalized(), state.Y)
    np.testing.assert_array_equal(model.l1.b.array, np.arange(7))
    np.testing.assert_array_equal(model.norm.gamma.array, np.full(6, 2))
    np.testing.assert_array_equal(model.norm.avg_var, np.full(6, 5))
    assert not [key for key in contents() if '.' in key or 'weight' in key
                or 'module' in key or 'sv' in key]


@pytest.mark.parametrize('layout', ['torch', 'torch-parametrized'])
def test_convert_to_other_layouts_of_pytorch(name, layout):
    state = State(name)
    snapshot.convert(state.write('in.npz'), 'out.npz', layout)
    found, expected = contents(), set()
    for path, W in state.W.items():
        keys = [f'{path}.{end}' for end in (
            ('weight_orig', 'weight_u', 'weight_v') if layout == 'torch' else (
                'parametrizations.weight.original',
                'parametrizations.weight.0._u',
                'parametrizations.weight.0._v'))]
        expected |= {*keys, f'{path}.bias'}
        np.testing.assert_array_equal(found[keys[0]], W)
        u, v = (found[key].astype('d') for key in keys[1:])
        assert u @ rows(W) @ v == pytest.approx(
            state.sigma[path], rel=1e-6)
        assert np.linalg.norm(u) == pytest.approx(1, rel=1e-6)
        assert np.linalg.norm(v) == pytest.approx(1, rel=1e-6)
    assert set(found) == expected | {
        key for key in state.arrays if key.startswith('norm.')}


def test_convert_keeps_what_pytorch_has_of_an_old_vector():
    state = State('old')
    snapshot.convert(state.write('in.npz'), 'out.npz', 'torch')
    found = contents()
    for path, W in state.W.items():
        u = state.arrays[f'{path}.weight_u']
        np.testing.assert_array_equal(found[f'{path}.weight_u'], u)
        np.testing.assert_allclose(
            found[f'{path}.weight_v'], unit(rows(W).T @ u),
            rtol=1e-5, atol=1e-6)


def test_iterations_of_test_mode():
    # BigGAN has one, whatever the hook has; the wrapper has those of each
    # call.
    for name, n in ('biggan', 1), ('wrapper', 4):
        state = State(name)
        snapshot.bake(state.write('in.npz'), 'out.npz', n_power_iteration=4,
                      overwrite=True)
        u = state.arrays[state.key('l1', 'u0' if n == 1 else '_u')]
        W = state.W['l1'].astype('d')
        sigma = reference.power_iteration(W, u.reshape(-1), n)[2]
        np.testing.assert_allclose(
            contents()['l1.weight'], W / sigma, rtol=2e-6)


def test_convert_with_converged_vectors(name):
    state = State(name)
    snapshot.convert(
        state.write('in.npz'), 'out.npz', 'chainer', converge=True)
    for Y in loaded().normalized().values():
        assert reference.true_norm(Y) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_bake(name, kind):
    state = State(name)
    snapshot.bake(state.write(f'in.{kind}'), 'out.npz')
    found = contents()
    assert set(found) == {
        f'{path}.{end}' for path in SHAPES for end in ('weight', 'bias')} | {
        key for key in state.arrays if key.startswith('norm.')}
    assert_close({path: found[f'{path}.weight'] for path in SHAPES}, state.Y)


@pytest.mark.parametrize('poison', [0, np.nan])
def test_repair(name, poison):
    state = State(name)
    u = state.key('l1', '.u0' if 'biggan' in name else '_u')
    good = state.arrays[u]
    state.arrays[u] = good * poison
    state.write('in.npz')
    assert not all(each.healthy for each in snapshot.inspect('in.npz'))
    for command in snapshot.bake, lambda src, dst: snapshot.convert(
            src, dst, 'chainer'):
        with pytest.raises(errors.SnapshotVectorError, match=repr(u)):
            command('in.npz', 'out.npz')
    outcome = snapshot.repair('in.npz', 'out.npz')
    assert [each.action for each in outcome.weights] == [
        'kept', 'kept', 'repaired']
    assert of_l1(outcome.weights).action == 'repaired'
    found = contents()
    assert set(found) == set(state.arrays)
    W = state.W['l1'].astype('d')
    assert found[u].shape == good.shape
    assert np.linalg.norm(W.T @ found[u].reshape(-1)) == pytest.approx(
        reference.true_norm(W), rel=1e-6)
    changed = {key for key in found
               if not np.array_equal(found[key], state.arrays[key])}
    assert changed <= {u, u[:-1] + 'v'}
    assert all(each.status in ('ok', 'lags')
               for each in snapshot.inspect('out.npz'))


def test_repair_all_converges(name):
    state = State(name)
    outcome = snapshot.repair(state.write('in.npz'), 'out.npz', all=True)
    for report, change in zip(snapshot.inspect('out.npz'), outcome.weights):
        assert report.estimate == pytest.approx(report.sigma, rel=1e-6)
        assert change.sigma == pytest.approx(report.sigma, rel=1e-6)


class TestWhatWrapsAModel:

    @pytest.mark.parametrize('prefix', [
        'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.',
        'module.module.'])
    def test_has_no_place_in_chainer(self, name, prefix):
        state = State(name, prefix)
        snapshot.convert(state.write('in.npz'), 'out.npz', 'chainer')
        assert_close(loaded().normalized(), state.Y)

    @pytest.mark.parametrize('prefix', ['module.', 'module._orig_mod.'])
    def test_stays_for_pytorch(self, prefix):
        state = State('wrapper', prefix)
        state.write('in.npz')
        snapshot.convert('in.npz', 'out.npz', 'torch')
        assert f'{prefix}l1.weight_orig' in contents()
        assert f'{prefix}l1.bias' in contents()
        snapshot.bake('in.npz', 'out.npz', overwrite=True)
        assert f'{prefix}block.0.weight' in contents()

    def test_is_named_in_errors_as_in_the_file(self):
        state = State('old', 'module.')
        state.arrays['module.l1.weight_u'] *= np.nan
        with pytest.raises(errors.SnapshotVectorError,
                           match=r"entry 'module\.l1\.weight_u'"):
            snapshot.convert(state.write('in.npz'), 'out.npz', 'chainer')

    def test_is_not_needed_to_name_a_part(self):
        state = State('wrapper', 'module.')
        state.write('in.npz')
        for model in 'l1', 'module.l1', 'l1.module':
            snapshot.convert('in.npz', 'out.npz', 'chainer', model=model,
                             overwrite=True)
            assert set(contents()) == {'W', 'W_u', 'b'}
            snapshot.bake('in.npz', 'out.npz', model=model, overwrite=True)
            assert set(contents()) == {'weight', 'bias'}

    def test_compiled_part(self):
        arrays = State('biggan').arrays
        np.savez('in.npz', **{
            key.replace('block.', 'block._orig_mod.'): x
            for key, x in arrays.items()})
        snapshot.convert('in.npz', 'out.npz', 'chainer')
        loaded()

    def test_part_of_that_name_stays(self):
        # Not all entries are below it, so it is a part of the model.
        W = np.eye(3, dtype='f')
        np.savez('in.npz', **{
            **biggan('module', W, W[0], W[0]), 'l2.bias': W[0]})
        snapshot.convert('in.npz', 'out.npz', 'chainer')
        assert set(contents()) == {'module/W', 'module/W_u', 'module/b',
                                   'l2/b'}

    @pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.'])
    def test_one_wrapped_layer_by_itself(self, prefix):
        W = np.random.normal(size=(3, 4)).astype('f')
        u, v = vectors(W)
        entries = wrapper('x', W, u.astype('f'), v.astype('f'))
        np.savez('in.npz', **{
            prefix + key[2:]: x for key, x in entries.items()})
        snapshot.convert('in.npz', 'out.npz', 'chainer')
        link = L.Linear(4, 3).add_hook(SpectralNormalization())
        serializers.load_npz('out.npz', link)
        np.testing.assert_array_equal(link.W.array, W)
        np.testing.assert_array_equal(link.b.array, np.arange(3))


class TestCorrupt:

    def test_vector_of_another_length(self, name):
        state = State(name)
        u = state.key('l1', '.u0' if 'biggan' in name else '_u')
        shape = state.arrays[u].shape
        state.arrays[u] = np.ones((*shape[:-1], 9), 'f')
        report = of_l1(snapshot.inspect(state.write('in.npz')))
        assert report.status == (
            f'of shape {(*shape[:-1], 9)} instead of {shape}')
        snapshot.repair('in.npz', 'out.npz')
        assert contents()[u].shape == shape

    def test_flat_vector_of_biggan(self):
        state = State('biggan')
        state.arrays['l1.u0'] = state.arrays['l1.u0'][0]
        report = of_l1(snapshot.inspect(state.write('in.npz')))
        assert report.status == 'of shape (7,) instead of (1, 7)'
        with pytest.raises(errors.SnapshotVectorError, match=r"'l1\.u0'"):
            snapshot.bake('in.npz', 'out.npz')
        snapshot.repair('in.npz', 'out.npz')
        assert contents()['l1.u0'].shape == (1, 7)

    def test_biggan_without_its_log_of_sigma(self):
        state = State('biggan')
        for path in SHAPES:
            del state.arrays[f'{path}.sv0']
        reports = snapshot.inspect(state.write('in.npz'))
        assert {each.status for each in reports} <= {'ok', 'lags'}
        assert of_l1(reports).note == "'l1.sv0' is missing, and is not needed"
        snapshot.convert('in.npz', 'out.npz', 'chainer')
        assert_close(loaded().normalized(), state.Y)

    @pytest.mark.parametrize(('name', 'end'), [
        ('stale buffer', '_u'), ('wrapper', '_u'), ('wrapper', '_v'),
        ('biggan', '.u0')])
    def test_missing_vector_is_made(self, name, end):
        state = State(name)
        key = state.key('l1', end)
        gone = state.arrays.pop(key)
        assert of_l1(snapshot.inspect(
            state.write('in.npz'))).status == 'missing'
        with pytest.raises(errors.SnapshotVectorError, match='is missing'):
            snapshot.bake('in.npz', 'out.npz')
        outcome = snapshot.repair('in.npz', 'out.npz')
        assert of_l1(outcome.weights).note == 'it had no vector'
        found = contents()
        assert set(found) == {*state.arrays, key}
        W = rows(state.W['l1'].astype('d'))
        assert np.linalg.norm(
            W.T @ found[key].reshape(-1) if end != '_v'
            else W @ found[key]) == pytest.approx(
                reference.true_norm(W), rel=1e-6)
        assert found[key].shape == gone.shape
        assert of_l1(snapshot.inspect('out.npz')).status == 'ok'

    def test_weight_that_u_is_orthogonal_to(self):
        W = np.diag([2., 1, 0])[:, :2].astype('f')
        np.savez('in.npz', **old_without_buffer(
            'l', W, np.eye(3, dtype='f')[2], None))
        report, = snapshot.inspect('in.npz')
        assert (report.estimate, report.status) == (0, 'lags')
        snapshot.repair('in.npz', 'out.npz', all=True)
        assert snapshot.inspect('out.npz')[0].estimate == pytest.approx(2)

    @pytest.mark.parametrize('poison', [np.nan, np.inf])
    def test_weight_that_is_lost(self, name, poison):
        state = State(name)
        W = next(key for key, x in state.arrays.items()
                 if x is state.W['l1'])
        state.arrays[W] = np.full_like(state.W['l1'], poison)
        report = of_l1(snapshot.inspect(state.write('in.npz')))
        assert report.status == 'the weight holds NaN or Inf'
        for command in snapshot.bake, snapshot.repair:
            with pytest.raises(errors.SnapshotWeightError,
                               match=f'{W!r}: it holds NaN'):
                command('in.npz', 'out.npz')

    def test_weight_that_is_none(self, name):
        state = State(name)
        W = next(key for key, x in state.arrays.items()
                 if x is state.W['l1'])
        state.arrays[W] = np.arange(12).reshape(3, 4)
        with pytest.raises(errors.SnapshotLayoutError,
                           match=f"layout is unknown: .*{W}' has shape") as e:
            snapshot.inspect(state.write('in.npz'))
        assert 'earlier snapshot' not in str(e.value)


@pytest.mark.parametrize('arrays', [
    {'l.weight_bar': np.eye(3)},
    {'l.weight_g': np.ones((3, 1)), 'l.weight_v': np.eye(3)},
    {'l.weight_orig': np.eye(3), 'l.weight_mask': np.eye(3)},
    {'l.u0': np.ones((1, 3))},
], ids=lambda arrays: ','.join(arrays))
def test_layouts_that_are_not_known(arrays):
    np.savez('in.npz', **arrays)
    for command in snapshot.bake, snapshot.repair, (
            lambda src, dst: snapshot.convert(src, dst, 'chainer')), (
            lambda src, dst: snapshot.inspect(src)):
        with pytest.raises(errors.SnapshotLayoutError,
                           match='layout is unknown') as e:
            command('in.npz', 'out.npz')
        for key in arrays:
            assert repr(key) in str(e.value)
        assert 'earlier snapshot' not in str(e.value)


@pytest.mark.parametrize('arrays', [
    {'l.weight': np.eye(3)},
    {'l.weight': np.eye(3), 'l.weight_u': np.ones(3)},
    {'l.weight': np.eye(3), 'l.u0': np.ones(3)},
], ids=lambda arrays: ','.join(arrays))
def test_vectors_that_are_not_known(arrays):
    np.savez('in.npz', **arrays)
    report, = snapshot.inspect('in.npz')
    assert (report.key, report.status) == ('l.weight', 'no vector')
    for command in snapshot.bake, snapshot.repair, (
            lambda src, dst: snapshot.convert(src, dst, 'chainer')):
        with pytest.raises(errors.SnapshotNoVectorError,
                           match=r"weights: 'l\.weight'. Make the"):
            command('in.npz', 'out.npz')
    assert os.listdir('.') == ['in.npz']


def test_no_layout_is_written_that_is_only_read():
    State('old').write('in.npz')
    for layout in 'torch-0.4', 'torch-wrapper', 'biggan':
        with pytest.raises(errors.LayoutNameError, match='torch-parametrized'):
            snapshot.convert('in.npz', 'out.npz', layout)


def test_deconvolution_that_the_wrapper_has_along_its_inputs():
    # Its u has as many numbers as there are inputs: no hook has such a one.
    W = np.random.normal(size=(4, 6, 3, 3)).astype('f')
    u, v = vectors(W)
    entries = wrapper('l', W, u.astype('f'), v.astype('f'))
    np.savez('in.npz', **{**entries, 'l.module.bias': np.ones(6, 'f')})
    snapshot.bake('in.npz', 'out.npz')
    np.testing.assert_allclose(
        contents()['l.weight'], W / one_iteration(W.astype('d'), u),
        rtol=2e-6)
    axes = {'*': 1}
    snapshot.repair('in.npz', 'repaired.npz', axes=axes)
    snapshot.convert(
        'repaired.npz', 'out.npz', 'chainer', axes=axes, overwrite=True)
    chain = chainer.Chain(l=L.Deconvolution2D(4, 6, 3).add_hook(
        SpectralNormalization()))
    serializers.load_npz('out.npz', chain)
    with chainer.using_config('train', False):
        hook = chain.l.local_link_hooks['SpectralNormalization']
        Y = hook.normalize_weight(chain.l).array
    assert reference.true_norm(Y, 1) == pytest.approx(1, abs=1e-6)
