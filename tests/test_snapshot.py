"""Snapshots: what is read, baked, converted and repaired, and what is not.

The oracles are models that load the files: with this package's hook, with
Chainer's, and PyTorch's own modules (those of
`tests/snapshots/data/write_torch.py`, whose output is stored, so that PyTorch
is not needed).
"""
import io
import json
import os
import pathlib
import pickle
import stat
import subprocess
import sys
import zipfile

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, serializers

import sn_function
from sn_function import SpectralNormalization, errors, snapshot
from tests import reference

DATA = pathlib.Path(__file__).parent / 'snapshots' / 'data'
TORCH = ['torch', 'torch-parametrized']


class Model(chainer.Chain):
    """Each kind of link, with a hook, with a BatchNormalization between."""

    def __init__(self, make_hook=None, **settings):
        super().__init__()
        make_hook = make_hook or SpectralNormalization

        def hooked(link, **kwargs):
            return link.add_hook(make_hook(**kwargs, **settings))

        with self.init_scope():
            self.linear = hooked(L.Linear(5, 7))
            self.block = chainer.Sequential(
                hooked(L.Convolution2D(3, 6, 3, nobias=True)),
                L.BatchNormalization(6))
            self.deconv = hooked(L.Deconvolution2D(4, 6, 3))
            self.square = hooked(L.Deconvolution2D(5, 5, 3))
            self.embed = hooked(L.EmbedID(8, 4))
            self.plain = L.Linear(3, 2)

    def forward(self):
        def x(*shape):
            return np.random.normal(size=shape).astype('f')
        self.block(x(2, 3, 5, 5))
        self.embed(np.array([0, 3], 'i'))
        self.plain(x(2, 3))
        return (self.linear(x(2, 5)), self.deconv(x(1, 4, 3, 3)),
                self.square(x(1, 5, 3, 3)))

    def normalized(self):
        """The weights of the links in test mode."""
        with chainer.using_config('train', False):
            return {path[1:]: hook.normalize_weight(link).array
                    for path, link in self.namedlinks()
                    for hook in getattr(link, 'local_link_hooks', {}).values()}


NAMES = ['block/0', 'deconv', 'embed', 'linear', 'square']


def without_hooks(model):
    for link in model.links():
        for name in list(link.local_link_hooks):
            link.delete_hook(name)
    return model


def run(model, n=3):
    for _ in range(n):
        model()
    return model


def contents(path):
    with np.load(path) as file:
        return dict(file)


def write(path, arrays):
    np.savez_compressed(path, **arrays)
    return path


@pytest.fixture
def files(tmp_path):
    return lambda name: str(tmp_path / name)


def saved(files, model, name='in.npz'):
    path = files(name)
    save = (serializers.save_hdf5 if name.endswith('.h5')
            else serializers.save_npz)
    save(path, model)
    return path


def gammas(**kwargs):
    """Models with gamma, where it is not the norm of the weight."""
    model = run(Model(use_gamma=True, **kwargs))
    for name, param in model.namedparams():
        if name.endswith('gamma') and '/block/1' not in name:
            param.array[...] = np.random.uniform(.5, 2)
    return model


class TestInspect:

    @pytest.mark.parametrize('name', ['in.npz', 'in.h5'])
    @pytest.mark.parametrize('make_hook', [
        SpectralNormalization, link_hooks.SpectralNormalization])
    def test_true_sigma_and_condition(self, files, make_hook, name):
        model = run(Model(make_hook))
        path = saved(files, model, name)
        reports = {each.key: each for each in snapshot.inspect(path)}
        assert set(reports) == {f'{name}/W' for name in [*NAMES, 'plain']}
        assert reports.pop('plain/W').status == 'no vector'
        for name, link in model.namedlinks():
            if not getattr(link, 'local_link_hooks', None):
                continue
            report = reports[f'{name[1:]}/W']
            axis = sn_function.link_hooks.output_axis(link)
            W = reference.as_matrix(link.W.array.astype('d'), axis)
            values = np.linalg.svd(W, compute_uv=False)
            assert report.axis == axis or name == '/square'
            if report.axis == axis:
                assert report.sigma == pytest.approx(values[0], rel=1e-6)
                assert report.condition == pytest.approx(
                    values[0] / values[-1], rel=1e-4)
                assert report.estimate == pytest.approx(
                    reference.power_iteration(
                        W, reference.settled(W, link.W_u))[2], rel=1e-5)
            assert report.shape == link.W.shape
            assert report.layout == 'chainer'
            assert report.healthy

    def test_rank_deficient_weight(self, files):
        W = np.outer(np.arange(1., 4), np.ones(4)).astype('f')
        path = write(files('a.npz'), {'W': W, 'W_u': W[:, 0]})
        report, = snapshot.inspect(path)
        assert report.condition == np.inf
        assert report.status == 'ok'
        path = write(files('a.npz'), {
            'W': 0 * W, 'W_u': np.ones(3, 'f')})
        report, = snapshot.inspect(path)
        assert (report.sigma, report.estimate) == (0, 0)
        assert report.status == 'ok'

    @pytest.mark.parametrize(('u', 'status'), [
        (np.zeros(3, 'f'), 'zero'),
        (np.array([1, np.nan, 0], 'f'), 'NaN'),
        (np.array([1, np.inf, 0], 'f'), 'Inf'),
        (np.ones(4, 'f'), 'of shape (4,) instead of (3,)'),
        (np.ones((1, 3), 'f'), 'of shape (1, 3) instead of (3,)'),
        (np.ones(3, 'c8'), 'of dtype complex64'),
        (np.array(None), 'not initialized'),
        (np.array([0, 0, 1], 'f'), 'lags'),
        (np.array([1, 0, 0], 'f'), 'ok'),
    ], ids=str)
    def test_status(self, files, u, status):
        W = np.diag([3., 2., 1.]).astype('f')[:, [0, 1, 2, 2]]
        path = write(files('a.npz'), {'l/W': W, 'l/W_u': u})
        report, = snapshot.inspect(path)
        assert report.status == status
        assert report.healthy == (status in ('ok', 'lags'))

    def test_large_weight(self, files, monkeypatch):
        W = np.random.normal(size=(300, 400)).astype('f')
        path = write(files('a.npz'), {'W': W, 'W_u': np.ones(300, 'f')})
        monkeypatch.setattr('sn_function._arithmetic.singular.LARGE', 299)
        report, = snapshot.inspect(path)
        assert report.condition is None
        assert report.sigma == pytest.approx(
            reference.true_norm(W), rel=1e-6)

    def test_trainer_and_model(self, files):
        path = save_trainer(files, dis=run(Model()), gen=run(Model()))
        reports = snapshot.inspect(path)
        assert len(reports) == 12
        assert reports[0].key.startswith('updater/model:')
        for model in 'dis', 'updater/model:dis', 'updater/model:dis/':
            assert {each.key for each in snapshot.inspect(
                path, model=model)} == {
                f'updater/model:dis/{name}/W' for name in [*NAMES, 'plain']}
        with pytest.raises(errors.SnapshotModelError, match='dis, gen'):
            snapshot.inspect(path, model='main')

    def test_lazy_link_that_never_ran(self, files):
        path = saved(files, L.Linear(None, 3).add_hook(
            SpectralNormalization()))
        report, = snapshot.inspect(path)
        assert (report.status, report.shape) == ('not initialized', None)
        with pytest.raises(errors.SnapshotPickleError, match="entry 'W'"):
            snapshot.bake(path, files('out.npz'))
        snapshot.repair(path, files('out.npz'))
        serializers.load_npz(files('out.npz'), L.Linear(None, 3).add_hook(
            SpectralNormalization()))

    def test_weight_of_another_name(self, files):
        path = write(files('a.npz'), {
            'l/H': np.eye(3, dtype='f'), 'l/H_u': np.ones(3, 'f'),
            'l/b': np.ones(3, 'f'), 'l/b_u': np.ones(3, 'f'),
            'l/other_u': np.ones(3, 'f')})
        assert [each.key for each in snapshot.inspect(path)] == ['l/H']


