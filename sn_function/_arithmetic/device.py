"""K power iterations and their adjoint on a CUDA device; arrays only.

The same mathematics as :mod:`.power_iteration`, but nothing waits
for the device: norms, sigma, its floor, whether anything is finite, and u are
decided by the kernels of :mod:`.kernels`.  A ``u`` that is zero or
not finite, which is an error on the host, is replaced: the iteration starts
from the unit vector of the largest row.

A small weight takes one launch forward and one backward, which it shares with
others of the same node.  A large one takes ``3 K + 1`` and, with the exact
gradient, ``4 K``, or 3 with u and v constant.
"""
from __future__ import annotations

import importlib
import math
from typing import Any, Sequence

import numpy
from chainer.backends import cuda

from sn_function._arithmetic import kernels
from sn_function._arithmetic.kernels import ADJOINT, NULL, STATE
from sn_function._arithmetic.matrix import accumulator_dtype
from sn_function._arithmetic.power_iteration import Settings

if cuda.available:
    importlib.import_module('cupy.cublas')  # an attribute of cupy from now on

# As cupy.cublas takes them: it would make arrays of numbers at each call.
_SCALARS = {
    char: (numpy.ones((), char), numpy.zeros((), char)) for char in 'fd'}


class Iteration:
    """What a forward computed, for its backward; it stays on the device.

    Args:
        W: Weight with 2 or more dimensions.
        axis: Its output axis.
        K: Number of iterations.

    """

    def __init__(self, W: Any, axis: int, K: int) -> None:
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
        self._us = len(STATE) + 2 * K
        self._vs = self._us + (K + 1) * m
        self._x = self._vs + K * self.n
        self.state = cuda.cupy.empty(self._x + m, self.dtype)

    def us(self, k: int) -> Any:
        """Returns ``u_k``, ``0 <= k <= K``."""
        start = self._us + k * self.m
        return self.state[start:start + self.m]

    def vs(self, k: int) -> Any:
        """Returns ``v_k``, ``1 <= k <= K``."""
        start = self._vs + (k - 1) * self.n
        return self.state[start:start + self.n]

    @property
    def x(self) -> Any:
        """``u_K``, scaled for a product with the weight."""
        return self.state[self._x:]

    def scalar(self, name: str) -> Any:
        """Returns one of :data:`.kernels.STATE`, shape ``()``."""
        return self.state[STATE.index(name)]

    # As _power_iteration.PowerIteration has them, for the composed function.

    @property
    def u(self) -> Any:
        return self.us(self.K)

    @property
    def v(self) -> Any:
        return self.vs(self.K)

    @property
    def start(self) -> Any:
        return self.us(0)

    @property
    def restarted(self) -> Any:
        return self.scalar('RESTARTED')

    @property
    def scale(self) -> tuple[Any, Any]:
        """Factors of its inverse, as of the others."""
        return self.scalar('W1'), self.scalar('W2')

    @property
    def u_scale(self) -> tuple[Any, Any]:
        return self.scalar('U1'), self.scalar('U2')

    def floored(self, eps: float) -> tuple[Any, tuple[Any, Any], Any]:
        """``max(sigma, eps)``, the scale it is in, and if it is sigma."""
        return (self.scalar('DIVISOR'),
                (self.scalar('Y1'), self.scalar('Y2')), self.scalar('ABOVE'))


def normalize_all(
        calls: Sequence[dict[str, Any]],
) -> list[tuple[tuple[Any, ...], Iteration]]:
    """Returns ``Y`` and ``sigma``, as named, and what backward needs.

    Small weights of a kind share a launch.

    Args:
        calls: For each weight the arguments of :class:`_Forward`.

    """
    return _run(kernels.fused_fwd, [_Forward(**call) for call in calls])


