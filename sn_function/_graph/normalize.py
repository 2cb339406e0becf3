"""The nodes of the graph: normalization of weights, and its gradient.

The arithmetic is in :mod:`sn_function._arithmetic`.
"""
from __future__ import annotations

import math
import warnings
from typing import Any, Iterator, Sequence, Union

import chainer
import numpy
from chainer import functions as F

from sn_function import _checks, errors
from sn_function._arithmetic.choose import arithmetic_of, is_on_device
from sn_function._arithmetic.groups import Groups
from sn_function._arithmetic.interface import (
    NEVER,
    Arithmetic,
    Array,
    Arrays,
    Backward,
    Forward,
    Renewal,
    Settings,
)
from sn_function._graph import higher_order, node

ArrayOrVariable = Any  # Array or chainer.Variable
Number = Union[int, float]
Grads = Sequence[Any]  # a Variable or None for each


class Normalization:
    """The normalization of one weight in a node.

    Attributes:
        names (tuple of str): Names of its inputs, ``'W'`` first.
        settings (Settings): What the caller chose.
        u, gamma: Those that are no inputs.  Arrays outside of the graph take
            less time than inputs.
        output_names (tuple of str): ``'Y'``, ``'sigma'`` or both.
        update_u (bool): Whether forward overwrites ``u``.
        renewal (Renewal): When forward makes u and gamma anew.
        iterations: What forward computed.

    """

    __slots__ = ('gamma', 'iterations', 'names', 'output_names', 'renewal',
                 'settings', 'u', 'update_u')

    def __init__(
            self, names: tuple[str, ...], settings: Settings, u: Any,
            gamma: Any, output_names: tuple[str, ...], update_u: bool,
            renewal: Renewal) -> None:
        self.names = names
        self.settings = settings
        self.u = u
        self.gamma = gamma
        self.output_names = output_names
        self.update_u = update_u
        self.renewal = renewal
        self.iterations: Any = None

    def _arguments(self, inputs: Iterator[Any]) -> tuple[Any, Any, Any]:
        """``W``, ``u`` and ``gamma``; takes its own from the inputs."""
        names = self.names
        return (next(inputs),
                next(inputs) if 'u' in names else self.u,
                next(inputs) if 'gamma' in names else self.gamma)

    def forward(self, inputs: Iterator[Array], reuse: bool) -> Forward:
        W, u, gamma = self._arguments(inputs)
        return Forward(self.settings, W, u, gamma, self.output_names,
                       self.update_u, reuse, self.renewal)

    def keep(self, iterations: Any) -> None:
        """Keeps what forward computed, but nothing that others may change."""
        self.iterations = iterations
        self.u = None
        if type(self.gamma) is not float and self.gamma is not None:
            self.gamma = self.gamma.copy()

    @property
    def has_converged(self) -> bool:
        """Whether a tolerance was reached, if there is one; true on a device.
        """
        iterations, rtol = self.iterations, self.renewal.rtol
        return rtol is None or is_on_device(iterations.u) or (
            iterations.residual() <= rtol)

    def backward(
            self, inputs: Iterator[Any], wanted: Sequence[str], gY: Any,
            gsigma: Any, reuse: bool = False) -> Backward:
        W, u, gamma = self._arguments(inputs)
        return Backward(self.settings, self.iterations, wanted, W, u, gamma,
                        gY, gsigma, reuse)


