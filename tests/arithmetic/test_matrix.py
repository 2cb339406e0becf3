"""The matrix view and its products, for any output axis."""
import chainer
import numpy as np
import pytest

from sn_function import errors
from sn_function._arithmetic import matrix
from tests import reference

CASES = [(shape, axis) for shape in [
    (4, 3), (1, 5), (5, 1), (4, 3, 2), (2, 3, 4, 5), (1, 3, 1, 2),
    (2, 1, 3, 2, 2)] for axis in range(len(shape))]


@pytest.mark.parametrize(('shape', 'axis'), CASES)
class TestMatrix:

    def test_products(self, shape, axis):
        W = np.random.normal(size=shape)
        A, expected = matrix.Matrix(W, axis), reference.as_matrix(W, axis)
        assert (A.m, A.n) == expected.shape
        u, v = np.random.normal(size=A.m), np.random.normal(size=A.n)
        np.testing.assert_allclose(A.dot(v), expected @ v)
        np.testing.assert_allclose(A.tdot(u), expected.T @ u)
        X = np.random.normal(size=shape)
        inner, y = A.inner_and_tdot(X, u)
        np.testing.assert_allclose(inner, np.sum(X * W))
        np.testing.assert_allclose(y, expected.T @ u)

    def test_is_a_view(self, shape, axis):
        W = np.random.normal(size=shape)
        assert np.shares_memory(matrix.Matrix(W, axis)._blocks, W)

    @pytest.mark.parametrize('scale', [1, 1e-300, 1e300])
    def test_row_norms(self, shape, axis, scale):
        W = np.random.normal(size=shape)
        rows = np.linalg.norm(reference.as_matrix(W, axis), axis=1)
        A = matrix.Matrix(W * scale, axis)
        np.testing.assert_allclose(A.row_norms(), rows * scale, rtol=1e-12)
        u = A.start_at_largest_row('f')
        assert u.dtype == np.float32
        np.testing.assert_array_equal(
            u, np.arange(len(rows)) == rows.argmax())

    def test_as_matrix(self, shape, axis):
        W = np.random.normal(size=shape)
        expected = reference.as_matrix(W, axis)
        np.testing.assert_array_equal(matrix.as_matrix(W, axis), expected)
        of_variable = matrix.as_matrix(chainer.Variable(W), axis)
        np.testing.assert_array_equal(of_variable.array, expected)


@pytest.mark.parametrize('size', [1e-300, 1e-160, 1, 1e160, 1e300])
def test_careful_norm(size):
    x = np.random.normal(size=50)
    norm = matrix.careful_norm(x * size)
    assert norm / size == pytest.approx(np.linalg.norm(x), rel=1e-12)
    if size == 1:
        assert matrix.ordinary_norm(x) == pytest.approx(norm, rel=1e-12)
    else:
        with pytest.raises(matrix.ExtremeNormError), np.errstate(all='ignore'):
            matrix.ordinary_norm(x * size)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_careful_norm_of_what_is_not_finite(bad):
    assert np.isnan(matrix.careful_norm(np.array([1, bad, 2])))
    assert matrix.careful_norm(np.zeros(3)) == 0


@pytest.mark.parametrize('rank', [1, 2, 4])
@pytest.mark.parametrize('size', ['as it is', 'in blocks', 'in single rows'])
@pytest.mark.parametrize(('shape', 'axis'), CASES)
def test_combination(shape, axis, size, rank, monkeypatch):
    if size != 'as it is':
        monkeypatch.setattr(matrix, 'SMALL_SIZE', 0)
        monkeypatch.setattr(matrix, 'LARGE_SIZE', 0)
        monkeypatch.setattr(
            matrix, 'BLOCK_SIZE', 7 if size == 'in blocks' else 1)
    W, X = np.random.normal(size=(2, *shape))
    A = matrix.Matrix(W, axis)
    P = np.random.normal(size=(rank, A.m))
    Q = np.random.normal(size=(rank, A.n))
    P_then, Q_then, X_then = P.copy(), Q.copy(), X.copy()
    for X_given in (X, None, np.asfortranarray(X)):
        out = A.combination(1.5, X_given, 0.7, P, Q)
        assert out.shape == shape
        assert out.flags.c_contiguous
        expected = 0.7 * P.T @ Q
        if X_given is not None:
            expected = expected + 1.5 * reference.as_matrix(X, axis)
        np.testing.assert_allclose(
            reference.as_matrix(out, axis), expected, atol=1e-14)
    inner, y = A.inner_and_tdot(np.asfortranarray(X), P[0])
    np.testing.assert_allclose(inner, np.sum(X * W))
    np.testing.assert_allclose(y, reference.as_matrix(W, axis).T @ P[0])
    for then, now in ((P_then, P), (Q_then, Q), (X_then, X)):
        np.testing.assert_array_equal(then, now)


