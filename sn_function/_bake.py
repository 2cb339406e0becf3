"""How :func:`sn_function.bake` replaces normalized weights by plain ones."""
from __future__ import annotations

import collections
import copy
import warnings
from typing import Any, NamedTuple, TypeVar

import chainer

from sn_function import _bake_certified, _certify, errors
from sn_function._bake_certified import Certificate
from sn_function._links import n_step, vector
from sn_function._links.bypass import bypasses_hooks
from sn_function._models import (
    ALL_HOOKS,
    check_models,
    hooked_links,
    hooks_of,
    normalize_weights,
)
from sn_function.link_hooks import SpectralNormalization

Model = TypeVar('Model', bound=chainer.Link)


def bake(
        model: Model, in_place: bool, certificate: Certificate | None = None,
) -> Model:
    """See :func:`sn_function.bake`."""
    check_models('bake', model)
    hooked = list(hooked_links(model))
    for path, link in hooked:
        _check(path, link)
    if certificate is not None:
        _certify.check(*certificate)
        _check_maps(hooked)
    if not hooked:
        warnings.warn(errors.NothingToBakeWarning(model), stacklevel=3)
    if not in_place:
        model = copy.deepcopy(model)
    hooked = list(hooked_links(model))
    # All of them first: an exception leaves the model as it was.
    folded = [[] if not hooks_of(link) else _fold(link, in_place)
              if certificate is None else _certified(path, link, certificate)
              for path, link in hooked]
    for (_, link), weights in zip(hooked, folded):
        _replace(link, weights)
    for link in model.links():
        if n_step.is_n_step(link):
            n_step.collect_weights(link)
    if not in_place:
        for param in model.params():
            param.cleargrad()
            param.update_rule = None
    return model


def _check(path: str, link: chainer.Link) -> None:
    where = _where(path, link)
    if n_step.is_n_step(link) and n_step.is_in_use(link):
        raise errors.WeightInUseError(where, 'ws')
    if hooks_of(link) and bypasses_hooks(link):
        raise errors.HookBypassedError(
            [(path, link)], ', or, if it is to compute what it does now, '
            'delete the hook first with link.delete_hook(name)')
    for hook in hooks_of(link):
        W = vars(link)[hook.weight_name]
        if not isinstance(W, chainer.Parameter):
            raise errors.WeightInUseError(where, hook.weight_name)
        # Chainer's hook makes its vector in a call, even where there is a
        # weight already.
        if W.array is None or not hasattr(link, vector.names(hook, link)[0]):
            raise errors.UninitializedWeightError(where, hook.weight_name)
        if vector.shape_of(link, hook, W.shape,
                           vector.map_of(link, hook)) is None:
            raise errors.UnknownInputSizeError(where, hook.weight_name)


def _check_maps(hooked: list[tuple[str, chainer.Link]]) -> None:
    unknown = [
        f'{_where(path, link)}.{hook.weight_name}' for path, link in hooked
        for hook in hooks_of(link) if not _bake_certified.is_known(
            link, hook, vars(link)[hook.weight_name])]
    if unknown:
        raise errors.UncertifiedWeightError(unknown)


def _where(path: str, link: chainer.Link) -> str:
    return f'{type(link).__name__} {path}'


class _Folded(NamedTuple):
    name: str
    parameter: chainer.Parameter


def _fold(link: chainer.Link, is_in_use: bool) -> list[_Folded]:
    """Returns the normalized weights of a link, as parameters."""
    # A copy has no scope that may have a weight of another u in store, and
    # nothing is lost if a vector has to be made anew.
    twin = copy.deepcopy(link) if is_in_use else link
    originals = {hook.weight_name: vars(twin)[hook.weight_name]
                 for hook in hooks_of(twin)}
    normalize_weights(twin, hooks_of(twin))
    return [_Folded(name, _parameter(vars(twin)[name].array, W))
            for name, W in originals.items()]


def _certified(
        path: str, link: chainer.Link, certificate: Certificate,
) -> list[_Folded]:
    """Returns the weights of a link with certified norms, as parameters."""
    originals = {hook.weight_name: vars(link)[hook.weight_name]
                 for hook in hooks_of(link)}
    arrays = {name: W.array for name, W in originals.items()}
    for hook in hooks_of(link):
        # The next hook may be one of the same weight.
        arrays[hook.weight_name] = _bake_certified.normalize_weight(
            _where(path, link), link, hook, arrays[hook.weight_name],
            certificate)
    return [_Folded(name, _parameter(link.device.send(arrays[name]), W))
            for name, W in originals.items()]


def _parameter(array: Any, W: chainer.Parameter) -> chainer.Parameter:
    parameter = chainer.Parameter(array, name=W.name)
    parameter.initializer = W.initializer  # for copy('init') and repeat()
    return parameter


def _replace(link: chainer.Link, folded: list[_Folded]) -> None:
    """Gives the link its new weights, and removes the hooks."""
    for hook in hooks_of(link):
        if isinstance(hook, SpectralNormalization):
            hook.deleted(link)
            continue
        # What two of Chainer's hooks on one link have in common is gone with
        # the first, and its own `deleted` would fail.
        names = [*vector.names(hook, link), 'gamma']
        for name in names[:1 + bool(hook.use_gamma)]:
            if hasattr(link, name):
                delattr(link, name)
    # Not by delete_hook: copy('share') leaves two links with one dictionary.
    link._local_link_hooks = collections.OrderedDict(
        (name, hook) for name, hook in link.local_link_hooks.items()
        if not isinstance(hook, ALL_HOOKS))
    for each in folded:
        vars(link)[each.name] = each.parameter
