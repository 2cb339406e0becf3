"""What one call must compute, and where u must be then, in float64."""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests import maps, reference

# Relative rounding of what one call computes and stores.
TOLERANCES = {'e': 4e-3, 'f': 4e-5, 'd': 1e-10}


@np.errstate(all='ignore')
def standardized(W):
    """What Chainer's WeightStandardization makes of a weight."""
    A = W.reshape(len(W), -1).astype('d')
    A = (A - A.mean(1, keepdims=True)) / np.sqrt(
        A.var(1, keepdims=True) + 1e-5)
    return A.reshape(W.shape)


class OfMatrix(NamedTuple):
    """How a weight is a matrix, whose norm a hook takes: by its axis."""

    axis: int

    def matrix(self, W):
        return reference.as_matrix(W, self.axis)

    def row_sizes(self, A):
        return np.linalg.norm(A, axis=1)


class OfMap(NamedTuple):
    """By the map of a link without bias, of inputs of a shape."""

    link: Any
    shape: tuple

    def matrix(self, W):
        return maps.dense(self.link, self.shape, W)

    def row_sizes(self, A):
        return abs(A).sum(1)


class Prediction(NamedTuple):
    Y: Any  # None: it depends on the order of operations
    u: Any  # None: it must not change
    sigma: float
    # Below 1, rounding errors in u are as much larger.
    condition: float


def factor_and_floor(hook):
    """A weight below the cap c is left alone, and has norm c above it."""
    if hook.cap is not None:
        return hook.cap, hook.cap
    return hook.factor or 1.0, hook.eps


def not_orthogonal(form, A, u, rounding=0.0):
    """Starts of length 1 that the weight does not take to zero.

    In the place of one that it takes there comes that of the largest row.
    Rows may be equally large, but for rounding.
    """
    u = u / abs(u).max()
    u = u / np.linalg.norm(u)
    if (A.T @ u).any():
        return [u]
    sizes = form.row_sizes(A)
    return list(np.eye(len(u))[sizes >= sizes.max() * (1 - rounding)])


@np.errstate(all='ignore')  # what leaves the range is NaN or Inf in Y, too
def predict(W, u, form, hook, gamma, uv=None):
    """What one call computes, in float64."""
    top = largest_factor(W.dtype)
    W, u = W.astype('d'), u.astype('d')
    factor, eps = factor_and_floor(hook)
    scale = abs(W).max()
    if not np.isfinite(scale):
        return Prediction(W * np.nan, None, np.nan, 1.0)
    c = float(gamma) * factor
    if scale == 0:
        # Zero times what may be Inf in the weight's arithmetic.
        Y = None if abs(c) > top else W * c
        return Prediction(Y, None, 0.0, 1.0)
    A = form.matrix(W / scale)
    u, *_ = not_orthogonal(form, A, u)
    first = np.linalg.norm(A.T @ u)
    u_K, _, sigma = reference.power_iteration(A, u, hook.n_power_iteration)
    if uv is not None:
        sigma = uv[0] @ A @ uv[1]
    if abs(c / max(sigma * scale, eps)) > top:
        # What W is multiplied by may be Inf, though Y is not: it depends on
        # whether W was divided by its scale first.
        Y = None
    elif sigma * scale < eps:
        Y = W * (c / eps)
    else:
        # Not W / (sigma * scale), which may leave the range.
        Y = W / scale * (c / sigma)
    return Prediction(
        Y, u_K, sigma * scale, first / reference.true_norm(A))


def assert_close(actual, expected, tolerance, of=1.0):
    """Relative to the largest entry; NaN where NaN is expected.

    What is too large for the dtype is not finite, and rounding decides of
    what is as large as its largest number.  Where the result is ``of`` times
    a number, that may be subnormal, and so lack digits.

    """
    __tracebackhide__ = True
    assert actual.shape == expected.shape
    ratio = abs(expected) / float(np.finfo(actual.dtype).max)
    with np.errstate(invalid='ignore'):  # of NaN, by NumPy 1.17
        is_known = ~(abs(ratio - 1) <= tolerance)
        finite = is_known & (ratio < 1)
    assert np.array_equal(
        finite, is_known & np.isfinite(actual)), (actual, expected)
    if finite.any():
        scale = abs(expected[finite]).max()
        error = abs(actual[finite].astype('d') - expected[finite]).max()
        tiny = 4 * smallest_subnormal(actual.dtype) * max(1.0, float(of))
        assert error <= tolerance * scale + tiny, (actual, expected)


def same_values(a, b):
    """As array_equal with equal_nan, which came with NumPy 1.19."""
    return a.shape == b.shape and bool(
        ((a == b) | (np.isnan(a) & np.isnan(b))).all())


def smallest_subnormal(dtype):
    """As NumPy's finfo has it from version 1.22 on."""
    return float(np.nextafter(dtype.type(0), dtype.type(1)))


def largest_factor(dtype):
    """Of what is computed with weights of this dtype."""
    return float(np.finfo(np.result_type(dtype, 'f')).max)


def same_bits(a, b):
    if a is None or b is None:
        return a is b
    return (a.dtype == b.dtype and a.shape == b.shape
            and a.tobytes() == b.tobytes())


def copy_of(array):
    return None if array is None else array.copy()
