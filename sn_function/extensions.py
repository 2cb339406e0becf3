"""Trainer extensions: seeing sigma while a model is trained."""
from __future__ import annotations

import json
import math
import os
import time
import warnings
from typing import Any, Iterator, NamedTuple

import chainer
import numpy
from chainer import link_hooks, training
from chainer.training import extension

from sn_function import _checks, errors, optimizer_hooks
from sn_function._arithmetic import quality
from sn_function._links import call
from sn_function._links.state import LinkState
from sn_function._monitoring import plot
from sn_function.chain import SUPPORTED
from sn_function.link_hooks import HOOKS, output_axis


class Layer(NamedTuple):
    """What :meth:`SpectralNormReport.measure` has found out about a layer.

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

    """

    name: str
    shape: tuple[int, ...]
    sigma: float | None
    residual: float | None
    true_sigma: float | None
    norm: float | None


class SpectralNormReport(training.Extension):
    """Reports the spectral norm of each layer that has a hook.

    The hooks are :class:`~sn_function.SpectralNormalization` and Chainer's
    own.  For a layer ``block1/conv`` of the model these values, which are
    floats, are reported by :func:`chainer.report`, so that ``LogReport``,
    ``PrintReport``, ``PlotReport`` and writers for TensorBoard find them:

    ``sigma/block1/conv``
        The estimate of the largest singular value of the raw weight ``W``
        that the next call in test mode divides by: of
        ``n_power_iteration`` iterations from the stored vector.
    ``residual/block1/conv``
        :math:`r = \\|W^T u - \\sigma v\\| / \\sigma`, where ``u`` and ``v``
        are the unit vectors that the estimate comes from, for which
        :math:`W v = \\sigma u`.  The true value is at least
        :math:`\\sigma \\sqrt{1 + r^2}`, and some singular value, if not the
        largest, is within :math:`r \\sigma / \\sqrt 2` of the estimate.

    and with ``true_sigma=True``, also

    ``true_sigma/block1/conv``
        The largest singular value of the raw weight, in float64.  Layers of
        the kinds that :class:`~sn_function.ChainSpectralNormalization` takes
        are reported without a hook, too.
    ``norm/block1/conv``
        That of the weight as the layer uses it: 1 for a perfect estimate,
        times gamma, factor or what else the hook was told to do.
    ``lipschitz_bound``
        The product over all layers of their norms as operators.  A linear
        layer has that of its weight.  A convolution has at most that of its
        weight times the square root of the number of windows that an input
        pixel is in, ``ceil(k / stride)`` along each axis, and a
        deconvolution times that of the size of its kernel (Y. Tsuzuku et
        al., `Lipschitz-Margin Training
        <https://arxiv.org/abs/1802.04034>`_).  It bounds the Lipschitz
        constant of a model that calls its layers once each, one after
        another, with nothing between them that magnifies differences: ReLU
        and pooling do not, batch normalization and residual connections may.
        A link of another kind counts with the norm of its weight.

    Training is not disturbed: no vector is moved on, no random number drawn,
    no graph made.  On a device everything is computed there and waited for
    once for the whole model, when the extension is triggered, and never
    between.  Layers that are not initialized yet are left out.

    It warns once for each layer and each cause, with the layer's name, by a
    :class:`~sn_function.errors.SpectralNormalizationWarning`: where the
    weight is zero or not finite, the stored vector is, or the estimate is off
    by more than the tolerance.  The last is the relative error where
    ``true_sigma=True``, and else the least that it can be by the residual.

    Args:
        model (~chainer.Link): Link or chain.
        true_sigma (bool): Compute the true largest singular values as well.
            That takes time: see :doc:`monitoring`.
        filename (str or None): Name of a picture, a PNG, in the directory of
            the trainer's output, that shows what has been reported so far.
            It takes Matplotlib; without it there is a warning and no
            picture.  At most a tenth of the time goes into drawing.
        prefix (str or None): Prepended to the keys, with a slash.  Tells
            models apart that have an extension each.
        tolerance (float): Relative error of an estimate that is too much.

    Raises:
        ToleranceError: The tolerance is not above 0.
        NothingToReportError: From the trainer's start: no layer has a hook,
            and ``true_sigma`` is false.

    .. admonition:: Example

        >>> import chainer, chainer.links as L
        >>> import sn_function
        >>> from sn_function import extensions
        >>> model = chainer.Sequential(
        ...     L.Linear(3, 4).add_hook(sn_function.SpectralNormalization()),
        ...     chainer.functions.relu, L.Linear(4, 1))
        >>> model[0].W.array[...] = 2
        >>> report = extensions.SpectralNormReport(model)
        >>> for layer in report.measure():
        ...     print('%s %s %.4f' % (layer.name, layer.shape, layer.sigma))
        0 (4, 3) 6.9282

    """

    trigger = 1, 'epoch'
    priority = extension.PRIORITY_WRITER

    def __init__(
            self, model: chainer.Link, true_sigma: bool = False,
            filename: str | None = None, prefix: str | None = None,
            tolerance: float = 0.2) -> None:
        if not _checks.as_float(tolerance) > 0:
            raise errors.ToleranceError(tolerance)
        self._model = model
        self._true_sigma = true_sigma
        self._filename: str | None = None
        if filename is not None and plot.is_available():
            self._filename = filename
        self._prefix = '' if prefix is None else prefix + '/'
        self._tolerance = tolerance
        self._warned: set[tuple[str, str]] = set()
        self._history: list[dict[str, float]] = []
        self._path: str | None = None  # of a picture that is due
        self._rest_until = -math.inf

    # Of a trainer

    def initialize(self, trainer: training.Trainer) -> None:
        """Checks that there is something to report."""
        if not any(True for _ in self._weights()):
            raise errors.NothingToReportError(self._model)

    def __call__(self, trainer: training.Trainer) -> None:
        """Reports, warns and draws."""
        measured = self._measure()
        layers = [weight.layer(numbers) for weight, numbers in measured]
        values = dict(_values(layers))
        if self._true_sigma and all(
                weight.is_initialized for weight in self._weights()):
            values['lipschitz_bound'] = math.prod([
                (layer.norm or 0.) * math.sqrt(n_windows(weight.link))
                for (weight, _), layer in zip(measured, layers)], start=1.)
        chainer.report(
            {self._prefix + key: value for key, value in values.items()})
        for weight, numbers in measured:
            self._warn(weight.name, *weight.fault(numbers, self._tolerance))
        if self._filename is not None:
            self._history.append(
                dict(values, iteration=trainer.updater.iteration))
            self._path = os.path.join(trainer.out, self._filename)
            if time.perf_counter() >= self._rest_until:
                self._draw()

    def finalize(self) -> None:
        """Draws what has been reported since the picture was drawn."""
        self._draw()

    def serialize(self, serializer: Any) -> None:
        """Saves or loads what the picture shows."""
        if isinstance(serializer, chainer.Serializer):
            serializer('_history', json.dumps(self._history))
            return
        try:
            history = serializer('_history', '')
        except KeyError:  # a snapshot of a run without this extension
            return
        self._history = json.loads(str(history) or '[]')

    def _warn(self, name: str, cause: str, message: str) -> None:
        if cause and (name, cause) not in self._warned:
            self._warned.add((name, cause))
            warnings.warn(
                f'{self._prefix}{name}: {message}',
                errors.SpectralNormalizationWarning, stacklevel=3)

    def _draw(self) -> None:
        if self._path is None:
            return
        start = time.perf_counter()
        plot.draw(self._history, self._path)
        self._path = None
        end = time.perf_counter()
        self._rest_until = end + 9 * (end - start)

    # Measuring

    def measure(self) -> list[Layer]:
        """Measures all layers, as they are now.

        Returns:
            list of Layer: In the order of ``model.namedlinks()``.

        """
        return [weight.layer(numbers) for weight, numbers in self._measure()]

    def _measure(self) -> list[tuple[_Weight, dict[str, float]]]:
        pending: dict[str, list[tuple[_Weight, dict[str, Any]]]] = {}
        weights = [x for x in self._weights() if x.is_initialized]
        for weight in weights:
            device = weight.link.device
            with chainer.using_device(device):
                pending.setdefault(str(device), []).append(
                    (weight, weight.measure(self._true_sigma)))
        found = {}
        for group in pending.values():
            arrays = [x for _, numbers in group for x in numbers.values()]
            device = group[0][0].link.device
            with chainer.using_device(device):
                stacked = device.xp.stack(arrays)
            # The one place where the host waits for the device.
            values = iter(chainer.get_device('@numpy').send(stacked).tolist())
            for weight, numbers in group:
                found[weight.name] = {name: next(values) for name in numbers}
        return [(weight, found[weight.name]) for weight in weights]

    def _weights(self) -> Iterator[_Weight]:
        seen = set()
        for path, link in self._model.namedlinks():
            if id(link) in seen:  # a link may have several paths
                continue
            seen.add(id(link))
            hooks = [hook for hook in link.local_link_hooks.values()
                     if isinstance(hook, HOOKS)]
            for hook in hooks:
                yield _Weight(path, link, hook.weight_name, hook)
            if self._true_sigma and not hooks and isinstance(
                    link, SUPPORTED) and hasattr(link, 'W'):
                yield _Weight(path, link, 'W', None)


