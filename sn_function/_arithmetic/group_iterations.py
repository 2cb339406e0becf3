"""Power iterations on the groups of a weight, all at once, and their adjoint.

The weight is seen as an array ``A`` of shape ``(G, l, m, r)``, see
:class:`.groups.Groups`; the vectors ``u`` have the shape ``(G, 1, 1, m)`` and
``v`` ``(G, l, 1, r)``.  The formulas are those of :mod:`.power_iteration`.

All here is for NumPy and for CuPy, where nothing waits for the device.  On the
host each group is divided by its largest entry only where a norm is so large
or small that its square has lost digits, and then in float64; on a device,
always.  What a scale does to the letters:

    A = W_g / scale        sigma_g = scale |t_K|        G is the same

Where each group is a map of images, ``A`` is a :class:`.group_maps.GroupMaps`.
"""
from __future__ import annotations

import math
from typing import Any, Callable, NamedTuple

import chainer
import numpy

from sn_function import errors
from sn_function._arithmetic.group_maps import GroupMaps
from sn_function._arithmetic.interface import (
    NEVER,
    SETTLED,
    Renewal,
    Settings,
)
from sn_function._arithmetic.matrix import ORDINARY


class Vectors(NamedTuple):
    """What ``n`` iterations on all groups computed.

    Attributes:
        us, vs: ``u_0 .. u_n`` and ``v_1 .. v_n``.
        s_norms, t_norms: Norms of ``s_1 .. s_n`` and ``t_1 .. t_n``, each of
            shape ``(G, 1, 1, 1)`` and dtype float64.

    """

    us: list[Any]
    vs: list[Any]
    s_norms: list[Any]
    t_norms: list[Any]

    @property
    def start(self) -> Any:
        return self.us[0]

    @property
    def following(self) -> Any:
        return self.us[-1]

    def turns(self) -> Any:
        """``1 - u_0 . u_1 / |u_0|`` of each group; 0 for a zero or a NaN."""
        # u_0 . W v_1 = |W^T u_0|
        return self.or_zero(1 - self.s_norms[0] / (
            self.t_norms[0] * length(self.us[0])))

    def residuals(self, A: Any) -> Any:
        """``|W^T u - sigma v| / sigma`` of each group; 0 as in turns."""
        return self.or_zero(length(
            tdot(A, self.us[-1]) / self.t_norms[-1] - self.vs[-1]))

    def or_zero(self, numbers: Any) -> Any:
        """Numbers of the groups, or 0 where sigma is zero or not finite."""
        xp, sigma = chainer.backend.get_array_module(numbers), self.t_norms[-1]
        return xp.where((sigma > 0) & (sigma < math.inf), numbers, 0.0)


class OfGroup(NamedTuple):
    """What :class:`.interface.Iterations` has, of one group."""

    u: Any
    v: Any
    start: Any
    restarted: Any
    basis: Any = None
    singular_values: Any = None


