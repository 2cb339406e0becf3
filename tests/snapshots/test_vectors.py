"""The vectors of one library, from those of the other."""
import sn_function  # isort: skip  # before chainer, which it repairs
import numpy as np
import pytest

from sn_function._snapshots import vectors
from sn_function._snapshots.vectors import WeightArrays
from tests import reference

assert sn_function

SHAPES = [(4, 9), (9, 4), (6, 6), (1, 5), (5, 1)]


def unit(x):
    return x / np.linalg.norm(x)


def torch_vectors(W, is_newer):
    """Those of PyTorch after an iteration, far from converged."""
    v = unit(W.T @ np.random.normal(size=W.shape[0]))
    u = unit(W @ v)
    if is_newer:
        v = unit(W.T @ u)
    return u, v


@pytest.mark.parametrize('is_newer', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_start_vector_gives_the_sigma_of_pytorch(shape, is_newer):
    W = np.random.normal(size=shape)
    u, v = torch_vectors(W, is_newer)
    x = vectors.start_vector(W, u, v)
    assert reference.power_iteration(W, x)[2] == pytest.approx(
        u @ W @ v, rel=1e-9)


def test_start_vector_of_a_large_or_zero_weight_is_u(monkeypatch):
    W = np.random.normal(size=(5, 6))
    u, v = torch_vectors(W, False)
    np.testing.assert_array_equal(vectors.start_vector(0 * W, u, v), u)
    assert (vectors.start_vector(W, u, v) != u).any()
    monkeypatch.setattr('sn_function._arithmetic.singular.LARGE', 4)
    np.testing.assert_array_equal(vectors.start_vector(W, u, v), u)


@pytest.mark.parametrize('n', [1, 3])
@pytest.mark.parametrize('axis', [0, 1, 2])
def test_vectors_for_pytorch_are_those_of_the_iterations(axis, n):
    W = np.random.normal(size=(4, 5, 3))
    u = np.random.normal(size=W.shape[axis])
    arrays = WeightArrays(W, axis, u)
    new = vectors.converted(arrays, True, n)
    expected = reference.power_iteration(W, u, n, axis)
    np.testing.assert_allclose(new.u, expected[0], rtol=1e-12)
    np.testing.assert_allclose(new.v, expected[1], rtol=1e-12)
    sigma, difference = vectors.compare(new, arrays, n)
    assert sigma == pytest.approx(expected[2], rel=1e-12)
    assert difference < 1e-12


@pytest.mark.parametrize('to_torch', [False, True])
@pytest.mark.parametrize('dtype', ['f', 'd'])
def test_converged_vectors(dtype, to_torch):
    W = np.random.normal(size=(4, 6)).astype(dtype)
    arrays = WeightArrays(W, 0, np.ones(4, dtype))
    new = vectors.converted(arrays, to_torch, 1, converge=True)
    assert new.u.dtype == dtype
    assert (new.v is not None) == to_torch
    assert vectors.estimate(new) == pytest.approx(
        reference.true_norm(W), rel=1e-6)


@pytest.mark.parametrize('v', [None, np.ones(6)])
def test_vectors_of_the_same_library_stay(v):
    arrays = WeightArrays(np.ones((4, 6)), 0, np.ones(4), v)
    assert vectors.converted(arrays, v is not None, 1) is arrays


def test_partner():
    W = np.random.normal(size=(4, 6))
    u = np.random.normal(size=4).astype('f')
    v = vectors.partner(W, u)
    assert v.dtype == np.float32
    np.testing.assert_allclose(v, unit(W.T @ u), rtol=1e-5, atol=1e-6)
    v = vectors.partner(0 * W, u)
    assert np.linalg.norm(v) == pytest.approx(1)


def test_fit_and_angle():
    W = np.random.normal(size=(5, 8))
    U, _, V = np.linalg.svd(W)
    assert vectors.fit(W, 3 * U[:, 0]) == pytest.approx(1)
    assert vectors.fit(W, U @ np.ones(5)) < .9
    assert vectors.fit(0 * W, U[:, 0]) == 0
    assert vectors.angle(W, 2 * U[:, 0], V[0]) == pytest.approx(1)
    assert vectors.angle(W, U[:, 1], V[0]) == pytest.approx(0, abs=1e-12)
    assert vectors.angle(0 * W, U[:, 0], V[0]) == 0