def save_trainer(files, name='snapshot_iter_1', **models):
    optimizers = {key: chainer.optimizers.Adam().setup(model)
                  for key, model in models.items()}
    for optimizer in optimizers.values():
        optimizer.target.cleargrads()
        for param in optimizer.target.params():
            param.grad = np.ones_like(param.array)
        optimizer.update()
        run(optimizer.target)
    iterator = chainer.iterators.SerialIterator(list(range(4)), 2)
    updater = chainer.training.updaters.StandardUpdater(iterator, optimizers)
    trainer = chainer.training.Trainer(updater, (1, 'iteration'))
    trainer.extend(chainer.training.extensions.LogReport())
    trainer._start_at = 0.  # as if it ran
    serializers.save_npz(files(name), trainer)
    return files(name)


class TestBake:

    @pytest.mark.parametrize('settings', [
        {}, {'n_power_iteration': 3}, {'factor': 2.5}, {'eps': 1.5},
        {'cap': .7}], ids=str)
    def test_bit_for_bit_what_the_hook_uses(self, files, settings):
        model = run(Model(**settings))
        path = saved(files, model)
        snapshot.bake(path, files('out.npz'), axes={'square/W': 1},
                      **settings)
        expected = model.normalized()
        plain = without_hooks(Model())
        serializers.load_npz(files('out.npz'), plain)
        baked = contents(files('out.npz'))
        assert set(baked) == {
            name[1:] for name in contents(path) for name in ['/' + name]
            if not name.endswith('_u')}
        for name, Y in expected.items():
            np.testing.assert_array_equal(baked[f'{name}/W'], Y)
        for name, array in contents(path).items():
            if name in baked and name[:-2] not in expected:
                np.testing.assert_array_equal(baked[name], array)

    def test_gamma(self, files):
        model = gammas()
        path = saved(files, model)
        snapshot.bake(path, files('out.npz'), axes={'square/W': 1})
        baked = contents(files('out.npz'))
        assert [key for key in baked if key.endswith('gamma')] == [
            'block/1/gamma']
        for name, Y in model.normalized().items():
            np.testing.assert_array_equal(baked[f'{name}/W'], Y)
        with pytest.raises(errors.SnapshotGammaError, match='capped'):
            snapshot.bake(path, files('b.npz'), axes={'square/W': 1}, cap=1)

    def test_of_chainers_hook(self, files):
        model = run(Model(link_hooks.SpectralNormalization), 20)
        path = saved(files, model)
        model.linear.forward = lambda x: model.linear.W.array  # what it uses
        with chainer.using_config('train', False):
            Y = model.linear(np.ones((1, 5), 'f'))
        snapshot.bake(path, files('out.npz'), axes={'square/W': 1},
                      n_warmup=0)
        np.testing.assert_allclose(
            contents(files('out.npz'))['linear/W'], Y, rtol=1e-5)

    @pytest.mark.parametrize('dtype', [np.float16, np.float64])
    def test_dtype(self, files, dtype):
        with chainer.using_config('dtype', dtype):
            link = L.Linear(6, 5).add_hook(SpectralNormalization())
        path = saved(files, link)
        snapshot.bake(path, files('out.npz'))
        with chainer.using_config('train', False):
            Y = link.local_link_hooks[
                'SpectralNormalization'].normalize_weight(link)
        baked = contents(files('out.npz'))['W']
        assert baked.dtype == dtype
        np.testing.assert_array_equal(baked, Y.array)

    def test_hdf5(self, files):
        model = run(Model())
        path = saved(files, model, 'in.h5')
        snapshot.bake(path, files('out.h5'), axes={'square/W': 1})
        plain = without_hooks(Model())
        serializers.load_hdf5(files('out.h5'), plain)
        for name, Y in model.normalized().items():
            link = dict(plain.namedlinks())[f'/{name}']
            np.testing.assert_array_equal(link.W.array, Y)

    def test_trainer(self, files):
        dis, gen = gammas(), run(without_hooks(Model()))
        path = save_trainer(files, dis=dis, gen=gen)
        axes = {'*/square/W': 1}
        outcome = snapshot.bake(path, files('all'), axes=axes)
        before, after = contents_of(path), contents_of(files('all'))
        gone = {f'updater/model:dis/{name}/{end}'
                for name in NAMES for end in ('W_u', 'gamma')} | {
                f'updater/optimizer:dis/{name}/gamma/{end}'
                for name in NAMES for end in 'mtv'}
        assert before == after | gone
        assert {each.key.split('dis/')[1]: each.action
                for each in outcome.weights} == {
            **{f'{name}/W': 'baked' for name in NAMES}, 'plain/W': 'kept'}
        snapshot.bake(path, files('dis.npz'), model='dis', axes=axes)
        plain = without_hooks(Model())
        serializers.load_npz(files('dis.npz'), plain)
        for name, Y in dis.normalized().items():
            np.testing.assert_array_equal(
                dict(plain.namedlinks())[f'/{name}'].W.array, Y)
        serializers.load_npz(
            files('all'), plain, path='updater/model:dis/')

    @pytest.mark.parametrize('name', TORCH)
    def test_of_pytorch(self, files, name):
        snapshot.bake(DATA / f'{name}.npz', files('out.npz'))
        baked = contents(files('out.npz'))
        for path, Y in contents(DATA / f'{name}-normalized.npz').items():
            np.testing.assert_allclose(
                baked[f'{path}.weight'], Y, rtol=2e-6, atol=1e-7)
        assert not any('_u' in key or 'orig' in key for key in baked)

    @pytest.mark.parametrize('setting', [
        {'n_power_iteration': 0}, {'n_warmup': -1}, {'factor': -1.},
        {'eps': -1.}, {'cap': 0.}, {'cap': 1., 'factor': 2.}], ids=str)
    def test_settings_out_of_range(self, files, setting):
        path = saved(files, run(Model()))
        with pytest.raises(errors.SpectralNormalizationError):
            snapshot.bake(path, files('out.npz'), **setting)
        assert not os.path.exists(files('out.npz'))


