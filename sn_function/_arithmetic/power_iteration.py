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
        tbar_{k-1} = ubar / |t_{k-1}|      (k > 1)

so ``d sigma / d W = G`` has rank 2K, and ``d sigma / d u_0 = ubar`` after
k = 1.  With u and v held constant it is ``u_K v_K^T``, of rank 1.  The
derivative of ``t / |t|`` would subtract the part of ubar along u_{k-1}; there
is none, as s_k = W^T u_{k-1}:

    u_{k-1} . ubar = s_k . sbar_k = |s_k| (v_k . sbar_k) = 0

With upstream gradients ``gY`` and ``gsigma`` of ``Y = gamma f W / sigma`` and
of sigma,

    gW = gamma f gY / sigma + c G       c = gsigma - gamma f <gY, W> / sigma^2
    gu = c d sigma / d u_0              ggamma = f <gY, W> / sigma

and, where sigma is below eps, that constant in its place and c = gsigma (and
another one where W is zero: see :class:`.interface.Settings`).
:mod:`.stacks` has the same for many small weights at once, and
:mod:`.device` for a CUDA device.

Where a norm is so large or small that its square has lost digits, all is done
again in float64, with norms that divide by the largest entry first, and from
``u_0 = u / |u|`` if u is the extreme one.  That is enough for any float16 or
float32, and for float64 weights from 1e-300 to 1e300.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple, Sequence

import numpy

from sn_function import errors
from sn_function._arithmetic import buffers, matrix
from sn_function._arithmetic.convolution import ConvolutionMatrix
from sn_function._arithmetic.interface import (
    GAMMA_LIMIT,
    GAMMA_TURN,
    NEVER,
    SETTLED,
    Arrays,
    Backward,
    Forward,
    Renewal,
    Settings,
)
from sn_function._arithmetic.matrix import (
    ExtremeNormError,
    Matrix,
    accumulator_dtype,
    is_ordinary,
)


class PowerIteration(NamedTuple):
    """What K iterations computed; all that the adjoint needs beside W.

    Attributes:
        us, vs: ``u_0 .. u_K`` and ``v_1 .. v_K``.
        s_norms, t_norms: Norms of ``s_1 .. s_K`` and ``t_1 .. t_K``.  One that
            is zero is stored as 1, so that the vector divided by it is zero.
        sigma: The estimate.
        stack: What was computed together with other weights.
        u_norm: What ``u`` was divided by for ``u_0``.
        restarted: Whether ``u_0`` is not the one that was given.
        matrix: The matrix, if it is kept.
        next_s: ``W^T u_K``, if that is known.

    """

    us: Sequence[Any]
    vs: Sequence[Any]
    s_norms: Sequence[float]
    t_norms: Sequence[float]
    sigma: float
    stack: Any = None
    u_norm: float = 1.0
    restarted: bool = False
    matrix: Any = None
    next_s: Any = None

    @property
    def u(self) -> Any:
        return self.us[-1]

    @property
    def v(self) -> Any:
        return self.vs[-1]

    @property
    def start(self) -> Any:
        return self.us[0]

    @property
    def following(self) -> Any:
        """What the next iteration starts from."""
        return self.us[-1]

    def floored(self, settings: Settings) -> tuple[float, bool]:
        """Returns what ``W`` is divided by, and whether that is sigma."""
        return floored(self.sigma, settings)

    def turn(self) -> float:
        """Returns ``1 - u_0 . u_1 / |u_0|``; 0 for a zero or a NaN."""
        if not 0 < self.sigma < math.inf:
            return 0.0
        # u_0 . W v_1 = |W^T u_0|
        return 1 - self.s_norms[0] / self.t_norms[0] / matrix.norm(self.us[0])

    def residual(self) -> float:
        """Returns ``|W^T u - sigma v| / sigma``; 0 for a zero or a NaN."""
        if not 0 < self.sigma < math.inf:
            return 0.0
        return matrix.norm(self.next_s / self.sigma - self.v)


def floored(sigma: float, settings: Settings) -> tuple[float, bool]:
    """Returns what ``W`` is divided by, and whether that is sigma."""
    if sigma == 0:
        return settings.at_zero, False
    if sigma < settings.eps:
        return settings.eps, False
    return sigma, True


def unfold(W: Any, settings: Settings, dtype: Any = None) -> Matrix:
    """Returns ``W`` as a matrix, in the dtype of sums unless one is given."""
    W = W.astype(dtype or accumulator_dtype(W.dtype), copy=False)
    if settings.convolution is not None:
        return ConvolutionMatrix(W, settings.convolution)
    return Matrix(W, settings.axis)


