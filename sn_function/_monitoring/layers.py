"""Numbers on the layers of a model, measured with one wait per device."""
from __future__ import annotations

from typing import Any, Iterable, NamedTuple, Tuple

import chainer

from sn_function import _checks, _table, errors
from sn_function._arithmetic import quality
from sn_function._arithmetic.interface import NEVER
from sn_function._certify import Interval, certify
from sn_function._compat.replacement import ChainersHook
from sn_function._links import call, vector
from sn_function._links.hooked_weight import renewal_of
from sn_function._links.weight import axis_of, groups_of, output_axis
from sn_function._models import LinkWeight, gamma_of


class Layer(NamedTuple):
    """What :meth:`~sn_function.extensions.SpectralNormReport.measure` finds.

    Attributes:
        name (str): Path of the link in the model, without the first slash,
            and the name of the weight if that is not ``'W'``.
        shape (tuple of int): Shape of the weight.
        sigma (float or None): The hook's estimate of the largest singular
            value of the raw weight; ``None`` without a hook.
        residual (float or None): How far the estimate is from a singular
            value, relative to it; ``None`` without a hook.
        true_sigma (float or None): The largest singular value of the raw
            weight; ``None`` unless asked for.
        norm (float or None): The largest singular value of the weight as the
            layer uses it; ``None`` unless ``true_sigma`` was asked for.
        singular_values (tuple of float or None): With several vectors, the
            hook's estimates of as many singular values of the raw weight, the
            largest one, ``sigma``, first; else ``None``.
        interval (Interval or None): What :func:`~sn_function.certify` finds
            for the weight as the layer uses it; ``None`` unless ``certify``
            was given, and where nothing is known of what the layer does.

    """

    name: str
    shape: tuple[int, ...]
    sigma: float | None
    residual: float | None
    true_sigma: float | None
    norm: float | None
    singular_values: tuple[float, ...] | None = None
    interval: Interval | None = None


class Layers(Tuple[Layer, ...]):
    """A tuple of :class:`Layer`, which ``print`` shows as a table.

    Attributes:
        uninitialized (tuple of str): Names of those without numbers, as they
            are not initialized yet.

    """

    uninitialized: tuple[str, ...]

    def __new__(
            cls, layers: Iterable[Layer],
            uninitialized: Iterable[str] = ()) -> Layers:
        self = super().__new__(cls, tuple(layers))
        self.uninitialized = tuple(uninitialized)
        return self

    def __str__(self) -> str:
        return '\n'.join([
            _table.text(
                ('layer', 'shape', 'sigma', 'true sigma', 'norm'),
                [(layer.name, _table.shape_text(layer.shape),
                  *map(_number_text, (
                      layer.sigma, layer.true_sigma, layer.norm)))
                 for layer in self]),
            *(f'{name}: not initialized yet'
              for name in self.uninitialized)])


def _number_text(x: float | None) -> str:
    return '-' if x is None else f'{x:#.4g}'


