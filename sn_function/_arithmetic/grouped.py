"""Normalization of a weight by the largest of its groups, and its gradient.

The groups ``W_1 .. W_G`` of a weight are maps of their own, side by side, so
the norm of all of them is that of the largest:

    sigma = max_g sigma_g        Y = gamma f W / max(sigma, eps)

Each ``sigma_g`` is from iterations of its own, of :mod:`.group_iterations`, or
of :mod:`.group_subspace` from several vectors, and the gradient of sigma is
that of the largest one.  As there, all is for NumPy and for CuPy.
"""
from __future__ import annotations

import math
from typing import Any

import chainer
import numpy

from sn_function._arithmetic import (
    buffers,
    group_iterations,
    group_subspace,
    power_iteration,
)
from sn_function._arithmetic.group_iterations import (
    Iterations,
    Vectors,
    as_groups,
    as_rows,
    transposed,
)
from sn_function._arithmetic.group_maps import GroupMaps
from sn_function._arithmetic.interface import (
    GAMMA_LIMIT,
    GAMMA_TURN,
    Arrays,
    Backward,
    Forward,
    Settings,
)
from sn_function._arithmetic.matrix import accumulator_dtype


def normalize(call: Forward) -> tuple[Arrays, Iterations]:
    """Returns ``Y`` and ``sigma``, as named, and what backward needs.

    Call it with NumPy's warnings off, as :func:`.power_iteration.normalize`.

    Raises:
        VectorValueError: On the host, ``u`` is zero or not finite.

    """
    settings, W = call.settings, call.W
    dtype = accumulator_dtype(W.dtype)
    array = W.astype(dtype, copy=False)
    A, n = _matrices(settings, array), settings.n_power_iteration
    if settings.n_vectors is None:
        iterations = group_iterations.power_iteration(
            A, call.u, n, call.renewal)
    else:
        iterations = group_subspace.subspace_iteration(
            A, call.u, n, call.update_u, call.renewal)
    outputs: Arrays = ()
    _renew_gamma(call, iterations)
    if 'Y' in call.output_names:
        Y = _times(array, _coefficient_of_Y(call, iterations),
                   buffers.empty_of(W, call.reuse and W is array))
        outputs = Y.astype(W.dtype, copy=False),
    if 'sigma' in call.output_names:
        xp = chainer.backend.get_array_module(W)
        outputs += xp.asarray(iterations.sigma).astype(dtype),
    return outputs, iterations


def _renew_gamma(call: Forward, iterations: Any) -> None:
    """As :func:`.power_iteration.renew_gamma`, on a device, too."""
    if isinstance(iterations.sigma, float):
        power_iteration.renew_gamma(call, iterations)
        return
    gamma, sigma = call.gamma, iterations.sigma
    initial = call.renewal.initial_gamma
    if initial is None:
        return
    xp = chainer.backend.get_array_module(sigma)
    value = xp.where(sigma > 0, sigma, 1.0).astype(gamma.dtype)
    is_off = (gamma == initial) & xp.isfinite(value) & (
        abs(sigma - gamma) > GAMMA_LIMIT * gamma) & (
        (sigma > gamma) | (iterations.turn() <= GAMMA_TURN))
    gamma[...] = xp.where(is_off, value, gamma)
    initial[...] = xp.where(is_off, value, initial)


def _coefficient_of_Y(call: Forward, iterations: Any) -> Any:
    """As :func:`.power_iteration.coefficient_of_Y`, on a device, too."""
    if isinstance(iterations.sigma, float):
        return power_iteration.coefficient_of_Y(call, iterations)
    divisor, _ = iterations.floored(call.settings)
    return _number(call.gamma) * call.settings.factor / divisor


def _split(settings: Settings, W: Any) -> Any:
    assert settings.groups is not None
    return settings.groups.split(W, settings.axis)


def largest_group(
        settings: Settings, iterations: Iterations, W: Any,
) -> tuple[Any, Settings]:
    """Returns the largest group as a weight, and how that is a matrix."""
    block = _split(settings, W)[iterations.largest][0]
    convolution = settings.convolution
    if convolution is None:
        return block, settings._replace(axis=1)
    return block.reshape(convolution.shape_of_group(W.shape)), (
        settings._replace(convolution=convolution.of_group()))


def _matrices(settings: Settings, W: Any) -> Any:
    """Returns what iterations are run on: the groups, or their maps."""
    if settings.convolution is None:
        return _split(settings, W)
    assert settings.groups is not None
    return GroupMaps(W, settings.groups, settings.convolution)


def normalize_and_store(call: Forward) -> tuple[Arrays, Iterations]:
    """:func:`normalize`, which then overwrites ``u`` if that is asked for."""
    outputs, iterations = normalize(call)
    if call.update_u:
        store(call.u, iterations)
    return outputs, iterations


def store(u: Any, iterations: Iterations) -> None:
    """Overwrites ``u`` with what follows, where sigma is positive and finite.

    Nothing is changed where one is not finite; the vector of a group whose
    sigma is zero stays as it is.
    """
    xp = chainer.backend.get_array_module(u)
    is_good = (iterations.sigmas > 0) & xp.isfinite(iterations.sigma)
    old = as_groups(u, len(is_good))
    u[...] = as_rows(xp.where(
        is_good.reshape(-1, 1, 1, 1), iterations.following, old)).reshape(
            u.shape)