def contents_of(path):
    with zipfile.ZipFile(path) as file:
        return {name[:-len('.npy')] for name in file.namelist()}


class TestAxis:

    def test_square_deconvolution(self, files):
        link = L.Deconvolution2D(5, 5, 3).add_hook(
            SpectralNormalization(n_warmup=200))
        path = saved(files, link)
        report, = snapshot.inspect(path)
        assert 'axis 0 or 1; u fits 1' in report.note
        for command in snapshot.bake, snapshot.repair, lambda *args: (
                snapshot.convert(*args, 'torch')):
            kwargs = {'all': True} if command is snapshot.repair else {}
            with pytest.raises(errors.SnapshotAxisError, match='--axis W=1'):
                command(path, files('out.npz'), **kwargs)
            assert not os.path.exists(files('out.npz'))
        for axis in 0, 1:
            snapshot.bake(path, files(f'{axis}.npz'), axes={'*': axis})
            assert reference.true_norm(
                contents(files(f'{axis}.npz'))['W'], axis) == (
                pytest.approx(1, abs=1e-3) if axis else pytest.approx(1, .8))

    def test_square_convolution_needs_none(self, files):
        link = L.Convolution2D(5, 5, 3).add_hook(SpectralNormalization())
        snapshot.bake(saved(files, link), files('out.npz'))

    def test_out_of_range(self, files):
        path = saved(files, run(Model()))
        with pytest.raises(errors.AxisError):
            snapshot.inspect(path, axes={'linear/W': 2})

    def test_repair_tells_what_it_took(self, files):
        arrays = {'W': np.random.normal(size=(4, 4, 3, 3)).astype('f'),
                  'W_u': np.zeros(4, 'f')}
        path = write(files('a.npz'), arrays)
        change, = snapshot.repair(path, files('out.npz')).weights
        assert 'taken as a convolution' in change.note
        change, = snapshot.repair(
            path, files('1.npz'), axes={'W': 1}).weights
        assert change.note == 'its vector was zero'
        for axis, name in enumerate(['out.npz', '1.npz']):
            u = contents(files(name))['W_u']
            assert reference.power_iteration(
                arrays['W'].astype('d'), u, axis=axis)[2] == pytest.approx(
                reference.true_norm(arrays['W'], axis), rel=1e-6)