class SpectralNormPenaltyState(training.Extension):
    """Keeps the vectors of a penalty in snapshots of the trainer.

    With it a run that is resumed ends with the numbers of one that went
    through, bit by bit.  Without it the vectors of
    :class:`~sn_function.optimizer_hooks.SpectralNormPenalty` are made anew.

    Args:
        optimizer (~chainer.Optimizer): An optimizer that has such a hook.

    .. admonition:: Example

        >>> import chainer, chainer.links as L
        >>> from sn_function import extensions
        >>> from sn_function.optimizer_hooks import SpectralNormPenalty
        >>> optimizer = chainer.optimizers.SGD().setup(L.Linear(3, 2))
        >>> optimizer.add_hook(SpectralNormPenalty(1e-2))
        >>> state = extensions.SpectralNormPenaltyState(optimizer)

    """

    def __init__(self, optimizer: chainer.Optimizer) -> None:
        self._optimizer = optimizer

    def __call__(self, trainer: training.Trainer) -> None:
        """Does nothing."""

    def serialize(self, serializer: Any) -> None:
        """Saves or loads the vectors."""
        for path, W in self._optimizer.target.namedparams():
            rule, key = W.update_rule, path.strip('/')
            u = getattr(rule, optimizer_hooks.VECTOR, None)
            if isinstance(serializer, chainer.Serializer):
                if u is not None:
                    serializer(key, u)
                continue
            try:
                u = serializer(key, None)
            except KeyError:  # of a run without it, or before its first step
                u = None
            if rule is not None:
                setattr(rule, optimizer_hooks.VECTOR, u)


