"""The nodes of the graph: normalization of weights, and its gradient.

The arithmetic is in :mod:`sn_function._power_iteration` for NumPy, and in
:mod:`sn_function._device` for CuPy.
"""
from __future__ import annotations

from typing import Any, Sequence

import chainer
import numpy
from chainer import functions as F

from sn_function import (
    _checks,
    _composition,
    _device,
    _graph,
    _power_iteration,
)
from sn_function._power_iteration import Settings

Array = Any  # numpy.ndarray or cupy.ndarray
ArrayOrVariable = Any  # Array or chainer.Variable


def arithmetic_of(array: Array) -> Any:
    """Returns the module that computes on this kind of array."""
    return _device if _checks.is_on_device(array) else _power_iteration


class Weight:
    """One weight of a node, with its arguments by name.

    Attributes:
        names (list of str): Names of its inputs, ``'W'`` first.
        constants (dict): ``'u'`` and ``'gamma'``, unless they are inputs, and
            what says how to compute.  Leaving them out of the graph is what
            makes it cheap.
        output_names (tuple of str): ``'Y'``, ``'sigma'`` or both.
        update_u (bool): Whether forward overwrites ``u``.
        it: What forward computed.

    """

    __slots__ = ('constants', 'it', 'names', 'output_names', 'update_u')

    def __init__(
            self, names: Sequence[str], constants: dict[str, Any],
            output_names: Sequence[str], update_u: bool) -> None:
        self.names = names
        self.constants = constants
        self.output_names = output_names
        self.update_u = update_u
        self.it: Any = None

    def keep(self, it: Any) -> None:
        """Keeps what forward computed, but nothing that others may change."""
        self.it = it
        constants = self.constants
        if 'u' in constants:
            constants['u'] = None
        if type(constants.get('gamma', 1.0)) is not float:
            constants['gamma'] = constants['gamma'].copy()


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
        results = arithmetic.normalize_all([
            dict(zip(weight.names, arrays), **weight.constants,
                 output_names=weight.output_names, update_u=weight.update_u)
            for weight in self.weights])
        outputs: tuple[Array, ...] = ()
        for weight, (of_weight, it) in zip(self.weights, results):
            weight.keep(it)
            outputs += of_weight
        return outputs

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        with_graph, = _graph.config('enable_backprop')
        inputs = (self.get_retained_inputs() if with_graph
                  else [x.data for x in self.inputs])
        places, calls = [], []
        i = o = 0
        for weight in self.weights:
            given = {}
            wanted = []
            detach_uv = weight.constants['settings'].detach_uv
            for name in weight.names:
                given[name] = inputs[i]
                if i in indexes and not (name == 'u' and detach_uv):
                    wanted.append(name)
                    places.append(i)
                i += 1
            n_inputs = len(given)
            for name in weight.output_names:
                g = grad_outputs[o]
                if g is not None:
                    given['g' + name] = g if with_graph else g.array
                o += 1
            if len(given) > n_inputs and wanted:
                calls.append((weight, wanted, given))
            else:
                del places[len(places) - len(wanted):]
        found: list[Any] = []
        if with_graph:
            for weight, wanted, given in calls:
                found += SpectralNormalizeGrad(
                    weight, list(given), wanted).apply(tuple(given.values()))
        elif calls:
            # Spare a small weight the cost of a node.
            arithmetic = arithmetic_of(inputs[0])
            for arrays in arithmetic.gradients_all([
                    dict(given, **weight.constants, it=weight.it,
                         wanted=wanted) for weight, wanted, given in calls]):
                found += map(_graph.variable, arrays)
        if len(found) == len(indexes):
            return tuple(found)
        grads = dict(zip(places, found))
        return tuple([grads.get(i) for i in indexes])


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
        weight = self.weight
        return arithmetic.gradients(
            it=weight.it, wanted=self.wanted,
            **dict(zip(self.names, inputs)), **weight.constants)

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        # The gradients are written once more, as a graph of Chainer's
        # functions, and differentiated.  The inputs go through an identity:
        # chainer.grad must stop there, for gY may itself depend on W.
        with chainer.force_backprop_mode(), numpy.errstate(all='ignore'):
            inputs = {name: F.identity(x) for name, x in
                      zip(self.names, self.get_retained_inputs())}
            x = dict(self.weight.constants, **inputs)
            outputs = dict(zip(('gY', 'gsigma'), _composition.compose(
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


def make_weight(
        W: ArrayOrVariable, u: ArrayOrVariable, n_power_iteration: int,
        gamma: Any, factor: float | None, eps: float, axis: int,
        detach_uv: bool, update_u: bool, output_names: Sequence[str],
        cap: float | None = None,
) -> tuple[Weight, list[ArrayOrVariable]]:
    """Checks the arguments; returns the weight of a node, and its inputs."""
    factor, eps = _checks.check_settings(n_power_iteration, factor, eps, cap)
    axis = _checks.check_arrays(W, u, axis, update_u)
    gamma = 1.0 if gamma is None else _checks.check_gamma(gamma, W)
    settings = Settings(
        int(n_power_iteration), axis, detach_uv, factor, eps)
    return collect(W, u, gamma, settings, output_names, update_u)


def collect(
        W: ArrayOrVariable, u: ArrayOrVariable, gamma: Any,
        settings: Settings, output_names: Sequence[str], update_u: bool,
) -> tuple[Weight, list[ArrayOrVariable]]:
    """:func:`make_weight` of what has been checked."""
    names, inputs = ['W'], [W]
    constants: dict[str, Any] = {'settings': settings}
    if isinstance(u, chainer.Variable):
        names.append('u')
        inputs.append(u)
    else:
        constants['u'] = u
    if isinstance(gamma, chainer.Variable):
        names.append('gamma')
        inputs.append(gamma)
    else:
        constants['gamma'] = gamma
    return Weight(names, constants, output_names, update_u), inputs


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
