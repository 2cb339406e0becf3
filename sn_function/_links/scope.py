"""Scopes, in which each weight is normalized once; each is of its thread."""
from __future__ import annotations

import threading
from typing import Any, Iterable, Iterator, Sequence, Tuple

import chainer

from sn_function._arithmetic.interface import Iterations
from sn_function._graph import node, normalize
from sn_function._links import call, turn
from sn_function._links.hooked_weight import Hook, HookedWeight, moves_on
from sn_function._links.shared import SharedWeight

# The id of the link, and the name of the weight.
_Key = Tuple[int, str]
# Its key, the weight in two forms, and what goes into the node.
_Prepared = Tuple[_Key, SharedWeight, HookedWeight, Any]


class _Scopes(threading.local):

    def __init__(self) -> None:
        self.opened: list[Scope] = []  # outer first


_scopes = _Scopes()


def begin(scope: Scope) -> None:
    """Opens a scope."""
    scope.opened = _scopes.opened
    scope.opened.append(scope)


def end(scope: Scope) -> None:
    """Closes a scope; that it is closed already is no error."""
    # Of the thread that opened it: another one may find it abandoned.
    if scope in scope.opened:
        scope.opened.remove(scope)


def are_open() -> bool:
    """Whether this thread has open scopes."""
    return bool(_scopes.opened)


def opened() -> list[Scope]:
    """Returns the open scopes of this thread, outer first."""
    return _scopes.opened.copy()


def covering(link: chainer.Link) -> Scope | None:
    """Returns the outermost open scope that has the link, or ``None``."""
    for scope in opened():
        if id(link) in scope.links:
            return scope
    return None


class Scope:
    """Normalized weights of some links, made on first use.

    Args:
        models: The links, or chains of them.
        kind: Class of the hooks that normalize.

    Attributes:
        links (dict): The links by their ids.
        opened (list): The open scopes of the thread that opened it.

    """

    opened: Any = ()

    def __init__(
            self, models: Iterable[chainer.Link], kind: type[Hook]) -> None:
        self.links = {
            id(link): link for model in models for link in model.links()}
        self._kind: type[Hook] = kind
        self._shared: dict[_Key, SharedWeight] = {}

    def has_hooks(self) -> bool:
        """Whether any of the links has a hook of that class."""
        return any(isinstance(hook, self._kind)
                   for link in self.links.values()
                   for hook in link.local_link_hooks.values())

    def normalize(
            self, own: HookedWeight,
    ) -> tuple[chainer.Variable, Iterations, tuple[int, ...] | None]:
        """Returns the normalized weight, how it was computed, and v's shape.

        That is not ``own.v_shape`` where a map of another size was loaded.
        All other weights that can be normalized now are made, too.
        """
        key = _key(own.hook, own.link)
        if not self._has(key, own.hook, own.W):
            with chainer.using_device(own.W.device):  # a copy goes there
                try:
                    made = [self._prepare(own), *self._others(own)]
                    self._make(made)
                except Exception:
                    # Others raise theirs when they are called.
                    made = [self._prepare(own)]
                    self._make(made)
            # Outside of that: a warning may be an error.
            for *_, weight, (of_node, _) in made:
                weight.check_convergence(of_node)
        shared = self._shared[key]
        is_train, = node.config('train')
        if moves_on(own.hook, is_train):
            shared.store_u(own.link)
        return shared.Y, shared.iterations, shared.v_shape

    def _has(self, key: _Key, hook: Hook, W: chainer.Variable) -> bool:
        shared = self._shared.get(key)
        return shared is not None and shared.is_usable(hook, W)

    def _others(self, own: HookedWeight) -> Iterator[_Prepared]:
        """What else lacks a normalized weight, and can get it now."""
        device = own.W.device
        for link in self.links.values():
            if covering(link) not in (self, None):  # an outer one has it
                continue
            for hook in link.local_link_hooks.values():
                if not isinstance(hook, self._kind):
                    continue
                W = call.original(link, hook.weight_name)
                if (W is own.W and link is own.link) or W.array is None or (
                        W.device != device
                        or not isinstance(W, chainer.Parameter)):
                    continue
                if self._has(_key(hook, link), hook, W):
                    continue
                # Another thread may be moving its u.  To wait would be to
                # hold one link and want the next, as that thread may do.
                other = turn.Turn(link)
                try:
                    if other.begin(waits=False):
                        weight = HookedWeight(hook, link, W)
                        # Of unknown size, it is made in a call of its own.
                        if weight.shape is not None:
                            yield self._prepare(weight)
                finally:
                    other.end()

    def _prepare(self, weight: HookedWeight) -> _Prepared:
        u, gamma = weight.vector_and_gamma()
        new = SharedWeight(weight, gamma)
        key = _key(weight.hook, weight.link)
        old = self._shared.get(key)
        is_first = True
        # It is the same, but has no graph.
        if old is not None and old.is_of(weight.hook, weight.W) and (
                old.shape == new.shape):
            is_first = False
            u = old.iterations.start
            new.is_stored = old.is_stored
        new.u = u.copy()
        return key, new, weight, weight.for_node(
            new.u, gamma, update_u=True, is_first=is_first)

    def _make(self, weights: Sequence[_Prepared]) -> None:
        Ys = normalize.apply([x for *_, x in weights], is_shared=True)
        for Y, (key, new, _, (weight, _)) in zip(Ys, weights):
            new.Y, new.iterations = Y, weight.iterations
            self._shared[key] = new


def _key(hook: Hook, link: chainer.Link) -> _Key:
    return id(link), hook.weight_name


class ScopeOfCall(call.TemporaryChange, Scope):
    """A scope that ends with a call of a chain."""

    is_seen = False  # a scope belongs to its thread

    def __init__(self, chain: chainer.Link, kind: type[Hook]) -> None:
        call.TemporaryChange.__init__(self, chain)
        Scope.__init__(self, [chain], kind)

    def change(self) -> None:
        begin(self)

    def undo(self) -> None:
        end(self)
