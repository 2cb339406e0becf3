"""K power iterations and their adjoint on a CUDA device; arrays only.

The same mathematics as :mod:`.power_iteration`, but nothing waits for the
device: norms, sigma, its floor, whether anything is finite, and u are decided
by the kernels of :mod:`.kernels`.  A ``u`` that is zero or not finite, which
is an error on the host, is replaced: the iteration starts from the unit vector
of the largest row.

A small weight takes one launch forward and one backward, which it shares with
others of the same node.  A large one takes ``3 K + 1`` and, with the exact
gradient, ``4 K``, or 3 with u and v constant.  One of several groups is
computed by :mod:`.grouped`, without kernels of its own.
"""
from __future__ import annotations

import importlib
import math
from typing import Any, Callable, Sequence

import numpy
from chainer.backends import cuda

from sn_function._arithmetic import grouped, kernels
from sn_function._arithmetic.groups import Groups
from sn_function._arithmetic.interface import (
    Array,
    Arrays,
    Backward,
    Forward,
    Settings,
)
from sn_function._arithmetic.kernels import COEFFICIENTS, NULL, NUMBERS
from sn_function._arithmetic.matrix import accumulator_dtype

if cuda.available:
    importlib.import_module('cupy.cublas')  # an attribute of cupy from now on

# As cupy.cublas takes them: it would make arrays of numbers at each call.
_SCALARS = {
    char: (numpy.ones((), char), numpy.zeros((), char)) for char in 'fd'}


class Iterations:
    """What a forward computed, for its backward; it stays on the device.

    Args:
        W: Weight with 2 or more dimensions.
        axis: Its output axis.
        K: Number of iterations.

    Attributes:
        numbers: See :mod:`.kernels`.
        vectors: See there.

    """

    def __init__(self, W: Array, axis: int, K: int) -> None:
        l = math.prod(W.shape[:axis])  # NOQA: E741
        m = W.shape[axis]
        r = math.prod(W.shape[axis + 1:])
        self.K, self.l, self.m, self.r, self.n = K, l, m, r, l * r
        self.sizes = tuple(map(numpy.int32, (l, m, r)))
        self.dtype = accumulator_dtype(W.dtype)
        self.is_small = W.size <= kernels.FUSED_SIZE
        # BLAS knows one dtype, and no batch that adds up.
        self.is_blas = (
            W.dtype == self.dtype and 1 in (l, r) and min(m, self.n) > 1)
        empty = cuda.cupy.empty
        self.numbers = empty(len(NUMBERS) + 2 * K, numpy.float64)
        self.vectors = empty((K + 1) * m + K * self.n, self.dtype)

    def us(self, k: int) -> Array:
        """Returns ``u_k``, ``0 <= k <= K``."""
        return self.vectors[k * self.m:(k + 1) * self.m]

    def vs(self, k: int) -> Array:
        """Returns ``v_k``, ``1 <= k <= K``."""
        start = (self.K + 1) * self.m + (k - 1) * self.n
        return self.vectors[start:start + self.n]

    def number(self, name: str) -> Array:
        """Returns one of :data:`.kernels.NUMBERS`, shape ``()``."""
        return self.numbers[NUMBERS.index(name)]

    # As :class:`.interface.Iterations` has them.

    @property
    def u(self) -> Array:
        return self.us(self.K)

    @property
    def v(self) -> Array:
        return self.vs(self.K)

    @property
    def start(self) -> Array:
        return self.us(0)

    @property
    def restarted(self) -> Array:
        return self.number('RESTARTED')

    @property
    def sigma(self) -> Array:
        return self.number('SIGMA')

    def floored(self, settings: Settings) -> tuple[Array, Array]:
        return self.number('DIVISOR'), self.number('ABOVE')


def normalize_all(calls: Sequence[Forward]) -> list[tuple[Arrays, Any]]:
    """Small weights of a kind share a launch."""
    return _each(
        calls, lambda plain: _run(kernels.fused_fwd, list(map(
            _Forward, plain))), grouped.normalize_and_store)


def gradients_all(calls: Sequence[Backward]) -> list[Arrays]:
    """Small weights of a kind share a launch."""
    return _each(
        calls, lambda plain: _run(kernels.fused_bwd, list(map(
            _Backward, plain))), grouped.gradients)


def _each(
        calls: Sequence[Any], plain: Callable[[Any], list[Any]],
        of_groups: Callable[[Any], Any]) -> list[Any]:
    """Returns the result of each; those without groups are run together."""
    results = iter(plain([
        call for call in calls if call.settings.groups is None]))
    return [next(results) if call.settings.groups is None else of_groups(call)
            for call in calls]