class _Forward:
    """What one weight takes of :func:`normalize_all`.

    Args:
        settings (Settings): What the caller chose.
        W: Weight with 2 or more dimensions.
        u: Start vector, shape ``(m,)``.
        gamma: A float, or an array of shape ``()``.
        output_names: ``'Y'``, ``'sigma'`` or both.
        update_u: Overwrite ``u`` with ``u_K``, unless that is not finite.
        reuse: Not used: CuPy has a pool of memory.

    """

    def __init__(
            self, settings: Settings, W: Any, u: Any, gamma: Any,
            output_names: Sequence[str], update_u: bool,
            reuse: bool = False) -> None:
        self.W = W = _contiguous(W)
        self.it = it = Iteration(
            W, settings.axis, settings.n_power_iteration)
        self.factor = settings.factor
        if isinstance(gamma, float):
            self.factor *= gamma
            self.gamma: Any = NULL
        else:
            self.gamma = gamma.astype(it.dtype, copy=False)
        self.u, self.vector = u, _contiguous(u)
        self.output_names = output_names
        self.update_u = update_u
        # Not a view of the state, which would live as long as it.
        self.sigma: Any = (
            cuda.cupy.empty((), it.dtype) if 'sigma' in output_names else NULL)
        self.Y: Any = NULL
        if it.is_small and 'Y' in output_names:
            self.Y = cuda.cupy.empty(W.shape, W.dtype)
        # In common with others in one launch.
        self.kind = (W.dtype, self.vector.dtype, numpy.int32(it.K),
                     settings.eps, numpy.int32(update_u))

    def arguments(self) -> tuple[Any, ...]:
        return (self.W, self.vector, self.it.state, self.sigma, self.gamma,
                self.Y, *self.it.sizes, self.factor)

    def launch(self) -> None:
        """Computes it by kernels of its own."""
        it, W, vector = self.it, self.W, self.vector
        T, U, K, *rest = self.kind
        for k in range(it.K):
            _transposed_product(
                it, W, it.us(k) if k else vector, it.vs(k + 1))
            _product(it, W, it.vs(k + 1), it.us(k + 1))
            kernels.settle_fwd(
                T, U, W, vector, it.state, self.sigma, self.gamma, *it.sizes,
                numpy.int32(k), K, self.factor, *rest)
        if 'Y' in self.output_names:
            self.Y = kernels.scale_fwd(W, it.state)

    def result(self) -> tuple[tuple[Any, ...], Iteration]:
        if self.update_u and self.vector is not self.u:
            self.u[...] = self.vector
        outputs = {'Y': self.Y, 'sigma': self.sigma}
        return tuple([outputs[name] for name in self.output_names]), self.it