class TestConvert:

    def loaded(self, path, **kwargs):
        model = Model(**kwargs)
        serializers.load_npz(path, model)
        return model

    @pytest.mark.parametrize('end', ['npz', 'safetensors'])
    @pytest.mark.parametrize('name', TORCH)
    def test_from_pytorch(self, files, name, end):
        outcome = snapshot.convert(
            DATA / f'{name}.{end}', files('out.npz'), 'chainer')
        assert outcome.unknown == []
        assert max(each.difference for each in outcome.weights) < 1e-6
        model = self.loaded(files('out.npz'), n_warmup=0)
        weights = model.normalized()
        theirs = contents(DATA / f'{name}-normalized.npz')
        assert len(theirs) == 5
        for path, Y in theirs.items():
            np.testing.assert_allclose(
                weights[path.replace('.', '/')], Y, rtol=2e-6, atol=1e-7)
        state = contents(DATA / f'{name}.npz')
        np.testing.assert_array_equal(
            model.block[1].avg_var, state['block.1.running_var'])
        np.testing.assert_array_equal(
            model.block[1].gamma.array, state['block.1.weight'])
        np.testing.assert_array_equal(
            model.plain.b.array, state['plain.bias'])
        assert model.block[1].N == 2

    @pytest.mark.parametrize('name', TORCH)
    def test_from_pytorch_converged(self, files, name):
        snapshot.convert(DATA / f'{name}.npz', files('out.npz'), 'chainer',
                         converge=True)
        for path, Y in self.loaded(files('out.npz')).normalized().items():
            axis = int(path in ('deconv', 'square'))
            assert reference.true_norm(Y, axis) == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize('n_power_iteration', [1, 3])
    @pytest.mark.parametrize('layout', TORCH)
    def test_to_pytorch_and_back(self, files, layout, n_power_iteration):
        model = run(Model(
            n_power_iteration=n_power_iteration, n_warmup=0), 1)
        path = saved(files, model)
        snapshot.convert(
            path, files('torch.npz'), layout, axes={'square/W': 1},
            fill=False, n_power_iteration=n_power_iteration)
        state = contents(files('torch.npz'))
        assert set(state) == set(contents(DATA / f'{layout}.npz'))
        for name, Y in model.normalized().items():
            W, u, v = (state[key] for key in torch_keys(layout, name))
            axis = int(name in ('deconv', 'square'))
            sigma = u @ reference.as_matrix(W, axis) @ v
            np.testing.assert_allclose(W / sigma, Y, rtol=2e-6, atol=1e-7)
        snapshot.convert(files('torch.npz'), files('back.npz'), 'chainer')
        back = self.loaded(files('back.npz'), n_warmup=0).normalized()
        for name, Y in model.normalized().items():
            np.testing.assert_allclose(back[name], Y, rtol=2e-6, atol=1e-7)
        assert set(contents(files('back.npz'))) == set(contents(path))

    @pytest.mark.parametrize(('source', 'target'), [TORCH, TORCH[::-1]])
    def test_between_those_of_pytorch(self, files, source, target):
        snapshot.convert(DATA / f'{source}.npz', files('out.npz'), target)
        converted = contents(files('out.npz'))
        expected = contents(DATA / f'{source}.npz')
        for path in 'linear', 'block.0', 'deconv', 'square', 'embed':
            for old, new in zip(torch_keys(source, path),
                                torch_keys(target, path)):
                np.testing.assert_array_equal(converted[new], expected[old])
        assert set(converted) == set(contents(DATA / f'{target}.npz'))

    def test_sngan_projection(self, files):
        # W_bar of source/links/sn_linear.py, in float64.
        W = np.random.normal(size=(4, 5)).astype('f')
        u, gamma = np.random.normal(size=(1, 4)).astype('f'), .7
        path = write(files('in.npz'), {
            'l/W': W, 'l/u': u, 'l/gamma': np.full((1, 1), gamma, 'f'),
            'l/b': np.ones(4, 'f')})
        report, = snapshot.inspect(path)
        assert report.layout == 'sngan-projection'
        assert report.healthy
        snapshot.convert(path, files('out.npz'), 'chainer')
        chain = chainer.Chain(l=L.Linear(5, 4).add_hook(
            SpectralNormalization(use_gamma=True, n_warmup=0)))
        serializers.load_npz(files('out.npz'), chain)
        _, _, sigma = reference.power_iteration(W.astype('d'), u[0])
        with chainer.using_config('train', False):
            Y = chain.l.local_link_hooks[
                'SpectralNormalization'].normalize_weight(chain.l)
        np.testing.assert_allclose(Y.array, gamma * W / sigma, rtol=1e-5)
        snapshot.convert(files('out.npz'), files('back.npz'),
                         'sngan-projection')
        back, expected = contents(files('back.npz')), contents(path)
        assert set(back) == set(expected)
        for key, array in expected.items():
            np.testing.assert_array_equal(back[key], array)
        snapshot.bake(path, files('baked.npz'))
        np.testing.assert_allclose(
            contents(files('baked.npz'))['l/W'], gamma * W / sigma, rtol=1e-5)

    def test_sngan_projection_has_no_deconvolution(self, files):
        path = saved(files, run(Model()))
        with pytest.raises(errors.SnapshotTargetError, match='no deconv'):
            snapshot.convert(path, files('out.npz'), 'sngan-projection',
                             axes={'square/W': 1}, fill=False)
        assert os.listdir(os.path.dirname(path)) == ['in.npz']

    def test_gamma_in_a_trainer(self, files):
        chain = chainer.Chain(l=L.Linear(5, 4).add_hook(
            SpectralNormalization(use_gamma=True)))
        chain.forward = lambda: chain.l(np.ones((1, 5), 'f'))
        path = save_trainer(files, main=chain)
        snapshot.convert(path, files('sngan'), 'sngan-projection')
        arrays = np.load(files('sngan'))
        state = 'updater/optimizer:main/l/gamma/'
        assert arrays['updater/model:main/l/gamma'].shape == (1, 1)
        assert arrays[state + 'm'].shape == (1, 1)
        assert arrays[state + 't'].shape == ()
        arrays.close()
        snapshot.convert(files('sngan'), files('back'), 'chainer')
        assert contents_of(files('back')) == contents_of(path)
        serializers.load_npz(
            files('back'), chain.l, path='updater/model:main/l/')
        with np.load(files('back')) as arrays:
            assert arrays[state + 'm'].shape == ()

    def test_trainer_to_pytorch_takes_its_model(self, files):
        path = save_trainer(files, dis=run(Model()),
                            gen=run(without_hooks(Model())))
        axes = {'*/square/W': 1}
        snapshot.convert(
            path, files('dis.npz'), 'torch', axes=axes, fill=False)
        assert set(contents(files('dis.npz'))) == set(
            contents(DATA / 'torch.npz'))
        path = save_trainer(files, dis=run(Model()), gen=run(Model()))
        with pytest.raises(errors.SnapshotModelError, match='several'):
            snapshot.convert(path, files('a.npz'), 'torch', axes=axes)
        snapshot.convert(path, files('a.npz'), 'torch', axes=axes,
                         model='gen', fill=False)

    def test_gamma_cannot_go_to_pytorch(self, files):
        path = saved(files, gammas())
        with pytest.raises(errors.SnapshotGammaError, match='has no gamma'):
            snapshot.convert(path, files('out.npz'), 'torch',
                             axes={'square/W': 1}, fill=False)

    def test_kinds_of_files(self, files):
        model = run(Model())
        path = saved(files, model)
        for name in 'a.h5', 'b.safetensors':
            outcome = snapshot.convert(
                path, files(name), 'chainer', fill=False)
            assert {each.action for each in outcome.weights} == {'kept'}
            snapshot.convert(
                files(name), files(f'{name}.npz'), 'chainer', fill=False)
            expected, back = contents(path), contents(files(f'{name}.npz'))
            assert set(back) == set(expected)
            for key in expected:
                np.testing.assert_array_equal(back[key], expected[key])
        serializers.load_hdf5(files('a.h5'), Model())

    def test_what_a_kind_cannot_hold_is_told(self, files):
        path = save_trainer(files, main=run(Model()))
        outcome = snapshot.convert(
            path, files('out.h5'), 'chainer', fill=False)
        assert outcome.left_out == [
            'extensions/LogReport/_summary/_names',
            'extensions/LogReport/_log']
        assert len(snapshot.inspect(files('out.h5'))) == 6

    def test_none_in_hdf5(self, files):
        chain = chainer.Chain(
            a=L.Linear(3, 2).add_hook(SpectralNormalization()),
            lazy=L.Linear(None, 2))
        path = saved(files, chain, 'in.h5')
        for name in 'out.h5', 'out.npz':
            snapshot.convert(path, files(name), 'chainer')
        serializers.load_hdf5(files('out.h5'), chain)
        serializers.load_npz(files('out.npz'), chain)
        outcome = snapshot.convert(files('out.npz'), files('b.h5'), 'chainer')
        assert outcome.left_out == ['lazy/W']

    def test_unknown_entries_and_layouts_are_told(self, files):
        arrays = {'a.weight_orig': np.eye(3, dtype='f'),
                  'a.weight_u': np.ones(3, 'f'),
                  'a.weight_v': np.ones(3, 'f'), 'b.alpha': np.ones(2, 'f'),
                  'norm.weight': np.ones(3, 'f'),
                  'norm.bias': np.ones(3, 'f')}
        path = write(files('a.npz'), arrays)
        outcome = snapshot.convert(path, files('out.npz'), 'chainer')
        assert outcome.unknown == ['b.alpha']
        assert set(contents(files('out.npz'))) == {
            'a/W', 'a/W_u', 'b/alpha', 'norm/gamma', 'norm/beta'}
        with pytest.raises(errors.LayoutNameError, match='sngan-projection'):
            snapshot.convert(path, files('b.npz'), 'keras')
        path = write(files('a.npz'), {
            **arrays, 'l/W': np.eye(3), 'l/W_u': np.ones(3)})
        with pytest.raises(errors.SnapshotLayoutError, match='both'):
            snapshot.convert(path, files('b.npz'), 'chainer')


