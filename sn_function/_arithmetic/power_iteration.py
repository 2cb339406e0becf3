"""K power iterations and their adjoint in NumPy; arrays only.

Forward, from any non-zero ``u_0``, for ``k = 1..K``:

    s_k = W^T u_{k-1}    v_k = s_k / |s_k|
    t_k = W v_k          u_k = t_k / |t_k|        sigma = |t_K| = u_K^T W v_K

Adjoint, the derivative of sigma through every iteration (a bar marks the
derivative of sigma with respect to what is under it):

    tbar_K = u_K
    for k = K..1:
        G      += tbar_k v_k^T
        vbar    = W^T tbar_k
        sbar_k  = (vbar - v_k (v_k . vbar)) / |s_k|
        G      += u_{k-1} sbar_k^T
        ubar    = W sbar_k
        tbar_{k-1} = (ubar - u_{k-1} (u_{k-1} . ubar)) / |t_{k-1}|      (k > 1)

so ``d sigma / d W = G`` has rank 2K, and ``d sigma / d u_0 = ubar`` after
k = 1.  With u and v held constant it is ``u_K v_K^T``, of rank 1.

With upstream gradients ``gY`` and ``gsigma`` of ``Y = gamma f W / sigma`` and
of sigma,

    gW = gamma f gY / sigma + c G       c = gsigma - gamma f <gY, W> / sigma^2
    gu = c d sigma / d u_0              ggamma = f <gY, W> / sigma

and, where sigma is below eps, that constant in its place and c = gsigma.
:mod:`.stacks` has the same for many small weights at once, and
:mod:`.device` for a CUDA device.
"""
from __future__ import annotations

import math
from typing import Any, Callable, NamedTuple, Sequence

import numpy

from sn_function import errors
from sn_function._arithmetic import buffers
from sn_function._arithmetic import matrix as _matrix
from sn_function._arithmetic.matrix import accumulator_dtype


class Settings(NamedTuple):
    """What the caller chose."""

    n_power_iteration: int
    axis: int
    detach_uv: bool
    factor: float = 1.0
    eps: float = 0.0


class PowerIteration(NamedTuple):
    """What K iterations computed; all that the adjoint needs beside W.

    ``us`` holds ``u_0 .. u_K``, ``vs`` holds ``v_1 .. v_K``.  A norm that is
    zero is stored as 1, so that the vector divided by it is zero, too.
    Everything is in units of ``W / scale`` and ``u / u_scale``, powers of two
    that are 1 unless squares could leave the range.  ``restarted`` tells that
    ``u_0`` is not the one that was given.  ``matrix`` is the matrix, if kept.
    What was computed together with other weights is in the ``stack``, too.
    """

    us: Sequence[Any]
    vs: Sequence[Any]
    s_norms: Sequence[Any]
    t_norms: Sequence[Any]
    sigma: Any
    stack: Any = None
    scale: float = 1.0
    u_scale: float = 1.0
    restarted: bool = False
    matrix: Any = None

    @property
    def u(self) -> Any:
        return self.us[-1]

    @property
    def v(self) -> Any:
        return self.vs[-1]

    @property
    def start(self) -> Any:
        return self.us[0]

    def floored(self, eps: float) -> tuple[float, float, bool]:
        """``max(sigma, eps)``, the scale it is in, and if it is sigma."""
        if self.sigma * self.scale < eps or self.sigma == 0:
            return eps or 1.0, 1.0, False  # with eps 0, W is 0
        return self.sigma, self.scale, True


def unfold(W: Any, axis: int) -> _matrix.Matrix:
    """Returns ``W`` as a matrix in the accumulator's dtype."""
    return _matrix.Matrix(
        W.astype(accumulator_dtype(W.dtype), copy=False), axis)


class _ExtremeNorm(ArithmeticError):
    pass


def _ordinary_norm(
        low: float, high: float) -> Callable[[Any], tuple[Any, Any]]:
    def norm(x: Any) -> tuple[Any, Any]:
        norm = math.sqrt(x.dot(x))
        if not low < norm < high:
            raise _ExtremeNorm
        return norm, norm

    return norm


# Norms, by dtype.  Outside of the range the squares in them may have lost
# digits to overflow or underflow: see _rescaled.
ORDINARY = {'f': (1e-15, 1e15), 'd': (1e-140, 1e140)}
_ORDINARY_NORM = {
    char: _ordinary_norm(*limits) for char, limits in ORDINARY.items()}


def _host_norm(x: Any) -> tuple[Any, Any]:
    norm = math.sqrt(x.dot(x))
    return norm, norm or 1.0


