"""Trainer extensions: seeing sigma while a model is trained."""
from __future__ import annotations

import warnings
from typing import Any, Iterable, Iterator

import chainer
from chainer import training
from chainer.training import extension

from sn_function import _checks, _models, errors, optimizer_hooks
from sn_function._monitoring import faults, layers, lipschitz, plot
from sn_function._monitoring.layers import Layer as Layer
from sn_function._monitoring.lipschitz import n_windows as n_windows


class SpectralNormReport(training.Extension):
    """Reports the spectral norm of each layer that has a hook.

    The hooks are :class:`~sn_function.SpectralNormalization` and Chainer's
    own.  For a layer ``block1/conv`` of the model these values, which are
    floats, are reported by :func:`chainer.report`, so that ``LogReport``,
    ``PrintReport``, ``PlotReport`` and writers for TensorBoard find them:

    ``sigma/block1/conv``
        The estimate of the largest singular value of the raw weight ``W``
        that the next call in test mode divides by.  It takes
        ``n_power_iteration`` iterations from the stored vector.
    ``residual/block1/conv``
        :math:`r = \\|W^T u - \\sigma v\\| / \\sigma`, where ``u`` and ``v``
        are the unit vectors that the estimate comes from, for which
        :math:`W v = \\sigma u`.  With several vectors
        :math:`W^T u = \\sigma v` holds, and this is
        :math:`\\|W v - \\sigma u\\| / \\sigma`.  The true value is at least
        :math:`\\sigma \\sqrt{1 + r^2}`, and some singular value, if not the
        largest, is within :math:`r \\sigma / \\sqrt 2` of the estimate.
    ``sigma2/block1/conv``
        With several vectors, ``n_vectors`` of the hook: the estimate of the
        second largest singular value.  :meth:`measure` returns all of them.

    and with ``true_sigma=True``, also

    ``true_sigma/block1/conv``
        The largest singular value of the raw weight, in float64.  Layers of
        the kinds that :class:`~sn_function.ChainSpectralNormalization` takes
        are reported without a hook, too.
    ``norm/block1/conv``
        That of the weight as the layer uses it: 1 for a perfect estimate,
        times what gamma, factor and cap make of it.
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

    Training is not disturbed: no vector is advanced, no random number drawn,
    no graph made.  On a device everything is computed there.  The host waits
    for it once for the whole model when the extension is triggered, and never
    in between.  Layers that are not initialized yet are left out.

    It warns once for each layer and each cause, with the layer's name, by a
    :class:`~sn_function.errors.SpectralNormalizationWarning`: where the
    weight is zero or not finite, where the stored vector is, and where the
    estimate is off by more than the tolerance.  What is compared with the
    tolerance is the relative error if ``true_sigma`` is true, and otherwise
    the least value that the residual leaves for it.

    Args:
        model (~chainer.Link): Link or chain.
        true_sigma (bool): Compute the true largest singular values as well.
            That takes time: see :doc:`monitoring`.
        filename (str or None): Name of a picture, a PNG, in the directory of
            the trainer's output, that shows what has been reported so far.
            It needs Matplotlib; without it there is a warning and no
            picture.  At most a tenth of the time goes into drawing.
        prefix (str or None): Prepended to the keys, with a slash, to
            distinguish models that have an extension each.
        tolerance (float): The largest relative error of an estimate that
            does not cause a warning.

    Raises:
        ToleranceError: The tolerance is not above 0.
        ModelTypeError: ``model`` is no link.
        NothingToReportError: When the trainer starts, as hooks may be added
            until then, and from :meth:`measure`: no layer has a hook, and
            ``true_sigma`` is false, or there is no layer of these kinds.

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
        _models.check_models('SpectralNormReport', model)
        if not _checks.as_float(tolerance) > 0:
            raise errors.ToleranceError(tolerance)
        self._model = model
        self._true_sigma = true_sigma
        if filename is not None and not plot.is_available():
            filename = None
        self._picture = plot.Picture(filename)
        self._prefix = '' if prefix is None else prefix + '/'
        self._tolerance = tolerance
        self._warned: set[tuple[str, str]] = set()

    def __repr__(self) -> str:
        prefix = self._prefix[:-1] if self._prefix else None
        return (
            f'{type(self).__name__}({type(self._model).__name__}, '
            f'true_sigma={self._true_sigma!r}, '
            f'filename={self._picture.filename!r}, prefix={prefix!r}, '
            f'tolerance={self._tolerance!r})')

    # Of a trainer

    def initialize(self, trainer: training.Trainer) -> None:
        """Checks that there is something to report."""
        self._checked_weights()

    def __call__(self, trainer: training.Trainer) -> None:
        """Reports, warns and draws."""
        weights = self._weights()
        measured = layers.measure(weights, self._true_sigma)
        found = [weight.layer(numbers) for weight, numbers in measured]
        values = dict(_values(found))
        if self._true_sigma and len(measured) == len(weights):
            values['lipschitz_bound'] = lipschitz.bound(
                (weight.link, layer.norm or 0.)
                for (weight, _), layer in zip(measured, found))
        chainer.report(
            {self._prefix + key: value for key, value in values.items()})
        for weight, numbers in measured:
            self._warn(weight.name, *faults.fault(
                weight, numbers, self._tolerance))
        self._picture.add(trainer.out, trainer.updater.iteration, values)

    def finalize(self) -> None:
        """Draws what was reported since the picture was last drawn."""
        self._picture.draw()

    def serialize(self, serializer: Any) -> None:
        """Saves or loads what the picture shows."""
        self._picture.serialize(serializer)

    def _warn(self, name: str, cause: str, message: str) -> None:
        if cause and (name, cause) not in self._warned:
            self._warned.add((name, cause))
            warnings.warn(
                f'{self._prefix}{name}: {message}',
                errors.SpectralNormalizationWarning, stacklevel=3)

    # Measuring

    def measure(self) -> list[Layer]:
        """Measures all layers, as they are now.

        Returns:
            list of Layer: In the order of ``model.namedlinks()``.

        """
        measured = layers.measure(self._checked_weights(), self._true_sigma)
        return [weight.layer(numbers) for weight, numbers in measured]

    def _checked_weights(self) -> list[layers.MonitoredWeight]:
        weights = self._weights()
        if not weights:
            raise errors.NothingToReportError(self._model, self._true_sigma)
        return weights

    def _weights(self) -> list[layers.MonitoredWeight]:
        return [layers.MonitoredWeight(weight)
                for weight in _models.weights(self._model)
                if self._true_sigma or weight.hook is not None]


def _values(found: Iterable[Layer]) -> Iterator[tuple[str, Any]]:
    """Yields the keys and values that are reported on the layers."""
    for layer in found:
        if layer.sigma is not None:
            yield f'sigma/{layer.name}', layer.sigma
            if layer.sigma != 0:  # else there is none
                yield f'residual/{layer.name}', layer.residual
        if layer.singular_values is not None:
            yield f'sigma2/{layer.name}', layer.singular_values[1]
        if layer.true_sigma is not None:
            yield f'true_sigma/{layer.name}', layer.true_sigma
            if layer.sigma is not None:
                yield f'norm/{layer.name}', layer.norm


class SpectralNormPenaltyState(training.Extension):
    """Keeps the vectors of optimizer hooks in snapshots of the trainer.

    With it, a resumed run ends with the same numbers as one that was not
    interrupted, bit by bit.  Without it, a resumed run makes new vectors for
    :class:`~sn_function.optimizer_hooks.SpectralNormPenalty` and
    :class:`~sn_function.optimizer_hooks.SpectralNormProjection`.

    Args:
        optimizer (~chainer.Optimizer): An optimizer that has one of these
            hooks, or both.

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
            for name, suffix in _SUFFIXES.items():
                _serialize_vector(
                    serializer, path.strip('/') + suffix, W.update_rule, name)


# What is added to the path of a weight in snapshots.
_SUFFIXES = {
    optimizer_hooks.VECTOR: '',
    optimizer_hooks.PROJECTION_VECTOR: optimizer_hooks.PROJECTION_VECTOR}


def _serialize_vector(
        serializer: Any, key: str, rule: Any, name: str) -> None:
    u = getattr(rule, name, None)
    if isinstance(serializer, chainer.Serializer):
        if u is not None:
            serializer(key, u)
        return
    try:
        u = serializer(key, None)
    except KeyError:  # of a run without it, or before its first step
        u = None
    if rule is not None:
        setattr(rule, name, u)