class TestPyTorch:
    """With PyTorch itself, where it is installed."""

    @pytest.fixture(params=TORCH)
    def layout(self, request):
        return request.param

    @pytest.fixture
    def modules(self, layout):
        pytest.importorskip('torch')
        from tests.snapshots.data import write_torch
        return write_torch.make(write_torch.SPECTRAL_NORMS[layout])

    def normalized(self, modules):
        from tests.snapshots.data import write_torch
        return write_torch.normalized(modules)

    def load(self, modules, path):
        import torch
        state = torch.load(path, weights_only=True)
        assert modules.load_state_dict(state, strict=True)

    def test_to_chainer(self, files, modules):
        import torch
        torch.save(modules.state_dict(), files('a.pt'))
        assert all(each.healthy for each in snapshot.inspect(files('a.pt')))
        snapshot.convert(files('a.pt'), files('b.npz'), 'chainer')
        model = Model(n_warmup=0)
        serializers.load_npz(files('b.npz'), model)
        ours = model.normalized()
        for name, Y in self.normalized(modules).items():
            np.testing.assert_allclose(
                ours[name.replace('.', '/')], Y, rtol=2e-6, atol=1e-7)

    def test_to_chainer_after_a_step(self, files, modules):
        # The vectors are those of the weight before: no x may fit.
        import torch
        with torch.no_grad():
            for param in modules.parameters():
                param += .03 * torch.randn(param.shape) * param.std()
        torch.save(modules.state_dict(), files('a.pt'))
        outcome = snapshot.convert(files('a.pt'), files('b.npz'), 'chainer')
        model = Model(n_warmup=0)
        serializers.load_npz(files('b.npz'), model)
        ours = model.normalized()
        differences = []
        for name, Y in self.normalized(modules).items():
            x = ours[name.replace('.', '/')]
            differences.append(np.abs(x - Y).max() / np.abs(Y).max())
        assert max(differences) < 5e-3
        assert max(each.difference for each in outcome.weights) == (
            pytest.approx(max(differences), rel=2e-2, abs=1e-6))

    def test_from_chainer(self, files, modules, layout):
        model = run(Model(n_warmup=0))
        snapshot.convert(saved(files, model), files('b.pt'), layout,
                         axes={'square/W': 1}, fill=False)
        self.load(modules, files('b.pt'))
        theirs = self.normalized(modules)
        for name, Y in model.normalized().items():
            np.testing.assert_allclose(
                theirs[name.replace('/', '.')], Y, rtol=2e-6, atol=1e-7)

    def test_converged(self, files, modules, layout):
        model = run(Model())
        snapshot.convert(saved(files, model), files('b.pt'), layout,
                         axes={'square/W': 1}, converge=True, fill=False)
        self.load(modules, files('b.pt'))
        for name, Y in self.normalized(modules).items():
            assert reference.true_norm(
                Y, int(name in ('deconv', 'square'))) == (
                    pytest.approx(1, abs=1e-5))

    def test_code_in_a_file_is_not_run(self, files, modules):
        import torch
        torch.save({'a': Payload(files('mark'))}, files('a.pt'))
        with pytest.raises(errors.SnapshotFileError):
            snapshot.inspect(files('a.pt'))
        torch.save({'model': modules.state_dict()}, files('a.pt'))
        with pytest.raises(errors.SnapshotFileError, match="'model'"):
            snapshot.inspect(files('a.pt'))
        assert not os.path.exists(files('mark'))


def torch_keys(layout, path):
    stem = path.replace('/', '.')
    return [f'{stem}.{end}' for end in (
        ('weight_orig', 'weight_u', 'weight_v') if layout == 'torch' else (
            'parametrizations.weight.original',
            'parametrizations.weight.0._u', 'parametrizations.weight.0._v'))]