def _iterate(
        A: _matrix.Matrix, u: Any, n: int,
        norm: Callable[[Any], tuple[Any, Any]]) -> PowerIteration:
    us, vs, s_norms, t_norms = [u], [], [], []
    sigma = None
    for _ in range(n):
        s = A.tdot(u)
        _, divisor = norm(s)
        v = s / divisor
        s_norms.append(divisor)
        t = A.dot(v)
        sigma, divisor = norm(t)
        u = t / divisor
        t_norms.append(divisor)
        us.append(u)
        vs.append(v)
    return PowerIteration(us, vs, s_norms, t_norms, sigma, matrix=A)


def power_iteration(A: _matrix.Matrix, u: Any, n: int) -> PowerIteration:
    """Runs ``n`` power iterations on ``A`` from ``u``, shape ``(m,)``.

    A weight that holds NaN or Inf gives a sigma that is NaN.  Call it with
    NumPy's warnings off: what overflows is done again, and NaN shows.

    Raises:
        VectorValueError: ``u`` is zero or not finite.

    """
    dtype = A.array.dtype
    u = u.astype(dtype, copy=False)
    try:
        return _iterate(A, u, n, _ORDINARY_NORM[dtype.char])
    except _ExtremeNorm:
        return _rescaled(A, u, n)


def _rescaled(A: _matrix.Matrix, u: Any, n: int) -> PowerIteration:
    """The same for a weight or a ``u`` of extreme size, or a zero product."""
    u_scale = float(abs(u).max())
    if not 0 < u_scale < math.inf:
        raise errors.VectorValueError(u)
    scale = float(abs(A.array).max())
    if not math.isfinite(scale):
        nan = numpy.full(A.m, numpy.nan, u.dtype)
        it = _iterate(A, nan, n, _host_norm)._replace(sigma=math.nan)
        # u is good: a second run may start from it.
        return it._replace(us=[u, *it.us[1:]])
    if scale == 0:
        return _iterate(A, u, n, _host_norm)
    # Powers of two: dividing by them loses no digit.
    scale = 2.0 ** (math.frexp(scale)[1] - 1)
    u_scale = 2.0 ** (math.frexp(u_scale)[1] - 1)
    A = A.scaled(scale)
    it = _iterate(A, u / u_scale, n, _host_norm)
    if not it.sigma:
        # W^T u_0 is zero and W is not: u_0 would be stuck, and sigma 0.  The
        # largest row of W is never orthogonal to itself.
        e = numpy.zeros_like(u)
        e[A.largest_row()] = 1
        it = _iterate(A, e, n, _host_norm)._replace(restarted=True)
    return it._replace(scale=scale, u_scale=u_scale)


def store(u: Any, it: PowerIteration) -> None:
    """Overwrites ``u`` with ``u_K``, unless that is zero or not finite."""
    if 0 < it.sigma < math.inf:
        u[...] = it.u


def adjoint(
        A: _matrix.Matrix, it: PowerIteration, detach_uv: bool, need_u: bool,
        vbar: Any = None,
) -> tuple[Any, Any, Any]:
    """Differentiates sigma with respect to ``A`` and ``u_0``.

    Args:
        A: The matrix that ``it`` was computed from.
        it: The iterations.
        detach_uv: Take u and v as constants.
        need_u: Whether the derivative with respect to ``u_0`` is wanted.
        vbar: ``A^T u_K`` if that is known; it is overwritten.

    Returns:
        ``P``, shape ``(r, m)``, and ``Q``, shape ``(r, n)``, such that
        ``d sigma / d A = P^T Q``; and ``ubar``, shape ``(m,)``, in units of
        ``1 / u_scale``, or ``None``.

    """
    if detach_uv:
        return it.u[None], it.v[None], None
    K = len(it.vs)
    P = numpy.empty((2 * K, A.m), it.u.dtype)
    Q = numpy.empty((2 * K, A.n), it.u.dtype)
    tbar = it.u
    for k in range(K - 1, -1, -1):
        u, v = it.us[k], it.vs[k]
        P[2 * k] = tbar
        Q[2 * k] = v
        P[2 * k + 1] = u
        sbar = A.tdot(tbar) if vbar is None else vbar
        vbar = None
        sbar -= v * v.dot(sbar)
        sbar /= it.s_norms[k]
        Q[2 * k + 1] = sbar
        if k > 0 or need_u:
            ubar = A.dot(sbar)
        if k > 0:
            tbar = (ubar - u * u.dot(ubar)) / it.t_norms[k - 1]
    if not need_u:
        return P, Q, None
    return P, Q, ubar


