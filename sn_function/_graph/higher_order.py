"""The same computation out of Chainer's functions, for higher orders.

The Grad node differentiates this, with all its small nodes, where the
gradient of a gradient is asked for.  Nothing else uses it.
"""
from __future__ import annotations

import math
from typing import Any

import chainer
from chainer import backend
from chainer import functions as F

from sn_function._arithmetic.power_iteration import Settings


def compose(
        settings: Settings, it: Any, W: chainer.Variable, u: Any, gamma: Any,
) -> tuple[chainer.Variable, chainer.Variable]:
    """``Y`` and ``sigma`` out of Chainer's functions, for higher orders."""
    dtype = it.u.dtype
    xp = backend.get_array_module(it.u)
    in_full = F.cast(W, dtype)
    scaled = _divide(in_full, it.scale)
    sigma = _estimate(settings, it, scaled, u)
    divisor, scale, is_above = it.floored(settings.eps)
    if is_above is True:
        divisor = sigma
    elif is_above is not False:  # a device knows, and does not tell
        # Where sigma is not used, its derivatives, which may overflow, must
        # not be there to be multiplied by zero.
        ones = chainer.as_variable(xp.ones_like(scaled.array))
        divisor = _where(is_above, _estimate(
            settings, it, _where(is_above, scaled, ones), u), divisor)
    if isinstance(gamma, chainer.Variable):
        gamma = F.cast(gamma, dtype)
    coefficient = gamma * settings.factor / divisor
    if not isinstance(coefficient, chainer.Variable):
        coefficient = chainer.as_variable(xp.asarray(coefficient, dtype))
    Y = _divide(in_full, scale)
    Y *= F.broadcast_to(coefficient, Y.shape)
    for factor in _factors(it.scale):
        sigma /= factor
    return F.cast(Y, W.dtype), sigma


def _estimate(
        settings: Settings, it: Any, W: chainer.Variable, u: Any,
) -> chainer.Variable:
    """Sigma of a weight that is in its units, in these."""
    A = _Blocks(W, settings.axis)
    if settings.detach_uv:
        return F.sum(it.u * A.dot(chainer.as_variable(it.v)))
    u = _start(it, u)
    for _ in range(settings.n_power_iteration):
        t = A.dot(_unit(A.tdot(u)))
        u = _unit(t)
    return F.sum(u * t)


def _where(condition: Any, x: Any, y: Any) -> chainer.Variable:
    """``x`` where a number of a device is not zero, else ``y``."""
    xp = backend.get_array_module(condition)
    return F.where(
        xp.broadcast_to(condition != 0, x.shape), x, chainer.as_variable(y))


def _start(it: Any, u: Any) -> chainer.Variable:
    """``u_0`` in its units, as a function of u if it is one."""
    start = chainer.as_variable(it.start)
    if not isinstance(u, chainer.Variable) or it.restarted is True:
        return start
    u = _divide(F.cast(u, start.dtype), it.u_scale)
    if it.restarted is False:
        return u
    return _where(it.restarted, start, u)


def _factors(scale: Any) -> tuple[Any, ...]:
    """Factors of the inverse of a power of two, which may overflow itself.

    A device gives them as such.
    """
    if isinstance(scale, tuple):
        return scale
    if scale == 1.0:
        return ()
    exponent = math.frexp(scale)[1] - 1
    half = exponent // 2
    return 2.0 ** -half, 2.0 ** (half - exponent)


def _divide(x: chainer.Variable, scale: Any) -> chainer.Variable:
    """``x / scale``"""
    for factor in _factors(scale):
        if not isinstance(factor, float):
            factor = F.broadcast_to(chainer.as_variable(factor), x.shape)
        x *= factor
    return x


def _unit(x: chainer.Variable) -> chainer.Variable:
    """``x / |x|``, or zero where x is zero; to any order."""
    xp = backend.get_array_module(x.array)
    largest = abs(x.array).max()
    x = x / xp.where(largest == 0, 1, largest).astype(x.dtype)
    square = F.sum(x * x)
    square += (square.array == 0).astype(x.dtype)
    return x / F.broadcast_to(F.sqrt(square), x.shape)


class _Blocks:
    """:class:`_matrix.Matrix` for Variables."""

    def __init__(self, W: chainer.Variable, axis: int) -> None:
        shape = W.shape
        self.W = W
        self.m = shape[axis]
        self.l = math.prod(shape[:axis])
        self.blocks = F.reshape(W, (self.l, self.m, -1))

    def dot(self, v: chainer.Variable) -> chainer.Variable:
        v = F.reshape(v, (self.l, -1, 1))
        return F.reshape(F.sum(F.matmul(self.blocks, v), axis=0), (self.m,))

    def tdot(self, u: chainer.Variable) -> chainer.Variable:
        u = F.broadcast_to(F.reshape(u, (1, 1, -1)), (self.l, 1, self.m))
        return F.reshape(F.matmul(u, self.blocks), (-1,))
