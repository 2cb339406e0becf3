"""Vectors and gammas, made anew for the weights of a model as they are."""
from __future__ import annotations

import warnings
from typing import Any

import chainer
import numpy
from chainer.backends import cuda

from sn_function import _models, errors
from sn_function._arithmetic import singular
from sn_function._arithmetic.convolution import Convolution
from sn_function._links import call, vector
from sn_function._links import gamma as _gamma
from sn_function._links.weight import axis_of, groups_of


def refresh(*models: chainer.Link, gamma: bool = False) -> None:
    """Makes the vectors of models anew, for their weights as they are.

    A hook notices a ``u`` that belongs to another weight, and iterates before
    it goes on.  In test mode it does so in each call, and stores nothing.
    After weights were loaded without their ``u``, were drawn anew, or are the
    average of those of several models, this function does it once and for all:
    ``u`` becomes the left singular vector of the largest singular value, with
    several vectors those of the largest ones, and is stored.  No random
    numbers are drawn.

    It finds that vector in float64 on the host, exactly, which takes about as
    long as a singular value decomposition does.  With ``norm='operator'`` it
    is that of the map, by the Lanczos method, and of several vectors those
    after the first are approximate.  A weight that is not initialized is left
    alone, as its first call makes ``u``; so is a map whose size is not known
    before that.  The weights are those on the links, without what other hooks
    make of them in a call.  Call it outside of :func:`cached`: an open scope
    goes on with the vectors that it has.

    Args:
        models (~chainer.Link): Links or chains, with hooks of this package or
            Chainer's.
        gamma (bool): Whether to make the gammas anew as well: the largest
            singular value of the weight, or 1 where that is 0.  A trained
            gamma is lost then.

    Raises:
        ModelTypeError: Something is not a link, or there is none.

    .. admonition:: Example

        >>> import numpy as np
        >>> import chainer.links as L
        >>> import sn_function
        >>> layer = L.Linear(2, 2).add_hook(
        ...     sn_function.SpectralNormalization())
        >>> layer.W.array[...] = np.diag([1, 4])
        >>> sn_function.refresh(layer)
        >>> print(abs(layer.W_u))
        [0. 1.]

    """
    _models.check_models('refresh', *models)
    for model in models:
        weights = list(_models.hooked_weights(model))
        if not weights:
            warnings.warn(
                errors.NothingToRefreshWarning(model), stacklevel=2)
        for weight in weights:
            W = call.original(weight.link, weight.weight_name).array
            if W is not None:
                _refresh(weight, W, gamma)


def _refresh(weight: _models.LinkWeight, W: Any, gamma: bool) -> None:
    path, link, weight_name, hook = weight
    convolution = vector.map_of(link, hook)
    shape = vector.shape_of(link, hook, W.shape, convolution)
    if shape is None:
        return
    if not numpy.isfinite(cuda.to_cpu(W)).all():
        warnings.warn(
            f'{path.rstrip("/")}/{weight_name} of {type(link).__name__} holds '
            f'NaN or Inf, so {vector.names(hook, link)[0]} was left as it '
            f'was.', errors.SpectralNormalizationWarning, stacklevel=3)
        return
    n = vector.count(link, hook, W.shape, convolution)
    sigma, u = _leading(link, hook, cuda.to_cpu(W), n, convolution)
    if sigma > 0:
        vector.store(link, hook, u.astype(W.dtype), shape)
    parameter = _models.gamma_of(link, hook) if gamma else None
    if parameter is None or parameter.array is None:
        return
    if isinstance(parameter.initializer, _gamma.LargestSingularValue):
        _gamma.initialize(
            parameter, call.original(link, weight_name), is_made_anew=True,
            convolution=convolution)
    else:
        parameter.array[...] = sigma or 1


def _leading(
        link: chainer.Link, hook: Any, W: Any, n: int,
        convolution: Convolution | None) -> tuple[float, Any]:
    """Returns the norm, and the ``n`` first vectors as the arithmetic does."""
    if convolution is not None:
        return singular.leading_of_map(W, convolution, n)
    return singular.leading_of_weight(
        W, axis_of(link, hook, W.ndim), groups_of(link, hook), n)
