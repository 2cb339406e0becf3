"""Snapshots of old code: weights that have no vector, beside others or alone.

The layouts are those of the links of pfnet-research/sngan_projection, which
save u, and of pfnet-research/chainer-gan-lib, which keep it in an attribute.
"""
import sn_function  # isort: skip  # before chainer, which it repairs
import os
import pathlib

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers
from chainer.training import extensions

from sn_function import SpectralNormalization, errors, snapshot
from tests import reference

SHAPES = {
    'c1': (6, 3, 3, 3), 'c2': (5, 6, 3, 3), 'c10': (4, 5, 3, 3),
    'l': (1, 4), 'embed': (8, 4)}
LACKING = 'c2', 'l'
HOOK = 'SpectralNormalization'


class Model(chainer.Chain):
    """That of ``SHAPES``, with the hook, or without it."""

    def __init__(self, **settings):
        super().__init__()
        with self.init_scope():
            self.c1 = L.Convolution2D(3, 6, 3)
            self.c2 = L.Convolution2D(6, 5, 3)
            self.c10 = L.Convolution2D(5, 4, 3)
            self.l = L.Linear(4, 1)
            self.embed = L.EmbedID(8, 4)
        if settings:
            for link in self.children():
                link.add_hook(SpectralNormalization(**settings))

    def forward(self):
        pass

    def normalized(self):
        with chainer.using_config('train', False):
            return {link.name: link.local_link_hooks[HOOK].normalize_weight(
                link).array for link in self.children()}


class OldLink(chainer.Link):
    """Entries as those of the links of sngan_projection, or chainer-gan-lib.
    """

    def __init__(self, shape, saves_u, use_gamma):
        super().__init__()
        with self.init_scope():
            self.W = chainer.Parameter(
                np.random.normal(size=shape).astype('f'))
            if len(shape) == 4 or shape[0] == 1:
                self.b = chainer.Parameter(np.zeros(shape[0], 'f'))
            if use_gamma:
                self.gamma = chainer.Parameter(
                    np.full((1,) * len(shape), 1.5, 'f'))
        self.u = np.random.normal(size=(1, shape[0])).astype('f')
        if saves_u:
            self.register_persistent('u')


def old_model(lacking=LACKING, use_gamma=False):
    return chainer.Chain(**{
        path: OldLink(shape, path not in lacking, use_gamma)
        for path, shape in SHAPES.items()})


def old_weight(link):
    """What the code of such a link computes with, in float64."""
    W = link.W.array.astype('d')
    sigma = reference.power_iteration(
        W.reshape(len(W), -1), link.u[0].astype('d'))[2]
    gamma = link.gamma.array.item() if hasattr(link, 'gamma') else 1
    return gamma * W / sigma


def save(path, model):
    if path.endswith('.h5'):
        pytest.importorskip('h5py')
        serializers.save_hdf5(path, model)
    else:
        serializers.save_npz(path, model)
    return path


def load(path, model, **kwargs):
    function = (serializers.load_hdf5 if path.endswith('.h5')
                else serializers.load_npz)
    function(path, model, **kwargs)
    return model


def contents(path):
    with np.load(path, allow_pickle=True) as file:
        return dict(file)


def trainer_of(**models):
    """A trainer that holds the state of an optimizer for each parameter."""
    optimizers = {}
    for name, model in models.items():
        optimizer = chainer.optimizers.Adam().setup(model)
        for param in model.params():
            param.grad = np.ones_like(param.array)
        optimizer.update()
        optimizers[name] = optimizer
    trainer = chainer.training.Trainer(
        chainer.training.updaters.StandardUpdater(
            chainer.iterators.SerialIterator([1, 2], 1), optimizers),
        (1, 'iteration'))
    trainer.extend(extensions.LogReport())
    trainer._start_at = 0.  # as if it ran
    return trainer


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    assert sn_function
    monkeypatch.chdir(tmp_path)
    np.random.seed(0)


KINDS = pytest.mark.parametrize('name', ['in.npz', 'in.h5'])


