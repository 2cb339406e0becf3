"""Vectors for snapshots that have none, of models without hooks."""
import sn_function  # isort: skip  # before chainer, which it repairs
import os

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

from sn_function import SpectralNormalization, errors, snapshot
from tests import reference


class Model(chainer.Chain):

    def __init__(self, hooked=(), **settings):
        super().__init__()
        with self.init_scope():
            self.linear = L.Linear(5, 7)
            self.block = chainer.Sequential(
                L.Convolution2D(3, 6, 3, nobias=True),
                L.BatchNormalization(6))
            self.deconv = L.Deconvolution2D(4, 6, 3)
            self.square = L.Deconvolution2D(5, 5, 3)
            self.embed = L.EmbedID(8, 4)
        for path, link in self.namedlinks():
            if path[1:] in hooked:
                link.add_hook(SpectralNormalization(**settings))


AXES = {'deconv/W': 1, 'square/W': 1}
HOOKED = ['linear', 'block/0', 'deconv', 'square', 'embed']


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    assert sn_function
    monkeypatch.chdir(tmp_path)
    np.random.seed(0)


def contents(path='out.npz'):
    with np.load(path) as file:
        return dict(file)


def norms(model):
    """The float64 norms of the weights as they are used, by the path."""
    with chainer.using_config('train', False):
        return {
            path[1:]: reference.true_norm(
                hook.normalize_weight(link).array,
                sn_function.link_hooks.output_axis(link))
            for path, link in model.namedlinks()
            for hook in getattr(link, 'local_link_hooks', {}).values()}


@pytest.mark.parametrize('name', ['in.npz', 'in.h5'])
def test_loads_into_a_model_with_hooks(name):
    plain, hooked = Model(), Model(HOOKED)
    save, load = ((serializers.save_npz, serializers.load_npz)
                  if name == 'in.npz' else
                  (serializers.save_hdf5, serializers.load_hdf5))
    save(name, plain)
    out = name.replace('in', 'out')
    with pytest.raises(KeyError):
        load(name, hooked)
    outcome = snapshot.repair(name, out, add_u=['*'], axes=AXES)
    assert {each.key: each.action for each in outcome.weights} == {
        f'{path}/W': 'repaired' for path in HOOKED}
    load(out, hooked)  # strict
    for path, norm in norms(hooked).items():
        assert norm == pytest.approx(1, abs=1e-6), path
    assert len(norms(hooked)) == 5
    for (path, x), (_, y) in zip(sorted(plain.namedparams()), sorted(
            hooked.namedparams())):
        np.testing.assert_array_equal(x.array, y.array, path)


def test_vector_is_the_first_singular_one():
    W = np.random.normal(size=(5, 9)).astype('f')
    np.savez('in.npz', **{'l/W': W, 'l/b': np.ones(5, 'f')})
    change, = snapshot.repair('in.npz', 'out.npz', add_u='*').weights
    U, values, _ = np.linalg.svd(W.astype('d'))
    assert (change.key, change.note) == ('l/W', 'it had no vector')
    assert change.sigma == pytest.approx(values[0], rel=1e-12)
    found = contents()
    assert list(found) == ['l/W', 'l/W_u', 'l/b']
    assert found['l/W_u'].dtype == np.float32
    assert abs(found['l/W_u'] @ U[:, 0]) == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(found['l/W'], W)


def test_only_those_that_fit():
    serializers.save_npz('in.npz', Model())
    snapshot.repair('in.npz', 'out.npz', add_u=['linear/*', 'block/?/W'])
    added = set(contents()) - set(contents('in.npz'))
    assert added == {'linear/W_u', 'block/0/W_u'}
    hooked = Model(['linear', 'block/0'])
    serializers.load_npz('out.npz', hooked)
    assert norms(hooked) == pytest.approx(
        {'linear': 1, 'block/0': 1}, abs=1e-6)