class TestRepair:

    @pytest.mark.parametrize('poison', [0, np.nan, np.inf])
    def test_gets_converged_vectors(self, files, poison):
        model = run(Model())
        for name in 'linear', 'deconv':
            model[name].W_u[...] = poison
        path = saved(files, model)
        with pytest.raises(errors.SnapshotVectorError, match='repair'):
            snapshot.bake(path, files('out.npz'), axes={'square/W': 1})
        outcome = snapshot.repair(path, files('out.npz'))
        assert {each.key for each in outcome.weights
                if each.action == 'repaired'} == {'linear/W', 'deconv/W'}
        for name, array in contents(files('out.npz')).items():
            if name not in ('linear/W_u', 'deconv/W_u'):
                np.testing.assert_array_equal(array, contents(path)[name])
        fresh = Model()
        serializers.load_npz(files('out.npz'), fresh)
        Ys = fresh.normalized()
        for name in 'linear', 'deconv':
            assert reference.true_norm(
                Ys[name], int(name == 'deconv')) == pytest.approx(1, 1e-5)

    @pytest.mark.parametrize('shape', [
        (1, 9), (9, 1), (300, 310), (310, 290)])
    def test_all(self, files, shape):
        W = np.random.normal(size=shape).astype('f')
        path = write(files('a.npz'), {'W': W, 'W_u': np.ones(shape[0], 'f')})
        snapshot.repair(path, files('out.npz'), all=True)
        u = contents(files('out.npz'))['W_u']
        theirs = np.linalg.svd(W.astype('d'))[0][:, 0]
        assert abs(u @ theirs) == pytest.approx(1, abs=1e-6)
        assert u.dtype == np.float32
        snapshot.repair(path, files('again.npz'), all=True)
        assert (pathlib.Path(files('again.npz')).read_bytes()
                == pathlib.Path(files('out.npz')).read_bytes())

    @pytest.mark.parametrize('name', TORCH)
    def test_of_pytorch(self, files, name):
        arrays = contents(DATA / f'{name}.npz')
        W, u, v = torch_keys(name, 'deconv')
        arrays[u][0] = np.nan
        path = write(files('a.npz'), arrays)
        snapshot.repair(path, files('out.npz'))
        new = contents(files('out.npz'))
        assert new[u] @ reference.as_matrix(new[W], 1) @ new[v] == (
            pytest.approx(reference.true_norm(new[W], 1), rel=1e-6))

    def test_zero_weight(self, files):
        path = write(files('a.npz'), {
            'W': np.zeros((3, 4), 'f'), 'W_u': np.zeros(3, 'f')})
        snapshot.repair(path, files('out.npz'))
        u = contents(files('out.npz'))['W_u']
        assert np.linalg.norm(u) == pytest.approx(1)

    def test_weight_that_is_lost(self, files):
        path = write(files('a.npz'), {
            'l/W': np.full((3, 4), np.nan, 'f'), 'l/W_u': np.zeros(3, 'f')})
        for command in snapshot.repair, snapshot.bake:
            with pytest.raises(errors.SnapshotWeightError,
                               match=r"a\.npz, entry 'l/W': it holds NaN"):
                command(path, files('out.npz'))
        assert not os.path.exists(files('out.npz'))
        report, = snapshot.inspect(path)
        assert report.status == 'the weight holds NaN or Inf'


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestBadInput:

    COMMANDS = [  # noqa: RUF012
        lambda src, dst: snapshot.inspect(src),
        snapshot.bake,
        lambda src, dst: snapshot.convert(src, dst, 'torch'),
        lambda src, dst: snapshot.repair(src, dst)]

    def refused(self, path, files, error, match=None):
        for command in self.COMMANDS:
            with pytest.raises(error, match=match) as e:
                command(path, files('out.npz'))
            assert path in str(e.value)
        assert not os.path.exists(files('out.npz'))
        assert not [name for name in os.listdir(os.path.dirname(path))
                    if name.endswith('.tmp')]

    @pytest.mark.parametrize(('content', 'match'), [
        (b'', 'empty'), (b'hello, this is text', 'no .npz'),
        (pickle.dumps({'W': 1}), 'a pickle'), (b'\x1f\x8b\x08' * 9, 'gunzip'),
        (b'PK\x03\x04' + bytes(50), 'truncated or damaged'),
        (b'\x93NUMPY' + bytes(50), 'one array'),
        (b'\x89HDF\r\n\x1a\n' + bytes(99), 'truncated or damaged'),
        (b'\x10' + bytes(7) + b'{"a": 1}' + bytes(9), 'damaged'),
    ], ids=lambda x: x if isinstance(x, str) else '')
    def test_other_files(self, files, content, match):
        if content.startswith(b'\x10'):
            pytest.importorskip('safetensors')
        path = files('in.npz')
        pathlib.Path(path).write_bytes(content)
        self.refused(path, files, errors.SnapshotFileError, match)

    def test_no_file(self, files):
        self.refused(files('no.npz'), files, errors.SnapshotFileError,
                     'No such file')
        os.mkdir(files('directory'))
        self.refused(files('directory'), files, errors.SnapshotFileError,
                     'directory')

    def test_no_normalized_weight(self, files):
        path = saved(files, L.BatchNormalization(3))
        self.refused(path, files, errors.SnapshotLayoutError, 'weight_orig')

    @pytest.mark.parametrize('arrays', [
        {'l/W_u': np.ones(3)},
        {'a.weight_u': np.ones(3), 'a.weight_v': np.ones(3)},
        {'a.module.weight_u': np.ones(3), 'a.module.weight_v': np.ones(3)},
        {'a.u0': np.ones((1, 3)), 'a.sv0': np.ones(1)},
        {'a.parametrizations.weight.0._u': np.ones(3)},
        {'W': np.ones(3), 'W_u': np.ones(3)},
        {'W': np.ones((0, 3)), 'W_u': np.ones(0)},
        {'W': np.ones((3, 3), int), 'W_u': np.ones(3)},
    ], ids=lambda arrays: ','.join(arrays))
    def test_weights_that_are_none(self, files, arrays):
        self.refused(
            write(files('in.npz'), arrays), files, errors.SnapshotLayoutError,
            f'layout is unknown: .*Its entries: .*{next(iter(arrays))!r}')

    def test_pickles_are_never_opened(self, files):
        path, mark = files('in.npz'), files('mark')
        hostile = np.array(Payload(mark), dtype=object)
        np.savez(path, **{'l/W': hostile, 'l/W_u': np.ones(3, 'f')})
        report, = snapshot.inspect(path)
        assert report.status == 'not initialized'
        for command in self.COMMANDS[1:3]:
            with pytest.raises(errors.SnapshotPickleError):
                command(path, files('out.npz'))
        # Beside a good weight it is copied, byte by byte.
        np.savez(path, **{'W': np.eye(3, dtype='f'), 'W_u': np.ones(3, 'f'),
                          'x': hostile})
        snapshot.bake(path, files('out.npz'))
        with zipfile.ZipFile(path) as a, zipfile.ZipFile(
                files('out.npz')) as b:
            assert a.read('x.npy') == b.read('x.npy')
        assert not os.path.exists(mark)
        with np.load(path, allow_pickle=True) as arrays:
            assert arrays['x'] is not None
        assert os.path.exists(mark)  # so it would have shown

    def test_small_files_that_take_all_memory(self, files):
        # By bzip2, with a small weight; by a chunk that was never written.
        path = files('in.npz')
        np.savez(path, **{'W': np.eye(3, dtype='f'), 'W_u': np.ones(3, 'f')})
        with zipfile.ZipFile(path, 'a', zipfile.ZIP_BZIP2) as file:
            file.writestr('x', bytes(10 ** 7))
        for command in self.COMMANDS[1:]:
            with pytest.raises(errors.SnapshotEntryError,
                               match='compressed as no'):
                command(path, files('out.npz'))
        h5py = pytest.importorskip('h5py')
        with h5py.File(path, 'w') as file:
            file.create_dataset('W', (10 ** 5, 10 ** 5), 'f', chunks=(9, 9))
            file['W_u'] = np.ones(10 ** 5, 'f')
        self.refused(path, files, errors.SnapshotEntryError, 'more than')

    @pytest.mark.parametrize('kind', ['external', 'virtual'])
    def test_no_other_file_is_read(self, files, kind):
        h5py = pytest.importorskip('h5py')
        path, other = files('in.h5'), files('other')
        with h5py.File(other, 'w') as file:
            file['x'] = np.eye(3, dtype='f')
            offset = file['x'].id.get_offset()
        with h5py.File(path, 'w') as file:
            file['W_u'] = np.ones(3, 'f')
            if kind == 'external':
                file.create_dataset(
                    'W', (3, 3), 'f', external=[(other, offset, 36)])
            else:
                layout = h5py.VirtualLayout((3, 3), 'f')
                layout[:] = h5py.VirtualSource(other, 'x', (3, 3))
                file.create_virtual_dataset('W', layout)
            assert file['W'][1, 1] == 1
        self.refused(path, files, errors.SnapshotEntryError, 'another file')

    def test_gamma_of_either(self, files):
        eye, u = np.eye(3, dtype='f'), np.ones(3, 'f')
        path = write(files('in.npz'), {
            'W': eye, 'W_u': u, 'H': eye, 'H_u': u,
            'gamma': np.array(2, 'f')})
        self.refused(path, files, errors.SnapshotGammaError, "'W' or of 'H'")
        path = write(path, {
            'W': eye, 'W_u': u, 'H': eye, 'H_u': u,
            'gamma': np.array(2, 'f'), 'H_gamma': np.array(3, 'f')})
        snapshot.bake(path, files('out.npz'), n_power_iteration=9)
        baked = contents(files('out.npz'))
        np.testing.assert_allclose(baked['W'], 2 * eye, rtol=1e-6)
        np.testing.assert_allclose(baked['H'], 3 * eye, rtol=1e-6)

    def test_header_that_claims_too_much(self, files):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {
            'shape': (1 << 40, 1 << 10), 'fortran_order': False,
            'descr': '<f4'})
        path = files('in.npz')
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('W.npy', file.getvalue())
            archive.writestr('W_u.npy', file.getvalue())
        self.refused(path, files, errors.SnapshotEntryError, 'header')

    @pytest.mark.parametrize(('name', 'package'), [
        ('out.h5', 'h5py'), ('out.safetensors', 'safetensors'),
        ('out.pt', 'torch')])
    def test_missing_package(self, files, monkeypatch, name, package):
        path = saved(files, run(Model()))
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(errors.SnapshotPackageError,
                           match=f'/{name}: .* pip install {package}'):
            snapshot.convert(path, files(name), 'chainer', fill=False)
        # Before any weight is decomposed.
        monkeypatch.delattr(snapshot.vectors, 'converged')
        with pytest.raises(errors.SnapshotPackageError, match=name):
            snapshot.repair(path, files(name), all=True)
        assert os.listdir(os.path.dirname(path)) == ['in.npz']

    def test_names_do_not_control_the_terminal(self, files):
        path = write(files('in.npz'), {'\x1b[2J': np.ones(3)})
        with pytest.raises(errors.SnapshotLayoutError) as e:
            snapshot.inspect(path)
        assert '\x1b' not in str(e.value)