class TestConvert:

    @KINDS
    @pytest.mark.parametrize('layout', snapshot.LAYOUTS)
    def test_asks_what_the_others_are_to_get(self, name, layout):
        save(name, old_model())
        before = pathlib.Path(name).read_bytes()
        with pytest.raises(
                errors.SnapshotPartialError,
                match=r"3 of its 5 weights .* 'c2/W', 'l/W' none.*--fill"):
            snapshot.convert(name, f'out-{name}', layout)
        assert os.listdir('.') == [name]
        with pytest.raises(errors.SnapshotPartialError):
            snapshot.convert(name, name, layout, overwrite=True)
        assert os.listdir('.') == [name]
        assert pathlib.Path(name).read_bytes() == before

    @KINDS
    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_fills(self, name, use_gamma):
        old = old_model(use_gamma=use_gamma)
        save(name, old)
        out = name.replace('in', 'out')
        outcome = snapshot.convert(name, out, 'chainer', fill=True)
        notes = {each.key: each.note for each in outcome.weights}
        assert list(notes) == ['c1/W', 'c2/W', 'c10/W', 'embed/W', 'l/W']
        assert {key for key, note in notes.items() if note} == {
            f'{path}/W' for path in LACKING}
        assert notes['l/W'] == 'it had no vector'
        assert 'taken as a convolution, unless --axis' in notes['c2/W']
        model = load(out, Model(n_warmup=0, use_gamma=use_gamma))
        for path, Y in model.normalized().items():
            if path in LACKING:
                assert reference.true_norm(Y) == pytest.approx(
                    1.5 if use_gamma else 1, rel=1e-6)
            else:
                np.testing.assert_allclose(
                    Y, old_weight(old[path]), rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(
                model[path].W.array, old[path].W.array)

    @pytest.mark.parametrize('layout', ['torch', 'torch-parametrized'])
    def test_fills_for_pytorch(self, layout):
        old = old_model()
        save('in.npz', old)
        outcome = snapshot.convert('in.npz', 'out.npz', layout, fill=True)
        assert {each.key.split('.')[0]: each.difference is None
                for each in outcome.weights} == {
            path: path in LACKING for path in SHAPES}
        found = contents('out.npz')
        for path in SHAPES:
            keys = (('parametrizations.weight.original',
                     'parametrizations.weight.0._u',
                     'parametrizations.weight.0._v') if '-' in layout
                    else ('weight_orig', 'weight_u', 'weight_v'))
            W, u, v = (found[f'{path}.{key}'] for key in keys)
            sigma = u @ W.reshape(len(W), -1) @ v
            expected = (reference.true_norm(W) if path in LACKING
                        else np.linalg.norm(W) / np.linalg.norm(
                            old_weight(old[path])))
            assert sigma == pytest.approx(expected, rel=1e-5)

    def test_fills_what_is_in_the_layout_already(self):
        model = Model(n_vectors=2)
        save('in.npz', model)
        arrays = contents('in.npz')
        del arrays['l/W_u'], arrays['l/W_us']
        np.savez('in.npz', **arrays)
        with pytest.raises(errors.SnapshotPartialError, match="'l/W' none"):
            snapshot.convert('in.npz', 'out.npz', 'chainer')
        snapshot.convert('in.npz', 'out.npz', 'chainer', fill=True)
        found = contents('out.npz')
        assert abs(found.pop('l/W_u')) == pytest.approx([1])
        assert set(found) == set(arrays)
        for key, array in arrays.items():
            np.testing.assert_array_equal(found[key], array)
        load('out.npz', model)

    def test_no_fill_leaves_the_others(self):
        save('in.npz', old_model())
        outcome = snapshot.convert('in.npz', 'out.npz', 'chainer', fill=False)
        assert len(outcome.weights) == 3
        found = contents('out.npz')
        assert {key for key in found if key.endswith('W_u')} == {
            f'{path}/W_u' for path in SHAPES if path not in LACKING}
        model = Model(n_warmup=0)
        for path in LACKING:
            model[path].delete_hook(HOOK)
        load('out.npz', model)

    def test_patterns_of_axes_fit_what_is_filled(self):
        W = np.random.normal(size=(4, 6, 3, 3)).astype('f')
        np.savez('in.npz', **{
            'l/W': np.eye(3, 4), 'l/u': np.ones((1, 3)), 'deconv/W': W})
        snapshot.convert('in.npz', 'out.npz', 'chainer', fill=True,
                         axes={'deconv/W': 1})
        u = contents('out.npz')['deconv/W_u']
        first = np.linalg.svd(reference.as_matrix(W.astype('d'), 1))[0][:, 0]
        assert abs(u @ first) == pytest.approx(1, abs=1e-6)
        with pytest.raises(errors.SnapshotTargetError, match='no deconv'):
            snapshot.convert('in.npz', 'b.npz', 'sngan-projection', fill=True,
                             axes={'deconv/W': 1})
        assert sorted(os.listdir('.')) == ['in.npz', 'out.npz']

    @pytest.mark.parametrize('poison', [np.nan, np.inf])
    def test_weight_that_is_lost(self, poison):
        old = old_model()
        old.c2.W.array[0, 0] = poison
        save('in.npz', old)
        with pytest.raises(errors.SnapshotWeightError, match="'c2/W'"):
            snapshot.convert('in.npz', 'out.npz', 'chainer', fill=True)
        assert os.listdir('.') == ['in.npz']

    def test_trainer(self):
        save('in', trainer_of(dis=old_model(use_gamma=True), gen=Model()))
        with pytest.raises(errors.SnapshotPartialError, match='3 of its 5'):
            snapshot.convert('in', 'out', 'chainer')
        snapshot.convert('in', 'out', 'chainer', fill=True)
        assert not [key for key in contents('out') if 'gen' in key
                    and key.endswith('_u')]
        dis, gen = Model(use_gamma=True), Model()
        load('out', trainer_of(dis=dis, gen=gen))
        before = contents('in')
        assert {x.shape for key, x in contents('out').items()
                if 'gamma' in key} == {()}
        for path in SHAPES:
            rule = dis[path].gamma.update_rule
            assert rule.state['m'].shape == dis[path].gamma.shape == ()
            assert rule.state['m'] == before[
                f'updater/optimizer:dis/{path}/gamma/m'].item()
            assert path not in LACKING or reference.true_norm(
                dis.normalized()[path]) == pytest.approx(
                    float(dis[path].gamma.array), rel=1e-5)

    def test_pytorch_says_itself_which_are_normalized(self):
        np.savez('in.npz', **{
            'a.weight_orig': np.eye(3), 'a.weight_u': np.ones(3),
            'a.weight_v': np.ones(3), 'b.weight': np.eye(2)})
        for fill in None, False, True:
            snapshot.convert('in.npz', f'{fill}.npz', 'chainer', fill=fill)
            assert set(contents(f'{fill}.npz')) == {'a/W', 'a/W_u', 'b/W'}


class TestInspect:

    @KINDS
    def test_without_any_vector(self, name):
        old = old_model(SHAPES)
        reports = snapshot.inspect(save(name, old))
        assert [each.key for each in reports] == [
            'c1/W', 'c2/W', 'c10/W', 'embed/W', 'l/W']
        for report in reports:
            assert (report.layout, report.status) == ('plain', 'no vector')
            assert report.estimate is None
            assert report.healthy
            assert report.sigma == pytest.approx(reference.true_norm(
                old[report.key[:-2]].W.array), rel=1e-6)

    def test_beside_others(self):
        reports = snapshot.inspect(save('in.npz', old_model()))
        assert {each.key for each in reports if each.status == 'no vector'
                } == {f'{path}/W' for path in LACKING}
        assert len(reports) == 5

    def test_models_without_any_are_not_listed_beside_others(self):
        save('in', trainer_of(dis=old_model(), gen=Model()))
        assert {each.key.split('/')[1] for each in snapshot.inspect('in')
                } == {'model:dis'}
        assert {(each.key, each.status) for each in snapshot.inspect(
            'in', model='gen')} == {
            (f'updater/model:gen/{path}/W', 'no vector') for path in SHAPES}
        assert len(snapshot.inspect('in', certify=.5, time_limit=1)) == 10

    @KINDS
    @pytest.mark.parametrize('other', [
        np.ones((2, 3), int), np.ones((2, 3), bool), np.zeros((0, 3), 'f'),
        np.ones((2, 3), complex)], ids=lambda x: f'{x.dtype} {x.size}')
    def test_arrays_that_are_no_weights(self, name, other):
        model = old_model(SHAPES)
        expected = snapshot.inspect(save(name, model))
        model.add_persistent('weight', other)
        model.c1.add_persistent('w0', other)
        name = save(f'more-{name}', model)
        assert snapshot.inspect(name) == expected
        snapshot.repair(name, 'out.npz', add_u=['*'])
        reports = snapshot.inspect('out.npz')
        assert [each.key for each in reports] == [
            each.key for each in expected]
        assert {each.status for each in reports} == {'ok'}

    def test_of_the_other_byte_order(self):
        W = np.diag([2., 1.])
        np.savez('in.npz', **{'l/W': W.astype('>f4')})
        assert snapshot.inspect('in.npz')[0].sigma == 2
        snapshot.repair('in.npz', 'out.npz', add_u=['*'])
        assert snapshot.inspect('out.npz')[0].status == 'ok'
        np.testing.assert_array_equal(contents('out.npz')['l/W'], W)

    def test_a_file_without_weights(self):
        np.savez('in.npz', a=np.ones(3), b=np.eye(3))
        with pytest.raises(errors.SnapshotLayoutError, match='no weight was'):
            snapshot.inspect('in.npz')


class TestRepair:

    @KINDS
    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_code_that_does_not_save_u(self, name, use_gamma):
        old = old_model(SHAPES, use_gamma)
        save(name, old)
        for function in snapshot.bake, snapshot.repair, (
                lambda src, dst: snapshot.convert(src, dst, 'chainer')):
            with pytest.raises(errors.SnapshotNoVectorError, match='--add'):
                function(name, f'out-{name}')
        assert os.listdir('.') == [name]
        snapshot.repair(name, f'out-{name}', add_u=['*'])
        model = load(f'out-{name}', Model(use_gamma=use_gamma))
        for path, Y in model.normalized().items():
            np.testing.assert_allclose(
                Y, model[path].W.array * (1.5 if use_gamma else 1)
                / reference.true_norm(model[path].W.array), rtol=1e-5)

    def test_trainer(self):
        save('in', trainer_of(dis=old_model(SHAPES, True), gen=Model()))
        snapshot.repair('in', 'out', add_u=['updater/model:dis/*'])
        # Of these shapes, as CuPy does not broadcast where it loads them.
        assert {x.shape for key, x in contents('out').items()
                if 'gamma' in key} == {()}
        assert not [key for key in contents('out') if 'gen' in key
                    and key.endswith('_u')]
        dis = Model(use_gamma=True)
        load('out', trainer_of(dis=dis, gen=Model()))
        for path, Y in dis.normalized().items():
            assert reference.true_norm(Y) == pytest.approx(
                float(dis[path].gamma.array), rel=1e-5)
            assert dis[path].gamma.update_rule.state['v'].shape == ()


    def test_weights_of_another_name_are_given_in_full(self):
        np.savez('in.npz', **{'l/kernel': np.eye(3)})
        with pytest.raises(errors.SnapshotPatternError,
                           match=r"in full: '\*'\. .* one of 'l/kernel'"):
            snapshot.repair('in.npz', 'out.npz', add_u=['*'])
        snapshot.repair('in.npz', 'out.npz', add_u=['l/kernel'])
        assert snapshot.inspect('out.npz')[0].status == 'ok'
        with pytest.raises(errors.SnapshotPatternError,
                           match=r"fits the pattern: '\*'. The file has none"):
            snapshot.repair('out.npz', 'more.npz', add_u=['*'])


class TestOrder:
    """That of the paths: 2 is before 10, in any order of the file."""

    KEYS = ('block2/c1', 'block2/c2', 'block2/c10', 'block10/c1', 'l')

    @pytest.fixture(params=['.npz', '.h5', '.safetensors'])
    def path(self, request):
        arrays = {}
        for key in sorted(self.KEYS, reverse=True):
            arrays[f'{key}/W_u'] = np.array([2, 1], 'f')
            arrays[f'{key}/W'] = np.eye(2, dtype='f')
        np.savez('in.npz', **arrays)
        if request.param != '.npz':
            pytest.importorskip(
                'h5py' if request.param == '.h5' else 'safetensors')
            snapshot.convert('in.npz', f'in{request.param}', 'chainer')
        return f'in{request.param}'

    def test_of_rows(self, path):
        def keys(weights):
            return [each.key for each in weights]

        expected = [f'{key}/W' for key in self.KEYS]
        assert keys(snapshot.inspect(path)) == expected
        assert keys(snapshot.bake(path, 'a.npz').weights) == expected
        assert keys(snapshot.repair(path, 'b.npz').weights) == expected
        assert keys(snapshot.convert(
            path, 'c.npz', 'sngan-projection').weights) == expected
        torch = [key.replace('/', '.') + '.weight_orig' for key in self.KEYS]
        assert keys(snapshot.convert(
            path, 'd.npz', 'torch').weights) == torch
        assert keys(snapshot.inspect('d.npz')) == torch


    def test_of_numbers_of_any_length(self):
        # Python may refuse to convert one of more than 640 digits.
        names = ['7', '08', '10', '9' * 5000, '1' + 5000 * '0']
        np.savez('in.npz', **{
            f'l{name}/W': np.eye(2) for name in reversed(names)})
        assert [each.key for each in snapshot.inspect('in.npz')] == [
            f'l{name}/W' for name in names]


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='there are no pipes')
def test_a_pipe_is_not_read():
    os.mkfifo('pipe')
    with pytest.raises(errors.SnapshotFileError, match='it is a pipe'):
        snapshot.inspect('pipe')
