"""Shipping: a plain model that computes what a normalized one does.

Training needs the raw weight, ``u`` and gamma; a model that is only run needs
none of them.
"""
from __future__ import annotations

import collections
import copy
from typing import Any, NamedTuple, TypeVar

import chainer

from sn_function import errors
from sn_function._models import ALL_HOOKS, hooked_links
from sn_function._models import OURS as OURS
from sn_function._models import hooks_of as _hooks
from sn_function.link_hooks import SpectralNormalization

Model = TypeVar('Model', bound=chainer.Link)


def bake(model: Model, in_place: bool = False) -> Model:
    """Returns a model without hooks that has the normalized weights.

    The weight of every link that has a :class:`SpectralNormalization`, of its
    own or by a :class:`ChainSpectralNormalization`, or Chainer's hook, becomes
    what that hook makes of it in test mode, and the hook, ``u`` and gamma are
    gone.  So the outputs are those of the hooked model with
    ``chainer.config.train`` false, bit for bit; snapshots are those of a model
    that never had a hook; and :mod:`onnx_chainer` can export it.

    * The baked weight is a new parameter of the same dtype on the same device,
      without a gradient.  A weight that two links share becomes one for each,
      as each has a ``u`` of its own.
    * A copy is left without the update rules and gradients of training.  A
      model that is baked in place needs ``optimizer.setup(model)`` before it
      is trained again: the optimizer knows the raw weights and gammas.
    * Hooks of other kinds stay.  One that changes the weight, too, changes the
      baked one from now on.
    * A NaN in a weight stays in the baked one.
    * There is no way back: keep the snapshot of the hooked model.

    Args:
        model (~chainer.Link): A link or a chain, with hooks or without.
        in_place (bool): Change this model, instead of a deep copy of it.

    Returns:
        ~chainer.Link: The baked model: a copy, or ``model`` itself.

    Raises:
        UninitializedWeightError: A link that has a hook was never called.
            Nothing has been changed, as with each of these errors.
        WeightInUseError: It is called within a call of the model.
        ValueError: Chainer cannot copy a :class:`~chainer.Sequential` that
            has a lambda: give it a named function, or bake in place.

    .. admonition:: Example

        >>> import numpy as np
        >>> import chainer
        >>> import chainer.links as L
        >>> import sn_function
        >>> layer = L.Linear(4, 3).add_hook(
        ...     sn_function.SpectralNormalization(use_gamma=True))
        >>> plain = sn_function.bake(layer)
        >>> sorted(name for name, _ in plain.namedparams())
        ['/W', '/b']
        >>> x = np.ones((1, 4), np.float32)
        >>> with chainer.using_config('train', False):
        ...     bool((plain(x).array == layer(x).array).all())
        True

    """
    for path, link in hooked_links(model):
        _check(path, link)
    if not in_place:
        model = copy.deepcopy(model)
        for param in model.params():
            param.cleargrad()
            param.update_rule = None
    links = [link for _, link in hooked_links(model)]
    # All of them first: an exception leaves the model as it was.
    folded = [_fold(link, in_place) if _hooks(link) else [] for link in links]
    for link, weights in zip(links, folded):
        _replace(link, weights)
    return model


def _check(path: str, link: chainer.Link) -> None:
    where = f'{type(link).__name__} {path}'
    for hook in _hooks(link):
        W = getattr(link, hook.weight_name)
        if not isinstance(W, chainer.Parameter):
            raise errors.WeightInUseError(where, hook.weight_name)
        # Chainer's hook makes its vector in a call, even where there is a
        # weight already.
        if W.array is None or not hasattr(link, hook.vector_name):
            raise errors.UninitializedWeightError(where, hook.weight_name)


class _Folded(NamedTuple):
    name: str
    parameter: chainer.Parameter


def _fold(link: chainer.Link, is_in_use: bool) -> list[_Folded]:
    """Returns the normalized weights of a link, as parameters."""
    # A copy has no scope that may have a weight of another u in store, and
    # nothing is lost if a vector has to be made anew.
    twin = copy.deepcopy(link) if is_in_use else link
    originals = {hook.weight_name: vars(twin)[hook.weight_name]
                 for hook in _hooks(twin)}
    with chainer.using_config('train', False), chainer.no_backprop_mode(), \
            chainer.using_device(twin.device):
        for hook in _hooks(twin):
            # As in a call: the next hook may be one of the same weight.
            vars(twin)[hook.weight_name] = hook.normalize_weight(twin)
    return [_Folded(name, _parameter(vars(twin)[name].array, W))
            for name, W in originals.items()]


def _parameter(array: Any, W: chainer.Parameter) -> chainer.Parameter:
    parameter = chainer.Parameter(array, name=W.name)
    parameter.initializer = W.initializer  # for copy('init') and repeat()
    return parameter


def _replace(link: chainer.Link, folded: list[_Folded]) -> None:
    """Gives the link its new weights, and removes the hooks."""
    for hook in _hooks(link):
        if isinstance(hook, SpectralNormalization):
            hook.deleted(link)
            continue
        # What two of Chainer's hooks on one link have in common is gone with
        # the first, and its own `deleted` would fail.
        for name in [hook.vector_name, 'gamma'][:1 + bool(hook.use_gamma)]:
            if hasattr(link, name):
                delattr(link, name)
    # Not by delete_hook: copy('share') leaves two links with one dictionary.
    link._local_link_hooks = collections.OrderedDict(
        (name, hook) for name, hook in link.local_link_hooks.items()
        if not isinstance(hook, ALL_HOOKS))
    for each in folded:
        vars(link)[each.name] = each.parameter
