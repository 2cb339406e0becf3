"""What a link keeps for a hook, for one weight, beside u and gamma."""
from __future__ import annotations

import copy
import weakref
from typing import Any, Callable

import chainer
import numpy
from chainer.backends import cuda

from sn_function import errors


class LinkState:
    """State of one weight, an attribute of its link.

    ``link.copy('init')`` and ``link.repeat()`` copy a link with its u and then
    initialize the weight again, which hooks are not told; that u does not
    belong to the new weight.  So a deep copy of the state remembers the weight
    and the u that were copied, until the first call, which compares.

    Attributes:
        gamma_name (str or None): Name of the link's parameter gamma.
        start (ndarray or None): The vector that the latest call started from.
        v (ndarray or None): The right vector that the latest call found.
        settings (tuple): Those of the hook, and the node's, made of them.

    """

    def __init__(self, weight_name: str, gamma_name: str | None) -> None:
        self.weight_name = weight_name
        self.gamma_name = gamma_name
        self.start: Any = None
        self.v: Any = None
        self.settings: Any = (None, None)
        self._copied: Any = None
        self._link: Callable[[], Any] = lambda: None  # a weak reference
        self._latest: Any = None

    def put(self, link: chainer.Link) -> None:
        link.__dict__[self._key(self.weight_name)] = self
        self._link = weakref.ref(link)

    @classmethod
    def of(cls, link: chainer.Link, weight_name: str) -> LinkState:
        state = link.__dict__.get(cls._key(weight_name))
        if state is None:
            raise errors.HookNotAddedError(link, weight_name)
        if state._link() is not link:  # a shallow copy, or unpickled
            state = copy.copy(state)
            state.put(link)
        return state

    @classmethod
    def remove(cls, link: chainer.Link, weight_name: str) -> None:
        del link.__dict__[cls._key(weight_name)]

    @classmethod
    def is_on(cls, link: chainer.Link, weight_name: str) -> bool:
        """Whether the link has a hook of ours for that weight."""
        return cls._key(weight_name) in link.__dict__

    @staticmethod
    def _key(weight_name: str) -> str:
        return f'_{weight_name}_sn_state'

    def watch(self, W: Any, u: Any) -> None:
        """Keeps the parameter and u, for a copy of this state.

        A shallow copy of the link shares the state, and may be copied itself
        when the link is gone.  An unpickled state does not know its link
        before the first call.

        """
        if isinstance(W, chainer.Parameter):
            self._latest = W, u

    def _present(self) -> Any:
        """Returns the present parameter and u, or ``None``."""
        link = self._link()
        if link is not None:
            self.watch(link.__dict__[self.weight_name],
                       link.__dict__[self.weight_name + '_u'])
        return self._latest

    def is_stale(self, W: Any, u: Any) -> bool:
        """Whether u was copied and the weight then got other values.

        This is true at most once.  It is false if u was changed as well, as by
        a snapshot that was loaded.

        """
        if self._copied is None:
            return False
        W_then, u_then = self._copied
        self._copied = None
        if W is W_then or u is None:
            return False
        W, W_then, u, u_then = map(
            cuda.to_cpu, (W, W_then, u, u_then))  # it may have been moved
        return _is_same(u, u_then) and not _is_same(W, W_then)

    def forget_copied(self) -> None:
        """Forgets what :meth:`is_stale` compares with."""
        self._copied = None

    def __copy__(self) -> LinkState:
        return _unpickle(*self.__reduce__()[1])

    def __deepcopy__(self, memo: Any) -> LinkState:
        other = copy.copy(self)
        other.start = copy.deepcopy(self.start, memo)
        other._copied = copy.deepcopy(self._copied, memo)
        other._latest = None
        present = self._present()
        if other._copied is None and present is not None:
            # Of the array: the owner may be another link, which shares it.
            W, u = copy.deepcopy(present[0].array, memo), present[1]
            if W is not None and u is not None:
                other._copied = W, u.copy()
        link = self._link()
        if link is not None and id(link) in memo:
            other._link = weakref.ref(memo[id(link)])
        return other

    def __reduce__(self) -> Any:
        return _unpickle, (
            self.weight_name, self.gamma_name, self.start, self._copied,
            self._present())


def _is_same(a: numpy.ndarray, b: numpy.ndarray) -> bool:
    # As array_equal with equal_nan, which came with NumPy 1.19.
    return a.shape == b.shape and bool(
        ((a == b) | ((a != a) & (b != b))).all())


def _unpickle(
        weight_name: str, gamma_name: str | None, start: Any, copied: Any,
        latest: Any = None,
) -> LinkState:
    state = LinkState(weight_name, gamma_name)
    state.start = start
    state._copied = copied
    state._latest = latest
    return state
