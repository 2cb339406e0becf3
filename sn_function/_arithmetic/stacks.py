"""K power iterations and their adjoint on small weights of one shape at once.

The cost of a small weight is calls of NumPy, not arithmetic.  So weights of
one shape, dtype and settings are copied into an array of shape ``(b, m, n)``,
and each line of :mod:`.power_iteration` is one call for all of them.
``numpy.matmul`` calls the same routine of BLAS for each of them as ``dot``
does for one, so that the numbers are the same, up to rounding on old BLAS.

This is for ordinary numbers only: where a norm is zero, not finite or of
extreme size, the weights are computed one by one.
"""
from __future__ import annotations

import math
from typing import Any, Iterator, NamedTuple, Sequence

import numpy

from sn_function._arithmetic.interface import Arrays, Backward, Forward
from sn_function._arithmetic.matrix import ORDINARY
from sn_function._arithmetic.power_iteration import (
    PowerIteration,
    coefficient_of_Y,
    coefficients,
    renew_gamma,
)

# In entries: larger weights are not copied into a stack, and no larger stacks
# are made, as fresh memory costs more than calls.
MAX_SIZE = 1 << 12
MAX_STACK_SIZE = 1 << 16
# Fewer weights are faster one by one.
MIN_LENGTH = 4


class Stack(NamedTuple):
    """What the iterations on ``b`` weights computed, for their adjoint.

    Attributes:
        us (list): ``u_0 .. u_K``, each of shape ``(b, 1, m)``.
        vs (list): ``v_1 .. v_K``, each of shape ``(b, 1, n)``.
        s_norms (list): Norms of ``W^T u``, each of shape ``(b, 1, 1)``.
        t_norms (list): Norms of ``W v``, likewise.

    """

    us: list[Any]
    vs: list[Any]
    s_norms: list[Any]
    t_norms: list[Any]


class OneByOneError(Exception):
    """These weights cannot be computed together."""


def kind(call: Forward) -> Any:
    """What the weights of a stack have in common; ``None`` for no stack."""
    settings, W = call.settings, call.W
    dtype = W.dtype
    if W.size > MAX_SIZE or settings.axis != 0 or settings.groups or (
            settings.n_vectors or settings.convolution
            or call.renewal.rtol is not None) or not (
            dtype.char in 'fd' and dtype.isnative and W.flags.c_contiguous):
        return None
    return W.shape, dtype.char, settings, call.output_names


def normalize(
        calls: Sequence[Forward]) -> list[tuple[Arrays, PowerIteration]]:
    """:func:`.power_iteration.normalize` of weights of one kind.

    Raises:
        OneByOneError: A number is not an ordinary one.

    """
    if len(calls) < MIN_LENGTH:
        raise OneByOneError
    step = MAX_STACK_SIZE // calls[0].W.size
    return [result for start in range(0, len(calls), step)
            for result in _normalize(calls[start:start + step])]


def _normalize(calls: Sequence[Forward]) -> Iterator[Any]:
    settings, W = calls[0].settings, calls[0].W
    A = _stacked([call.W for call in calls])
    u = numpy.concatenate([call.u for call in calls])
    all_iterations = _iterate(A, u, settings.n_power_iteration)
    _check_turns(calls, u, all_iterations)
    outputs: list[Any] = []
    for name in calls[0].output_names:
        if name == 'sigma':
            outputs.append([numpy.array(iterations.sigma, A.dtype)
                            for iterations in all_iterations])
        else:
            for call, iterations in zip(calls, all_iterations):
                renew_gamma(call, iterations)
            coefficients = [
                coefficient_of_Y(call, iterations)
                for call, iterations in zip(calls, all_iterations)]
            Y = A * _column(coefficients, A.dtype)
            outputs.append(list(Y.reshape(-1, *W.shape)))
    return zip(zip(*outputs) if outputs else [()] * len(calls),
               all_iterations)


def _check_turns(
        calls: Sequence[Forward], u: Any,
        all_iterations: Sequence[PowerIteration]) -> None:
    """Raises an error if a u is one of another weight."""
    if not any([call.renewal.n_warmup for call in calls]):
        return
    lengths = _inner(*2 * [u.reshape(len(calls), 1, -1)])
    for call, length, iterations in zip(calls, lengths, all_iterations):
        # As PowerIteration.turn, of ordinary numbers.
        cosine = iterations.s_norms[0] / (
            iterations.t_norms[0] * math.sqrt(length))
        if cosine < 1 - call.renewal.limit:
            raise OneByOneError


