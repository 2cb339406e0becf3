"""K power iterations and their adjoint on a CUDA device; arrays only.

The same mathematics as :mod:`.power_iteration`, but nothing waits for the
device: norms, sigma, its floor, whether anything is finite, and u are decided
by the kernels of :mod:`.kernels`.  A ``u`` that is zero or not finite, which
is an error on the host, is replaced: the iteration starts from the unit vector
of the largest row.

A small weight takes one launch forward and one backward.  A large one takes
``2 K + 1`` and, with the exact gradient, 2 for K = 1 and ``3 K`` for more, or
2 with u and v constant; ``docs/gpu.rst`` says which take more.  Weights of one
kind share their launches.  One with several vectors is computed by
:mod:`.device_subspace`, and one of several groups by :mod:`.grouped`, without
kernels of its own.

A map of a convolution is computed as on the host, with arrays of the device:
Chainer's own convolutions make the products, and the host waits for the two
norms of each iteration.
"""
from __future__ import annotations

from typing import Any, Callable, Iterable, NamedTuple, Sequence

import numpy
from chainer.backends import cuda

from sn_function._arithmetic import (
    device_subspace,
    grouped,
    host,
    kernels,
    workspace,
)
from sn_function._arithmetic.convolution import Convolution
from sn_function._arithmetic.device_weight import (
    FLOAT64,
    Iterations,
    Part,
    contiguous,
    renew_gammas,
)
from sn_function._arithmetic.groups import Groups
from sn_function._arithmetic.interface import (
    Array,
    Arrays,
    Backward,
    Forward,
    Settings,
    n_vectors_of,
)
from sn_function._arithmetic.kernels import COEFFICIENTS, NULL
from sn_function._arithmetic.matrix import accumulator_dtype
from sn_function._arithmetic.workspace import DOUBLE

_INT32 = _ZERO, _ONE = numpy.int32(0), numpy.int32(1)
# Of sn_correct_bwd, where it only makes coefficients.
_ONE_BLOCK = _ONE, _ZERO, _ONE


def normalize_all(calls: Sequence[Forward]) -> list[tuple[Arrays, Any]]:
    """Weights of a kind share their launches."""
    return _each(calls, _forward, _normalize_alone)


def gradients_all(calls: Sequence[Backward]) -> list[Arrays]:
    """Weights of a kind share their launches."""
    return _each(calls, _backward, lambda call: (
        host.module_of(call).gradients(call)))


def _each(
        calls: Sequence[Any], plain: Callable[[Any], list[Any]],
        alone: Callable[[Any], Any]) -> list[Any]:
    """Returns the result of each; those that have kernels run together."""
    are_plain = [call.settings.groups is call.settings.convolution is None
                 for call in calls]
    results = iter(plain([
        call for call, is_plain in zip(calls, are_plain) if is_plain]))
    return [next(results) if is_plain else alone(call)
            for call, is_plain in zip(calls, are_plain)]


def _normalize_alone(call: Forward) -> tuple[Arrays, Any]:
    if call.settings.groups is not None:
        return grouped.normalize_and_store(call)
    module = host.module_of(call)
    result = module.normalize(call)
    if call.update_u:
        module.store(call.u, result[1])
    return result


def _by_kind(parts: Sequence[Any]) -> Iterable[tuple[Any, list[Any]]]:
    """Those that can share launches, with what they have in common."""
    if len(parts) == 1:
        return [(parts[0].kind, list(parts))]
    kinds: dict[Any, list[Any]] = {}
    for part in parts:
        kinds.setdefault(part.kind, []).append(part)
    return kinds.items()