def _run(fused: kernels.Fused, parts: Sequence[Any]) -> list[Any]:
    """Runs :class:`_Forward` or :class:`_Backward` of each weight.

    Small ones of a kind share the launches of the fused kernel.
    """
    small: dict[Any, list[Any]] = {}
    for part in parts:
        if part.iterations.is_small:
            small.setdefault(part.kind, []).append(part)
        else:
            part.launch()
    for (T, U, *common), group in small.items():
        fused(T, U, [part.arguments() for part in group], *common)
    return [part.result() for part in parts]


class _Forward:
    """What one weight takes of :func:`normalize_all`."""

    def __init__(self, call: Forward) -> None:
        settings = call.settings
        self.W = W = _contiguous(call.W)
        self.iterations = iterations = Iterations(
            W, settings.axis, settings.n_power_iteration)
        self.factor = settings.factor
        if isinstance(call.gamma, float):
            self.factor *= call.gamma
            self.gamma: Any = NULL
        else:
            self.gamma = call.gamma.astype(iterations.dtype, copy=False)
        self.call = call
        self.vector = _contiguous(call.u)
        empty = cuda.cupy.empty
        # Not a view of the numbers, which would live as long as it.
        self.sigma: Any = (
            empty((), iterations.dtype) if 'sigma' in call.output_names
            else NULL)
        self.Y: Any = NULL
        if iterations.is_small and 'Y' in call.output_names:
            self.Y = empty(W.shape, W.dtype)
        renewal = call.renewal
        self.initial_gamma: Any = NULL
        # A gamma of another dtype was cast, so the kernel has a copy of it.
        if renewal.initial_gamma is not None and self.gamma is call.gamma:
            self.initial_gamma = renewal.initial_gamma
        # In common with others in one launch.
        self.kind = (W.dtype, self.vector.dtype, numpy.int32(iterations.K),
                     settings.eps, settings.at_zero,
                     numpy.int32(call.update_u),
                     numpy.int32(renewal.n_warmup), renewal.limit)

    def arguments(self) -> tuple[Any, ...]:
        iterations = self.iterations
        return (self.W, self.vector, iterations.numbers, iterations.vectors,
                self.sigma, self.gamma, self.initial_gamma, self.Y,
                *iterations.sizes, self.factor)

    def launch(self) -> None:
        """Computes it by kernels of its own."""
        it, W, vector = self.iterations, self.W, self.vector
        T, U, K, *rest = self.kind
        for k in range(it.K):
            _transposed_product(
                it, W, it.us(k) if k else vector, it.vs(k + 1))
            _product(it, W, it.vs(k + 1), it.us(k + 1))
            kernels.settle_fwd(
                T, U, W, vector, it.numbers, it.vectors, self.sigma,
                self.gamma, self.initial_gamma, *it.sizes, numpy.int32(k), K,
                self.factor, *rest)
        if 'Y' in self.call.output_names:
            self.Y = kernels.scale_fwd(W, it.numbers)

    def result(self) -> tuple[Arrays, Iterations]:
        if self.call.update_u and self.vector is not self.call.u:
            self.call.u[...] = self.vector
        outputs = {'Y': self.Y, 'sigma': self.sigma}
        return tuple([outputs[name] for name in self.call.output_names]), (
            self.iterations)