class _Weight:
    """A weight of a link of the model, and the hook that normalizes it."""

    def __init__(
            self, path: str, link: chainer.Link, weight_name: str, hook: Any
    ) -> None:
        parts = [path.strip('/')]
        if weight_name != 'W' or path == '/':
            parts.append(weight_name)
        self.name = '/'.join(filter(None, parts))
        self.link, self.hook = link, hook
        self.array = call.original(link, weight_name).array
        self.vector = hook and getattr(link, hook.vector_name, None)

    @property
    def is_initialized(self) -> bool:
        return self.array is not None and (
            self.hook is None or self.vector is not None)

    def measure(self, true_sigma: bool) -> dict[str, Any]:
        """Returns numbers on it, arrays of shape () on its device."""
        W, u, hook, link = self.array, self.vector, self.hook, self.link
        if hook is None:
            return quality.measure(W, None, output_axis(link), 1, true_sigma)
        # Where a snapshot was loaded before the first call.
        u = link.device.send(u).astype(W.dtype, copy=False)
        numbers = quality.measure(
            W, u, hook.axis if _is_of_chainer(hook) else output_axis(link),
            hook.n_power_iteration, true_sigma)
        gamma = self._gamma()
        if gamma is not None and gamma.array is not None:
            numbers['gamma'] = gamma.array.astype(numpy.float64)
        return numbers

    def _gamma(self) -> Any:
        if not self.hook.use_gamma:
            return None
        if _is_of_chainer(self.hook):
            return self.link.gamma
        state = LinkState.of(self.link, self.hook.weight_name)
        return state.gamma_name and getattr(self.link, state.gamma_name)

    def layer(self, numbers: dict[str, float]) -> Layer:
        true_sigma = norm = numbers.get('true_sigma')
        sigma = numbers.get('sigma')
        if norm is not None and sigma is not None:
            factor, eps = _factor_and_eps(self.hook)
            norm *= abs(numbers.get('gamma', 1.)) * factor / (
                max(sigma, eps) or 1.)
        return Layer(self.name, self.array.shape, sigma,
                     numbers.get('residual'), true_sigma, norm)

    def fault(
            self, numbers: dict[str, float], tolerance: float
    ) -> tuple[str, str]:
        """Returns a word for what is wrong, if anything, and a sentence."""
        if not math.isfinite(numbers['peak']):
            return 'not finite', 'the weight holds NaN or Inf.'
        if numbers['peak'] == 0:
            return 'zero', (
                'the weight is all zero, so it has no singular vector.')
        if self.hook is None:
            return '', ''
        if not numbers['is_sound']:
            return 'vector', (
                f'the stored vector {self.hook.vector_name} is zero or not '
                f'finite.')
        sigma, residual = numbers['sigma'], numbers['residual']
        if 'true_sigma' in numbers:
            at_least, error = '', abs(1 - sigma / numbers['true_sigma'])
        else:
            at_least = 'at least '
            error = 1 - 1 / math.hypot(1, residual)
        # NaN: the weight is so small that the residual is out of the range.
        if error <= tolerance or math.isnan(error):
            return '', ''
        return 'estimate', (
            f'the estimate of sigma, {sigma:.4g}, is off by {at_least}'
            f'{error:.0%}. More power iterations (n_power_iteration) or a '
            f'smaller step size bring it closer.')