def gradients(call: Backward) -> Arrays:
    """Returns ``gW``, ``gu`` and ``ggamma``, as wanted.

    Call it with NumPy's warnings off, as :func:`.power_iteration.normalize`.

    """
    settings, iterations, wanted, W, u, gamma, gY, gsigma, reuse = call
    dtype = iterations.vectors.us[0].dtype
    array = W.astype(dtype, copy=False)
    a, c, dot = 0.0, 0.0, 0.0  # gW = a gY + c G
    if gY is not None:
        gY = gY.astype(dtype, copy=False)
        a, c, dot = _coefficients(
            settings, iterations, gamma, _inner(gY, array))
    if gsigma is not None:
        c = c + _number(gsigma)
    grads: dict[str, Any] = {}
    if 'gamma' in wanted:
        xp = chainer.backend.get_array_module(W)
        grads['gamma'] = xp.asarray(settings.factor * dot).astype(gamma.dtype)
    if 'W' in wanted or 'u' in wanted:
        G, ubar = _of_sigma(settings, iterations, array, 'u' in wanted)
        if 'W' in wanted:
            out = _times(gY, a, buffers.empty_of(
                W, reuse and W is array), array)
            blocks = _split(settings, out)
            blocks[iterations.largest] += (G * c).astype(
                dtype, copy=False).reshape(1, *blocks.shape[1:])
            grads['W'] = out.astype(W.dtype, copy=False)
        if 'u' in wanted:
            xp = chainer.backend.get_array_module(W)
            gu = xp.zeros_like(iterations.vectors.us[0])
            gu[iterations.largest] = ubar * c
            grads['u'] = gu.reshape(-1).astype(u.dtype)
    return tuple([grads[name] for name in wanted])


def _coefficients(
        settings: Settings, iterations: Any, gamma: Any, dot: Any,
) -> tuple[Any, Any, Any]:
    """As :func:`.power_iteration.coefficients`, on a device, too."""
    if isinstance(dot, float):
        return power_iteration.coefficients(
            settings, iterations, gamma, dot)
    xp = chainer.backend.get_array_module(dot)
    divisor, is_above = iterations.floored(settings)
    dot = dot / divisor
    a = _number(gamma) * settings.factor / divisor
    return a, xp.where(is_above, -a * dot, 0.0), dot


def _of_sigma(
        settings: Settings, iterations: Iterations, W: Any, need_u: bool,
) -> tuple[Any, Any]:
    """Differentiates sigma with respect to the largest group and its vector.

    Returns:
        ``G``, in the order of the group's entries, and the derivative with
        respect to the vector that was given, shape ``(1, 1, 1, m)``, or
        ``None``.

    """
    largest, A = iterations.largest, _matrices(settings, W)
    vectors = Vectors(*[
        [x[largest] for x in column] for column in iterations.vectors])
    if settings.detach_uv or settings.n_vectors is not None:
        return _product(A, largest, vectors.us[-1], vectors.vs[-1]), None
    scale, u_norm, restarts = [
        x[largest] if hasattr(x, 'shape') else x for x in (
            iterations.scale, iterations.u_norm, iterations.restarts)]
    of_group = A.pick(largest) if isinstance(A, GroupMaps) else A[largest]
    P, Q, ubar = group_iterations.adjoint(
        group_iterations.divided(of_group, scale).astype(
            vectors.us[0].dtype, copy=False), vectors, need_u)
    if ubar is not None:
        ubar = ubar * (scale / u_norm)
        if restarts is not False:
            xp = chainer.backend.get_array_module(ubar)
            ubar = xp.where(restarts, 0, ubar)
    return _product(A, largest, P, Q), ubar


def _product(A: Any, largest: Any, P: Any, Q: Any) -> Any:
    """``P^T Q``, the gradient with respect to the entries of the group."""
    if isinstance(A, GroupMaps):
        return A.pick(largest).gradient(P, Q)
    return transposed(P) @ Q


def _inner(x: Any, y: Any) -> Any:
    """``<x, y>``, in float64 if need be: a float, or an array of a device.
    """
    if isinstance(x, numpy.ndarray):
        found = float(x.ravel().dot(y.ravel()))
        if math.isfinite(found):
            return found
    return (x.astype(numpy.float64) * y).sum()


def _number(x: Any) -> Any:
    """A number, or an array of shape ``()``: as a float, on the host."""
    return (x.item() if isinstance(x, numpy.ndarray)
            else x if isinstance(x, float) else x.astype(numpy.float64))


def _times(x: Any, number: Any, empty: Any, like: Any = None) -> Any:
    """``x`` times a number, in its dtype; zeros if x is ``None``.

    Args:
        x: An array, or ``None``.
        number: A number, or an array of shape ``()`` and dtype float64.
        empty: Makes the array that is returned, on the host.
        like: An array of the shape and dtype of the result.

    """
    like = x if like is None else like
    xp = chainer.backend.get_array_module(like)
    out = (xp.empty if xp is not numpy else empty)(like.shape, like.dtype)
    if x is None:
        out[...] = 0
        return out
    if xp is numpy:
        return numpy.multiply(x, float(number), out=out)
    # Of one dimension more, it is not taken for a number of the dtype of x.
    out[...] = x * number.reshape((1,) * x.ndim)
    return out