def _iterate(
        A: Matrix, u: Any, n: int, careful: bool, s: Any = None,
) -> PowerIteration:
    """Runs ``n`` iterations; ``s`` is ``W^T u`` if that is known."""
    us, vs, s_norms, t_norms = [u], [], [], []
    sigma = 0.0
    for k in range(n):
        if k > 0 or s is None:
            s = A.tdot(u)
        s_norm = A.norm_of_s(s, careful) or 1.0
        v = s / s_norm
        t = A.dot(v)
        sigma = A.norm_of_t(t, careful)
        t_norm = sigma or 1.0
        u = t / t_norm
        us.append(u)
        vs.append(v)
        s_norms.append(s_norm)
        t_norms.append(t_norm)
    return PowerIteration(us, vs, s_norms, t_norms, sigma, matrix=A)


def _iterate_anew(
        A: Matrix, u: Any, n: int, careful: bool, renewal: Renewal,
) -> PowerIteration:
    """Runs ``n`` iterations, from another vector where the renewal says so."""
    iterations = _measured(A, _iterate(A, u, n, careful), renewal)
    limit = renewal.limit
    for _ in range(0, renewal.n_warmup, n):
        if renewal.accepts(iterations, limit):
            break
        limit = SETTLED
        u = iterations.u.astype(u.dtype, copy=False)
        s = iterations.next_s if u is iterations.u else None
        iterations = _measured(A, _iterate(A, u, n, careful, s), renewal)
    return iterations


def _measured(
        A: Matrix, iterations: PowerIteration, renewal: Renewal,
) -> PowerIteration:
    """Returns them with what the residual needs, if it matters."""
    if renewal.rtol is None:
        return iterations
    return iterations._replace(next_s=A.tdot(iterations.u))


def power_iteration(
        A: Matrix, u: Any, n: int, renewal: Renewal = NEVER,
) -> PowerIteration:
    """Runs ``n`` power iterations on ``A`` from ``u``, shape ``(m,)``.

    They start from another vector where the renewal says so.  A weight that
    holds NaN or Inf gives a sigma that is NaN.  Call it with NumPy's warnings
    off: what overflows is done again, and NaN shows.

    Raises:
        VectorValueError: ``u`` is zero or not finite.

    """
    u = u.astype(A.array.dtype, copy=False)
    try:
        return _iterate_anew(A, u, n, False, renewal)
    except ExtremeNormError:
        pass
    u_norm = A.norm_of_t(u, careful=True)
    if not 0 < u_norm < math.inf:
        raise errors.VectorValueError(u)
    A = A.astype(numpy.float64)
    start = u
    if is_ordinary(u_norm, u.dtype):
        u_norm = 1.0
    else:
        start = (u.astype(numpy.float64) / u_norm).astype(u.dtype, copy=False)
    iterations = _iterate_anew(A, start, n, True, renewal)
    if iterations.sigma == 0 and not A.is_zero():
        # W^T u_0 is zero and W is not: u_0 would be stuck, and sigma 0.
        start = A.start_at_largest_row(u.dtype)
        iterations = _iterate_anew(A, start, n, True, renewal)
        return iterations._replace(restarted=True)
    return iterations._replace(u_norm=u_norm)


def store(u: Any, iterations: Any) -> None:
    """Overwrites ``u`` with what follows, unless sigma is 0 or not finite."""
    if 0 < iterations.sigma < math.inf:
        u[...] = iterations.following


def adjoint(
        A: Matrix, iterations: PowerIteration, detach_uv: bool, need_u: bool,
        vbar: Any = None,
) -> tuple[Any, Any, Any]:
    """Differentiates sigma with respect to ``A`` and ``u_0``.

    Args:
        A: The matrix that the iterations were run on.
        iterations: The iterations.
        detach_uv: Take u and v as constants.
        need_u: Whether the derivative with respect to ``u_0`` is wanted.
        vbar: ``A^T u_K`` if that is known; it is overwritten.

    Returns:
        ``P``, shape ``(r, m)``, and ``Q``, shape ``(r, n)``, such that
        ``d sigma / d A = P^T Q``; and ``ubar``, shape ``(m,)``, or ``None``.

    """
    if detach_uv:
        return iterations.u[None], iterations.v[None], None
    us, vs, s_norms, t_norms = iterations[:4]
    K = len(vs)
    P = A.xp.empty((2 * K, A.m), us[-1].dtype)
    Q = A.xp.empty((2 * K, A.n), us[-1].dtype)
    tbar, ubar = us[-1], None
    for k in range(K - 1, -1, -1):
        v = vs[k]
        P[2 * k], Q[2 * k] = tbar, v
        sbar = A.tdot(tbar) if vbar is None else vbar
        vbar = None
        sbar -= v * v.dot(sbar)
        sbar /= s_norms[k]
        P[2 * k + 1], Q[2 * k + 1] = us[k], sbar
        if k > 0:
            tbar = A.dot(sbar) / t_norms[k - 1]
        elif need_u:
            ubar = A.dot(sbar)
    return P, Q, ubar