def _iterate(A: Any, u: Any, n: int) -> list[PowerIteration]:
    u = u.astype(A.dtype, copy=False).reshape(len(A), 1, -1)
    stack = Stack([u], [], [], [])
    s_norms, t_norms = [], []
    for _ in range(n):
        v, norm, column = _unit(numpy.matmul(u, A))
        s_norms.append(norm)
        stack.vs.append(v)
        stack.s_norms.append(column)
        u, norm, column = _unit(
            numpy.matmul(A, _transposed(v)).reshape(u.shape))
        t_norms.append(norm)
        stack.us.append(u)
        stack.t_norms.append(column)
    vectors = [zip(*[x[:, 0] for x in xs]) for xs in (stack.us, stack.vs)]
    return list(map(
        PowerIteration, *vectors, zip(*s_norms), zip(*t_norms), t_norms[-1],
        [stack] * len(A)))


def _unit(x: Any) -> tuple[Any, list[float], Any]:
    """Makes unit vectors; returns them and the norms, also as an array."""
    low, high = ORDINARY[x.dtype.char]
    norms = [math.sqrt(number) for number in _inner(x, x)]
    if not all([low < norm < high for norm in norms]):
        raise OneByOneError
    column = _column(norms, x.dtype)
    x /= column
    return x, norms, column


def stack_of(call: Backward) -> Any:
    """What identifies the stack of a weight; ``None`` for no stack."""
    stack = None if call.settings.groups else call.iterations.stack
    return None if stack is None else id(stack)


def gradients(calls: Sequence[Backward]) -> list[Arrays]:
    """:func:`.power_iteration.gradients` of the weights of one stack.

    Raises:
        OneByOneError: Some are missing, or want what others do not want.

    """
    first = calls[0]
    settings, stack, wanted = (
        first.settings, first.iterations.stack, first.wanted)
    kinds = {(tuple(call.wanted), call.gY is None, call.gsigma is None)
             for call in calls}
    if len(calls) != len(stack.us[0]) or len(kinds) > 1 or 'u' in wanted:
        raise OneByOneError
    A = _stacked([call.W for call in calls])
    gY = None
    if first.gY is not None:
        gY = _stacked([call.gY for call in calls]).astype(A.dtype, copy=False)
    a, c, dots = _coefficients(A, gY, calls)
    grads: dict[str, Any] = {}
    if 'W' in wanted:
        P, Q = ((stack.us[-1], stack.vs[-1]) if settings.detach_uv
                else _adjoint(A, stack))
        P = _transposed(P * _column(c, A.dtype))
        # BLAS is not called by matmul for one column and one row.
        gW = P * Q if settings.detach_uv else numpy.matmul(P, Q)
        if gY is not None:
            gY *= _column(a, A.dtype)
            gW += gY
        grads['W'] = gW.reshape(len(calls), *first.W.shape)
    if 'gamma' in wanted:
        grads['gamma'] = [
            numpy.array(settings.factor * dot, call.gamma.dtype)
            for dot, call in zip(dots, calls)]
    return list(zip(*[grads[name] for name in wanted]))


def _coefficients(
        A: Any, gY: Any, calls: Sequence[Backward],
) -> tuple[list[float], list[float], list[float]]:
    """``a`` and ``c`` in ``gW = a gY + c G``, and ``<gY, W> / divisor``."""
    zeros = [0.0] * len(calls)
    a, c, dots = zeros, zeros, zeros
    if gY is not None:
        inner = _inner(gY.reshape(len(A), 1, -1), A.reshape(len(A), 1, -1))
        a, c, dots = map(list, zip(*[
            coefficients(call.settings, call.iterations, call.gamma, dot)
            for call, dot in zip(calls, inner)]))
    if calls[0].gsigma is not None:
        c = [x + call.gsigma.item() for x, call in zip(c, calls)]
    return a, c, dots


def _adjoint(A: Any, stack: Stack) -> tuple[Any, Any]:
    """Returns ``P (b, 2K, m)`` and ``Q (b, 2K, n)``: ``G = P^T Q``."""
    us, vs, s_norms, t_norms = stack
    P: list[Any] = []
    Q: list[Any] = []
    tbar = us[-1]
    for k in range(len(vs) - 1, -1, -1):
        u, v = us[k], vs[k]
        sbar = numpy.matmul(tbar, A)
        sbar -= v * numpy.matmul(v, _transposed(sbar))
        sbar /= s_norms[k]
        P = [tbar, u, *P]
        Q = [v, sbar, *Q]
        if k > 0:
            tbar = numpy.matmul(A, _transposed(sbar)).reshape(u.shape)
            tbar /= t_norms[k - 1]
    return numpy.concatenate(P, axis=1), numpy.concatenate(Q, axis=1)


def _stacked(arrays: Sequence[Any]) -> Any:
    """A copy of the arrays, as matrices one after another."""
    return numpy.concatenate(arrays).reshape(len(arrays), len(arrays[0]), -1)


def _transposed(x: Any) -> Any:
    return x.transpose(0, 2, 1)


def _inner(x: Any, y: Any) -> list[float]:
    """``<x, y>`` of each."""
    return numpy.matmul(x, _transposed(y)).ravel().tolist()


def _column(numbers: list[float], dtype: Any) -> Any:
    return numpy.array(numbers, dtype).reshape(-1, 1, 1)
