"""The largest singular value and its vectors, by NumPy's decomposition."""
import tracemalloc

import sn_function  # isort: skip  # before chainer, which it repairs
import numpy as np
import pytest

from sn_function._arithmetic import matrix, singular

assert sn_function


def with_values(m, n, values):
    k = min(m, n)
    U, V = (np.linalg.qr(np.random.normal(size=(size, k)))[0]
            for size in (m, n))
    return (U * values) @ V.T


SPECTRA = {
    'random': lambda m, n: np.random.normal(size=(m, n)),
    'within a thousandth': lambda m, n: with_values(
        m, n, 1 - 1e-3 * np.random.rand(min(m, n))),
    'equal': lambda m, n: with_values(m, n, np.ones(min(m, n))),
    'two equal': lambda m, n: with_values(
        m, n, np.r_[1, 1, np.random.rand(min(m, n) - 2)]),
    'two close': lambda m, n: with_values(
        m, n, np.r_[1, 1 - 1e-9, 0.9 * np.random.rand(min(m, n) - 2)]),
    'geometric': lambda m, n: with_values(m, n, 0.5 ** np.arange(min(m, n))),
    'rank 1': lambda m, n: np.outer(
        np.random.normal(size=m), np.random.normal(size=n)),
    'rank 3': lambda m, n: np.random.normal(size=(m, 3)) @ (
        np.random.normal(size=(3, n))),
    'one entry': lambda m, n: np.eye(m, n) * np.eye(1, n),
    'tiny': lambda m, n: 1e-300 * np.random.normal(size=(m, n)),
    'huge': lambda m, n: 1e300 * np.random.normal(size=(m, n)),
}


@pytest.mark.parametrize('shape', [(280, 300), (300, 260), (270, 270)])
@pytest.mark.parametrize('spectrum', SPECTRA)
def test_largest(spectrum, shape, monkeypatch):
    svd = np.linalg.svd

    def small_only(A, **kwargs):
        assert A.shape != shape
        return svd(A, **kwargs)

    A = SPECTRA[spectrum](*shape)
    expected = np.linalg.svd(A, compute_uv=False)[0]
    before = A.copy()
    scale = np.abs(A).max()
    monkeypatch.setattr(singular.numpy.linalg, 'svd', small_only)
    value, u, v = singular.largest(A)
    np.testing.assert_array_equal(A, before)
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    sigma = value / scale
    np.testing.assert_allclose(A / scale @ v, sigma * u, atol=1e-12 * sigma)
    np.testing.assert_allclose(u @ (A / scale), sigma * v, atol=1e-12 * sigma)
    for x in (u, v):
        np.testing.assert_allclose(x @ x, 1, rtol=1e-12)


def test_the_output_is_the_same_each_time():
    A = np.random.normal(size=(300, 280))
    first, second = (singular.largest(A) for _ in range(2))
    for x, y in zip(first, second):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('n_starts', [1, 20])
def test_too_few_steps(n_starts, monkeypatch):
    """From one vector; it is found from others, or otherwise."""
    A = with_values(300, 280, np.r_[
        1 - 1e-2 * np.random.rand(30), np.random.rand(250)])
    monkeypatch.setattr(singular, 'MAX_STEPS', 40)
    *_, residual = singular._bidiagonalized(
        matrix.Matrix(A, 0), np.random.normal(size=280))
    assert residual > 1e-10
    monkeypatch.setattr(singular, 'MAX_STARTS', n_starts)
    value, u, v = singular.largest(A)
    np.testing.assert_allclose(A @ v, value * u, atol=1e-12 * value)
    np.testing.assert_allclose(
        value, np.linalg.svd(A, compute_uv=False)[0], rtol=1e-13)


@pytest.mark.parametrize('shape', [(3000, 3), (3, 3000)])
def test_memory_of_a_narrow_matrix(shape):
    """An EmbedID of many words: no square of the long side."""
    A = np.random.normal(size=shape)
    tracemalloc.start()
    try:
        value, u, v = singular.largest(A)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * A.nbytes
    np.testing.assert_allclose(value, np.linalg.norm(A, 2), rtol=1e-13)
    np.testing.assert_allclose(A @ v, value * u, atol=1e-12 * value)


def test_zero():
    value, u, _ = singular.largest(np.zeros((300, 280)))
    assert value == 0
    np.testing.assert_allclose(u @ u, 1)


@pytest.mark.parametrize('condition', [1e3, 1e6, 1e9, 1e12])
def test_condition(condition):
    # Of float32 too, whose own precision ends at 1e7: the weight is what it
    # is, and not rounded again.
    U, V = (np.linalg.qr(np.random.RandomState(i).normal(size=(300, 300)))[0]
            for i in range(2))
    A = U * np.geomspace(1, 1 / condition, 300) @ V
    assert singular.singular_values(A, 0)[1] == pytest.approx(
        condition, rel=1e-3)
    W = np.diag(np.geomspace(1, 1 / condition, 300)).astype('f')
    assert singular.singular_values(W, 0)[1] == pytest.approx(
        condition, rel=1e-3)


@pytest.mark.parametrize('dtype', 'efd')
def test_condition_of_a_singular_matrix(dtype):
    W = np.random.RandomState(0).normal(size=(200, 200)).astype(dtype)
    assert singular.singular_values(W, 0)[1] < 1e6
    W[7] = W[3]
    assert singular.singular_values(W, 0)[1] == np.inf


@pytest.mark.parametrize('axis', [0, 1])
def test_a_large_weight_has_no_condition(axis, monkeypatch):
    W = np.random.normal(size=(300, 70, 2, 2)).astype('f')
    A = np.moveaxis(W, axis, 0).reshape(W.shape[axis], -1).astype('d')
    values = np.linalg.svd(A, compute_uv=False)
    np.testing.assert_allclose(
        singular.singular_values(W, axis),
        (values[0], values[0] / values[-1]))
    monkeypatch.setattr(singular, 'LARGE', 60)
    value, condition = singular.singular_values(W, axis)
    np.testing.assert_allclose(value, values[0], rtol=1e-13)
    assert condition is None
