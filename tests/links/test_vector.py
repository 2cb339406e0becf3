"""The vector of a weight: made where there is none, and moved to it."""
import chainer.links as L
import numpy as np
import pytest
from chainer.backends import cuda

from sn_function import errors
from sn_function._links import vector
from tests import reference
from tests.links.hooks import Hook

LINKS = {
    'linear': lambda: L.Linear(5, 6),
    'deconvolution': lambda: L.Deconvolution2D(3, 4, 2)}


@pytest.fixture(params=LINKS)
def link(request):
    link = LINKS[request.param]()
    link.W_u = None
    return link


def axis_of(link):
    return int(isinstance(link, L.Deconvolution2D))


def test_a_new_one(link):
    W = link.W.array
    u = vector.find(link, Hook(n_warmup=0), W)
    assert link.W_u is u
    assert u.shape == (W.shape[axis_of(link)],)
    assert u.dtype == W.dtype


def test_a_new_one_is_warmed_up(link):
    W = link.W.array
    u = vector.find(link, Hook(n_warmup=500), W)
    A = reference.as_matrix(W.astype('d'), axis_of(link))
    expected = np.linalg.svd(A)[0][:, 0]
    assert abs(expected @ u) == pytest.approx(1, abs=1e-5)


def test_one_that_is_there(link):
    W = link.W.array
    u = link.W_u = np.ones(W.shape[axis_of(link)], 'f')
    assert vector.find(link, Hook(n_warmup=10), W) is u
    np.testing.assert_array_equal(u, 1)


def test_one_of_another_dtype(link):
    W = link.W.array.astype('d')
    link.W_u = np.ones(W.shape[axis_of(link)], 'f')
    u = vector.find(link, Hook(n_warmup=10), W)
    assert link.W_u is u
    assert u.dtype == 'd'
    np.testing.assert_array_equal(u, 1)


@pytest.mark.gpu
def test_one_on_another_device(link):
    """Such as that of a snapshot that was loaded before the move."""
    link.to_device('@cupy:0')
    W = link.W.array
    link.W_u = np.ones(W.shape[axis_of(link)], 'f')
    u = vector.find(link, Hook(n_warmup=10), W)
    assert link.W_u is u
    assert isinstance(u, cuda.ndarray)
    np.testing.assert_array_equal(cuda.to_cpu(u), 1)


def test_warm_up(link):
    W, axis = link.W.array, axis_of(link)
    u = np.random.normal(size=W.shape[axis]).astype('f')
    expected, _, _ = reference.power_iteration(
        W.astype('d'), u.astype('d'), 3, axis)
    vector.warm_up(link, Hook(n_warmup=3), W, u)
    np.testing.assert_allclose(u, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('value', [0, np.nan])
def test_warm_up_of_a_bad_vector(link, value):
    W = link.W.array
    u = np.full(W.shape[axis_of(link)], value, 'f')
    with pytest.raises(errors.VectorValueError):
        vector.warm_up(link, Hook(n_warmup=1), W, u)
    vector.warm_up(link, Hook(), W, u)


def test_an_empty_weight():
    link = L.Linear(5, 0)
    link.W_u = None
    with pytest.raises(errors.WeightShapeError):
        vector.find(link, Hook(), link.W.array)
    assert link.W_u is None