class Iterations(NamedTuple):
    """What a forward computed, for its backward.

    Attributes:
        vectors: Those of all groups.
        sigmas: Estimate of each group, shape ``(G,)`` and dtype float64.
        sigma: The largest: a float, or an array of shape ``()`` of a device.
        largest: Index of that group: a slice of length 1, or an array of
            shape ``(1,)`` of a device.
        given: The start vector that was given, shape ``(G m,)``; or the
            several that were used, shape ``(b, G m)``.
        scale: What each group was divided by, shape ``(G, 1, 1, 1)``, or 1.
        u_norm: What each vector was divided by, likewise.
        restarts: Whether ``u_0`` of a group is not the one that was given,
            likewise, or ``False``.
        basis: With several vectors, an orthonormal basis of their span in
            each group, shape ``(G, 1, b, m)``.
        moved: With several vectors, what follows them, likewise.
        singular_values: With several vectors, the estimates of the largest
            ones of each group, shape ``(G, 1, b, 1)``.
        residuals: That of each group, if there is a tolerance.

    """

    vectors: Vectors
    sigmas: Any
    sigma: Any
    largest: Any
    given: Any
    scale: Any = 1.0
    u_norm: Any = 1.0
    restarts: Any = False
    basis: Any = None
    moved: Any = None
    singular_values: Any = None
    residuals: Any = None

    @property
    def u(self) -> Any:
        return self.vectors.us[-1].reshape(-1)

    @property
    def v(self) -> Any:
        return self.vectors.vs[-1].reshape(-1)

    @property
    def following(self) -> Any:
        """What each group goes on from, shape ``(G, 1, b, m)``."""
        return self.vectors.us[-1] if self.moved is None else self.moved

    @property
    def start(self) -> Any:
        if self.restarts is False:
            return self.given
        first = self.vectors.us[0]
        given = self.given.reshape(first.shape)
        xp = chainer.backend.get_array_module(first)
        return xp.where(self.restarts, first, given).reshape(-1).astype(
            given.dtype, copy=False)

    @property
    def restarted(self) -> Any:
        """That of the largest group; of the others nothing depends on it."""
        if self.restarts is False:
            return False
        restarted = self.restarts[self.largest].reshape(())
        return (bool(restarted) if isinstance(self.largest, slice)
                else restarted)

    def floored(self, settings: Settings) -> tuple[Any, Any]:
        """Returns what ``W`` is divided by, and whether that is sigma."""
        sigma, eps = self.sigma, settings.eps
        if isinstance(sigma, float):
            if sigma == 0:
                return settings.at_zero, False
            return (eps, False) if sigma < eps else (sigma, True)
        xp = chainer.backend.get_array_module(sigma)
        is_zero, is_below = sigma == 0, sigma < eps
        divisor = xp.where(is_zero, settings.at_zero, xp.where(
            is_below, eps, sigma))
        return divisor, ~(is_zero | is_below)

    def turn(self) -> Any:
        """Returns how much the first iteration turns that of the largest."""
        turn = self.vectors.turns()[self.largest].reshape(())
        return float(turn) if isinstance(self.largest, slice) else turn

    def residual(self) -> Any:
        """Returns the largest of all groups, which a tolerance is for."""
        return self.residuals.max()

    def of_largest(self) -> OfGroup:
        """Returns the vectors of the largest group."""
        us, vs, *_ = self.vectors
        start = as_groups(self.start, len(us[0]))
        u, v, start = [x[self.largest].reshape(-1)
                       for x in (us[-1], vs[-1], start)]
        of_group = OfGroup(u, v, start, self.restarted)
        if self.basis is None:
            return of_group
        return of_group._replace(
            basis=self.basis[self.largest][0, 0],
            singular_values=self.singular_values[self.largest].reshape(-1))


