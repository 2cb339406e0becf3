"""Which weights of a model are normalized, and which ones could be."""
from __future__ import annotations

import fnmatch
from typing import Any, Iterator, NamedTuple, Sequence

import chainer
from chainer import links as L

from sn_function import errors
from sn_function._links import n_step, vector
from sn_function._links.state import LinkState
from sn_function.link_hooks import HOOKS, LocalHook, SpectralNormalization

# Links whose forward uses W, and that nothing else uses the W of.
SUPPORTED = (
    L.Linear, L.EmbedID, L.Convolution2D, L.ConvolutionND, L.Deconvolution2D,
    L.DeconvolutionND, L.DilatedConvolution2D)

# Each of its groups is a map, and the whole weight as one matrix is none.
SUPPORTED_BY_GROUP = (*SUPPORTED, L.DepthwiseConvolution2D)

# The hooks of this package, on links and on chains; and Chainer's as well.
OURS = (LocalHook,)
ALL_HOOKS = (*OURS, *HOOKS)

# A pattern, a class, a function of a path and a link, or a list of these.
Filter = Any


# Links

def is_supported(
        link: chainer.Link, weight_name: str = 'W', groups: str | None = None,
        norm: str = 'matrix') -> bool:
    """Whether the link's weight is one that a chain's hook normalizes.

    Args:
        link: The link.
        weight_name: Name of the weight.
        groups, norm: As in :class:`.link_hooks.SpectralNormalization`.

    """
    kinds = (SUPPORTED if groups is None and norm == 'matrix'
             else SUPPORTED_BY_GROUP)
    return isinstance(link, kinds) and weight_name in vars(link)


def hooks_of(link: chainer.Link) -> list[Any]:
    """Returns the hooks that normalize a weight of the link, in order."""
    return [hook for hook in link.local_link_hooks.values()
            if isinstance(hook, HOOKS)]


def is_hooked(link: chainer.Link, weight_name: str = 'W') -> bool:
    """Whether a hook normalizes that weight of the link."""
    return any(hook.weight_name == weight_name for hook in hooks_of(link))


def vector_names(link: chainer.Link) -> list[str]:
    """Returns the names of the vectors that hooks keep on the link."""
    return [name for hook in hooks_of(link)
            for name in vector.names(hook, link)]


def gamma_of(link: chainer.Link, hook: Any) -> chainer.Parameter | None:
    """Returns the gamma of a hook on the link, ours or Chainer's."""
    if not hook.use_gamma:
        return None
    name = 'gamma'
    if isinstance(hook, SpectralNormalization):
        name = LinkState.of(link, hook.weight_name).gamma_name or name
    return getattr(link, name)


def normalize_weights(link: chainer.Link, hooks: list[Any]) -> None:
    """Puts what hooks make of weights, in test mode, in their place.

    There it stays: the link is a copy, or about to lose its hooks.
    """
    with chainer.using_config('train', False), chainer.no_backprop_mode(), \
            chainer.using_device(link.device):
        for hook in hooks:
            # As in a call: the next hook may be one of the same weight.
            vars(link)[hook.weight_name] = hook.normalize_weight(link)


# Models

def check_models(function: str, *models: Any) -> None:
    """Raises an error unless these are models, at least one.

    Args:
        function: Name of what they were given to.
        models: What was given.

    """
    for model in models:
        if not isinstance(model, chainer.Link):
            raise errors.ModelTypeError(function, model)
    if not models:
        raise errors.ModelTypeError(function)


class LinkWeight(NamedTuple):
    """A weight of a link, and the hook that normalizes it, or ``None``."""

    path: str
    link: chainer.Link
    weight_name: str
    hook: Any


def weights(model: chainer.Link) -> Iterator[LinkWeight]:
    """Yields what hooks normalize, and the W of supported links without one.

    Each link counts once, with the first of its paths.
    """
    for path, link in _unique_links(model):
        hooks = hooks_of(link)
        for hook in hooks:
            yield LinkWeight(path, link, hook.weight_name, hook)
        if not hooks and is_supported(link):
            yield LinkWeight(path, link, 'W', None)


