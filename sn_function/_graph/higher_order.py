"""The same computation out of Chainer's functions, for higher orders.

The Grad node differentiates this, with all its small nodes, where the
gradient of a gradient is asked for.  Nothing else uses it.

The weight is divided by its sigma first, as a constant, so that the powers of
sigma in higher orders do not leave the range: sigma of that is near 1, and
``W / sigma`` is the same.  It is multiplied twice by ``root = sigma^(-1/2)``,
as neither the inverse of sigma nor sigma itself need be in the range of W.
"""
from __future__ import annotations

import math
from typing import Any

import chainer
import numpy
from chainer import backend
from chainer import functions as F

from sn_function._arithmetic.convolution import Convolution
from sn_function._arithmetic.interface import Iterations, Settings
from sn_function._arithmetic.matrix import accumulator_dtype
from sn_function._graph.leading_vector import leading_vector


def compose(
        settings: Settings, iterations: Iterations, W: chainer.Variable,
        u: Any, gamma: Any,
) -> tuple[chainer.Variable, chainer.Variable]:
    """``Y`` and ``sigma`` out of Chainer's functions, for higher orders."""
    dtype = iterations.u.dtype
    xp = backend.get_array_module(iterations.u)
    in_full = F.cast(W, dtype)
    if isinstance(u, chainer.Variable):
        u = F.cast(u, dtype)  # once: its gradients are added in that dtype
    root = _root(iterations.sigma, dtype)
    scaled = _times(in_full, root, root)
    sigma = _estimate(settings, iterations, scaled, u)
    if isinstance(gamma, chainer.Variable):
        gamma = F.cast(gamma, dtype)
    floor, is_above = iterations.floored(settings)
    Y = in_full
    if is_above is True:
        Y, divisor = scaled, sigma
    elif is_above is False:
        divisor = floor
    else:  # a device knows, and does not tell
        # Where sigma is not used, its derivatives, which may overflow, must
        # not be there to be multiplied by zero.
        ones = chainer.as_variable(xp.ones_like(scaled.array))
        Y = _where(is_above, scaled, in_full)
        divisor = _where(is_above, _estimate(
            settings, iterations, _where(is_above, scaled, ones), u),
            xp.asarray(floor, dtype))
    coefficient = gamma * settings.factor / divisor
    if not isinstance(coefficient, chainer.Variable):
        coefficient = chainer.as_variable(xp.asarray(coefficient, dtype))
    Y = Y * F.broadcast_to(coefficient, Y.shape)
    return F.cast(Y, W.dtype), F.cast(
        sigma / root / root, accumulator_dtype(W.dtype))


def _root(sigma: Any, dtype: Any) -> Any:
    """``sigma^(-1/2)``, or 1 where sigma is zero."""
    if isinstance(sigma, float):
        return (sigma or 1.0) ** -0.5
    xp = backend.get_array_module(sigma)
    return (xp.where(sigma == 0, 1., sigma) ** -0.5).astype(dtype)


def _estimate(
        settings: Settings, iterations: Iterations, W: chainer.Variable,
        u: Any) -> chainer.Variable:
    """Sigma of a multiple of the weight that the iterations were run on."""
    axis = settings.axis
    of_group: Any = iterations
    if settings.groups is not None:
        W, u, of_group = _largest_group(settings, iterations, W, u)
        axis = 1
    A = (_Blocks(W, axis) if settings.convolution is None
         else _Map(W, settings.convolution))
    if settings.detach_uv:
        return F.sum(of_group.u * A.dot(chainer.as_variable(of_group.v)))
    if settings.n_vectors is not None:
        return _largest_in_span(A, of_group)
    u = _start(of_group, u)
    for _ in range(settings.n_power_iteration):
        t = A.dot(_unit(A.tdot(u)))
        u = _unit(t)
    return F.sum(u * t)


def _largest_in_span(A: _Blocks | _Map, iterations: Any) -> chainer.Variable:
    """Sigma of several vectors, whose span is a constant."""
    S = A.tdot_all(iterations.basis)
    in_full = F.cast(S, numpy.float64)
    c = F.cast(leading_vector(
        F.matmul(in_full, in_full, transb=True), S.dtype), S.dtype)
    s = F.matmul(F.reshape(c, (1, -1)), S)
    return F.sum(s * _unit(s))


def _largest_group(
        settings: Settings, iterations: Any, W: chainer.Variable, u: Any,
) -> tuple[chainer.Variable, Any, Any]:
    """Returns the largest group as a weight of output axis 1, and its own.

    A group is chosen by a sum over all, of which the others are multiplied by
    zero: so it is on a device, which does not tell which one it is.
    """
    assert settings.groups is not None
    xp = backend.get_array_module(W.array)
    blocks = settings.groups.split(W, settings.axis)
    G, _, m, _ = blocks.shape
    chosen = xp.zeros((G, 1), W.dtype)
    chosen[iterations.largest] = 1
    weight = F.sum(blocks * F.broadcast_to(chainer.as_variable(
        chosen.reshape(G, 1, 1, 1)), blocks.shape), axis=0)
    if isinstance(u, chainer.Variable):
        u = F.reshape(u, (G, m))
        u = F.sum(u * F.broadcast_to(
            chainer.as_variable(chosen.astype(u.dtype)), (G, m)), axis=0)
    return weight, u, iterations.of_largest()


def _where(condition: Any, x: Any, y: Any) -> chainer.Variable:
    """``x`` where a number of a device is not zero, else ``y``."""
    xp = backend.get_array_module(condition)
    return F.where(
        xp.broadcast_to(condition != 0, x.shape), x, chainer.as_variable(y))


def _start(iterations: Iterations, u: Any) -> chainer.Variable:
    """A multiple of ``u_0``, as a function of u if it is one."""
    dtype = iterations.u.dtype
    start = chainer.as_variable(iterations.start.astype(dtype, copy=False))
    if not isinstance(u, chainer.Variable) or iterations.restarted is True:
        return start
    u = _unit(u)
    if iterations.restarted is False:
        return u
    return _where(iterations.restarted, start, u)


def _times(x: chainer.Variable, *factors: Any) -> chainer.Variable:
    for factor in factors:
        if not isinstance(factor, float):
            factor = F.broadcast_to(chainer.as_variable(factor), x.shape)
        x = x * factor
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
    """:class:`._arithmetic.matrix.Matrix` for Variables."""

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

    def tdot_all(self, U: Any) -> chainer.Variable:
        b = len(U)
        U = F.broadcast_to(chainer.as_variable(U), (self.l, *U.shape))
        return F.reshape(F.transpose(
            F.matmul(U, self.blocks), (1, 0, 2)), (b, -1))


class _Map:
    """:class:`._arithmetic.convolution.ConvolutionMatrix` for Variables."""

    def __init__(self, W: chainer.Variable, convolution: Convolution) -> None:
        self.W = W
        self.convolution = convolution

    def dot(self, v: chainer.Variable) -> chainer.Variable:
        v = F.reshape(v, (1, *self.convolution.out_shape(self.W.shape)))
        return F.flatten(self.convolution.adjoint(self.W, v))

    def tdot(self, u: chainer.Variable) -> chainer.Variable:
        return F.flatten(self.tdot_all(F.reshape(u, (1, -1))))

    def tdot_all(self, U: Any) -> chainer.Variable:
        U = F.reshape(U, (-1, *self.convolution.in_shape(self.W.shape)))
        return F.reshape(
            self.convolution.apply(self.W, U), (len(U), -1))