def test_those_that_are_there_stay():
    model = Model(['linear'])
    serializers.save_npz('in.npz', model)
    outcome = snapshot.repair('in.npz', 'out.npz', add_u=['*'], axes=AXES)
    assert {each.key: each.action for each in outcome.weights}[
        'linear/W'] == 'kept'
    np.testing.assert_array_equal(contents()['linear/W_u'], model.linear.W_u)
    assert set(contents()) - set(contents('in.npz')) == {
        'block/0/W_u', 'deconv/W_u', 'square/W_u', 'embed/W_u'}


def test_gamma_is_not_touched():
    # As of a link that keeps its u in an attribute, and gamma as a parameter.
    W = np.random.normal(size=(4, 5)).astype('f')
    np.savez('in.npz', **{'W': W, 'b': np.ones(4, 'f'),
                          'gamma': np.array(2.5, 'f')})
    snapshot.repair('in.npz', 'out.npz', add_u=['W'])
    link = L.Linear(5, 4).add_hook(SpectralNormalization(use_gamma=True))
    serializers.load_npz('out.npz', link)
    with chainer.using_config('train', False):
        Y = link.local_link_hooks[
            'SpectralNormalization'].normalize_weight(link).array
    assert reference.true_norm(Y) == pytest.approx(2.5, rel=1e-6)


def test_axis_that_is_guessed_is_told():
    serializers.save_npz('in.npz', Model())
    notes = {each.key: each.note for each in snapshot.repair(
        'in.npz', 'out.npz', add_u=['*'], axes={'deconv/W': 1}).weights}
    assert notes['deconv/W'] == notes['linear/W'] == 'it had no vector'
    for key in 'square/W', 'block/0/W':
        assert 'taken as a convolution, unless --axis' in notes[key]


def test_weight_of_another_name():
    np.savez('in.npz', **{'l/H': np.diag([2., 1]), 'l/x': np.eye(3)})
    with pytest.raises(errors.SnapshotPatternError, match="'l/H', 'l/x'"):
        snapshot.repair('in.npz', 'out.npz', add_u=['l/*'])
    snapshot.repair('in.npz', 'out.npz', add_u=['l/H'])
    np.testing.assert_allclose(abs(contents()['l/H_u']), [1, 0], atol=1e-12)
    assert 'l/x_u' not in contents()


def test_n_step_link():
    plain, hooked = (chainer.Chain(r=L.NStepLSTM(2, 4, 3, 0.))
                     for _ in range(2))
    hooked.r.add_hook(SpectralNormalization())
    serializers.save_npz('in.npz', plain)
    with pytest.raises(errors.MissingVectorError, match=r'w\d_u'):
        serializers.load_npz('in.npz', hooked)
    snapshot.repair('in.npz', 'out.npz', add_u=['*'])
    serializers.load_npz('out.npz', hooked)
    for child in hooked.r:
        for k in range(8):
            W, u = getattr(child, f'w{k}').array, getattr(child, f'w{k}_u')
            first = np.linalg.svd(W.astype('d'))[0][:, 0]
            assert abs(u @ first) == pytest.approx(1, abs=1e-6)


def test_trainer():
    model = Model()
    optimizer = chainer.optimizers.Adam().setup(model)
    for param in model.params():
        param.grad = np.ones_like(param.array)
    optimizer.update()
    updater = chainer.training.updaters.StandardUpdater(
        chainer.iterators.SerialIterator([1, 2], 1), optimizer)
    trainer = chainer.training.Trainer(updater, (1, 'iteration'))
    trainer._start_at = 0.  # as if it ran
    serializers.save_npz('in', trainer)
    snapshot.repair('in', 'out', add_u=['*'], axes={
        '*deconv/W': 1, '*square/W': 1})
    with np.load('in') as before, np.load('out') as after:
        assert set(after.files) - set(before.files) == {
            f'updater/model:main/{path}/W_u' for path in HOOKED}
    hooked = Model(HOOKED)
    serializers.load_npz('out', hooked, path='updater/model:main/')
    assert set(norms(hooked)) == set(HOOKED)
    assert list(norms(hooked).values()) == pytest.approx([1] * 5, abs=1e-6)