@pytest.mark.parametrize('rank', [1, 2])
@pytest.mark.parametrize(('a', 'c'), [
    (0, 1), (1, 0), (0, 0), (1e-30, 1), (1, 1e-30), (1e30, 1), (1, 1e30),
    (1e-38, 1e-38), (1e-45, 1e30), (1, np.nan), (np.nan, 1)])
def test_factors_of_a_combination_of_any_size(a, c, rank, monkeypatch):
    """Nothing overflows or is lost on the way."""
    monkeypatch.setattr(matrix, 'SMALL_SIZE', 0)
    W, X = np.random.normal(size=(2, 6, 5)).astype('f')
    X[2:4] = 0  # so that the smaller term is all that is there
    P, Q = (np.random.normal(size=(rank, k)).astype('f') for k in (6, 5))
    with np.errstate(all='ignore'):
        out = matrix.Matrix(W, 0).combination(a, X, c, P, Q)
        term, product = a * X.astype('d'), c * (P.astype('d').T @ Q)
        expected = (term + product).astype('f')
    for x, y, *terms in zip(out, expected, term, product):
        size = max(np.abs(of_row).max() for of_row in terms)
        np.testing.assert_allclose(x, y, atol=1e-6 * size + 1e-44)


@pytest.mark.parametrize('rank', [1, 2])
def test_a_combination_of_large_vectors(rank, monkeypatch):
    """As of a nearly orthogonal u; no product of theirs with c/a overflows."""
    monkeypatch.setattr(matrix, 'SMALL_SIZE', 0)
    X = np.random.normal(size=(6, 5)).astype('f')
    P = np.random.normal(size=(rank, 6)).astype('f')
    Q = np.float32(1e29) * np.random.normal(size=(rank, 5)).astype('f')
    out = matrix.Matrix(X, 0).combination(1e-13, X, 1.0, P, Q)
    np.testing.assert_allclose(out, P.T @ Q, rtol=1e-4, atol=1e24)


def test_the_buffer_of_numpy_is_as_it_was(monkeypatch):
    monkeypatch.setattr(matrix, 'SMALL_SIZE', 0)
    W, X = np.random.normal(size=(2, 6, 5))
    before = np.getbufsize()
    assert before > 16
    seen = []
    product = matrix._product
    monkeypatch.setattr(matrix, '_product', lambda *args: (
        seen.append(np.getbufsize()), product(*args)))
    with np.errstate(over='raise'):
        A = matrix.Matrix(W, 0)
        P, Q = np.ones((1, 6)), np.full((1, 5), 1e20)
        A.combination(1.5, X, 0.7, P, Q)
        assert seen == [16]
        assert np.getbufsize() == before
        with pytest.raises(FloatingPointError):
            A.combination(1e300, X, 1e300, P, Q)
        assert np.getbufsize() == before
        assert np.geterr()['over'] == 'raise'


def test_normalize_axis():
    assert [matrix.normalize_axis(a, 3) for a in (0, 2, -1, -3)] == [
        0, 2, 2, 0]
    assert matrix.normalize_axis(np.int64(1), 2) == 1


@pytest.mark.parametrize('axis', [2, -3, 0.5, None, 'W', True])
def test_axis_out_of_range(axis):
    with pytest.raises(errors.AxisError):
        matrix.normalize_axis(axis, 2)
