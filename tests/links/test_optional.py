"""Snapshots without the further vectors, loaded strictly."""
import pickle

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, serializers

from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    errors,
)

assert sn_function  # it is imported for what it does


def linear(n=3, in_size=7, **settings):
    return L.Linear(in_size, 6).add_hook(
        SpectralNormalization(n_vectors=n, **settings))


def x_of(n=7):
    return np.random.normal(size=(2, n)).astype('f')


def save_npz(obj, path):
    serializers.save_npz(path, obj)


def save_hdf5(obj, path):
    pytest.importorskip('h5py')
    serializers.save_hdf5(str(path), obj)


def load_hdf5(path, obj):
    serializers.load_hdf5(str(path), obj)


FORMATS = pytest.mark.parametrize(('save', 'load'), [
    (save_npz, serializers.load_npz), (save_hdf5, load_hdf5)],
    ids=['npz', 'hdf5'])


@FORMATS
@pytest.mark.parametrize('in_size', [7, None])
def test_all_vectors_are_saved(save, load, in_size, tmp_path):
    source, link = linear(), linear(in_size=in_size)
    source(x_of())
    save(source, tmp_path / 'file.npz')
    load(tmp_path / 'file.npz', link)
    np.testing.assert_array_equal(link.W_u, source.W_u)
    np.testing.assert_array_equal(link.W_us, source.W_us)
    x = x_of()
    for train in (False, True, True):
        with chainer.using_config('train', train):
            np.testing.assert_array_equal(link(x).array, source(x).array)


@FORMATS
@pytest.mark.parametrize('in_size', [7, None])
@pytest.mark.parametrize('hook', [
    link_hooks.SpectralNormalization, SpectralNormalization])
def test_a_snapshot_without_them(save, load, in_size, hook, tmp_path):
    source = L.Linear(7, 6).add_hook(hook())
    for _ in range(3):
        source(x_of())
    link = linear(in_size=in_size, n_warmup=0)
    save(source, tmp_path / 'file.npz')
    load(tmp_path / 'file.npz', link)
    np.testing.assert_array_equal(link.W_u, source.W_u)
    assert link.W_us is None
    with chainer.using_config('train', False):
        link(x_of())
    np.testing.assert_array_equal(link.W_u, source.W_u)
    assert link.W_us.shape == (2, 6)
    assert np.linalg.matrix_rank([link.W_u, *link.W_us]) == 3


@FORMATS
def test_into_a_hook_with_one_vector(save, load, tmp_path):
    source, link = linear(), linear(1)
    save(source, tmp_path / 'file.npz')
    load(tmp_path / 'file.npz', link)
    np.testing.assert_array_equal(link.W_u, source.W_u)
    assert not hasattr(link, 'W_us')


@FORMATS
def test_of_links_that_are_not_initialized(save, load, tmp_path):
    save(linear(in_size=None), tmp_path / 'file.npz')
    link = linear(in_size=None)
    load(tmp_path / 'file.npz', link)
    assert link.W_u is link.W_us is None
    link(x_of())
    assert link.W_us.shape == (2, 6)


@FORMATS
def test_a_weight_with_one_vector(save, load, tmp_path):
    """No entry is an object, which few readers take."""
    def make():
        return L.Linear(7, 1).add_hook(SpectralNormalization(n_vectors=3))

    source, link = make(), make()
    save(source, tmp_path / 'file.npz')
    if save is save_npz:
        with np.load(tmp_path / 'file.npz') as file:
            assert all(file[name].dtype == 'f' for name in file.files)
            assert file['W_us'].shape == (0, 1)
    load(tmp_path / 'file.npz', link)
    link(x_of())


@FORMATS
@pytest.mark.parametrize('n', [2, 5])
def test_of_another_number(save, load, n, tmp_path):
    source, link = linear(n), linear(3, n_warmup=0)
    save(source, tmp_path / 'file.npz')
    load(tmp_path / 'file.npz', link)
    with chainer.using_config('train', False):
        link(x_of())
    k = min(n, 3) - 1
    np.testing.assert_array_equal(link.W_us[:k], source.W_us[:k])
    assert link.W_us.shape == (2, 6)


