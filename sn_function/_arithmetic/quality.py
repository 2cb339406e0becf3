"""How good an estimate of sigma is; arrays only, on any device.

From the stored vector, ``K`` power iterations give unit vectors ``u`` and
``v`` and ``sigma = |W v|``, so ``W v = sigma u`` holds by construction.  What
need not hold is the other equation of a singular triple, and how far it is
off is the residual

    r = |W^T u - sigma v| / sigma

As ``v . W^T u = sigma``, Pythagoras gives ``|W^T u|^2 = sigma^2 (1 + r^2)``,
so the largest singular value is at least ``sigma sqrt(1 + r^2)``.  And some
singular value is within ``r sigma / sqrt(2)`` of the estimate: ``(u, v)`` is
an approximate eigenvector of the symmetric matrix ``[[0, W], [W^T, 0]]``,
whose eigenvalues are plus and minus the singular values, and 0.
"""
from __future__ import annotations

import math
from typing import Any

import chainer
import numpy

from sn_function._arithmetic.matrix import accumulator_dtype
from sn_function._arithmetic.power_iteration import Settings
from sn_function._graph import normalize
from sn_function.errors import VectorValueError


def measure(
        W: Any, u: Any, axis: int, n_power_iteration: int, true_sigma: bool,
) -> dict[str, Any]:
    """Returns numbers on one weight, on its device; nothing waits for them.

    Args:
        W: Weight with 2 or more dimensions.
        u: Start vector, shape ``(m,)``, which is left alone, or ``None``.
        axis: Output axis.
        n_power_iteration: Number of iterations from ``u``.
        true_sigma: Whether the true sigma is wanted.

    Returns:
        Arrays of shape ``()`` and dtype float64: ``'peak'``, the largest
        magnitude in ``W``; with ``u``, ``'is_sound'``, whether it is finite
        and not zero, ``'sigma'`` and ``'residual'``; and ``'true_sigma'``.
        What is not defined is NaN.

    """
    xp = chainer.backend.get_array_module(W)
    with numpy.errstate(all='ignore'):
        numbers = {'peak': xp.maximum(W.max(), -W.min())}
        matrix = xp.moveaxis(W, axis, 0).reshape(W.shape[axis], -1)
        if u is not None:
            numbers['is_sound'] = xp.isfinite(u).all() & (u != 0).any()
            numbers['sigma'], numbers['residual'] = _estimate(
                xp, W, matrix, u, Settings(n_power_iteration, axis, True))
        if true_sigma:
            numbers['true_sigma'] = _true_sigma(xp, matrix, numbers['peak'])
        return {name: xp.asarray(x).astype(numpy.float64)
                for name, x in numbers.items()}


def _estimate(
        xp: Any, W: Any, matrix: Any, u: Any, settings: Settings) -> Any:
    try:
        ((sigma,), it), = normalize.arithmetic_of(W).normalize_all([{
            'settings': settings, 'W': W, 'u': u, 'gamma': 1.0,
            'output_names': ('sigma',), 'update_u': False}])
    except VectorValueError:  # a device replaces it without a word
        return math.nan, math.nan
    dtype = accumulator_dtype(W.dtype)
    # Divided first: then neither a large nor a small weight leaves the range.
    difference = xp.dot(
        it.u / sigma, matrix.astype(dtype, copy=False)) - it.v
    return sigma, xp.sqrt((difference * difference).sum())


def _true_sigma(xp: Any, matrix: Any, peak: Any) -> Any:
    """The largest singular value, of the smaller one of the Gram matrices.

    For the largest one that loses nothing, and it is several times as fast as
    a singular value decomposition.
    """
    peak = peak.astype(numpy.float64)
    scale = xp.where((peak > 0) & xp.isfinite(peak), peak, 1.)
    # Of NaN there is no decomposition; it comes back at the end.
    A = matrix.astype(numpy.float64) / scale
    A = xp.where(xp.isfinite(A), A, 0.)
    gram = A.dot(A.T) if len(A) <= A.shape[1] else A.T.dot(A)
    largest = xp.linalg.eigvalsh(gram)[-1]
    return xp.sqrt(xp.maximum(largest, 0.)) * scale + 0 * peak