class MonitoredWeight:
    """The raw weight of a layer and, if it has a hook, the hook's vector."""

    def __init__(self, weight: LinkWeight) -> None:
        path, self.link, self.weight_name, self.hook = weight
        parts = [path.strip('/')]
        if self.weight_name != 'W' or path == '/':
            parts.append(self.weight_name)
        self.name = '/'.join(filter(None, parts))
        self.array = call.original(self.link, self.weight_name).array

    @property
    def is_initialized(self) -> bool:
        link, hook = self.link, self.hook
        if self.array is None or hook is None:
            return self.array is not None
        # A weight of another shape gets another vector in the next call.
        u = getattr(link, vector.names(hook, link)[0], None)
        return u is not None and u.shape == vector.shape_of(
            link, hook, self.array.shape, vector.map_of(link, hook))

    def measure(self, true_sigma: bool) -> dict[str, Any]:
        """Returns numbers on it, arrays of shape () on its device."""
        W, hook, link = self.array, self.hook, self.link
        if hook is None:
            return quality.measure(W, None, output_axis(link), 1, true_sigma)
        convolution = vector.map_of(link, hook)
        u = vector.at_hand(link, hook, W, convolution)
        is_of_chainer = _is_of_chainer(hook)
        gamma = gamma_of(link, hook)
        if gamma is not None and gamma.array is None:
            gamma = None  # the next call initializes it
        renewal = NEVER if is_of_chainer else renewal_of(
            hook, False, gamma, call.original(link, hook.weight_name))
        return quality.measure(
            W, u, hook.axis if is_of_chainer else axis_of(link, hook, W.ndim),
            hook.n_power_iteration, true_sigma, renewal,
            groups_of(link, hook), None if gamma is None else gamma.array,
            convolution)

    def layer(self, numbers: dict[str, float]) -> Layer:
        """Returns what users see of the numbers."""
        true_sigma = norm = numbers.get('true_sigma')
        sigma = numbers.get('sigma')
        if norm is not None and sigma is not None:
            factor, eps = _factor_and_eps(self.hook)
            norm *= abs(numbers.get('gamma', 1.)) * factor / (
                max(sigma, eps) or 1.)
        others = [x for name, x in numbers.items()  # sigma2, sigma3, ...
                  if name[len('sigma'):].isdigit()]
        return Layer(
            self.name, self.array.shape, sigma, numbers.get('residual'),
            true_sigma, norm,
            (numbers['sigma'], *others) if others else None)


def _is_of_chainer(hook: Any) -> bool:
    return isinstance(hook, ChainersHook)


def _factor_and_eps(hook: Any) -> tuple[float, float]:
    """Returns what the hook multiplies by, and its floor on sigma."""
    if _is_of_chainer(hook):
        # Chainer adds eps to the norms of the vectors.  Relative to sigma,
        # that changes sigma by no more than eps / sigma.
        return hook.factor or 1., 0.
    return _checks.check_settings(
        hook.n_power_iteration, hook.factor, hook.eps, hook.cap)[:2]


class Certificates:
    """The norms of links of a model, each certified once.

    Args:
        rtol: As in :func:`~sn_function.certify`.
        time_limit: Likewise, for each link.

    """

    def __init__(self, rtol: float, time_limit: float | None) -> None:
        self._rtol, self._time_limit = rtol, time_limit
        self._intervals: dict[int, Interval] = {}

    def __call__(self, link: chainer.Link) -> Interval:
        if id(link) not in self._intervals:
            self._intervals[id(link)] = certify(
                link, self._rtol, self._time_limit)
        return self._intervals[id(link)]

    def of_weight(self, weight: MonitoredWeight) -> Interval | None:
        """Returns that of its link, if it is known what the link does."""
        if weight.weight_name != 'W':
            return None
        try:
            return self(weight.link)
        except errors.CertifyLinkError:
            return None


def measure(
        weights: Iterable[MonitoredWeight], true_sigma: bool,
) -> list[tuple[MonitoredWeight, dict[str, float]]]:
    """Measures the weights that are initialized, and returns them, too."""
    measured = []
    by_device: dict[str, list[dict[str, Any]]] = {}
    for weight in weights:
        if weight.is_initialized:
            device = weight.link.device
            with chainer.using_device(device):
                numbers = weight.measure(true_sigma)
            measured.append((weight, numbers))
            by_device.setdefault(str(device), []).append(numbers)
    for name, group in by_device.items():
        _bring_to_host(name, group)
    return measured


def _bring_to_host(device_name: str, group: list[dict[str, Any]]) -> None:
    """Replaces the arrays, all on one device, by floats."""
    device = chainer.get_device(device_name)
    arrays = [x for numbers in group for x in numbers.values()]
    with chainer.using_device(device):
        stacked = device.xp.stack(arrays)
    # The one place where the host waits for the device.
    values = iter(chainer.get_device('@numpy').send(stacked).tolist())
    for numbers in group:
        for key in numbers:
            numbers[key] = next(values)