def gradients_all(
        calls: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Returns ``gW``, ``gu`` and ``ggamma``, as wanted.

    Small weights of a kind share a launch.

    Args:
        calls: For each weight the arguments of :class:`_Backward`.

    """
    return _run(kernels.fused_bwd, [_Backward(**call) for call in calls])


def _run(fused: kernels.Fused, parts: Sequence[Any]) -> list[Any]:
    """Runs :class:`_Forward` or :class:`_Backward` of each weight.

    Small ones of a kind share the launches of the fused kernel.
    """
    small: dict[Any, list[Any]] = {}
    for part in parts:
        if part.it.is_small:
            small.setdefault(part.kind, []).append(part)
        else:
            part.launch()
    for (T, U, *common), group in small.items():
        fused(T, U, [part.arguments() for part in group], *common)
    return [part.result() for part in parts]


class _Backward:
    """What one weight takes of :func:`gradients_all`.

    Args:
        settings (Settings): What the caller chose.
        it: What the forward computed.
        wanted: ``'W'``, ``'u'`` and ``'gamma'``, or some of them.
        W: Weight.
        u: Start vector, if its gradient is wanted.
        gamma: Scale.
        gY: Upstream gradient of ``Y``, of its shape and dtype, or ``None``.
        gsigma: Upstream gradient of sigma, shape ``()``, or ``None``.
        reuse: Not used: CuPy has a pool of memory.

    """

    def __init__(
            self, settings: Settings, it: Iteration, wanted: Sequence[str],
            W: Any, u: Any, gamma: Any, gY: Any = None, gsigma: Any = None,
            reuse: bool = False) -> None:
        self.settings, self.it = settings, it
        self.wanted, self.gamma = wanted, gamma
        self.W = W = _contiguous(W)
        empty = cuda.cupy.empty
        self.gW = empty(W.shape, W.dtype) if 'W' in wanted else NULL
        self.gu = empty(it.m, u.dtype) if 'u' in wanted else NULL
        self.ggamma = empty((), it.dtype) if 'gamma' in wanted else NULL
        self.gY: Any = NULL
        if gY is not None:
            self.gY = gY.astype(W.dtype, copy=False)
            if it.is_small:
                self.gY = _contiguous(self.gY)
        self.gsigma = (NULL if gsigma is None
                       else gsigma.astype(it.dtype, copy=False))
        self.adjoint = empty(
            len(ADJOINT) + it.K * (it.m + it.n) + max(it.m, it.n), it.dtype)
        # In common with others in one launch.
        self.kind = (W.dtype, it.dtype if self.gu is NULL else u.dtype,
                     numpy.int32(it.K), numpy.int32(settings.detach_uv))

    def arguments(self) -> tuple[Any, ...]:
        return (self.W, self.gY, self.gsigma, self.it.state, self.adjoint,
                self.gW, self.gu, self.ggamma, *self.it.sizes,
                self.settings.factor)

    def result(self) -> tuple[Any, ...]:
        grads = {'W': self.gW, 'u': self.gu, 'gamma': self.ggamma}
        if 'gamma' in self.wanted:
            grads['gamma'] = self.ggamma.astype(self.gamma.dtype, copy=False)
        return tuple([grads[name] for name in self.wanted])

    def launch(self) -> None:
        """Computes it by kernels of its own."""
        it, W, gY, adjoint = self.it, self.W, self.gY, self.adjoint
        gW, gu, detach_uv = self.gW, self.gu, self.settings.detach_uv
        K, m, n = it.K, it.m, it.n
        tbars = len(ADJOINT)
        sbars = tbars + K * m
        x = adjoint[sbars + K * n:]
        dots = NULL
        if gY is not NULL:
            dots = _dots(it, W, gY)
        numbers = (
            dots, numpy.int32(0 if gY is NULL else dots.size),
            self.gsigma, self.ggamma, self.settings.factor)

        def project(
                is_first: bool, y: Any, e: Any, size: int, norm: int
        ) -> None:
            kernels.project_bwd(
                W.dtype, it.dtype, it.state, adjoint, numpy.int32(is_first),
                *numbers, y, e, numpy.int32(size), numpy.int32(norm), x)

        if detach_uv or (gW is NULL and gu is NULL):
            project(True, NULL, NULL, 0, 0)
        else:
            for k in range(K, 0, -1):
                sbar = adjoint[sbars + (k - 1) * n:sbars + k * n]
                _transposed_product(it, W, it.x if k == K else x[:m], sbar)
                project(k == K, sbar, it.vs(k), n, k - 1)
                if k == 1 and gu is NULL:
                    break
                # Before the first iteration it goes where tbar_K would, u_K.
                row = tbars + ((k - 2) % K) * m
                ubar = adjoint[row:row + m]
                _product(it, W, x[:n], ubar)
                if k > 1:
                    project(False, ubar, it.us(k - 1), m, K + k - 2)
                else:
                    kernels.vector_bwd(ubar, it.state, adjoint, gu)
        if gW is not NULL:
            kernels.correct_bwd(
                0.0 if gY is NULL else gY, it.state, adjoint, m, n, it.r, K,
                int(detach_uv), gW)


def warm_up(W: Any, u: Any, axis: int, n: int) -> None:
    """Moves ``u`` on by ``n`` iterations, unless it would not be finite."""
    for _ in range(n):  # one at a time: the state of one is enough
        normalize_all([{
            'settings': Settings(1, axis, True), 'W': W, 'u': u, 'gamma': 1.0,
            'output_names': (), 'update_u': True}])


def _contiguous(x: Any) -> Any:
    return x if x.flags.c_contiguous else cuda.cupy.ascontiguousarray(x)


def _transposed_product(it: Iteration, W: Any, x: Any, out: Any) -> None:
    """``out = W^T x``"""
    if not it.is_blas:
        kernels.product(W.reshape(it.l, it.m, it.r), x.reshape(-1, 1),
                         axis=1, out=out.reshape(it.l, it.r))
    elif it.l == 1:
        _gemv('T', W.reshape(it.m, it.r), x, out)
    else:
        _gemv('N', W.reshape(it.l, it.m), x, out)


def _product(it: Iteration, W: Any, x: Any, out: Any) -> None:
    """``out = W x``"""
    if not it.is_blas:
        kernels.product(W.reshape(it.l, it.m, it.r),
                         x.reshape(it.l, 1, it.r), axis=(0, 2), out=out)
    elif it.l == 1:
        _gemv('N', W.reshape(it.m, it.r), x, out)
    else:
        _gemv('T', W.reshape(it.l, it.m), x, out)


def _gemv(transposed: str, matrix: Any, x: Any, out: Any) -> None:
    # Not xp.dot: it calls BLAS for a product of matrices, which may split the
    # sum and add the parts with a kernel more.
    one, zero = _SCALARS[matrix.dtype.char]
    cuda.cupy.cublas.gemv(transposed, one, matrix, x, zero, out)


def _dots(it: Iteration, W: Any, gY: Any) -> Any:
    """``<gY, W / scale>`` in parts, one for each block of the device."""
    parts = math.gcd(W.size, 1024)
    if parts > W.shape[0] and gY.flags.c_contiguous:
        W, gY = W.reshape(parts, -1), gY.reshape(parts, -1)
    dots = cuda.cupy.empty(W.shape[0], it.dtype)
    kernels.dot_bwd(
        gY, W, *it.scale, axis=tuple(range(1, W.ndim)), out=dots)
    return dots
