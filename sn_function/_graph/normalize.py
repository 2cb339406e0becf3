"""The nodes of the graph: normalization of weights, and its gradient.

The arithmetic is in :mod:`sn_function._arithmetic.host` for NumPy, and in
:mod:`sn_function._arithmetic.device` for CuPy.
"""
from __future__ import annotations

from typing import Any, Iterator, Sequence

import chainer
import numpy
from chainer import functions as F

from sn_function import _checks
from sn_function._arithmetic import device, host
from sn_function._arithmetic.power_iteration import Settings
from sn_function._graph import higher_order
from sn_function._graph import node as _graph

Array = Any  # numpy.ndarray or cupy.ndarray
ArrayOrVariable = Any  # Array or chainer.Variable


def arithmetic_of(array: Array) -> Any:
    """Returns the module that computes on this kind of array."""
    return device if _checks.is_on_device(array) else host


class Weight:
    """One weight of a node, and how to compute on it.

    Attributes:
        names (tuple of str): Names of its inputs, ``'W'`` first.
        settings (Settings): What the caller chose.
        u, gamma: Those that are no inputs.  Leaving them out of the graph is
            what makes it cheap.
        output_names (tuple of str): ``'Y'``, ``'sigma'`` or both.
        update_u (bool): Whether forward overwrites ``u``.
        it: What forward computed.

    """

    __slots__ = ('gamma', 'it', 'names', 'output_names', 'settings', 'u',
                 'update_u')

    def __init__(
            self, names: tuple[str, ...], settings: Settings, u: Any,
            gamma: Any, output_names: tuple[str, ...], update_u: bool) -> None:
        self.names = names
        self.settings = settings
        self.u = u
        self.gamma = gamma
        self.output_names = output_names
        self.update_u = update_u
        self.it: Any = None

    def call(self, inputs: Iterator[Array]) -> dict[str, Any]:
        """Arguments, by name; takes its own from the inputs."""
        names = self.names
        return {
            'settings': self.settings,
            'W': next(inputs),
            'u': next(inputs) if 'u' in names else self.u,
            'gamma': next(inputs) if 'gamma' in names else self.gamma}

    def keep(self, it: Any) -> None:
        """Keeps what forward computed, but nothing that others may change."""
        self.it = it
        self.u = None
        if type(self.gamma) is not float and self.gamma is not None:
            self.gamma = self.gamma.copy()


