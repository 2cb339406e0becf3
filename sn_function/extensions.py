"""Trainer extensions: seeing sigma while a model is trained."""
from __future__ import annotations

import warnings
from typing import Any, Iterable, Iterator

import chainer
from chainer import training
from chainer.training import extension

from sn_function import (
    _certify,
    _checks,
    _models,
    errors,
    optimizer_hooks,
)
from sn_function._monitoring import faults, layers, lipschitz, plot
from sn_function._monitoring.layers import Layer, Layers

__all__ = [
    'Layer', 'Layers', 'SpectralNormPenaltyState', 'SpectralNormReport']

# The tolerance of a bound that is asked for without one.
DEFAULT_RTOL = 1e-3


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

    and with ``certify=rtol``, a tolerance such as 1e-2, also

    ``certified_norm/block1/conv``
        The upper end of the interval that :func:`~sn_function.certify` finds
        for the layer as it is called in test mode: its norm as a map, of
        images of any size, surely is no larger.  :meth:`measure` returns the
        interval.  These layers are reported without a hook, too.
    ``lipschitz_bound``
        A bound on the Lipschitz constant of the model in test mode:
        :meth:`lipschitz_bound`.  It is left out, with a warning that names
        them, where there are layers that are not understood.

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
        certify (float or None): The relative tolerance of the certified
            norms, or ``None`` for none.  They take time: see
            :doc:`monitoring`.
        time_limit (float or None): Seconds for the certificate of a layer, as
            in :func:`~sn_function.certify`.  When they are over, the
            interval is wider, and the bound higher.
        residual: The chains of the model that compute ``x + f(x)``, as a
            pattern of their paths, a class, a function of a path and a link,
            or a list of these; see :meth:`lipschitz_bound`.

    Raises:
        ToleranceError: The tolerance is not above 0.
        ModelTypeError: ``model`` is no link.
        CertifyArgumentError: ``certify`` is no number above 0, or
            ``time_limit`` none of at least 0.
        FilterError: ``residual`` can choose no links.
        ShortcutError: ``residual`` is a dictionary with something else than
            names.
        NothingToReportError: When the trainer starts, as hooks may be added
            until then, and from :meth:`measure`: no layer has a hook, and
            neither ``true_sigma`` nor ``certify`` is given, or there is no
            layer of these kinds.

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
        ...
        0 (4, 3) 6.9282

    """

    trigger = 1, 'epoch'
    priority = extension.PRIORITY_WRITER

    def __init__(
            self, model: chainer.Link, true_sigma: bool = False,
            filename: str | None = None, prefix: str | None = None,
            tolerance: float = 0.2, certify: float | None = None,
            time_limit: float | None = 10., residual: Any = None) -> None:
        _models.check_models('SpectralNormReport', model)
        if not _checks.as_float(tolerance) > 0:
            raise errors.ToleranceError(tolerance)
        _certify.check(
            DEFAULT_RTOL if certify is None else certify, time_limit)
        lipschitz.check_residual(residual)
        self._model = model
        self._true_sigma = true_sigma
        self._certify = certify
        self._time_limit = time_limit
        self._residual = residual
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
            f'tolerance={self._tolerance!r}, certify={self._certify!r})')

    # Of a trainer

    def initialize(self, trainer: training.Trainer) -> None:
        """Checks that there is something to report."""
        self._checked_weights()

    def __call__(self, trainer: training.Trainer) -> None:
        """Reports, warns and draws."""
        weights = self._weights()
        measured, found, certificates = self._measured(weights)
        values = dict(_values(found))
        if self._certify is not None and len(measured) == len(weights):
            try:
                values['lipschitz_bound'] = lipschitz.bound(
                    self._model, certificates, self._residual)
            except errors.UninitializedWeightError:
                pass
            except errors.LipschitzError as e:
                self._warn('lipschitz_bound', 'unknown', str(e))
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
        return self._measured(self._checked_weights())[1]

    def lipschitz_bound(self) -> float:
        """Bounds the Lipschitz constant of the model, as it is now.

        It is the product of bounds of its layers: for a linear layer, an
        EmbedID that comes first, and a convolution the upper end of its
        certified interval; for batch normalization, as it is in test mode,
        :math:`\\max |\\gamma| / \\sqrt{var + \\epsilon}`; and 1 for other
        links that have no parameters of their own.  In a
        :class:`~chainer.Sequential` the functions count, too: ReLU and its
        relatives, dropout (which does nothing in test mode), those that
        change shapes, and pooling, whose windows may overlap.  Arguments are
        given by :func:`functools.partial`; a ``lambda`` is not understood.

        A chain with a ``forward`` of its own must call each of its children
        once, one after another, with nothing between them that magnifies
        differences: ReLU does not, and a sum over ``n`` pixels does, by
        :math:`\\sqrt n`.  Chains that ``residual`` takes have the bound
        :math:`1 + \\prod`, over all children.  For those that compute
        ``shortcut(x) + f(x)``, ``residual`` is a dictionary from such a
        filter to a pattern of the names of the children that make up the
        shortcut; a chain that has no such child adds ``x`` itself:
        ``{Block: 'shortcut*'}``.

        The bound holds in exact arithmetic, for weights as they are: it is
        rounded up, and what the layers round in a call is not part of it.

        Returns:
            float: The bound, by intervals with the tolerance ``certify``, or
            1e-3 if none is given.  NaN if a weight holds NaN or Inf.

        Raises:
            LipschitzError: Layers are not understood, such as LSTM, layer
                normalization, or unknown links with parameters.
            UninitializedWeightError: A parameter has no array yet.
            UnknownInputSizeError: A layer whose hook has ``norm='operator'``
                has not been called yet.

        """
        return lipschitz.bound(
            self._model, self._certificates(), self._residual)

    def _measured(self, weights: list[layers.MonitoredWeight]) -> tuple[
            list[tuple[layers.MonitoredWeight, dict[str, float]]],
            list[Layer], layers.Certificates]:
        """Returns what is measured, what users see of it, and certificates."""
        measured = layers.measure(weights, self._true_sigma)
        certificates = self._certificates()
        found = [weight.layer(numbers) for weight, numbers in measured]
        if self._certify is not None:
            found = [
                layer._replace(interval=certificates.of_weight(weight))
                for (weight, _), layer in zip(measured, found)]
        return measured, found, certificates

    def _certificates(self) -> layers.Certificates:
        return layers.Certificates(
            DEFAULT_RTOL if self._certify is None else self._certify,
            self._time_limit)

    def _checked_weights(self) -> list[layers.MonitoredWeight]:
        weights = self._weights()
        if not weights:
            raise errors.NothingToReportError(
                self._model, self._takes_all())
        return weights

    def _weights(self) -> list[layers.MonitoredWeight]:
        return [layers.MonitoredWeight(weight)
                for weight in _models.weights(self._model)
                if self._takes_all() or weight.hook is not None]

    def _takes_all(self) -> bool:
        return self._true_sigma or self._certify is not None


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
        if layer.interval is not None:
            yield f'certified_norm/{layer.name}', layer.interval.hi


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
