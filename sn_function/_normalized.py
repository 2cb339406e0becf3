"""A scope in which the weights of links are the normalized ones."""
from __future__ import annotations

import contextlib
import warnings
from typing import Iterator

import chainer

from sn_function import _models, errors
from sn_function._links import scope as scopes
from sn_function._links.reading import ReadingScope
from sn_function.link_hooks import SpectralNormalization


@contextlib.contextmanager
def normalized(*models: chainer.Link) -> Iterator[None]:
    """A scope in which ``link.W`` is the normalized weight, with its graph.

    A penalty, a regularization or a log-determinant that is written by hand
    takes ``link.W``.  That is the raw parameter, with which no layer computes.
    Within this scope it is the weight that calls of the link use, a Variable
    whose graph leads to the parameter; and so for every link of the models
    that has a :class:`~sn_function.SpectralNormalization`, of its own or by a
    :class:`~sn_function.ChainSpectralNormalization`, and under every name of a
    weight that has one.

    * It is a scope like :func:`~sn_function.cached`: calls and attributes have
      one normalized weight, the same Variable, and ``u`` advances once in
      training mode, when a link is first called or its weight first read, and
      in test mode with ``update_u='always'`` only.  In a scope that was open
      before, :func:`cached` or a call of a chain with a hook, it is the weight
      of that one.
    * Gradients are those of the parameter: ``link.W.grad`` after the scope.
    * Optimizers, ``params()``, ``cleargrads()``, snapshots, copies, pickles
      and other threads find the parameters, in the scope as outside of it.
      After an update, ``link.W`` is the new weight, normalized.
    * Afterwards ``link.W`` is the parameter again, also where the program has
      put another Variable in its place.  A new parameter stays.
    * ``link.forward(x)`` and ``F.linear(x, link.W)`` compute with the
      normalized weight, too.
    * What is written into ``link.W.array`` is written into the normalized
      weight.  Write weights outside of the scope, or by ``params()``.
    * What other hooks make of the weight, such as
      :class:`~chainer.link_hooks.WeightStandardization`, is in calls only.
    * Copies of links have no part in it, nor have links and hooks that are
      added within the scope, nor classes that make the attribute by a
      property.
    * The weights of an n-step RNN are ``link.ws``, or ``link[0].w0`` and so
      on.
    * A function that :func:`chainer.functions.forget` runs a second time gets
      the weight of the first run, in the scope or after it.

    The scope is of its thread, as :func:`~sn_function.cached` is, and lasts
    as long in a generator as that stays in it.  If no link of the models has a
    hook, ``link.W`` is the parameter, as layers use it, and there is a
    :class:`~sn_function.errors.SpectralNormalizationWarning`.

    Args:
        models (~chainer.Link): Links or chains.

    Raises:
        ModelTypeError: There is none, or one is no link.
        ForeignHookError: A link has the hook of Chainer.
        UninitializedWeightError: When ``link.W`` is read, which no call has
            initialized yet; also by a chain that looks whether it has to, as
            :class:`~chainer.links.LSTM` does without an input size.
        UnknownInputSizeError: Likewise, where its norm is that of a map of
            images, whose size no call has told yet.

    .. admonition:: Example

        >>> import numpy as np
        >>> import sn_function
        >>> import chainer.functions as F
        >>> import chainer.links as L
        >>> layer = L.Linear(2, 2, initialW=np.diag([4, 2])).add_hook(
        ...     sn_function.SpectralNormalization())
        >>> with sn_function.normalized(layer):
        ...     loss = F.sum(layer.W ** 2)
        ...
        >>> print('%.3f' % loss.array)
        1.250
        >>> loss.backward()
        >>> layer.W.grad.shape
        (2, 2)

    """
    _models.check_models('normalized', *models)
    foreign = [
        (path, link) for model in models
        for path, link in _models.hooked_links(model)
        if not all(isinstance(hook, SpectralNormalization)
                   for hook in _models.hooks_of(link))]
    if foreign:
        raise errors.ForeignHookError(foreign)
    scope = ReadingScope(models, SpectralNormalization)
    if not scope.has_hooks():
        warnings.warn(errors.NothingToShareWarning(
            models, 'normalized'), stacklevel=3)
    scopes.begin(scope)
    try:
        yield
    finally:
        scopes.end(scope)
        scope.restore()