class SpectralNormalize(_graph.Node):
    """``(W[, u][, gamma]) -> (Y[, sigma])`` or ``sigma``, of each weight."""

    def __init__(
            self, weights: Sequence[Weight], is_shared: bool = False) -> None:
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

    def compute(
            self, arithmetic: Any, inputs: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        arrays = iter(inputs)
        # Without a graph the normalized weights do not live side by side, so
        # that keeping the memory of each would take more than it did.
        reuse, = _graph.config('enable_backprop')
        calls = []
        for weight in self.weights:
            call = weight.call(arrays)
            call['output_names'] = weight.output_names
            call['update_u'] = weight.update_u
            call['reuse'] = reuse
            calls.append(call)
        outputs: list[Array] = []
        for weight, (of_weight, it) in zip(
                self.weights, arithmetic.normalize_all(calls)):
            weight.keep(it)
            outputs += of_weight
        return tuple(outputs)

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        with_graph, = _graph.config('enable_backprop')
        inputs = (self.get_retained_inputs() if with_graph
                  else [x.data for x in self.inputs])
        arrays, grads = iter(inputs), iter(grad_outputs)
        asked = set(indexes)
        places: list[int] = []
        calls: list[dict[str, Any]] = []
        weights = []
        i = 0
        for weight in self.weights:
            call = weight.call(arrays)
            n_without = len(call)
            for name in weight.output_names:
                g = next(grads)
                if g is not None:
                    call['g' + name] = g if with_graph else g.array
            has_gradient = len(call) > n_without
            call['wanted'] = wanted = []
            for name in weight.names:
                if has_gradient and i in asked and not (
                        name == 'u' and weight.settings.detach_uv):
                    wanted.append(name)
                    places.append(i)
                i += 1
            if wanted:
                call['it'] = weight.it
                call['reuse'] = True
                calls.append(call)
                weights.append(weight)
        found: list[Any] = []
        if with_graph:
            for weight, call in zip(weights, calls):
                names = [*weight.names, *(
                    name for name in ('gY', 'gsigma') if name in call)]
                found += SpectralNormalizeGrad(
                    weight, names, call['wanted']).apply(
                        tuple([call[name] for name in names]))
        elif calls:
            # Spare a small weight the cost of a node.
            arithmetic = arithmetic_of(inputs[0])
            for arrays in arithmetic.gradients_all(calls):
                found += map(_graph.variable, arrays)
        if len(found) == len(indexes):
            return tuple(found)
        of_places = dict(zip(places, found))
        return tuple([of_places.get(i) for i in indexes])


class SpectralNormalizeGrad(_graph.Node):
    """``(W[, u][, gamma][, gY][, gsigma]) -> (gW, gu, ggamma)``, as wanted."""

    def __init__(
            self, weight: Weight, names: Sequence[str],
            wanted: Sequence[str]) -> None:
        super().__init__()
        self.weight = weight
        self.names = names
        self.wanted = wanted

    def compute(
            self, arithmetic: Any, inputs: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        arrays = iter(inputs)
        call = self.weight.call(arrays)
        call.update(zip(self.names[len(self.weight.names):], arrays),
                    wanted=self.wanted, it=self.weight.it)
        grads, = arithmetic.gradients_all([call])
        return grads

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        # The gradients are written once more, as a graph of Chainer's
        # functions, and differentiated.  The inputs go through an identity:
        # chainer.grad must stop there, for gY may itself depend on W.
        with chainer.force_backprop_mode(), numpy.errstate(all='ignore'):
            inputs = {name: F.identity(x) for name, x in
                      zip(self.names, self.get_retained_inputs())}
            x = dict(self.weight.call(iter(inputs.values())), **inputs)
            outputs = dict(zip(('gY', 'gsigma'), higher_order.compose(
                x['settings'], self.weight.it, x['W'], x['u'], x['gamma'])))
            given = [name for name in outputs if name in x]
            grads = chainer.grad(
                [outputs[name] for name in given],
                [x[name] for name in self.wanted],
                [x[name] for name in given], enable_double_backprop=True)
        pairs = [(g, gg) for g, gg in zip(grads, grad_outputs)
                 if g is not None and gg is not None]
        with numpy.errstate(all='ignore'):
            return tuple(chainer.grad(
                [g for g, _ in pairs], [x[self.names[i]] for i in indexes],
                [gg for _, gg in pairs],
                enable_double_backprop=chainer.config.enable_backprop))


def make_settings(
        n_power_iteration: int, axis: int, detach_uv: bool,
        factor: float | None, eps: float, cap: float | None) -> Settings:
    """Checks what holds for any weight; :func:`make_weight` does the axis."""
    factor, eps = _checks.check_settings(n_power_iteration, factor, eps, cap)
    return Settings(int(n_power_iteration), axis, detach_uv, factor, eps)


def make_weight(
        W: ArrayOrVariable, u: ArrayOrVariable, gamma: Any,
        settings: Settings, output_names: tuple[str, ...], update_u: bool,
) -> tuple[Weight, list[ArrayOrVariable]]:
    """Checks the arguments; returns the weight of a node, and its inputs."""
    axis = _checks.check_arrays(W, u, settings.axis, update_u)
    if axis != settings.axis or type(settings.axis) is not int:
        settings = settings._replace(axis=axis)
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
    return Weight(names, settings, u, gamma, output_names, update_u), inputs


def normalize(
        weights: Sequence[tuple[Weight, list[ArrayOrVariable]]],
        is_shared: bool = False,
) -> list[tuple[chainer.Variable, ...]]:
    """Normalizes weights in one node; returns the outputs of each."""
    if not weights:
        return []
    node = SpectralNormalize([weight for weight, _ in weights], is_shared)
    outputs = iter(node.apply([x for _, inputs in weights for x in inputs]))
    return [tuple([next(outputs) for _ in weight.output_names])
            for weight, _ in weights]
