"""Vectors and gammas that are made anew on request."""
import sn_function  # isort: skip  # before chainer, which it repairs

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks
from chainer.backends import cuda

from sn_function import ChainSpectralNormalization, SpectralNormalization
from tests import reference

LINKS = {
    'Linear': lambda: L.Linear(6, 5),
    'large': lambda: L.Linear(300, 280),
    'EmbedID': lambda: L.EmbedID(5, 4),
    'Convolution2D': lambda: L.Convolution2D(3, 6, (2, 3)),
    'DeconvolutionND': lambda: L.DeconvolutionND(3, 2, 4, 2),
}


def axis_of(link):
    return int(isinstance(link, L.DeconvolutionND))


def assert_leading(link):
    W = cuda.to_cpu(link.W.array).astype('d')
    u = np.linalg.svd(reference.as_matrix(W, axis_of(link)))[0][:, 0]
    assert link.W_u.dtype == link.W.dtype
    assert abs(u @ cuda.to_cpu(link.W_u)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize('device', [
    '@numpy', pytest.param('@cupy:0', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('hook', [
    SpectralNormalization, link_hooks.SpectralNormalization])
@pytest.mark.parametrize('kind', LINKS)
def test_vectors(kind, hook, device):
    link = LINKS[kind]().add_hook(hook())
    link.to_device(device)
    link.W.array[...] = link.xp.asarray(np.random.normal(size=link.W.shape))
    state = np.random.get_state()[1].copy()
    sn_function.refresh(link)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert_leading(link)


@pytest.mark.parametrize('dtype', ['e', 'f', 'd'])
@pytest.mark.parametrize('kind', LINKS)
def test_several_vectors(kind, dtype):
    """The leading ones, in order, whatever n is; also of low rank."""
    with chainer.using_config('dtype', np.dtype(dtype)):
        link = LINKS[kind]().add_hook(SpectralNormalization(n_vectors=4))
    W = link.W.array[...] = np.random.normal(size=link.W.shape)
    sn_function.refresh(link)
    A = reference.as_matrix(link.W.array.astype('d'), axis_of(link))
    u, s, _ = np.linalg.svd(A, full_matrices=False)
    found = np.array([link.W_u, *link.W_us], 'd')
    k = min(4, *A.shape)
    tolerance = 4e-3 if dtype == 'e' else 1e-5
    np.testing.assert_allclose(
        abs(np.sum(found * u.T[:k], axis=1)), 1, rtol=tolerance)
    np.testing.assert_allclose(
        found @ found.T, np.eye(k), atol=tolerance)
    assert link.W_us.dtype == link.W.dtype
    with chainer.using_config('train', False):
        Y = link.local_link_hooks['SpectralNormalization'].normalize_weight(
            link).array
    np.testing.assert_allclose(
        Y, W / s[0], rtol=tolerance, atol=tolerance)


def test_several_vectors_of_a_matrix_of_low_rank():
    for shape in [(6, 9), (9, 6)]:
        with chainer.using_config('dtype', np.float64):
            link = L.Linear(*shape).add_hook(
                SpectralNormalization(n_vectors=4))
        x, y = np.random.normal(size=(2, 9))
        link.W.array[...] = np.outer(x, y)[:len(link.W)][:, :shape[0]]
        link.W.array *= 1e-200  # its square is zero
        arrays = link.W_u, link.W_us
        sn_function.refresh(link)
        assert (link.W_u, link.W_us) == arrays  # in place
        assert_leading(link)
        found = np.array([link.W_u, *link.W_us], 'd')
        np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-6)


def test_several_models():
    models = [chainer.Sequential(L.Linear(4, 3), L.Linear(3, 2)).add_hook(
        ChainSpectralNormalization(n_warmup=0)) for _ in range(2)]
    sn_function.refresh(*models)
    for model in models:
        for link in model:
            assert_leading(link)


@pytest.mark.parametrize('hook', [
    SpectralNormalization, link_hooks.SpectralNormalization])
def test_gamma(hook):
    link = L.Linear(6, 5).add_hook(hook(use_gamma=True))
    before = link.gamma.array.copy()
    link.W.array *= 3
    sn_function.refresh(link)
    np.testing.assert_array_equal(link.gamma.array, before)
    sn_function.refresh(link, gamma=True)
    np.testing.assert_allclose(
        link.gamma.array, reference.true_norm(link.W.array), rtol=1e-5)


def test_it_follows_a_trained_weight():
    """The reason to call it: training in test mode leaves u behind."""
    link = L.Linear(20, 20).add_hook(SpectralNormalization())
    link.W.array[...] = np.diag(np.linspace(1, 1.1, 20))
    with chainer.using_config('train', False):
        x = np.eye(20, dtype='f')
        sn_function.refresh(link)
        y = link(x).array - link.b.array
    assert np.linalg.norm(y, 2) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize('use_gamma', [False, True])
def test_a_zero_weight(use_gamma):
    link = L.Linear(6, 5).add_hook(SpectralNormalization(use_gamma=use_gamma))
    u = link.W_u.copy()
    link.W.array[...] = 0
    sn_function.refresh(link, gamma=True)
    np.testing.assert_array_equal(link.W_u, u)
    if use_gamma:
        assert link.gamma.array == 1


def test_a_weight_that_is_not_finite():
    model = chainer.Sequential(L.Linear(6, 5)).add_hook(
        ChainSpectralNormalization())
    u = model[0].W_u.copy()
    model[0].W.array[0, 0] = np.nan
    with pytest.warns(
            sn_function.errors.SpectralNormalizationWarning,
            match='^/0/W of Linear holds NaN or Inf'):
        sn_function.refresh(model)
    np.testing.assert_array_equal(model[0].W_u, u)


def test_a_lazy_weight():
    link = L.Linear(None, 5).add_hook(SpectralNormalization())
    sn_function.refresh(link)
    assert link.W_u is None


def test_several_vectors_of_which_some_are_missing():
    link = L.Linear(6, 5).add_hook(SpectralNormalization(n_vectors=3))
    link.W_us = None
    sn_function.refresh(link)
    assert link.W_us.shape == (2, 5)
    before = [link.W_u, *link.W_us]
    with chainer.using_config('train', False):
        link(np.ones((2, 6), 'f'))
    np.testing.assert_array_equal([link.W_u, *link.W_us], before)


@pytest.mark.parametrize('given', [
    (), ('x.npz',), (np.ones((2, 2)),), (SpectralNormalization(),)])
def test_what_is_no_model(given):
    with pytest.raises(
            sn_function.errors.ModelTypeError, match=r'^refresh takes'):
        sn_function.refresh(*given)


def test_a_model_without_a_hook():
    with pytest.warns(
            sn_function.errors.NothingToRefreshWarning, match=r'^Linear has'):
        sn_function.refresh(L.Linear(3, 2))


@pytest.mark.parametrize('kind', ['convolution', 'depthwise'])
def test_groups(kind):
    link = (L.Convolution2D(8, 16, 3, groups=4) if kind == 'convolution'
            else L.DepthwiseConvolution2D(8, 2, 3))
    link.add_hook(SpectralNormalization(groups='each'))
    link.W.array[...] = np.random.normal(size=link.W.shape)
    sn_function.refresh(link)
    W = link.W.array.astype('d')
    groups = (np.split(W, 4) if kind == 'convolution'
              else W.transpose(1, 0, 2, 3))
    matrices = [group.reshape(len(group), -1) for group in groups]
    for A, u in zip(matrices, np.split(link.W_u, len(matrices))):
        expected = np.linalg.svd(A)[0][:, 0]
        assert abs(expected @ u) == pytest.approx(1, rel=1e-6)
