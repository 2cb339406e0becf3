"""Whole models: a hook for a chain, and a scope that shares what it computed.

Both normalize many weights in one node of the graph, which a small weight
notices, and each weight once, however often its link is called.
"""
from __future__ import annotations

import contextlib
import uuid
from typing import Any, Iterable, Iterator

import chainer

from sn_function import _models, errors
from sn_function._graph import node
from sn_function._graph import normalize as _nodes
from sn_function._links import call
from sn_function._links import scope as _scope
from sn_function._links.state import LinkState
from sn_function.link_hooks import LocalHook, SpectralNormalization


@contextlib.contextmanager
def cached(*models: chainer.Link) -> Iterator[None]:
    """A scope in which each weight is normalized once, and u advances once.

    A step of a GAN calls its discriminator two or three times, with the same
    weights.  Within this scope all calls of a link that has a
    :class:`SpectralNormalization` use one normalized weight, the same
    Variable: the first call makes it, for all links of the models at once, in
    one node of the graph.  The gradients of all calls meet there, so one
    backward of the sum of the losses goes through the normalization once.

    * ``u`` advances when a link is first called in training mode; a call in
      test mode uses the same weight as the others.
    * When an optimizer has updated a weight (or gamma), or its array was
      replaced, the next call normalizes it anew.  Another change in place,
      such as ``link.W.array[...] = 0``, is not noticed before the scope ends.
    * What was made under :func:`chainer.no_backprop_mode` has no graph; a
      call that wants one makes it again, from the same ``u``.
    * :meth:`~chainer.Variable.unchain_backward` leaves a normalized weight
      connected with its parameter, as other calls share it.
    * Of scopes within one another the outer one counts, for the models that
      it has.  A scope is one of its thread.
    * A second run by :func:`chainer.functions.forget` starts from the ``u``
      that the first one started from, in the scope or after it.

    Args:
        models (~chainer.Link): Links or chains.

    .. admonition:: Example

        >>> import numpy as np
        >>> import sn_function
        >>> import chainer.links as L
        >>> x = np.ones((1, 4), np.float32)
        >>> layer = L.Linear(4, 3).add_hook(
        ...     sn_function.SpectralNormalization())
        >>> with sn_function.cached(layer):
        ...     loss = (layer(x) - layer(-x)).array.sum()  # normalizes once

    """
    scope = _Scope(*models)
    _scope.begin(scope)
    try:
        yield
    finally:
        _scope.end(scope)


class ChainSpectralNormalization(LocalHook):
    """Normalizes the weights of all links of a chain in each call of it.

    Adds a :class:`~sn_function.SpectralNormalization` to every link in the
    chain that it supports: :class:`~chainer.links.Linear`,
    :class:`~chainer.links.EmbedID`, the convolutions and the deconvolutions.
    When the chain is called, all these weights are normalized in one node of
    the graph; a link that the chain calls twice uses the same normalized
    weight twice.  Otherwise it is the same as a hook on each link: the same
    numbers, the same snapshots, also when a link is called by itself.  A call
    of the chain is a scope like :func:`cached`.

    Links that have such a hook for that weight already keep theirs; those that
    are put into the chain later have none.  :meth:`~chainer.Link.delete_hook`
    removes what it has added.

    Args:
        filter (str, type, callable, list or None): Which links: a pattern
            of their paths in the chain, such as ``'/block*/conv?'``, with the
            wildcards of :mod:`fnmatch`, where ``*`` also stands for slashes; a
            class; a function that is called with the path and the link; or a
            list of these, for links that any of them takes.  ``None`` takes
            every supported link.  A function must be one of a module if the
            chain is to be pickled.
        name (str or None): Name of this hook,
            ``'ChainSpectralNormalization'`` if ``None``.
        **settings: Arguments of :class:`~sn_function.SpectralNormalization`
            for the links.

    Attributes:
        hook (SpectralNormalization): The hook on the links.

    Raises:
        SpectralNormalizationError: One of :mod:`sn_function.errors`; from
            :meth:`~chainer.Link.add_hook`, which then leaves the chain as it
            was, where no link is found.

    .. admonition:: Example

        >>> import chainer
        >>> import sn_function
        >>> import chainer.links as L
        >>> model = chainer.Sequential(
        ...     L.Linear(4, 3), chainer.functions.relu, L.Linear(3, 1))
        >>> hook = sn_function.ChainSpectralNormalization(
        ...     filter=lambda path, link: path != '/1', detach_uv=True)
        >>> _ = model.add_hook(hook)
        >>> [path for path, link in model.namedlinks()
        ...  if hasattr(link, 'W_u')]
        ['/0']

    """

    name = 'ChainSpectralNormalization'

    def __init__(
            self, filter: _models.Filter = None, name: str | None = None,
            **settings: Any) -> None:
        _models.check_filter(filter)
        self.filter = filter
        self.hook = _HookOfLink(**settings)
        if name is not None:
            self.name = name

    def added(self, chain: chainer.Link) -> None:
        """Adds the hook to the links."""
        done: list[chainer.Link] = []
        try:
            for link in self._links(chain):
                link.add_hook(self.hook)
                done.append(link)
            if not done:
                raise errors.NoLinkError(chain, self.hook.weight_name)
        except BaseException:
            for link in done:
                link.delete_hook(self.hook.name)
            # Link.add_hook registers the hook before it calls this.
            del chain.local_link_hooks[self.name]
            raise

    def _links(self, chain: chainer.Link) -> list[chainer.Link]:
        weight_name = self.hook.weight_name
        found = {  # once each: a link may have several paths
            id(link): link for path, link
            in _models.supported_links(chain, weight_name)
            if not LinkState.is_on(link, weight_name)
            and self.accepts(path, link)}
        return list(found.values())

    def accepts(self, path: str, link: chainer.Link) -> bool:
        """Returns whether the filter takes the link at that path."""
        return _models.takes(self.filter, path, link)

    def deleted(self, chain: chainer.Link) -> None:
        """Deletes the hook from the links."""
        for link in chain.links():
            hook = link.local_link_hooks.get(self.hook.name)
            if getattr(hook, 'key', None) == self.hook.key:
                link.delete_hook(self.hook.name)

    def forward_preprocess(self, cb_args: Any) -> None:
        """Opens the scope, unless this call is in one, or a second run."""
        chain = cb_args.link
        if _scope.covering(chain) is None and (
                not chainer.config.in_recomputing):
            call.begin(cb_args, self.name, _ScopeOfCall(chain))

    def forward_postprocess(self, cb_args: Any) -> None:
        """Sees to it that the scope is closed."""
        scope = _scope.covering(cb_args.link)
        if isinstance(scope, _ScopeOfCall) and scope.link is cb_args.link:
            scope.restore_uncalled()