class SpectralNormalize(node.Node):
    """``(W[, u][, gamma]) -> (Y[, sigma])`` or ``sigma``, of each weight."""

    def __init__(
            self, weights: Sequence[Normalization],
            is_shared: bool = False) -> None:
        super().__init__()
        self.weights = weights
        self.is_shared = is_shared

    def unchain(self) -> None:
        """Cuts the graph here, unless other calls share this node.

        They may have a gradient to send through it.  What is unchained is cut
        from it by the nodes that use its outputs.
        """
        if not self.is_shared:
            super().unchain()

    def compute(self, arithmetic: Arithmetic, inputs: Arrays) -> Arrays:
        arrays = iter(inputs)
        # Without a graph the normalized weights do not live at the same time,
        # so keeping memory for each would take more of it.
        reuse, = node.config('enable_backprop')
        outputs: list[Array] = []
        for weight, (of_weight, iterations) in zip(
                self.weights, arithmetic.normalize_all([
                    weight.forward(arrays, reuse)
                    for weight in self.weights])):
            weight.keep(iterations)
            outputs += of_weight
        return tuple(outputs)

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: Grads,
    ) -> tuple[Any, ...]:
        with_graph, = node.config('enable_backprop')
        inputs = (self.get_retained_inputs() if with_graph
                  else [x.data for x in self.inputs])
        if not with_graph:
            grad_outputs = [
                None if g is None else g.array for g in grad_outputs]
        weights, calls, places = self._calls(inputs, indexes, grad_outputs)
        found: list[Any] = []
        if with_graph:
            for weight, call in zip(weights, calls):
                found += SpectralNormalizeGrad.of(weight, call)
        elif calls:  # without the cost of a node
            arithmetic = arithmetic_of(inputs[0])
            for of_weight in arithmetic.gradients_all(calls):
                found += map(node.variable, of_weight)
        if len(found) == len(indexes):
            return tuple(found)
        of_places = dict(zip(places, found))
        return tuple([of_places.get(i) for i in indexes])

    def _calls(
            self, inputs: Sequence[Any], indexes: Sequence[int],
            grad_outputs: Grads,
    ) -> tuple[list[Normalization], list[Backward], list[int]]:
        """What each weight is asked for in backward, if anything.

        Returns:
            The weights that get a gradient, their calls, and the places, among
            the inputs, of what these return.

        """
        arguments, grads = iter(inputs), iter(grad_outputs)
        asked = set(indexes)
        weights, calls, places = [], [], []
        i = 0
        for weight in self.weights:
            gY = gsigma = None
            for name in weight.output_names:
                if name == 'Y':
                    gY = next(grads)
                else:
                    gsigma = next(grads)
            is_used = gY is not None or gsigma is not None
            wanted = []
            for name in weight.names:
                if is_used and i in asked and not (
                        name == 'u' and weight.settings.detach_uv):
                    wanted.append(name)
                    places.append(i)
                i += 1
            call = weight.backward(arguments, wanted, gY, gsigma, True)
            if wanted:
                weights.append(weight)
                calls.append(call)
        return weights, calls, places


class SpectralNormalizeGrad(node.Node):
    """``(W[, u][, gamma][, gY][, gsigma]) -> (gW, gu, ggamma)``, as wanted."""

    def __init__(
            self, weight: Normalization, upstream: Sequence[str],
            wanted: Sequence[str]) -> None:
        super().__init__()
        self.weight = weight
        self.upstream = upstream
        self.wanted = wanted

    @classmethod
    def of(
            cls, weight: Normalization, call: Backward,
    ) -> tuple[chainer.Variable, ...]:
        """Returns the gradients of a call whose arguments are Variables."""
        upstream = [name for name in ('gY', 'gsigma')
                    if getattr(call, name) is not None]
        return cls(weight, upstream, call.wanted).apply(tuple([
            getattr(call, name) for name in (*weight.names, *upstream)]))

    def _call(self, inputs: Sequence[Any]) -> Backward:
        n = len(self.weight.names)
        given = dict(zip(self.upstream, inputs[n:]))
        return self.weight.backward(
            iter(inputs[:n]), self.wanted, given.get('gY'),
            given.get('gsigma'))

    def compute(self, arithmetic: Arithmetic, inputs: Arrays) -> Arrays:
        grads, = arithmetic.gradients_all([self._call(inputs)])
        return grads

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: Grads,
    ) -> tuple[Any, ...]:
        # The gradients are written once more, as a graph of Chainer's
        # functions, and differentiated.  The inputs go through an identity:
        # chainer.grad must stop there, for gY may itself depend on W.
        with chainer.force_backprop_mode(), numpy.errstate(all='ignore'):
            inputs = [F.identity(x) for x in self.get_retained_inputs()]
            call = self._call(inputs)
            Y, sigma = higher_order.compose(
                call.settings, call.iterations, call.W, call.u, call.gamma)
            pairs = [(y, gy) for y, gy in ((Y, call.gY), (sigma, call.gsigma))
                     if gy is not None]
            ys, gys = zip(*pairs)
            grads = chainer.grad(
                ys, [getattr(call, name) for name in self.wanted], gys,
                enable_double_backprop=True)
        pairs = [(g, gg) for g, gg in zip(grads, grad_outputs)
                 if g is not None and gg is not None]
        with numpy.errstate(all='ignore'):
            return tuple(chainer.grad(
                [g for g, _ in pairs], [inputs[i] for i in indexes],
                [gg for _, gg in pairs],
                enable_double_backprop=chainer.config.enable_backprop))


