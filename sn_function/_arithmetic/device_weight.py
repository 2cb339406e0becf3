"""A weight on a CUDA device: what a forward keeps there, and where."""
from __future__ import annotations

import math
from typing import Any, Sequence

import numpy
from chainer.backends import cuda

from sn_function._arithmetic import kernels, workspace
from sn_function._arithmetic.interface import (
    Array,
    Arrays,
    Forward,
    Settings,
)
from sn_function._arithmetic.kernels import NULL, NUMBERS
from sn_function._arithmetic.matrix import accumulator_dtype
from sn_function._arithmetic.workspace import DOUBLE

FLOAT64 = numpy.dtype(numpy.float64)


class Iterations:
    """What a forward computed, for its backward; it stays on the device.

    Args:
        W: Weight with 2 or more dimensions, C-contiguous.
        axis: Its output axis.
        K: Number of iterations.
        u: Start vector, C-contiguous.

    Attributes:
        plan: The plan of its forward.
        at: The place of all that is kept.
        bars: The place for what a backward keeps, if there is one already.

    """

    at: Any
    bars: Any = None

    def __init__(self, W: Array, axis: int, K: int, u: Array) -> None:
        shape = W.shape
        l = math.prod(shape[:axis]) if axis else 1  # NOQA: E741
        m = shape[axis]
        r = math.prod(shape[axis + 1:])
        self.K, self.l, self.m, self.r, self.n = K, l, m, r, l * r
        self.dtype = accumulator_dtype(W.dtype)
        # A copy of a link may read vectors where CuPy is not at hand.
        self._ndarray = cuda.cupy.ndarray
        self.is_small = W.size <= kernels.FUSED_SIZE
        # u is read in packs as well where the first product is by rows.
        self.plan = self.plan_for(W, u if r == 1 else W)

    def plan_for(self, W: Array, other: Array) -> workspace.Plan:
        """Returns the plan, for another array of the shape of the weight."""
        return workspace.plan(
            self.l, self.m, self.r, self.K, W.dtype.itemsize,
            W.data.ptr % 16 == 0 and other.data.ptr % 16 == 0, self.is_small,
            kernels.BLOCK_SIZE)

    def place_of_u(self, k: int) -> Any:
        """Returns the place of ``u_k``, ``0 <= k <= K``."""
        plan = self.plan
        return self.at + (plan.us + k * plan.m_step)

    def place_of_v(self, k: int) -> Any:
        """Returns the place of ``v_{k+1}``, ``0 <= k < K``."""
        plan = self.plan
        return self.at + (plan.vs + k * plan.n_step)

    def place_of_norm(self, k: int) -> Any:
        """Returns the place of a norm: those of s come first, then of t."""
        return self.at + DOUBLE * (len(NUMBERS) + k)

    def array(self, place: Any, n: int, dtype: Any) -> Array:
        """Returns ``n`` entries of the device's memory, from a place on."""
        return self._ndarray((n,), dtype, place)

    @property
    def numbers(self) -> Array:
        """Those of :data:`.kernels.NUMBERS`, and norms."""
        return self.array(self.at, len(NUMBERS) + 2 * self.K, FLOAT64)

    def us(self, k: int) -> Array:
        """Returns ``u_k``, ``0 <= k <= K``."""
        return self.array(self.place_of_u(k), self.m, self.dtype)

    def vs(self, k: int) -> Array:
        """Returns ``v_k``, ``1 <= k <= K``."""
        return self.array(self.place_of_v(k - 1), self.n, self.dtype)

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


class SubspaceIterations(Iterations):
    """The same of several vectors, behind what a backward looks at.

    Args:
        W, axis: As above.
        b: Number of vectors.

    """

    def __init__(self, W: Array, axis: int, b: int) -> None:
        super().__init__(W, axis, 1, W)
        self.b = b
        self.subspace = workspace.subspace_plan(
            self.l, self.m, self.r, b, W.dtype.itemsize,
            W.data.ptr % 16 == 0, self.is_small, kernels.BLOCK_SIZE)

    def _vectors(self, place: int) -> Array:
        """Returns those of a place, shape ``(b, m)``."""
        return self.array(
            self.at + place, self.m * self.b, self.dtype,
        ).reshape(self.m, self.b).T

    def _values(self) -> Array:
        return self.array(self.at + self.subspace.values, self.b + 2, FLOAT64)

    @property
    def start(self) -> Array:
        return self._vectors(self.subspace.start)

    @property
    def basis(self) -> Array:
        """An orthonormal basis of the span, shape ``(b, m)``."""
        return self._vectors(self.subspace.basis)

    @property
    def singular_values(self) -> Array:
        """Ritz values, shape ``(b,)``, the largest one first."""
        return self._values()[:self.b]

    def turn(self) -> Array:
        """Returns how much the next pass turns u, shape ``()``, if that was
        measured, else 0."""
        return self._values()[self.b]

    def residual(self) -> Array:
        """Returns ``|W v - sigma u| / sigma``, shape ``()``, likewise."""
        return self._values()[self.b + 1]


class Part:
    """What one weight takes of a forward, whatever its iterations are.

    Args:
        call: The normalization.
        iterations: Makes its iterations, of the weight and u if these are
            C-contiguous.

    Attributes:
        it: What it computes.
        W, u: Weight and start vectors, C-contiguous.
        size, at: How much memory it keeps, and where.
        factor, gamma, initial_gamma: Factors of Y.
        sigma, Y: Outputs.

    """

    size: int
    at: Any = None

    def __init__(self, call: Forward, iterations: Any) -> None:
        self.call = call
        self.W = W = contiguous(call.W)
        self.u = contiguous(call.u)
        self.it = it = iterations(W, self.u)
        self.factor = call.settings.factor
        if isinstance(call.gamma, float):
            self.factor *= call.gamma
            self.gamma: Any = NULL
        else:
            self.gamma = call.gamma.astype(it.dtype, copy=False)
        empty = cuda.cupy.empty
        # Not a view of the numbers, which would live as long as it.
        self.sigma: Any = (
            empty((), it.dtype) if 'sigma' in call.output_names else NULL)
        self.Y: Any = (
            empty(W.shape, W.dtype) if 'Y' in call.output_names else NULL)
        initial_gamma = call.renewal.initial_gamma
        self.initial_gamma: Any = NULL
        # A gamma of another dtype was cast, so the kernel has a copy of it.
        if initial_gamma is not None and self.gamma is call.gamma:
            self.initial_gamma = initial_gamma

    def keep(self, size: int) -> None:
        """Asks for memory for the forward, and for a backward if a graph is
        made."""
        self._own_size = size
        self.size = size + (self.it.plan.bar_size if self.call.reuse else 0)

    def result(self) -> tuple[Arrays, Iterations]:
        call, it = self.call, self.it
        if call.update_u and self.u is not call.u:
            call.u[...] = self.u
        if call.reuse:
            it.bars = self.at + self._own_size
        outputs = {'Y': self.Y, 'sigma': self.sigma}
        return tuple([outputs[name] for name in call.output_names]), it


def renew_gammas(parts: Sequence[Part]) -> None:
    """Stores those that are made anew, behind a launch that reads them."""
    for part in parts:
        if part.initial_gamma is not NULL:
            kernels.renew_gamma(
                part.it.numbers, part.gamma, part.initial_gamma)


def contiguous(x: Array) -> Array:
    return x if x.flags.c_contiguous else cuda.cupy.ascontiguousarray(x)