def as_groups(u: Any, G: int) -> Any:
    """Vectors of all groups, one after another, as ``(G, 1, b, m)``."""
    return u.reshape(1, -1, G, u.shape[-1] // G).transpose(2, 0, 1, 3)


def as_rows(U: Any) -> Any:
    """What :func:`as_groups` takes, shape ``(b, G m)``."""
    return U.transpose(1, 2, 0, 3).reshape(U.shape[2], -1)


def iterate(A: Any, u: Any, n: int) -> Vectors:
    """Runs ``n`` power iterations on all groups.

    Args:
        A: Array of shape ``(G, l, m, r)``.
        u: Array of shape ``(G, 1, 1, m)``.
        n: Number of iterations.

    """
    vectors = Vectors([u], [], [], [])
    for _ in range(n):
        v, s_norm = _unit(tdot(A, u))
        u, t_norm = _unit(_dot(A, v))
        for column, x in zip(vectors, (u, v, s_norm, t_norm)):
            column.append(x)
    return vectors


def xp_of(A: Any) -> Any:
    """The module of the groups: NumPy or CuPy."""
    return A.xp if isinstance(A, GroupMaps) else (
        chainer.backend.get_array_module(A))


def tdot(A: Any, U: Any) -> Any:
    """``W^T u`` of each group and vector, shape ``(G, l, b, r)``."""
    return A.tdot(U) if isinstance(A, GroupMaps) else U @ A


def _dot(A: Any, v: Any) -> Any:
    """``W v`` of each group, shape ``(G, 1, 1, m)``."""
    if isinstance(A, GroupMaps):
        return A.dot(v)
    t = A @ transposed(v)
    if A.shape[1] > 1:
        t = t.sum(axis=1)
    return t.reshape(len(A), 1, 1, -1)


def _unit(x: Any) -> tuple[Any, Any]:
    """Unit vectors, or zero where x is zero; and the norms, in float64."""
    norm = length(x)
    return (x / or_one(norm)).astype(x.dtype, copy=False), norm


def length(x: Any) -> Any:
    x = x.astype(numpy.float64, copy=False).reshape(len(x), 1, 1, -1)
    return (x * x).sum(axis=3, keepdims=True) ** 0.5


def or_one(x: Any) -> Any:
    """``x``, or 1 where that is zero."""
    return x + (x == 0)


def divided(A: Any, scale: Any) -> Any:
    """``A / scale``, in the dtype of A."""
    if isinstance(A, GroupMaps):
        return A.divided_by(scale)
    return (A / scale).astype(A.dtype, copy=False)


def row_sizes(A: Any) -> Any:
    """What tells the largest rows of each group, shape ``(G, m)``."""
    if isinstance(A, GroupMaps):
        return A.row_sizes()
    return (A * A).sum(axis=(1, 3))


def peak(x: Any) -> Any:
    """The largest magnitude of each group, or 1 where it is 0 or not finite.
    """
    if isinstance(x, GroupMaps):
        x = x.blocks
    xp = chainer.backend.get_array_module(x)
    largest = abs(x).max(axis=(1, 2, 3), keepdims=True).astype(numpy.float64)
    return xp.where((largest > 0) & xp.isfinite(largest), largest, 1.0)


def iterate_anew(
        A: Any, run: Callable[[Any], Any], start: Any, n: int,
        renewal: Renewal) -> Any:
    """Runs ``n`` iterations, again where the renewal says so.

    Each group has vectors of its own, and is decided for by itself: from
    where these are taken to, until it is settled.  On a device that is done
    with a tolerance only, as all iterations are run there.

    Args:
        A: Array of shape ``(G, l, m, r)``.
        run: Runs them from vectors of all groups; returns :class:`Vectors`,
            or what has their methods, and ``start`` and ``following``.
        start: The vectors, with the groups along the first axis.
        n: Number of iterations of a run.
        renewal: When more are needed.

    """
    xp = xp_of(A)
    found, limit, is_off = run(start), renewal.limit, True
    if xp is not numpy and renewal.rtol is None:
        return found
    for _ in range(0, renewal.n_warmup, n):
        if renewal.rtol is None:
            is_off = is_off & (found.turns() > limit)
        else:
            is_off = is_off & (found.residuals(A) > renewal.rtol)
        if xp is numpy and not is_off.any():
            break
        limit = SETTLED
        found = run(xp.where(is_off, found.following, found.start))
    return found


def power_iteration(
        A: Any, u: Any, n: int, renewal: Renewal = NEVER) -> Iterations:
    """Runs ``n`` power iterations on each group.

    Args:
        A: Array of shape ``(G, l, m, r)``.
        u: Array of shape ``(G m,)``, which is copied.
        n: Number of iterations.
        renewal: When they start from another vector, by
            :func:`iterate_anew`.

    Raises:
        VectorValueError: On the host, ``u`` is zero or not finite.

    """
    # A copy: the owner of u is free to change it.
    given = u.astype(A.dtype)
    start = given.reshape(len(A), 1, 1, A.shape[2])
    if xp_of(A) is not numpy:
        return _carefully(A, start, n, renewal)
    vectors = iterate_anew(
        A, lambda u: iterate(A, u, n), start, n, renewal)
    low, high = ORDINARY[A.dtype.char]
    norms = numpy.array([vectors.s_norms, vectors.t_norms])
    if norms.min() > low and norms.max() < high:
        return _measured(A, renewal, finished(
            vectors, vectors.t_norms[-1], vectors.us[0].reshape(-1)))
    if not (numpy.isfinite(given).all() and given.any()):
        raise errors.VectorValueError(u)
    return _carefully(A.astype(numpy.float64), start, n, renewal)


def _carefully(
        A: Any, given: Any, n: int, renewal: Renewal) -> Iterations:
    """Iterations on groups and from vectors of any size.

    A vector that its group takes to zero is replaced, unless that is zero, as
    is one that is not finite: by the unit vector of the row of the largest
    norm.
    """
    xp = xp_of(A)
    scale, u_peak = peak(A), peak(given)
    A = divided(A, scale)
    start, start_norm = _unit(given / u_peak)  # in float64, as peaks are
    start = start.astype(A.dtype, copy=False)
    rows = row_sizes(A).reshape(given.shape)
    is_zero = rows.max(axis=3, keepdims=True) == 0
    is_usable = xp.isfinite(start_norm) & (is_zero | (
        tdot(A, start) != 0).any(axis=(1, 3), keepdims=True))
    largest_row = xp.arange(A.shape[2]) == xp.expand_dims(
        rows.argmax(axis=3), 3)
    start = xp.where(is_usable, start, largest_row.astype(A.dtype))
    vectors = iterate_anew(
        A, lambda u: iterate(A, u, n), start, n, renewal)
    restarts = ~is_usable
    if vectors.start is not start:
        restarts |= (vectors.us[0] != start).any(axis=3, keepdims=True)
    iterations = finished(
        vectors, vectors.t_norms[-1] * scale, given.reshape(-1))
    return _measured(A, renewal, iterations._replace(
        scale=scale, u_norm=or_one(start_norm) * u_peak, restarts=restarts))


def finished(vectors: Vectors, sigmas: Any, given: Any) -> Iterations:
    sigmas = sigmas.reshape(-1)
    sigma, largest = sigmas.max(), sigmas.argmax()  # NaN is the largest
    if isinstance(sigmas, numpy.ndarray):
        sigma, largest = float(sigma), slice(largest, largest + 1)
    else:
        largest = largest.reshape(1)
    return Iterations(vectors, sigmas, sigma, largest, given)


def _measured(A: Any, renewal: Renewal, iterations: Iterations) -> Iterations:
    if renewal.rtol is None:
        return iterations
    return iterations._replace(residuals=iterations.vectors.residuals(A))


def adjoint(
        A: Any, vectors: Vectors, need_u: bool) -> tuple[Any, Any, Any]:
    """As :func:`.power_iteration.adjoint`, of groups that were picked.

    Returns:
        ``P (1, 1, 2K, m)``, ``Q (1, l, 2K, r)`` and ``ubar (1, 1, 1, m)`` or
        ``None``.

    """
    us, vs, s_norms, t_norms = vectors
    dtype = A.dtype
    P, Q = [], []
    tbar, ubar = us[-1], None
    for k in range(len(vs) - 1, -1, -1):
        sbar = tdot(A, tbar)
        sbar = sbar - vs[k] * (vs[k] * sbar).sum()
        sbar = (sbar / or_one(s_norms[k])).astype(dtype, copy=False)
        P += [tbar, us[k]]
        Q += [vs[k], sbar]
        if k > 0:
            tbar = (_dot(A, sbar) / or_one(t_norms[k - 1])).astype(
                dtype, copy=False)
        elif need_u:
            ubar = _dot(A, sbar)
    xp = xp_of(A)
    return xp.concatenate(P, axis=2), xp.concatenate(Q, axis=2), ubar


def transposed(x: Any) -> Any:
    return x.transpose(0, 1, 3, 2)