def normalize(
        settings: Settings, W: Any, u: Any, gamma: Any,
        output_names: Sequence[str],
        reuse: bool = False,
) -> tuple[tuple[Any, ...], PowerIteration]:
    """Returns ``Y`` and ``sigma``, as named, and what backward needs.

    Args:
        settings: What the caller chose.
        W: Weight with 2 or more dimensions.
        u: Start vector, shape ``(m,)``.
        gamma: A float, or an array of shape ``()``.
        output_names: ``'Y'``, ``'sigma'`` or both.
        reuse: Make ``Y`` in memory that this weight has needed before.

    Call it with NumPy's warnings off, as :func:`power_iteration`.

    Raises:
        VectorValueError: ``u`` is zero or not finite.

    """
    A = unfold(W, settings.axis)
    # A copy: the owner of u is free to change it.
    it = power_iteration(A, u.copy(), settings.n_power_iteration)
    if it.matrix.array is not W:  # made anew, rather than kept
        it = it._replace(matrix=None)
    outputs: tuple[Any, ...] = ()
    if 'Y' in output_names:
        divisor, scale, _ = it.floored(settings.eps)
        x = A.array if scale == 1.0 else A.array / scale
        coefficient = as_float(gamma) * settings.factor / divisor
        if W.size <= _matrix.SMALL_SIZE or W.dtype != x.dtype:
            Y = (x * coefficient).astype(W.dtype, copy=False)
        else:
            Y = numpy.multiply(
                x, coefficient, buffers.empty_of(W, reuse)(W.shape, W.dtype))
        outputs = Y,
    if 'sigma' in output_names:
        outputs += numpy.array(it.sigma * it.scale, A.array.dtype),
    return outputs, it


def gradients(
        settings: Settings, it: PowerIteration, wanted: Sequence[str], W: Any,
        u: Any, gamma: Any, gY: Any = None, gsigma: Any = None,
        reuse: bool = False,
) -> tuple[Any, ...]:
    """Returns ``gW``, ``gu`` and ``ggamma``, as wanted.

    Args:
        settings: What the caller chose.
        it: What the forward computed.
        wanted: ``'W'``, ``'u'`` and ``'gamma'``, or some of them.
        W: Weight.
        u: Start vector, for its dtype.
        gamma: Scale.
        gY: Upstream gradient of ``Y``, of its shape and dtype, or ``None``.
        gsigma: Upstream gradient of sigma, shape ``()``, or ``None``.
        reuse: Make ``gW`` in memory that this weight has needed before.

    Call it with NumPy's warnings off, as :func:`power_iteration`.

    """
    A = it.matrix
    if A is None or A.array is not W:
        A = unfold(W, settings.axis)
    if it.scale != 1.0:
        A = A.scaled(it.scale)
    grads: dict[str, Any] = {}
    needs_adjoint = 'W' in wanted or 'u' in wanted
    a, c, dot, vbar = 0.0, 0.0, 0.0, None  # gW = a gY + c G
    if gsigma is not None:
        c = gsigma.item()
    if gY is not None:
        gY = gY.astype(A.array.dtype, copy=False)
        if settings.detach_uv or not needs_adjoint:
            dot = A.inner(gY)
        else:
            dot, vbar = A.inner_and_tdot(gY, it.u)
        a, of_sigma, dot = coefficients(settings, it, gamma, dot)
        c += of_sigma
    if 'gamma' in wanted:
        grads['gamma'] = numpy.array(settings.factor * dot, gamma.dtype)
    if needs_adjoint:
        P, Q, ubar = adjoint(
            A, it, settings.detach_uv, 'u' in wanted, vbar)
        if ubar is not None:
            # In this order: scale / u_scale may not be in the range.
            gu = ubar * (0 if it.restarted else c * it.scale / it.u_scale)
            grads['u'] = gu.astype(u.dtype, copy=False)
        if 'W' in wanted:
            reuse = reuse and W.dtype == P.dtype  # or it is converted
            gW = A.combination(
                a, gY, c, P, Q, buffers.empty_of(W, reuse))
            grads['W'] = gW.astype(W.dtype, copy=False)
    return tuple([grads[name] for name in wanted])


def coefficients(
        settings: Settings, it: PowerIteration, gamma: Any, dot: float,
) -> tuple[float, float, float]:
    """Of the gradient, from ``<gY, W>`` in units of ``W / scale``.

    Returns:
        ``a`` and ``c`` in ``gW = a gY + c G``, without what an upstream
        gradient of sigma adds to c; and ``<gY, W> / max(sigma, eps)``.

    """
    divisor, scale, is_above = it.floored(settings.eps)
    # Twice divided: sigma ** 2 could overflow.
    dot = dot * (it.scale / scale) / divisor
    a = as_float(gamma) * settings.factor / divisor / scale
    return a, -a * dot if is_above else 0.0, dot


def as_float(x: Any) -> float:
    """A number, or an array of shape ``()``, as a float."""
    return x if isinstance(x, float) else x.item()
