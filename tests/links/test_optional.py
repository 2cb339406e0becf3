"""Snapshots without the further vectors, loaded strictly."""
import io

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, serializers

from sn_function import ChainSpectralNormalization, SpectralNormalization

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


def test_what_else_lacks_is_an_error():
    file = io.BytesIO()
    serializers.save_npz(file, L.Linear(7, 6))
    for n in (1, 3):
        file.seek(0)
        with pytest.raises(KeyError, match='W_u '):
            serializers.load_npz(file, linear(n))


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
