"""A normalized weight that several calls use, and until when they may."""
from __future__ import annotations

from typing import Any

import chainer

from sn_function._arithmetic.interface import Array, Iterations
from sn_function._graph import node
from sn_function._links import vector
from sn_function._links.hooked_weight import Hook, HookedWeight


class SharedWeight:
    """A normalized weight that several calls use, and the next ``u``.

    Args:
        own: The weight, and the hook that normalizes it.
        gamma: Its factor, if any.

    Attributes:
        shape (tuple of int or None): Of one vector, as the link keeps it.
        v_shape (tuple of int or None): Of a right vector, as the hook shows
            it, if not ``(n,)``.
        Y (Variable): The normalized weight.
        iterations: How it was computed.
        u (ndarray): The vector after that.
        is_stored (bool): Whether the link has that vector.

    """

    Y: chainer.Variable
    iterations: Iterations
    u: Array

    def __init__(
            self, own: HookedWeight,
            gamma: chainer.Parameter | None) -> None:
        self.hook, self.W, self.gamma = own.hook, own.W, gamma
        self.shape, self.v_shape = own.shape, own.v_shape
        self.is_stored = False
        self.has_graph, = node.config('enable_backprop')
        self._of_W, self._of_gamma = _version(own.W), _version(gamma)

    def is_of(self, hook: Hook, W: chainer.Variable) -> bool:
        """Whether the hook made it from the weight as it is now."""
        return hook is self.hook and W is self.W and (
            _is_at(W, self._of_W) and _is_at(self.gamma, self._of_gamma))

    def is_usable(self, hook: Hook, W: chainer.Variable) -> bool:
        """Whether a call may use it, now and as Chainer is configured."""
        wants_graph, = node.config('enable_backprop')
        if wants_graph and not (
                self.has_graph and self.Y.creator_node is not None):
            return False
        return self.is_of(hook, W)

    def store_u(self, link: chainer.Link) -> None:
        """Moves the link's vector on, once."""
        if self.is_stored:
            return
        vector.store(
            link, self.hook, self.u.astype(self.W.dtype, copy=False),
            self.shape)
        self.is_stored = True


def _version(x: chainer.Variable | None) -> tuple[Any, Any]:
    """The array, and how often an optimizer has updated it."""
    if x is None:
        return None, None
    rule = getattr(x, 'update_rule', None)
    return x.array, rule and rule.t


def _is_at(x: chainer.Variable | None, version: tuple[Any, Any]) -> bool:
    array, t = _version(x)
    return array is version[0] and t == version[1]