def test_state_dict():
    W = np.random.normal(size=(6, 3, 3, 3)).astype('f')
    np.savez('in.npz', **{
        'module.conv.weight': W, 'module.conv.bias': np.ones(6, 'f'),
        'module.norm.weight': np.ones(6, 'f')})
    snapshot.repair('in.npz', 'out.npz', add_u=['*'])
    found = contents()
    assert list(found) == [
        'module.conv.weight_orig', 'module.conv.weight_u',
        'module.conv.weight_v', 'module.conv.bias', 'module.norm.weight']
    u, v = found['module.conv.weight_u'], found['module.conv.weight_v']
    assert u @ W.reshape(6, -1) @ v == pytest.approx(
        reference.true_norm(W), rel=1e-6)
    snapshot.convert('out.npz', 'chainer.npz', 'chainer')
    link = L.Convolution2D(3, 6, 3).add_hook(SpectralNormalization())
    serializers.load_npz('chainer.npz', link, path='conv/')
    assert norms(chainer.Chain(l=link)) == pytest.approx({'l': 1}, abs=1e-6)
    np.savez('in.npz', **{'weight': W, 'bias': np.ones(6, 'f')})
    snapshot.repair('in.npz', 'out.npz', add_u=['*'], overwrite=True)
    assert set(contents()) == {
        'weight_orig', 'weight_u', 'weight_v', 'bias'}


@pytest.mark.parametrize(('n_in', 'refusal'), [
    (12, pytest.raises(errors.VectorAxisError, match='PATTERN=1')),
    (6, pytest.warns(errors.VectorAxisWarning, match='PATTERN=1'))])
def test_deconvolution_that_is_taken_as_a_convolution(n_in, refusal):
    """The model says what to do, and that is right."""
    serializers.save_npz('in.npz', L.Deconvolution2D(n_in, 6, 3))
    link = L.Deconvolution2D(n_in, 6, 3).add_hook(SpectralNormalization())
    snapshot.repair('in.npz', 'out.npz', add_u=['*'])
    with refusal:
        serializers.load_npz('out.npz', link)
    snapshot.repair('in.npz', 'out.npz', add_u=['*'], axes={'W': 1},
                    overwrite=True)
    serializers.load_npz('out.npz', link)
    assert norms(chainer.Chain(l=link)) == pytest.approx({'l': 1}, abs=1e-6)


class TestErrors:

    def refused(self, error, match, **kwargs):
        with pytest.raises(error, match=match):
            snapshot.repair('in.npz', 'out.npz', **kwargs)
        assert os.listdir('.') == ['in.npz']

    def test_pattern_that_fits_nothing(self):
        serializers.save_npz('in.npz', Model(['linear']))
        self.refused(errors.SnapshotPatternError, r"in\.npz: .*'conv\*'",
                     add_u=['*', 'conv*'], axes=AXES)
        self.refused(errors.SnapshotPatternError, "'linear/W'",
                     add_u=['linear/W'])

    def test_pattern_of_an_axis_that_fits_nothing(self):
        serializers.save_npz('in.npz', Model())
        self.refused(errors.SnapshotPatternError, "'deconvs/W'",
                     add_u=['*'], axes={'deconvs/W': 1})

    @pytest.mark.parametrize(('W', 'error', 'match'), [
        (np.full((2, 2), np.nan), errors.SnapshotWeightError, 'NaN or Inf'),
        (np.eye(3, dtype='i'), errors.SnapshotLayoutError, 'dtype int32'),
        (np.ones((0, 2)), errors.SnapshotLayoutError, r'shape \(0, 2\)')],
        ids=str)
    def test_weight_that_has_no_norm(self, W, error, match):
        np.savez('in.npz', **{'a/W': np.eye(2), 'l/W': W})
        self.refused(error, match, add_u=['l/W'])

    def test_says_how_where_it_is_missed(self):
        serializers.save_npz('in.npz', Model())
        self.refused(errors.SnapshotNoVectorError, "OUT --add '\\*'")