def _allocate(parts: Sequence[Any]) -> None:
    """Gives each part ``at``, the place of as much memory as its ``size``.

    It is one piece for all.
    """
    size = 0
    for part in parts:
        part.at = size
        size += part.size
    start = cuda.cupy.empty(size // DOUBLE, FLOAT64).data
    for part in parts:
        part.at = start + part.at


def _forward(calls: Sequence[Forward]) -> list[tuple[Arrays, Iterations]]:
    parts: list[Any] = [
        _Forward(call) if call.settings.n_vectors is None
        else device_subspace.Forward(call) for call in calls]
    _allocate(parts)
    for part in parts:
        part.it.at = part.at
    for kind, group in _by_kind(parts):
        if isinstance(group[0], device_subspace.Forward):
            device_subspace.launch(kind, group)
            continue
        is_small, T, U, K, *common = kind
        if is_small:
            kernels.fused_fwd(
                T, U, [part.fused() for part in group], K, *common)
            continue
        for k in range(int(K)):
            _multiply(T, U, [part.first_product(k) for part in group])
            _multiply(T, U, [part.second_product(k) for part in group])
        if group[0].has_tolerance:
            _multiply(T, U, [part.next_product() for part in group])
        kernels.finish_fwd(
            T, U, [part.finish() for part in group], K, *common)
        renew_gammas(group)
    return [part.result() for part in parts]


def _backward(calls: Sequence[Backward]) -> list[Arrays]:
    parts = [_Backward(call) for call in calls]
    without = [part for part in parts if part.at is None]
    if without:
        _allocate(without)
    for (is_small, T, A, *common), group in _by_kind(parts):
        if is_small:
            kernels.fused_bwd(
                T, A, [part.fused() for part in group], *common)
            continue
        for step in range(max([part.n_steps for part in group])):
            _multiply(T, A, [part.product(step) for part in group
                             if step < part.n_steps])
            projections = [part.projection(step) for part in group
                           if part.is_projected(step)]
            if projections:
                kernels.project_bwd(T, A, projections)
        dots = [part.dot() for part in group if part.takes_dot]
        if dots:
            kernels.dot_bwd(T, A, dots)
        kernels.correct_bwd(
            T, A, [part.correct() for part in group], *common)
    return [part.result() for part in parts]


class _Product(NamedTuple):
    """A product ``y = W^T x`` or ``W x``, as its kernels take it.

    Attributes:
        raw: Arguments of ``sn_product``, if it takes part.
        middle: Those of ``sn_middle_product``, likewise.
        gather: Those of ``sn_gather``, likewise.

    """

    raw: Any
    middle: Any
    gather: Any


def _multiply(T: Any, U: Any, products: Sequence[_Product]) -> None:
    raw = [product.raw for product in products if product.raw]
    if raw:
        kernels.product(T, U, raw)
    for product in products:
        if product.middle:
            kernels.middle_product(*product.middle[:-1], axis=(0, 2),
                                   out=product.middle[-1])
    gathers = [product.gather for product in products if product.gather]
    if gathers:
        kernels.gather(T, accumulator_dtype(T), gathers)


class _Products:
    """The products of one weight, in a forward or a backward.

    Attributes:
        it: What its forward computed.
        plan: Its plan.
        W: Weight.

    """

    it: Iterations
    plan: workspace.Plan
    W: Array

    def multiply(
            self, is_transposed: bool, x: Any, y: Any, e: Any, sums: Any,
            parts: Any, gY: Any = NULL, u: Any = NULL, start: Any = NULL,
            extras: Any = NULL, x_sums: Any = NULL, is_raw: bool = False,
            norm: Any = NULL, divisor: Any = NULL) -> _Product:
        """Returns a product; for the arguments see ``sn_product``."""
        plan = self.plan
        how = plan.s if is_transposed else plan.t
        numbers = self.it.at
        n_x_sums = (plan.t if is_transposed else plan.s).n_sums
        of_x = x_sums, norm, divisor, numbers, n_x_sums, _INT32[is_raw]
        if not how.is_gathered:
            return _Product((
                self.W, gY, u, x, start, y, e, sums, extras, *of_x,
                _INT32[is_transposed], *how.arguments, *plan.sizes,
                how.blocks), None, None)
        if how.is_middle:
            raw, middle = None, self._in_the_middle(x, y)
            parts, n_parts = y, _ONE
        else:
            raw, middle = (
                self.W, gY, u, x, start, parts, NULL, NULL, extras, NULL,
                NULL, NULL, numbers, _ZERO, _ZERO, _INT32[is_transposed],
                *how.arguments, *plan.sizes, how.blocks), None
            n_parts = how.arguments[1]
        return _Product(raw, middle, (
            parts, n_parts, y, e, sums, *of_x, numpy.int32(how.n),
            how.n_sums))

    def _in_the_middle(self, x: Any, y: Any) -> tuple[Any, ...]:
        it = self.it
        of_x, of_y = (it.array(place, n, it.dtype)
                      for place, n in ((x, it.n), (y, it.m)))
        return (self.W.reshape(it.l, it.m, it.r), of_x.reshape(it.l, 1, it.r),
                it.number('SCALE'), of_y)


class _Forward(Part, _Products):

    def __init__(self, call: Forward) -> None:
        K = call.settings.n_power_iteration
        super().__init__(call, lambda W, u: Iterations(
            W, call.settings.axis, K, u))
        self.plan = self.it.plan
        renewal = call.renewal
        # W^T u_K comes last, if a tolerance asks for it.
        self.has_tolerance = renewal.rtol is not None
        size = workspace.with_vector(
            self.plan, self.it.dtype) if self.has_tolerance else self.plan.size
        self.keep(size)
        # In common with others in one launch.
        self.kind = (self.it.is_small, self.W.dtype, self.u.dtype,
                     numpy.int32(K), call.settings.eps, call.settings.at_zero,
                     numpy.int32(call.update_u),
                     numpy.int32(renewal.n_warmup), renewal.limit,
                     renewal.rtol if self.has_tolerance else -1.0)

    def fused(self) -> tuple[Any, ...]:
        plan = self.plan
        return (self.W, self.u, self.at, self._next_s(), self.sigma,
                self.gamma, self.initial_gamma, self.Y, *plan.sizes,
                self.factor, plan.is_wide, _ONE)

    def _next_s(self) -> Any:
        return self.at + self.plan.size if self.has_tolerance else NULL

    def first_product(self, k: int) -> _Product:
        """Returns that of iteration k, from 0 on."""
        it, plan, at = self.it, self.plan, self.at
        y, sums, parts = it.place_of_v(k), at + plan.s_sums, at + plan.parts
        if k == 0:
            return self.multiply(
                True, NULL, y, NULL, sums, parts, u=self.u,
                start=it.place_of_u(0), extras=at + plan.extras)
        return self.multiply(
            True, it.place_of_u(k), y, NULL, sums, parts,
            x_sums=at + plan.t_sums, is_raw=True,
            norm=at + (plan.norms + DOUBLE * (it.K + k - 1)))

    def second_product(self, k: int) -> _Product:
        """Returns that of iteration k, from 0 on."""
        it, plan, at = self.it, self.plan, self.at
        return self.multiply(
            False, it.place_of_v(k), it.place_of_u(k + 1), it.place_of_u(0),
            at + plan.t_sums, at + plan.parts, x_sums=at + plan.s_sums,
            norm=at + (plan.norms + DOUBLE * k))

    def next_product(self) -> _Product:
        """Returns ``W^T u_K``, of which a residual needs the norm."""
        it, plan, at = self.it, self.plan, self.at
        return self.multiply(
            True, it.place_of_u(it.K), self._next_s(), NULL, at + plan.s_sums,
            at + plan.parts, x_sums=at + plan.t_sums, is_raw=True,
            norm=at + (plan.norms + DOUBLE * (2 * it.K - 1)))

    def finish(self) -> tuple[Any, ...]:
        plan, at = self.plan, self.at
        return (self.W, self.u, at, at + plan.norms, at + plan.t_sums,
                plan.t.n_sums, at + plan.s_sums, plan.s.n_sums,
                self._next_s(), at + plan.extras, plan.s.blocks, self.sigma,
                self.gamma, self.initial_gamma, self.Y, *plan.sizes,
                self.factor, plan.is_wide, plan.blocks)


class _Backward(_Products):
    """Its products are, from the last iteration to the first, those of
    ``sbar_k`` and ``tbar_{k-1}``; and that of ubar, if u is wanted.
    """

    def __init__(self, call: Backward) -> None:
        self.call = call
        self.it = it = call.iterations
        self.W = W = contiguous(call.W)
        self.gY: Any = NULL
        if call.gY is not None:
            self.gY = contiguous(call.gY.astype(W.dtype, copy=False))
        self.plan = plan = it.plan_for(
            W, W if self.gY is NULL else self.gY)
        self.size = plan.bar_size
        # Once: another backward may run at the same time, on another stream.
        self.at: Any
        self.at, it.bars = it.bars if plan is it.plan else None, None
        wanted = call.wanted
        empty = cuda.cupy.empty
        self.gW = empty(W.shape, W.dtype) if 'W' in wanted else NULL
        self.ggamma = empty((), it.dtype) if 'gamma' in wanted else NULL
        self.needs_u = 'u' in wanted
        self.gsigma = (NULL if call.gsigma is None
                       else call.gsigma.astype(it.dtype, copy=False))
        # The span of several vectors is a constant.
        detach_uv = (call.settings.detach_uv
                     or call.settings.n_vectors is not None)
        is_exact = not detach_uv and (self.gW is not NULL or self.needs_u)
        self.n_steps = 2 * it.K - 1 + self.needs_u if is_exact else 0
        # Then sn_correct_bwd can make sbar of W^T u in passing.
        self.is_raw = self.n_steps == 1
        self.takes_dot = not is_exact and self.gY is not NULL
        # In common with others in one launch.
        self.kind = (it.is_small, W.dtype, it.dtype, numpy.int32(it.K),
                     numpy.int32(detach_uv))

    def fused(self) -> tuple[Any, ...]:
        plan = self.plan
        return (self.W, self.gY, self.gsigma, self.it.at, self.at, self.gW,
                self.ggamma, *plan.sizes, self.call.settings.factor,
                numpy.int32(self.needs_u), plan.is_wide, _ONE)

    def _tbar(self, k: int) -> Any:
        return self.at + (self.plan.tbars + k * self.plan.m_step)

    def _sbar(self, k: int) -> Any:
        return self.at + (self.plan.sbars + k * self.plan.n_step)

    def product(self, step: int) -> _Product:
        it, plan = self.it, self.plan
        k = it.K - 1 - step // 2
        sums, parts = self.at + plan.bar_sums, self.at + plan.bar_parts
        if step % 2 == 1:
            # ubar is in the place of tbar_K, which is u_K.
            return self.multiply(
                False, self._sbar(k), self._tbar((k or it.K) - 1), NULL, sums,
                parts, divisor=it.place_of_norm(it.K + k - 1) if k else NULL)
        if step > 0:
            return self.multiply(
                True, self._tbar(k), self._sbar(k), it.place_of_v(k), sums,
                parts)
        return self.multiply(
            True, it.place_of_u(it.K), self._sbar(k), it.place_of_v(k), sums,
            parts, gY=self.gY,
            extras=NULL if self.gY is NULL else self.at + plan.bar_extras)

    def is_projected(self, step: int) -> bool:
        return step % 2 == 0 and step < self.n_steps and not self.is_raw

    def projection(self, step: int) -> tuple[Any, ...]:
        it, plan = self.it, self.plan
        k = it.K - 1 - step // 2
        return (self._sbar(k), it.place_of_v(k), self.at + plan.bar_sums,
                plan.s.n_sums, it.place_of_norm(k), it.at, *plan.of_n)

    def dot(self) -> tuple[Any, ...]:
        plan = self.plan
        return (self.W, self.gY, self.at + plan.bar_extras,
                numpy.int64(self.W.size), plan.is_wide, plan.blocks)

    def correct(self) -> tuple[Any, ...]:
        plan, at = self.plan, self.at
        return (self.gY, self.gsigma, self.it.at, at,
                at + plan.bar_sums if self.is_raw else NULL, plan.s.n_sums,
                at + plan.bar_extras,
                plan.blocks if self.takes_dot else plan.s.blocks, self.gW,
                self.ggamma, *plan.sizes, self.call.settings.factor,
                *(plan.correct if self.gW is not NULL else _ONE_BLOCK))

    def result(self) -> Arrays:
        call = self.call
        grads = {'W': self.gW}
        if 'gamma' in call.wanted:
            grads['gamma'] = self.ggamma.astype(call.gamma.dtype, copy=False)
        if self.needs_u:
            grads['u'] = self._gradient_of_u()
        return tuple([grads[name] for name in call.wanted])

    def _gradient_of_u(self) -> Array:
        it = self.it
        gu = cuda.cupy.empty(it.m, self.call.u.dtype)
        kernels.gradient_of_u(
            it.numbers, it.array(self.at, len(COEFFICIENTS), FLOAT64),
            it.array(self._tbar(it.K - 1), it.m, it.dtype), gu)
        return gu


def warm_up(
        W: Array, u: Array, axis: int, n: int, groups: Groups | None = None,
        rtol: float | None = None, convolution: Convolution | None = None,
) -> None:
    if convolution is not None:
        host.warm_up(W, u, axis, n, groups, rtol, convolution)
        return
    settings = Settings(
        1, axis, True, groups=groups, n_vectors=n_vectors_of(u))
    for _ in range(n):  # one at a time: the vectors of one are enough
        normalize_all([Forward(settings, W, u, 1.0, (), update_u=True)])