class TestWithoutTheLeadingOne:
    """The error names the command that makes it."""

    def refused(self, load, path, link, match):
        with pytest.raises(errors.MissingVectorError, match=match) as e:
            load(path, chainer.Chain(block=chainer.Sequential(link)))
        assert isinstance(e.value, KeyError)
        assert str(e.value).startswith("'block/0/W_u' is not in the snapshot")
        copy = pickle.loads(pickle.dumps(e.value))
        assert str(copy) == str(e.value)

    @FORMATS
    @pytest.mark.parametrize('n', [1, 3])
    @pytest.mark.parametrize('in_size', [7, None])
    def test_of_a_model_without_hooks(self, save, load, n, in_size, tmp_path):
        path = tmp_path / 'file.npz'
        save(chainer.Chain(block=chainer.Sequential(L.Linear(7, 6))), path)
        self.refused(load, path, linear(n, in_size),
                     r"sn-function repair SNAPSHOT OUT --add '\*'")

    @FORMATS
    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_of_sngan_projection(self, save, load, use_gamma, tmp_path):
        source = L.Linear(7, 6)
        with source.init_scope():
            source.gamma = chainer.Parameter(np.ones((1, 1), 'f'))
        source.add_persistent('u', np.ones((1, 6), 'f'))
        path = tmp_path / 'file.npz'
        save(chainer.Chain(block=chainer.Sequential(source)), path)
        self.refused(load, path, linear(1, use_gamma=use_gamma),
                     'sn-function convert SNAPSHOT OUT --to chainer')

    def test_of_a_gamma_that_does_not_fit(self):
        """As on a device, where nothing is broadcast."""
        class Strict(serializers.NpzDeserializer):

            def __call__(self, key, value):
                loaded = super().__call__(key, None)
                if value is not None and loaded.shape != value.shape:
                    raise ValueError('Shape mismatch')
                return loaded

        arrays = {'W': np.ones((6, 7), 'f'), 'b': np.ones(6, 'f'),
                  'u': np.ones((1, 6), 'f'), 'gamma': np.ones((1, 1), 'f')}
        with pytest.raises(errors.MissingVectorError, match='convert'):
            Strict(arrays).load(linear(1, use_gamma=True))
        del arrays['u']
        with pytest.raises(ValueError, match='Shape mismatch'):
            Strict(arrays).load(linear(1, use_gamma=True))

    def test_below_a_path(self, tmp_path):
        path = tmp_path / 'file.npz'
        np.savez(path, **{
            f'updater/model:dis/l/{name}': np.ones(shape, 'f')
            for name, shape in (('W', (6, 7)), ('b', 6), ('u', (1, 6)))})
        with pytest.raises(errors.MissingVectorError,
                           match=r"^'updater/model:dis/l/W_u' is not .*conv"):
            serializers.load_npz(
                path, chainer.Chain(l=linear(1)), 'updater/model:dis/')

    def test_of_a_link_that_has_an_array_u_itself(self, tmp_path):
        path = tmp_path / 'file.npz'
        source, link = L.Linear(7, 6), linear(1)
        for each in source, link:
            each.add_persistent('u', np.ones(3))
        serializers.save_npz(path, source)
        with pytest.raises(errors.MissingVectorError, match='repair'):
            serializers.load_npz(path, link)

    @FORMATS
    def test_what_else_is_wrong_stays_as_it_was(self, save, load, tmp_path):
        path = tmp_path / 'file.npz'
        save(L.Linear(7, 5), path)
        for link in linear(), chainer.Chain(l=linear()):
            with pytest.raises(
                    (KeyError, ValueError, TypeError), match=r'.') as e:
                load(path, link)
            assert not isinstance(e.value, errors.MissingVectorError)
        save(L.Linear(7, 6, nobias=True).add_hook(
            SpectralNormalization()), path)
        with pytest.raises(KeyError, match='b') as e:
            load(path, linear(1))
        assert not isinstance(e.value, errors.MissingVectorError)

    def test_chainers_hook_is_left_alone(self, tmp_path):
        serializers.save_npz(tmp_path / 'file.npz', L.Linear(7, 6))
        link = L.Linear(7, 6).add_hook(link_hooks.SpectralNormalization())
        link(x_of())
        with pytest.raises(KeyError, match='W_u is not a file') as e:
            serializers.load_npz(tmp_path / 'file.npz', link)
        assert type(e.value) is KeyError


def test_a_model(tmp_path):
    def make(**settings):
        return chainer.Sequential(
            L.Linear(7, 6), chainer.ChainList(L.Linear(6, 5))).add_hook(
                ChainSpectralNormalization(**settings))

    source, model = make(), make(n_vectors=2)
    serializers.save_npz(tmp_path / 'file.npz', source)
    serializers.load_npz(tmp_path / 'file.npz', model)
    for link, other in zip(model.links(), source.links()):
        if isinstance(link, L.Linear):
            np.testing.assert_array_equal(link.W_u, other.W_u)
            assert link.W_us is None


def test_an_n_step_link(tmp_path):
    source, link = (
        L.NStepLSTM(1, 4, 3, 0.).add_hook(SpectralNormalization(n_vectors=n))
        for n in (1, 2))
    serializers.save_npz(tmp_path / 'file.npz', source)
    serializers.load_npz(tmp_path / 'file.npz', link)
    np.testing.assert_array_equal(link[0].w3_u, source[0].w3_u)
    assert link[0].w3_us is None


def test_copies_that_share_arrays_still_do(tmp_path):
    source, link = linear(), linear()
    serializers.save_npz(tmp_path / 'file.npz', source)
    other = link.copy('share')
    serializers.load_npz(tmp_path / 'file.npz', link)
    np.testing.assert_array_equal(other.W_u, source.W_u)
    np.testing.assert_array_equal(other.W_us, source.W_us)
    link(x_of())
    np.testing.assert_array_equal(other.W_us, link.W_us)


@pytest.mark.parametrize('how', [
    {'strict': False}, {'ignore_names': ['W_u', 'W_us']}])
@pytest.mark.parametrize('has_them', [False, True])
def test_what_is_left_alone(how, has_them, tmp_path):
    source = L.Linear(7, 6)
    if has_them and 'ignore_names' in how:
        source = linear()
    serializers.save_npz(tmp_path / 'file.npz', source)
    link = linear()
    before = link.W_u, link.W_us, link.W_us.copy()
    serializers.load_npz(tmp_path / 'file.npz', link, **how)
    assert link.W_u is before[0]
    assert link.W_us is before[1]
    np.testing.assert_array_equal(link.W_us, before[2])


def test_another_dtype(tmp_path):
    source, link = linear(), linear()
    source.W_us = source.W_us.astype('d')
    serializers.save_npz(tmp_path / 'file.npz', source)
    serializers.load_npz(tmp_path / 'file.npz', link)
    assert link.W_us.dtype == 'f'
    np.testing.assert_array_equal(link.W_us, source.W_us)
