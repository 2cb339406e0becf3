"""The norms of a model's weights, without a trainer."""
from __future__ import annotations

import chainer

from sn_function import _models, errors
from sn_function._monitoring import layers


def norms(model: chainer.Link) -> layers.Layers:
    """Measures the norm of each weight of a model, as it is now.

    For a layer with a hook, this package's or Chainer's: the estimate of
    sigma that the next call in test mode divides by, the true value, and the
    norm of the weight as the layer uses it, which is 1 for a perfect estimate,
    times what gamma, factor and cap make of it.  (:func:`~sn_function.summary`
    tells of hooks without an effect.)  For another one of the kinds
    that :class:`~sn_function.ChainSpectralNormalization` takes, the norm of
    its weight.  With ``norm='operator'`` it is that of the map of images.

    Nothing is changed: no vector moves on, and no random number is drawn.
    The true values take about as long as singular value decompositions do.
    In training :class:`~sn_function.extensions.SpectralNormReport` reports the
    same numbers.

    Args:
        model (~chainer.Link): A link or chain.

    Returns:
        ~sn_function.extensions.Layers: A tuple with one
        :class:`~sn_function.extensions.Layer` for each weight, which ``print``
        shows as a table.

    Raises:
        ModelTypeError: ``model`` is no link.
        NothingToReportError: It has no such layer.

    .. admonition:: Example

        >>> import numpy as np
        >>> import chainer
        >>> import chainer.links as L
        >>> import sn_function
        >>> model = chainer.Sequential(
        ...     L.Linear(2, 3).add_hook(sn_function.SpectralNormalization()),
        ...     L.Linear(3, 1))
        >>> model[0].W.array[...] = [[4, 0], [0, 1], [0, 0]]
        >>> model[1].W.array[...] = 2
        >>> found = sn_function.norms(model)
        >>> print(found)
        layer  shape  sigma  true sigma  norm
        0      3x2    4.000  4.000       1.000
        1      1x3    -      3.464       3.464
        >>> [layer.name for layer in found if layer.norm > 1.01]
        ['1']

    """
    _models.check_models('norms', model)
    weights = list(map(layers.MonitoredWeight, _models.weights(model)))
    if not weights:
        raise errors.NothingToReportError(model, True)
    return layers.Layers(
        (weight.layer(numbers)
         for weight, numbers in layers.measure(weights, True)),
        (weight.name for weight in weights if not weight.is_initialized))