def normalize(call: Forward) -> tuple[Arrays, PowerIteration]:
    """Returns ``Y`` and ``sigma``, as named, and what backward needs.

    Call it with NumPy's warnings off, as :func:`power_iteration`.

    Raises:
        VectorValueError: ``u`` is zero or not finite.

    """
    settings, W = call.settings, call.W
    # A copy: the owner of u is free to change it.
    iterations = power_iteration(
        unfold(W, settings), call.u.copy(), settings.n_power_iteration,
        call.renewal)
    return finish(call, iterations)


def finish(call: Forward, iterations: Any) -> tuple[Arrays, Any]:
    """Returns the outputs, and what backward needs of the iterations."""
    W, array, xp = call.W, iterations.matrix.array, iterations.matrix.xp
    if array is not W:  # made anew, rather than kept
        iterations = iterations._replace(matrix=None)
    outputs: Arrays = ()
    renew_gamma(call, iterations)
    if 'Y' in call.output_names:
        coefficient = coefficient_of_Y(call, iterations)
        if W.size <= matrix.SMALL_SIZE or array.dtype != W.dtype or (
                xp is not numpy):
            Y = (array * coefficient).astype(W.dtype, copy=False)
        else:
            Y = numpy.multiply(
                array, coefficient,
                buffers.empty_of(W, call.reuse)(W.shape, W.dtype))
        outputs = Y,
    if 'sigma' in call.output_names:
        outputs += xp.array(iterations.sigma, accumulator_dtype(W.dtype)),
    return outputs, iterations


def gradients(call: Backward) -> Arrays:
    """Returns ``gW``, ``gu`` and ``ggamma``, as wanted.

    Call it with NumPy's warnings off, as :func:`power_iteration`.

    """
    settings, iterations, wanted, W, u, gamma, gY, gsigma, reuse = call
    A = iterations.matrix
    if A is None or A.array is not W:
        A = unfold(W, settings, iterations.u.dtype)
    grads: dict[str, Any] = {}
    needs_adjoint = 'W' in wanted or 'u' in wanted
    a, c, dot, vbar = 0.0, 0.0, 0.0, None  # gW = a gY + c G
    if gsigma is not None:
        c = gsigma.item()
    if gY is not None:
        gY = gY.astype(A.array.dtype, copy=False)
        if settings.detach_uv or not needs_adjoint:
            dot = A.inner(gY)
        elif iterations.next_s is not None:
            dot, vbar = A.inner(gY), iterations.next_s.copy()
        else:
            dot, vbar = A.inner_and_tdot(gY, iterations.u)
        a, of_sigma, dot = coefficients(settings, iterations, gamma, dot)
        c += of_sigma
    if 'gamma' in wanted:
        grads['gamma'] = A.xp.array(settings.factor * dot, gamma.dtype)
    if needs_adjoint:
        P, Q, ubar = adjoint(
            A, iterations, settings.detach_uv, 'u' in wanted, vbar)
        if ubar is not None:
            ubar *= 0 if iterations.restarted else c
            ubar /= iterations.u_norm
            grads['u'] = ubar.astype(u.dtype, copy=False)
        if 'W' in wanted:
            reuse = reuse and W.dtype == P.dtype  # or it is converted
            gW = A.combination(a, gY, c, P, Q, buffers.empty_of(W, reuse))
            grads['W'] = gW.astype(W.dtype, copy=False)
    return tuple([grads[name] for name in wanted])


def coefficients(
        settings: Settings, iterations: PowerIteration, gamma: Any,
        dot: float) -> tuple[float, float, float]:
    """Returns the coefficients of the gradient.

    Args:
        settings: What the caller chose.
        iterations: What the forward computed.
        gamma: A float, or an array of shape ``()``.
        dot: ``<gY, W>``.

    Returns:
        ``a`` and ``c`` in ``gW = a gY + c G``, without what an upstream
        gradient of sigma adds to c; and ``<gY, W> / max(sigma, eps)``.

    """
    divisor, is_above = iterations.floored(settings)
    dot = dot / divisor
    a = as_float(gamma) * settings.factor / divisor
    return a, -a * dot if is_above else 0.0, dot


def renew_gamma(call: Forward, iterations: Any) -> None:
    """Makes gamma anew, in place, where the renewal says so."""
    initial = call.renewal.initial_gamma
    if initial is None or call.gamma != initial:
        return
    sigma, gamma = iterations.sigma, call.gamma.item()
    if abs(sigma - gamma) <= GAMMA_LIMIT * gamma or (
            sigma < gamma and iterations.turn() > GAMMA_TURN):
        return
    # A sigma of float64 may be too small for a gamma of float32.
    value = call.gamma.dtype.type(sigma) or call.gamma.dtype.type(1)
    if math.isfinite(value):
        call.gamma[...] = initial[...] = value


def coefficient_of_Y(call: Forward, iterations: Any) -> float:
    """Returns what ``W`` is multiplied by."""
    divisor, _ = iterations.floored(call.settings)
    return as_float(call.gamma) * call.settings.factor / divisor


def as_float(x: Any) -> float:
    """A number, or an array of shape ``()``, as a float."""
    return x if isinstance(x, float) else x.item()