class TestOutput:

    def test_is_not_overwritten(self, files):
        path = saved(files, L.Linear(5, 4).add_hook(SpectralNormalization()))
        before = pathlib.Path(path).read_bytes()
        os.symlink(path, files('link.npz'))
        os.link(path, files('hard.npz'))
        for name in 'in.npz', 'link.npz', 'hard.npz':
            with pytest.raises(errors.SnapshotOutputError,
                               match='the input itself'):
                snapshot.repair(path, files(name))
        pathlib.Path(files('other.npz')).touch()
        with pytest.raises(errors.SnapshotOutputError, match='exists'):
            snapshot.repair(path, files('other.npz'))
        assert pathlib.Path(path).read_bytes() == before
        snapshot.bake(path, path, overwrite=True)
        assert set(contents(path)) == {'W', 'b'}

    def test_symbolic_link_stays_one(self, files):
        path = saved(files, L.Linear(5, 4).add_hook(SpectralNormalization()))
        os.symlink(path, files('link.npz'))
        snapshot.bake(path, files('link.npz'), overwrite=True)
        assert os.path.islink(files('link.npz'))
        assert set(contents(path)) == {'W', 'b'}

    def test_mode_and_compression_are_those_of_the_input(self, files):
        path = saved(files, run(Model()))
        os.chmod(path, 0o640)
        serializers.save_npz(
            files('stored.npz'), run(Model()), compression=False)
        for name, compress, expected in (
                ('in.npz', None, 8), ('stored.npz', None, 0),
                ('in.npz', False, 0), ('stored.npz', True, 8)):
            snapshot.repair(files(name), files('out.npz'), compress=compress,
                            overwrite=True)
            with zipfile.ZipFile(files('out.npz')) as file:
                assert {each.compress_type for each in file.infolist()} == {
                    expected}
        snapshot.repair(path, files('mode.npz'))
        mode = stat.S_IMODE(os.stat(files('mode.npz')).st_mode)
        assert mode == 0o640

    def test_nothing_is_left_when_it_fails(self, files, monkeypatch):
        path = saved(files, run(Model()))
        good = pathlib.Path(path).read_bytes()
        for error, expected in (
                (OSError(28, 'No space left on device'),
                 errors.SnapshotOutputError),
                (KeyboardInterrupt(), KeyboardInterrupt)):
            def fail(self, key, array, error=error):
                raise error
            monkeypatch.setattr(
                'sn_function._snapshots.writers.NpzWriter.write', fail)
            with pytest.raises(expected):
                snapshot.bake(path, path, overwrite=True,
                              axes={'square/W': 1})
            assert pathlib.Path(path).read_bytes() == good
            assert os.listdir(os.path.dirname(path)) == ['in.npz']

    def test_places_that_are_none(self, files):
        path = saved(files, run(Model()))
        with pytest.raises(errors.SnapshotOutputError, match='directory'):
            snapshot.repair(path, files('no/out.npz'))
        with pytest.raises(errors.SnapshotOutputError, match='not a file'):
            snapshot.repair(path, os.path.dirname(path), overwrite=True)

    def test_one_weight_is_in_memory_at_a_time(self, files):
        # Eight of 4 MiB.
        arrays = {}
        for i in range(8):
            arrays[f'{i}/W'] = np.random.normal(
                size=(1024, 1024)).astype('f')
            arrays[f'{i}/W_u'] = np.ones(1024, 'f')
        path = files('in.npz')
        np.savez(path, **arrays)
        del arrays
        import tracemalloc
        tracemalloc.start()
        snapshot.bake(path, files('out.npz'))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 14 << 20


