"""K power iterations and their adjoint on small weights of one shape at once.

What a small weight costs is calls of NumPy, not arithmetic.  So weights of one
shape, dtype and settings are copied into an array of shape ``(b, m, n)``, and
each line of :mod:`.power_iteration` is one call for all of them.
``numpy.matmul`` calls the same routine of BLAS for each of them as ``dot``
does for one, so that the numbers are the same, up to rounding on old BLAS.

Ordinary numbers only: where a norm is zero, not finite or of extreme size, the
weights are to be done one by one.
"""
from __future__ import annotations

import math
from typing import Any, Iterator, NamedTuple, Sequence

import numpy

from sn_function._arithmetic.power_iteration import (
    ORDINARY,
    PowerIteration,
    as_float,
    coefficients,
)

# Larger weights are not copied into a stack, and no larger stacks are made, in
# entries: fresh memory costs more than calls.
MAX_SIZE = 1 << 12
MAX_STACK_SIZE = 1 << 16
# Fewer weights are done sooner one by one.
MIN_LENGTH = 4

Call = Any  # a dict: the arguments of a function, by name


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
    """These weights cannot be done together."""


def kind(call: Call) -> Any:
    """What the weights of a stack have in common; ``None`` for no stack."""
    W, settings = call['W'], call['settings']
    dtype = W.dtype
    if W.size > MAX_SIZE or settings.axis != 0 or not (
            dtype.char in 'fd' and dtype.isnative and W.flags.c_contiguous):
        return None
    return W.shape, dtype.char, settings, call['output_names']


def normalize(calls: Sequence[Call]) -> list[Any]:
    """:func:`.power_iteration.normalize` of weights of one kind.

    Raises:
        OneByOneError: A number is not an ordinary one.

    """
    if len(calls) < MIN_LENGTH:
        raise OneByOneError
    step = MAX_STACK_SIZE // calls[0]['W'].size
    return [result for start in range(0, len(calls), step)
            for result in _normalize(calls[start:start + step])]


def _normalize(calls: Sequence[Call]) -> Iterator[Any]:
    settings, W = calls[0]['settings'], calls[0]['W']
    A = _stacked(calls, 'W')
    u = numpy.concatenate([call['u'] for call in calls])
    its = _iterate(A, u, settings.n_power_iteration)
    outputs: list[Any] = []
    for name in calls[0]['output_names']:
        if name == 'sigma':
            outputs.append([numpy.array(it.sigma, A.dtype) for it in its])
        else:
            coefficients = [
                as_float(call['gamma']) * settings.factor / it.floored(
                    settings.eps)[0] for call, it in zip(calls, its)]
            Y = A * _column(coefficients, A.dtype)
            outputs.append(list(Y.reshape(-1, *W.shape)))
    return zip(zip(*outputs) if outputs else [()] * len(its), its)


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


def stack_of(call: Call) -> Any:
    """What identifies the stack of a weight; ``None`` for no stack."""
    stack = call['it'].stack
    return None if stack is None else id(stack)


def gradients(calls: Sequence[Call]) -> list[Any]:
    """:func:`.power_iteration.gradients` of the weights of one stack.

    Raises:
        OneByOneError: Some are missing, or want what others do not want.

    """
    settings, W, wanted, it = map(
        calls[0].get, ('settings', 'W', 'wanted', 'it'))
    stack, b = it.stack, len(it.stack.us[0])
    kinds = {(tuple(call['wanted']), call.get('gY') is None,
              call.get('gsigma') is None) for call in calls}
    if len(calls) != b or len(kinds) > 1 or 'u' in wanted:
        raise OneByOneError
    (_, lacks_gY, lacks_gsigma), = kinds
    A = _stacked(calls, 'W')
    grads: dict[str, Any] = {}
    a, c, dots = [0.0] * b, [0.0] * b, [0.0] * b
    if not lacks_gsigma:
        c = [call['gsigma'].item() for call in calls]
    if not lacks_gY:
        gY = _stacked(calls, 'gY').astype(A.dtype, copy=False)
        dots = _inner(gY.reshape(b, 1, -1), A.reshape(b, 1, -1))
        for i, call in enumerate(calls):
            a[i], of_sigma, dots[i] = coefficients(
                settings, call['it'], call['gamma'], dots[i])
            c[i] += of_sigma
        gY *= _column(a, A.dtype)
    if 'W' in wanted:
        P, Q = ((stack.us[-1], stack.vs[-1]) if settings.detach_uv
                else _adjoint(A, stack))
        P = _transposed(P * _column(c, A.dtype))
        # BLAS is not called by matmul for one column and one row.
        gW = P * Q if settings.detach_uv else numpy.matmul(P, Q)
        if not lacks_gY:
            gW += gY
        grads['W'] = gW.reshape(b, *W.shape)
    if 'gamma' in wanted:
        grads['gamma'] = [
            numpy.array(settings.factor * x, call['gamma'].dtype)
            for x, call in zip(dots, calls)]
    return list(zip(*[grads[name] for name in wanted]))


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
            ubar = numpy.matmul(A, _transposed(sbar)).reshape(u.shape)
            tbar = ubar - u * numpy.matmul(u, _transposed(ubar))
            tbar /= t_norms[k - 1]
    return numpy.concatenate(P, axis=1), numpy.concatenate(Q, axis=1)


def _stacked(calls: Sequence[Call], name: str) -> Any:
    """A copy of the arrays, as matrices one after another."""
    arrays = [call[name] for call in calls]
    return numpy.concatenate(arrays).reshape(len(arrays), len(arrays[0]), -1)


def _transposed(x: Any) -> Any:
    return x.transpose(0, 2, 1)


def _inner(x: Any, y: Any) -> list[float]:
    """``<x, y>`` of each."""
    return numpy.matmul(x, _transposed(y)).ravel().tolist()


def _column(numbers: list[float], dtype: Any) -> Any:
    return numpy.array(numbers, dtype).reshape(-1, 1, 1)