class _Backward:
    """What one weight takes of :func:`gradients_all`."""

    def __init__(self, call: Backward) -> None:
        self.call = call
        self.iterations = it = call.iterations
        self.W = W = _contiguous(call.W)
        wanted, u = call.wanted, call.u
        empty = cuda.cupy.empty
        self.gW = empty(W.shape, W.dtype) if 'W' in wanted else NULL
        self.gu = empty(it.m, u.dtype) if 'u' in wanted else NULL
        self.ggamma = empty((), it.dtype) if 'gamma' in wanted else NULL
        self.gY: Any = NULL
        if call.gY is not None:
            self.gY = call.gY.astype(W.dtype, copy=False)
            if it.is_small:
                self.gY = _contiguous(self.gY)
        self.gsigma = (NULL if call.gsigma is None
                       else call.gsigma.astype(it.dtype, copy=False))
        self.coefficients = empty(len(COEFFICIENTS), numpy.float64)
        self.bars = empty(it.K * (it.m + it.n), it.dtype)
        # In common with others in one launch.
        self.kind = (W.dtype, it.dtype if self.gu is NULL else u.dtype,
                     numpy.int32(it.K), numpy.int32(call.settings.detach_uv))

    def arguments(self) -> tuple[Any, ...]:
        it = self.iterations
        return (self.W, self.gY, self.gsigma, it.numbers, it.vectors,
                self.coefficients, self.bars, self.gW, self.gu, self.ggamma,
                *it.sizes, self.call.settings.factor)

    def result(self) -> Arrays:
        grads = {'W': self.gW, 'u': self.gu, 'gamma': self.ggamma}
        if 'gamma' in self.call.wanted:
            grads['gamma'] = self.ggamma.astype(
                self.call.gamma.dtype, copy=False)
        return tuple([grads[name] for name in self.call.wanted])

    def launch(self) -> None:
        """Computes it by kernels of its own."""
        it = self.iterations
        detach_uv = self.call.settings.detach_uv
        dots = NULL if self.gY is NULL else _dots(self.W, self.gY)
        if detach_uv or (self.gW is NULL and self.gu is NULL):
            self._project(dots)
        else:
            self._go_back(dots)
        if self.gW is not NULL:
            kernels.correct_bwd(
                0.0 if self.gY is NULL else self.gY, self.coefficients,
                it.vectors, self.bars, it.m, it.n, it.r, it.K,
                int(detach_uv), self.gW)

    def _go_back(self, dots: Any) -> None:
        """Computes the bars of all iterations, the last one first."""
        it, W = self.iterations, self.W
        x = it.u
        for k in range(it.K, 0, -1):
            sbar = self._sbar(k)
            _transposed_product(it, W, x, sbar)
            self._project(dots, x, sbar, it.vs(k), k - 1, k == it.K)
            if k > 1:
                tbar = self._tbar(k - 1)
                _product(it, W, sbar, tbar)
                self._project(dots, sbar, tbar, NULL, it.K + k - 2, False)
                x = tbar
            elif self.gu is not NULL:
                ubar = self._tbar(it.K)  # the place of tbar_K, which is u_K
                _product(it, W, sbar, ubar)
                self._project(dots, sbar, ubar, NULL, 0, False, self.gu)

    def _tbar(self, k: int) -> Array:
        m = self.iterations.m
        return self.bars[(k - 1) * m:k * m]

    def _sbar(self, k: int) -> Array:
        it = self.iterations
        start = it.K * it.m + (k - 1) * it.n
        return self.bars[start:start + it.n]

    def _project(
            self, dots: Any, x: Any = NULL, y: Any = NULL, e: Any = NULL,
            norm: int = 0, is_first: bool = True, gu: Any = NULL) -> None:
        T, U, *_ = self.kind
        it = self.iterations
        kernels.project_bwd(
            T, U, self.W, it.numbers, self.coefficients, *it.sizes,
            numpy.int32(is_first), dots,
            numpy.int32(0 if dots is NULL else dots.size), self.gsigma,
            self.ggamma, self.call.settings.factor, x, y, e,
            numpy.int32(norm), gu)


def warm_up(
        W: Array, u: Array, axis: int, n: int, groups: Groups | None = None,
) -> None:
    for _ in range(n):  # one at a time: the vectors of one are enough
        normalize_all([Forward(
            Settings(1, axis, True, groups=groups), W, u, 1.0, (),
            update_u=True)])


def _contiguous(x: Array) -> Array:
    return x if x.flags.c_contiguous else cuda.cupy.ascontiguousarray(x)


def _transposed_product(
        it: Iterations, W: Array, x: Array, out: Array) -> None:
    """``out = W^T x``"""
    if not it.is_blas:
        kernels.product(W.reshape(it.l, it.m, it.r), x.reshape(-1, 1),
                        axis=1, out=out.reshape(it.l, it.r))
    elif it.l == 1:
        _gemv('T', W.reshape(it.m, it.r), x, out)
    else:
        _gemv('N', W.reshape(it.l, it.m), x, out)


def _product(it: Iterations, W: Array, x: Array, out: Array) -> None:
    """``out = W x``"""
    if not it.is_blas:
        kernels.product(W.reshape(it.l, it.m, it.r),
                        x.reshape(it.l, 1, it.r), axis=(0, 2), out=out)
    elif it.l == 1:
        _gemv('N', W.reshape(it.m, it.r), x, out)
    else:
        _gemv('T', W.reshape(it.l, it.m), x, out)


def _gemv(transposed: str, matrix: Array, x: Array, out: Array) -> None:
    # Not xp.dot: it calls BLAS for a product of matrices, which may split the
    # sum and add the parts with a kernel more.
    one, zero = _SCALARS[matrix.dtype.char]
    cuda.cupy.cublas.gemv(transposed, one, matrix, x, zero, out)


def _dots(W: Array, gY: Array) -> Array:
    """``<gY, W>`` in parts, one for each block of the device."""
    parts = math.gcd(W.size, 1024)
    if parts > W.shape[0] and gY.flags.c_contiguous:
        W, gY = W.reshape(parts, -1), gY.reshape(parts, -1)
    dots = cuda.cupy.empty(W.shape[0], numpy.float64)
    kernels.dot_bwd(gY, W, axis=tuple(range(1, W.ndim)), out=dots)
    return dots