class TestCorners:
    """What a review has found, by files that are made by hand."""

    @pytest.fixture(autouse=True)
    def _here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def save(self, **arrays):
        np.savez('in.npz', **{
            key.replace('__', '/').replace('_of_', '.'): x
            for key, x in arrays.items()})

    def load(self):
        with np.load('out.npz') as f:
            return dict(f)

    @pytest.mark.parametrize(('W', 'u'), [
        (np.diag([2., 0, 0])[:2], np.array([0., 1])),   # W^T u is zero
        (np.random.RandomState(0).normal(size=(4, 5)) * 1e-200, np.ones(4))])
    def test_vectors_for_torch_are_those_of_the_hook(self, W, u):
        self.save(l__W=W, l__W_u=u)
        snapshot.convert('in.npz', 'out.npz', 'torch', converge=True)
        snapshot.convert(
            'in.npz', 'out.npz', 'torch', n_power_iteration=20,
            overwrite=True)
        found = self.load()
        sigma = found['l.weight_u'] @ W @ found['l.weight_v']
        assert sigma == pytest.approx(reference.true_norm(W), rel=1e-3)

    @pytest.mark.parametrize('command', [
        lambda axes: snapshot.inspect('in.npz', axes=axes),
        lambda axes: snapshot.bake('in.npz', 'out.npz', axes=axes),
        lambda axes: snapshot.repair('in.npz', 'out.npz', axes=axes),
        lambda axes: snapshot.convert(
            'in.npz', 'out.npz', 'torch', axes=axes)])
    def test_pattern_of_an_axis_that_fits_nothing(self, command):
        self.save(l__W=np.ones((5, 5, 3, 3)), l__W_u=np.ones(5))
        with pytest.raises(errors.SnapshotPatternError,
                           match=r"'deconv/W'.*'l/W'"):
            command({'deconv/W': 1})
        assert not os.path.exists('out.npz')

    def test_matrix_of_torch_with_its_axis_turned(self):
        W = np.random.normal(size=(4, 5))
        U, s, V = np.linalg.svd(W)
        self.save(l_of_weight_orig=W, l_of_weight_u=V[0],
                  l_of_weight_v=U[:, 0])
        report, = snapshot.inspect('in.npz')
        assert (report.status, report.axis) == ('ok', 1)
        assert report.estimate == pytest.approx(s[0])
        with pytest.raises(errors.SnapshotTargetError, match='axis 0'):
            snapshot.convert('in.npz', 'out.npz', 'chainer')
        self.save(l_of_weight_orig=W, l_of_weight_u=V[0] * np.nan,
                  l_of_weight_v=U[:, 0])
        snapshot.repair('in.npz', 'out.npz')
        assert self.load()['l.weight_u'].shape == (5,)

    def test_vectors_of_torch_that_are_opposite(self):
        W = np.random.normal(size=(4, 5))
        U, s, V = np.linalg.svd(W)
        self.save(l_of_weight_orig=W, l_of_weight_u=U[:, 0],
                  l_of_weight_v=-V[0])
        assert snapshot.inspect('in.npz')[0].status == 'opposite to v'
        with pytest.raises(errors.SnapshotVectorError):
            snapshot.bake('in.npz', 'out.npz')
        snapshot.repair('in.npz', 'out.npz')
        found = self.load()
        assert found['l.weight_u'] @ W @ found['l.weight_v'] == (
            pytest.approx(s[0]))

    def test_axis_that_repair_has_guessed(self):
        self.save(l__W=np.random.normal(size=(4, 6, 3, 3)),
                  l__W_u=np.array(None))
        change, = snapshot.repair('in.npz', 'out.npz').weights
        assert '--axis' in change.note
        change, = snapshot.repair(
            'in.npz', 'out.npz', axes={'*': 1}, overwrite=True).weights
        assert '--axis' not in change.note
        assert self.load()['l/W_u'].shape == (6,)

    def test_model_with_a_colon_in_its_name(self):
        self.save(**{'updater/model:a:b/l/W': np.eye(3),
                     'updater/model:a:b/l/W_u': np.ones(3)})
        snapshot.convert('in.npz', 'out.npz', 'torch')
        assert 'l.weight_orig' in self.load()

    def test_gamma_of_sngan_projection(self):
        self.save(l__W=np.eye(3), l__W_u=np.ones(3), l__W_gamma=np.array(2.))
        snapshot.convert('in.npz', 'out.npz', 'sngan-projection')
        assert set(self.load()) == {'l/W', 'l/u', 'l/gamma'}

    def test_output_that_appears_meanwhile(self):
        self.save(l__W=np.eye(3), l__W_u=np.ones(3))

        def progress(keys):
            pathlib.Path('out.npz').write_bytes(b'theirs')
            return keys

        with pytest.raises(errors.SnapshotOutputError, match='meanwhile'):
            snapshot.bake('in.npz', 'out.npz', progress=progress)
        assert pathlib.Path('out.npz').read_bytes() == b'theirs'
        assert sorted(os.listdir()) == ['in.npz', 'out.npz']

    def test_long_name(self):
        self.save(l__W=np.eye(3), l__W_u=np.ones(3))
        snapshot.bake('in.npz', '\u5b57' * 80 + '.npz')

    def test_damage_that_compressed_hdf5_shows(self):
        h5py = pytest.importorskip('h5py')
        link = L.Linear(60, 40).add_hook(SpectralNormalization())
        serializers.save_hdf5('in.h5', chainer.Sequential(link, L.Linear(
            60, 40)))
        with h5py.File('in.h5', 'r') as f:
            chunk = f['1/W'].id.get_chunk_info(0)
        data = bytearray(pathlib.Path('in.h5').read_bytes())
        data[chunk.byte_offset + chunk.size // 2] ^= 0xff
        pathlib.Path('in.h5').write_bytes(data)
        with pytest.raises(errors.SnapshotEntryError, match='1/W'):
            snapshot.inspect('in.h5')

    def test_hdf5_has_no_place_for_a_name(self):
        pytest.importorskip('h5py')
        self.save(l__W=np.eye(3), l__W_u=np.ones(3), x=np.ones(3),
                  x__y=np.ones(2))
        with pytest.raises(errors.SnapshotOutputError, match='x/y'):
            snapshot.convert('in.npz', 'out.h5', 'chainer')
        assert os.listdir() == ['in.npz']

    @pytest.mark.parametrize(('name', 'package'), [
        ('out.npz', 'numpy'), ('out.h5', 'h5py'),
        ('out.safetensors', 'safetensors'), ('out.pt', 'torch')])
    def test_full_disk(self, name, package):
        resource = pytest.importorskip('resource')
        pytest.importorskip(package)
        self.save(l__W=np.random.normal(size=(300, 300)), l__W_u=np.ones(300))
        code = f'''
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from sn_function import errors, snapshot
resource.setrlimit(resource.RLIMIT_FSIZE, (100000, {resource.RLIM_INFINITY}))
try:
    snapshot.repair('in.npz', {name!r})
except errors.SnapshotOutputError as e:
    print('told' if 'File too large' in str(e) else e)
'''
        done = subprocess.run(
            [sys.executable, '-c', code], stdout=subprocess.PIPE, check=True)
        assert done.stdout == b'told\n'
        assert os.listdir() == ['in.npz']

    def test_bfloat16(self):
        pytest.importorskip('safetensors')
        x = np.array([1.5, -2, 3e20], 'f')
        about = {'l.weight_orig': ('F32', [2, 2], 16),
                 'l.weight_u': ('F32', [2], 8), 'l.weight_v': ('F32', [2], 8),
                 'x': ('BF16', [3], 6)}
        header, begin = {}, 0
        for key, (dtype, shape, size) in about.items():
            header[key] = {'dtype': dtype, 'shape': shape,
                           'data_offsets': [begin, begin + size]}
            begin += size
        header = json.dumps(header).encode()
        pathlib.Path('in.safetensors').write_bytes(
            len(header).to_bytes(8, 'little') + header
            + np.eye(2, dtype='<f4').tobytes() + np.ones(4, '<f4').tobytes()
            + (x.view('u4') >> 16).astype('<u2').tobytes())
        snapshot.bake('in.safetensors', 'out.npz')
        np.testing.assert_allclose(self.load()['x'], x, rtol=1e-2)