def _is_of_chainer(hook: Any) -> bool:
    return isinstance(hook, link_hooks.SpectralNormalization)


def _factor_and_eps(hook: Any) -> tuple[float, float]:
    """What the hook multiplies by, and its floor on sigma."""
    if _is_of_chainer(hook):
        # Chainer adds eps to the norms of the vectors, which changes sigma by
        # as little, relative to it, as eps / sigma.
        return hook.factor or 1., 0.
    return _checks.check_settings(
        hook.n_power_iteration, hook.factor, hook.eps, hook.cap)


def _values(layers: list[Layer]) -> Iterator[tuple[str, Any]]:
    """Yields what is reported of the layers."""
    for layer in layers:
        if layer.sigma is not None:
            yield f'sigma/{layer.name}', layer.sigma
            if layer.sigma != 0:  # else there is none
                yield f'residual/{layer.name}', layer.residual
        if layer.true_sigma is not None:
            yield f'true_sigma/{layer.name}', layer.true_sigma
            if layer.sigma is not None:
                yield f'norm/{layer.name}', layer.norm


def n_windows(link: chainer.Link) -> int:
    """Returns how many outputs, at most, take an entry of the input in.

    Written as a matrix, a convolution repeats its weight for every window of
    the input, and a pixel is in ``n`` of these; so its norm is at most
    ``sqrt(n)`` times that of the weight.
    """
    kernel = link.W.shape[2:] if isinstance(link, SUPPORTED) else ()
    if not kernel:
        return 1
    if output_axis(link) == 1:  # a deconvolution
        return math.prod(kernel)
    ndim = len(kernel)
    return math.prod(
        -(-k * math.gcd(stride, dilate) // stride)
        for k, stride, dilate in zip(
            kernel, _each(link.stride, ndim), _each(link.dilate, ndim)))


def _each(x: Any, ndim: int) -> Any:
    return tuple(x) if hasattr(x, '__getitem__') else (x,) * ndim