class _HookOfLink(SpectralNormalization):
    """Knows its own copies, which each copy of a link has one of."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.key = uuid.uuid4().hex


class _Scope:
    """Normalized weights of some links, made on first use.

    Attributes:
        links (dict): The links by their ids.

    """

    def __init__(self, *models: chainer.Link) -> None:
        self.links = {
            id(link): link for model in models for link in model.links()}
        self._shared: dict[tuple[int, str], _Shared] = {}

    def normalize(
            self, hook: SpectralNormalization, link: chainer.Link,
            W: chainer.Variable) -> tuple[chainer.Variable, Any]:
        """Returns the normalized weight, and how it was computed."""
        if not self._has(hook, link, W):
            own = hook, link, W
            try:
                self._make([own, *self._others(own)])
            except Exception:
                self._make([own])  # of others it will be told in their turn
        shared = self._shared[id(link), hook.weight_name]
        is_train, = node.config('train')
        if is_train:
            shared.store_u(link)
        return shared.Y, shared.it

    def _has(
            self, hook: SpectralNormalization, link: chainer.Link,
            W: chainer.Variable) -> bool:
        shared = self._shared.get((id(link), hook.weight_name))
        return shared is not None and shared.is_usable(hook, W)

    def _others(self, own: Any) -> Iterator[Any]:
        """What else lacks a normalized weight, and can get it now."""
        device = own[2].device
        for link in self.links.values():
            for hook in link.local_link_hooks.values():
                if not isinstance(hook, SpectralNormalization):
                    continue
                W = call.original(link, hook.weight_name)
                if (W is own[2] and link is own[1]) or W.array is None or (
                        W.device != device
                        or not isinstance(W, chainer.Parameter)):
                    continue
                if not self._has(hook, link, W):
                    yield hook, link, W

    def _make(self, members: Iterable[Any]) -> None:
        made = []
        weights = []
        for hook, link, W in members:
            key = id(link), hook.weight_name
            state = LinkState.of(link, hook.weight_name)
            gamma, u = hook._gamma_and_vector(link, W, state)
            new = _Shared(hook, W, gamma)
            old = self._shared.get(key)
            if old is not None and old.is_of(hook, W):  # but has no graph
                u = old.it.start
                new.is_stored = old.is_stored
            new.u = u.copy()
            made.append((key, new))
            weights.append(hook._make_weight(
                link, W, state, gamma, new.u, True))
        for (key, new), (weight, _), (Y,) in zip(
                made, weights, _nodes.normalize(weights, is_shared=True)):
            new.Y, new.it = Y, weight.iterations
            self._shared[key] = new


class _Shared:
    """A normalized weight that several calls share, and the next ``u``."""

    Y: chainer.Variable
    it: Any
    u: Any

    def __init__(
            self, hook: SpectralNormalization, W: chainer.Variable,
            gamma: chainer.Parameter | None) -> None:
        self.hook, self.W, self.gamma = hook, W, gamma
        self.is_stored = False
        self.has_graph, = node.config('enable_backprop')
        self._versions = [_version(x) for x in (W, gamma)]

    def is_of(self, hook: SpectralNormalization, W: chainer.Variable) -> bool:
        """Whether the hook made it from the weight as it is now."""
        return hook is self.hook and W is self.W and all(
            array is version[0] and t == version[1] for version, (array, t)
            in zip(self._versions, map(_version, (W, self.gamma))))

    def is_usable(
            self, hook: SpectralNormalization, W: chainer.Variable) -> bool:
        wants_graph, = node.config('enable_backprop')
        if wants_graph and not (
                self.has_graph and self.Y.creator_node is not None):
            return False
        return self.is_of(hook, W)

    def store_u(self, link: chainer.Link) -> None:
        """Moves the link's vector on, once."""
        if self.is_stored:
            return
        u = getattr(link, self.hook.vector_name)
        if u is None:
            setattr(link, self.hook.vector_name,
                    self.u.astype(self.W.dtype, copy=False))
        else:
            u[...] = self.u
        self.is_stored = True


def _version(x: chainer.Variable | None) -> tuple[Any, Any]:
    """The array, and how often an optimizer has updated it."""
    if x is None:
        return None, None
    rule = getattr(x, 'update_rule', None)
    return x.array, rule and rule.t


class _ScopeOfCall(call.Call, _Scope):
    """A scope that ends with a call of a chain."""

    def __init__(self, chain: chainer.Link) -> None:
        call.Call.__init__(self, chain)
        _Scope.__init__(self, chain)

    def change(self) -> None:
        _scope.begin(self)

    def undo(self) -> None:
        _scope.end(self)
