"""How good an estimate of sigma is; arrays only, on any device.

From the stored vector, ``K`` power iterations give unit vectors ``u`` and
``v`` and ``sigma = |W v|``, so ``W v = sigma u`` holds by construction.  What
need not hold is the other equation of a singular triple, and how far it is
off is the residual

    r = |W^T u - sigma v| / sigma

With several vectors it is the other way round: ``W^T u = sigma v`` holds, and
``r = |W v - sigma u| / sigma``.

As ``v . W^T u = sigma``, Pythagoras gives ``|W^T u|^2 = sigma^2 (1 + r^2)``,
or that of ``|W v|^2``, so the largest singular value is at least ``sigma
sqrt(1 + r^2)``.  And some singular value is within ``r sigma / sqrt(2)`` of
the estimate: ``(u, v)`` is an approximate eigenvector of the symmetric matrix
``[[0, W], [W^T, 0]]``, whose eigenvalues are plus and minus the singular
values, and 0.
"""
from __future__ import annotations

import math
from typing import Any

import chainer
import numpy

from sn_function._arithmetic import power_iteration, singular
from sn_function._arithmetic.choose import arithmetic_of
from sn_function._arithmetic.convolution import Convolution
from sn_function._arithmetic.groups import Groups
from sn_function._arithmetic.interface import (
    NEVER,
    Forward,
    Iterations,
    Renewal,
    Settings,
    n_vectors_of,
)
from sn_function.errors import VectorValueError


def measure(
        W: Any, u: Any, axis: int, n_power_iteration: int, true_sigma: bool,
        renewal: Renewal = NEVER, groups: Groups | None = None,
        gamma: Any = None, convolution: Convolution | None = None,
) -> dict[str, Any]:
    """Returns numbers on one weight, on its device; nothing waits for them.

    Args:
        W: Weight with 2 or more dimensions.
        u: Start vector, shape ``(m,)``, or several, shape ``(b, m)``, which
            are left alone, or ``None``.
        axis: Output axis.
        n_power_iteration: Number of iterations from ``u``.
        true_sigma: Whether the true sigma is wanted.
        renewal: When the estimate is one from another vector than ``u``.
        groups: The groups, if sigma is that of the largest one of them; the
            residual is, too.
        gamma: Array of shape ``()``, which is left alone, or ``None``.
        convolution: The convolution, if sigma is the norm of its map.

    Returns:
        Arrays of shape ``()`` and dtype float64: ``'peak'``, the largest
        magnitude in ``W``; with ``u``, ``'is_sound'``, whether it is finite
        and not zero, and several are independent (on a device that is not
        asked for), ``'sigma'`` and ``'residual'``; with several vectors,
        ``'sigma2'`` to that of their number, the estimates of the next
        singular values; with a renewal,
        ``'sigma_of_u'``, the estimate from ``u`` itself; with gamma,
        ``'gamma'``, as the renewal makes it; and ``'true_sigma'``.  What is
        not defined is NaN.

    """
    xp = chainer.backend.get_array_module(W)
    with numpy.errstate(all='ignore'):
        numbers = {'peak': xp.maximum(W.max(), -W.min())}
        if u is not None:
            numbers['is_sound'] = (
                xp.isfinite(u).all() & (u != 0).any(axis=-1).all())
            settings = Settings(
                n_power_iteration, axis, True, groups=groups,
                n_vectors=n_vectors_of(u), convolution=convolution)
            # Copies: the arithmetic makes gamma anew in place.
            gamma, initial = [None if x is None else x.copy() for x in (
                gamma, renewal.initial_gamma)]
            numbers.update(_estimate(
                W, u, settings, renewal._replace(initial_gamma=initial),
                1.0 if gamma is None else gamma))
            if gamma is not None:
                numbers['gamma'] = gamma
            if renewal.n_warmup:
                numbers['sigma_of_u'] = _estimate(W, u, settings)['sigma']
        if true_sigma:
            numbers['true_sigma'] = singular.norm(
                W, axis, groups, convolution)
        return {name: xp.asarray(x).astype(numpy.float64)
                for name, x in numbers.items()}


def _estimate(
        W: Any, u: Any, settings: Settings, renewal: Renewal = NEVER,
        gamma: Any = 1.0,
) -> dict[str, Any]:
    names = ['sigma', 'residual', *[
        f'sigma{k + 1}' for k in range(1, settings.n_vectors or 1)]]
    try:
        ((sigma,), iterations), = arithmetic_of(W).normalize_all([
            Forward(settings, W, u, gamma, ('sigma',), renewal=renewal)])
    except VectorValueError:  # a device replaces it without a word
        return {**dict.fromkeys(names, math.nan), 'is_sound': False}
    if settings.groups is not None:
        W = settings.groups.split(W, settings.axis)[iterations.largest][0]
        settings = settings._replace(axis=1)
        iterations = iterations.of_largest()
    if settings.n_vectors is None:
        return {'sigma': sigma, 'residual': residual(
            W, settings, sigma, iterations)}
    return dict(zip(names, [
        sigma, residual(W, settings, sigma, iterations, is_of_v=True),
        *iterations.singular_values[1:]]))


def residual(
        W: Any, settings: Settings, sigma: Any, iterations: Iterations,
        is_of_v: bool = False) -> Any:
    """Returns ``r``, shape ``()``, of iterations that found sigma.

    Args:
        W: Weight.
        settings: How it is a matrix.
        sigma: The estimate.
        iterations: Where it is from.
        is_of_v: Whether it is that of ``W v = sigma u``.

    """
    A = power_iteration.unfold(W, settings)
    # Divided first: then neither a large nor a small weight leaves the range.
    difference = (
        A.dot(iterations.v / sigma) - iterations.u if is_of_v
        else A.tdot(iterations.u / sigma) - iterations.v)
    return (difference * difference).sum() ** 0.5
