"""Several vectors on a CUDA device; arrays only.

The same mathematics as :mod:`.subspace`, and nothing waits for the device.
Vectors that are zero, not finite or dependent are replaced.

A small weight takes one launch.  A large one takes four for each of the K
passes, or six where the vectors are moved on, and one at the end.  Its
gradient is that of one vector with u and v constant, and so are the launches
of its backward.
"""
from __future__ import annotations

from typing import Any, Sequence

import numpy

from sn_function import errors
from sn_function._arithmetic import interface, kernels, workspace
from sn_function._arithmetic.device_weight import (
    Part,
    SubspaceIterations,
    renew_gammas,
)
from sn_function._arithmetic.kernels import NULL
from sn_function._arithmetic.matrix import accumulator_dtype

_ONE = numpy.int32(1)


class Forward(Part):
    """What one weight takes of a forward.

    Raises:
        VectorCountError: There are more than kernels are made for.

    """

    it: SubspaceIterations

    def __init__(self, call: interface.Forward) -> None:
        settings, renewal, b = call.settings, call.renewal, len(call.u)
        if b > kernels.MAX_VECTORS:
            raise errors.VectorCountError(b, kernels.MAX_VECTORS)
        super().__init__(call, lambda W, u: SubspaceIterations(
            W, settings.axis, b))
        self.plan = self.it.plan
        self.subspace = self.it.subspace
        self.keep(self.subspace.size)
        # Whether W S is needed, to move on or to measure.
        moves = (call.update_u or renewal.n_warmup > 0
                 or renewal.rtol is not None
                 or self.initial_gamma is not NULL)
        # In common with others in one launch.
        self.kind = (self.it.is_small, self.W.dtype, self.u.dtype, b,
                     numpy.int32(settings.n_power_iteration), settings.eps,
                     settings.at_zero, numpy.int32(moves),
                     numpy.int32(call.update_u),
                     numpy.int32(renewal.n_warmup), renewal.limit,
                     -1.0 if renewal.rtol is None else renewal.rtol)

    def fused(self) -> tuple[Any, ...]:
        plan = self.plan
        return (self.W, self.u, self.at, self.sigma, self.gamma,
                self.initial_gamma, self.Y, *plan.sizes, self.factor,
                plan.is_wide, _ONE)

    def _place(self, name: str) -> Any:
        return self.at + getattr(self.subspace, name)

    def begin(self, k: int) -> tuple[Any, ...]:
        """Returns what pass k, from 0 on, begins with."""
        return (self.u if k == 0 else NULL, self.at, self._place('found'),
                *self.plan.sizes, _ONE)

    def product(self, is_transposed: bool) -> tuple[Any, ...]:
        how = self.subspace.s if is_transposed else self.subspace.t
        return (self.W, self.at, self._parts(how, is_transposed),
                numpy.int32(is_transposed), *how.arguments, *self.plan.sizes,
                how.blocks)

    def _parts(self, how: workspace.Product, is_transposed: bool) -> Any:
        if how.is_gathered:
            return self._place('parts')
        return self._place('S' if is_transposed else 'T')

    def gram(self) -> tuple[Any, ...]:
        how = self.subspace.s
        return (self.at, self._parts(how, True), how.arguments[1],
                self._place('grams'), *self.plan.sizes, self.subspace.n_grams)

    def solve(self) -> tuple[Any, ...]:
        return (self.at, self._place('grams'), self.subspace.n_grams,
                self._place('found'), *self.plan.sizes, _ONE)

    def follow(self) -> tuple[Any, ...]:
        how = self.subspace.t
        return (self.at, self._parts(how, False), how.arguments[1],
                self._place('found'), self._place('sums'), *self.plan.sizes,
                self.subspace.n_sums)

    def finish(self) -> tuple[Any, ...]:
        plan = self.plan
        return (self.W, self.u, self.at, self._place('found'),
                self._place('sums'), self.subspace.n_sums, self.sigma,
                self.gamma, self.initial_gamma, self.Y, *plan.sizes,
                self.factor, plan.is_wide, plan.blocks)


def launch(kind: tuple[Any, ...], parts: Sequence[Forward]) -> None:
    """Computes weights of one kind."""
    is_small, T, U, b, K, *common = kind

    def run(kernel: kernels.Raw, own: list[tuple[Any, ...]],
            *common: Any) -> None:
        kernel(T, U if kernel.has_u else accumulator_dtype(T), own, *common,
               n_vectors=b)

    if is_small:
        run(kernels.fused_subspace, [part.fused() for part in parts], K,
            *common)
        return
    moves = common[2]
    for k in range(int(K)):
        run(kernels.begin_subspace, [part.begin(k) for part in parts])
        run(kernels.product_subspace, [part.product(True) for part in parts])
        run(kernels.gram_subspace, [part.gram() for part in parts])
        run(kernels.solve_subspace, [part.solve() for part in parts])
        if moves or k < int(K) - 1:
            run(kernels.product_subspace, [
                part.product(False) for part in parts])
            run(kernels.follow_subspace, [part.follow() for part in parts])
    run(kernels.finish_subspace, [part.finish() for part in parts], K,
        *common)
    renew_gammas(parts)