def hooked_weights(model: chainer.Link) -> Iterator[LinkWeight]:
    """Yields the weights that hooks normalize, as :func:`weights` does."""
    return (weight for weight in weights(model) if weight.hook is not None)


def hooked_links(
        model: chainer.Link, kinds: tuple[type, ...] = ALL_HOOKS,
) -> Iterator[tuple[str, chainer.Link]]:
    """Yields each link that has such a hook, once, with its first path."""
    return ((path, link) for path, link in _unique_links(model)
            if any(isinstance(hook, kinds)
                   for hook in link.local_link_hooks.values()))


def supported_links(
        model: chainer.Link, weight_name: str = 'W',
        groups: str | None = None, norm: str = 'matrix',
) -> Iterator[tuple[str, chainer.Link]]:
    """Yields each supported link under each of its paths, as filters do."""
    return ((path, link) for path, link in model.namedlinks()
            if is_supported(link, weight_name, groups, norm))


def _unique_links(
        model: chainer.Link) -> Iterator[tuple[str, chainer.Link]]:
    seen = set()
    for path, link in model.namedlinks():
        if id(link) not in seen:
            seen.add(id(link))
            yield path, link


# Filters

def check_filter(filter: Filter) -> None:
    """Raises an error unless :func:`takes` can use the filter."""
    is_list = isinstance(filter, (list, tuple))
    for one in filter if is_list else [filter]:
        if not (isinstance(one, str) or callable(one)
                or (one is None and not is_list)):
            raise errors.FilterError(one)


def filter_text(filter: Filter) -> str:
    """Returns the filter as it is written in a program."""
    if isinstance(filter, (list, tuple)):
        return f'[{", ".join(map(filter_text, filter))}]'
    return getattr(filter, '__qualname__', None) or repr(filter)


def takes(filter: Filter, path: str, link: chainer.Link) -> bool:
    """Whether the filter takes the link at that path; ``None`` takes all."""
    if filter is None:
        return True
    if isinstance(filter, (list, tuple)):
        return any(takes(one, path, link) for one in filter)
    if isinstance(filter, str):
        return fnmatch.fnmatchcase(path, filter)
    if isinstance(filter, type):
        return isinstance(link, filter)
    return bool(filter(path, link))


def excluded(
        model: chainer.Link, exclude: Filter,
        links: Sequence[tuple[str, chainer.Link]], is_strict: bool = True,
) -> set[int]:
    """Returns the ids of the links that a filter leaves out.

    A pattern or a class leaves out what is in a chain that it takes, too.

    Args:
        model: The model.
        exclude: The filter; ``None`` leaves out nothing.
        links: The links that could be chosen, with their paths in the model.
        is_strict: Whether each part of the filter has to leave out some.

    Raises:
        NothingExcludedError: A part of the filter takes none of the links.

    """
    if exclude is None:
        return set()
    chains = dict(model.namedlinks())
    found: set[int] = set()
    for one in exclude if isinstance(exclude, (list, tuple)) else [exclude]:
        taken = {
            id(link) for path, link in links if takes(one, path, link) or (
                # A function may expect a link that could be chosen.
                isinstance(one, (str, type)) and any(
                    takes(one, outer, chains[outer])
                    for outer in _paths_of_chains(path)))}
        if is_strict and not taken:
            raise errors.NothingExcludedError(model, one, links)
        found |= taken
    return found


def _paths_of_chains(path: str) -> Iterator[str]:
    """Yields the paths of the chains that a link is in, but for the model."""
    names = path.split('/')
    return ('/'.join(names[:n]) for n in range(2, len(names)))


def names_n_step_class(filter: Filter, link: chainer.Link) -> bool:
    """Whether the link is an n-step RNN whose class is in the filter."""
    if isinstance(filter, (list, tuple)):
        return any(names_n_step_class(one, link) for one in filter)
    return (isinstance(filter, type) and n_step.is_n_step_class(filter)
            and isinstance(link, filter))