def make_settings(
        n_power_iteration: int, axis: int, detach_uv: bool,
        factor: float | None, eps: float, cap: float | None,
        groups: Groups | None = None) -> Settings:
    """Checks what holds for any weight; :func:`make_weight` does the axis."""
    numbers = _checks.check_settings(n_power_iteration, factor, eps, cap)
    return Settings(
        int(n_power_iteration), axis, detach_uv, *numbers, groups=groups)


def until(
        rtol: float | None, max_iterations: int, n: int) -> Renewal:
    """Checks a tolerance, and returns when it asks for more than n iterations.
    """
    _checks.check_tolerance(rtol, max_iterations, n)
    if rtol is None:
        return NEVER
    return Renewal(
        (int(max_iterations) // n - 1) * n, 2.0, rtol=float(rtol))


def make_weight(
        W: ArrayOrVariable, u: ArrayOrVariable, gamma: Any,
        settings: Settings, output_names: tuple[str, ...], update_u: bool,
        renewal: Renewal = NEVER,
) -> tuple[Normalization, list[ArrayOrVariable]]:
    """Checks the arguments; returns a weight for a node, and its inputs."""
    axis = _checks.check_arrays(
        W, u, settings.axis, update_u, settings.groups,
        convolution=settings.convolution)
    if axis != settings.axis or type(settings.axis) is not int:
        settings = settings._replace(axis=axis)
    if isinstance(u, chainer.Variable) and (
            len(u.shape) == 2 or renewal.rtol is not None):
        u = u.array  # what it is taken to, outside of the graph, is a constant
    if len(u.shape) == 2:
        settings = settings._replace(n_vectors=len(u))
    gamma = 1.0 if gamma is None else _checks.check_gamma(gamma, W)
    names: tuple[str, ...] = ('W',)
    inputs = [W]
    if isinstance(u, chainer.Variable):
        names += 'u',
        inputs.append(u)
        u = None
    if isinstance(gamma, chainer.Variable):
        names += 'gamma',
        inputs.append(gamma)
        gamma = None
    return Normalization(names, settings, u, gamma, output_names, update_u,
                         renewal), inputs


def make_map(
        W: ArrayOrVariable, u: ArrayOrVariable, gamma: Any,
        settings: Settings, output_names: tuple[str, ...], update_u: bool,
        renewal: Renewal = NEVER,
) -> tuple[Normalization, list[ArrayOrVariable]]:
    """:func:`make_weight` of a convolution, from u in the shape of inputs."""
    if update_u and not (isinstance(u, chainer.Variable)
                         or u.flags.c_contiguous):
        raise errors.VectorUpdateError(u)
    several = (-1,) if u.ndim == W.ndim else ()
    size = math.prod(u.shape[len(several):])
    return make_weight(
        W, u.reshape(*several, size), gamma, settings, output_names,
        update_u, renewal)


def apply(
        weights: Sequence[tuple[Normalization, list[ArrayOrVariable]]],
        is_shared: bool = False,
) -> tuple[chainer.Variable, ...]:
    """Normalizes weights in one node; returns the outputs of all.

    Args:
        weights: Results of :func:`make_weight`.
        is_shared: Whether several calls use the outputs.

    """
    if not weights:
        return ()
    return SpectralNormalize(
        [weight for weight, _ in weights], is_shared).apply(
            [x for _, inputs in weights for x in inputs])


def normalize(
        weights: Sequence[tuple[Normalization, list[ArrayOrVariable]]],
) -> list[tuple[chainer.Variable, ...]]:
    """Normalizes weights in one node; returns the outputs of each.

    It warns where a tolerance was not reached.
    """
    outputs = iter(apply(weights))
    for weight, inputs in weights:
        if not weight.has_converged:
            warnings.warn(errors.ToleranceWarning(
                f'W of shape {inputs[0].shape}', weight.renewal.rtol),
                stacklevel=3)
    return [tuple([next(outputs) for _ in weight.output_names])
            for weight, _ in weights]
