"""The matrix view and its products, for any output axis."""
import numpy as np
import pytest

from sn_function import _matrix, errors
from tests import reference

CASES = [(shape, axis) for shape in [
    (4, 3), (1, 5), (5, 1), (4, 3, 2), (2, 3, 4, 5), (1, 3, 1, 2),
    (2, 1, 3, 2, 2)] for axis in range(len(shape))]


@pytest.mark.parametrize(('shape', 'axis'), CASES)
class TestMatrix:

    def test_products(self, shape, axis):
        W = np.random.normal(size=shape)
        A, expected = _matrix.Matrix(W, axis), reference.as_matrix(W, axis)
        assert (A.m, A.n) == expected.shape
        u, v = np.random.normal(size=A.m), np.random.normal(size=A.n)
        np.testing.assert_allclose(A.dot(v), expected @ v)
        np.testing.assert_allclose(A.tdot(u), expected.T @ u)
        P, Q = np.random.normal(size=(3, A.m)), np.random.normal(size=(3, A.n))
        outer = A.outer(P, Q)
        assert outer.shape == shape
        np.testing.assert_allclose(
            reference.as_matrix(outer, axis), P.T @ Q)

    def test_is_a_view(self, shape, axis):
        W = np.random.normal(size=shape)
        assert np.shares_memory(_matrix.Matrix(W, axis)._blocks, W)

    def test_scaled(self, shape, axis):
        W = np.random.normal(size=shape)
        v = np.random.normal(size=W.size // shape[axis])
        A = _matrix.Matrix(W, axis)
        np.testing.assert_array_equal(A.scaled(4).dot(v), A.dot(v) / 4)

    def test_largest_row(self, shape, axis):
        W = np.random.normal(size=shape)
        rows = np.linalg.norm(reference.as_matrix(W, axis), axis=1)
        assert _matrix.Matrix(W, axis).largest_row() == rows.argmax()


def test_normalize_axis():
    assert [_matrix.normalize_axis(a, 3) for a in (0, 2, -1, -3)] == [
        0, 2, 2, 0]
    assert _matrix.normalize_axis(np.int64(1), 2) == 1


@pytest.mark.parametrize('axis', [2, -3, 0.5, None, 'W', True])
def test_axis_out_of_range(axis):
    with pytest.raises(errors.AxisError):
        _matrix.normalize_axis(axis, 2)
