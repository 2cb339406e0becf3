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

from sn_function import _power_iteration as _pi


def compose(
        settings: _pi.Settings, it: _pi.PowerIteration, W: chainer.Variable,
        u: Any, gamma: Any,
) -> tuple[chainer.Variable, chainer.Variable]:
    """``Y`` and ``sigma`` out of Chainer's functions, for higher orders."""
    dtype = it.u.dtype
    xp = backend.get_array_module(it.u)
    A = _Blocks(_divide(F.cast(W, dtype), it.scale), settings.axis)
    if settings.detach_uv:
        sigma = F.sum(it.u * A.dot(chainer.as_variable(it.v)))
    else:
        if it.restarted:
            u = chainer.as_variable(it.us[0])
        else:
            u = chainer.as_variable(u)
            u = _divide(F.cast(u, dtype), it.u_scale)
        for _ in range(settings.n_power_iteration):
            t = A.dot(_unit(A.tdot(u)))
            u = _unit(t)
        sigma = F.sum(u * t)
    divisor, scale, is_above = _pi.floored(it, settings.eps)
    factor = settings.factor * (it.scale / scale)
    if is_above is False:
        coefficient = chainer.as_variable(xp.asarray(factor / divisor, dtype))
    else:
        mask = xp.asarray(is_above, dtype=dtype)
        coefficient = factor / (sigma * mask + divisor * (1 - mask))
    if isinstance(gamma, chainer.Variable):
        gamma = F.cast(gamma, dtype)
    coefficient *= _pi.number(gamma)
    Y = A.W * F.broadcast_to(coefficient, A.W.shape)
    return F.cast(Y, W.dtype), sigma * it.scale


def _divide(x: chainer.Variable, scale: float) -> chainer.Variable:
    """``x / scale`` for a power of two, whose inverse may overflow."""
    if scale == 1.0:
        return x
    exponent = math.frexp(scale)[1] - 1
    half = exponent // 2
    return x * 2.0 ** -half * 2.0 ** (half - exponent)


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
