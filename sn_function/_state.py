"""What a hook remembers of one weight of one link, beside u and gamma."""
from __future__ import annotations

import copy
import weakref
from typing import Any

import chainer
from chainer import backend


class LinkState:
    """State of one weight, an attribute of its link.

    ``link.copy('init')`` and ``link.repeat()`` copy a link with its u and then
    initialize the weight anew, without a word to hooks; that u has nothing to
    do with the new weight.  So a deep copy of the state remembers the copied
    weight's array and u, and :meth:`is_stale` compares, once.

    Attributes:
        gamma_name (str or None): Name of the link's parameter gamma.
        start (ndarray or None): The vector that the latest call in training
            started from.

    """

    def __init__(self, weight_name: str, gamma_name: str | None) -> None:
        self.weight_name = weight_name
        self.gamma_name = gamma_name
        self.start: Any = None
        self._copied: Any = None

    def put(self, link: chainer.Link) -> None:
        link.__dict__[self._key(self.weight_name)] = self
        self._link = weakref.ref(link)

    @classmethod
    def of(cls, link: chainer.Link, weight_name: str) -> LinkState:
        state = link.__dict__[cls._key(weight_name)]
        if state._link() is not link:  # a shallow copy, or unpickled
            state = copy.copy(state)
            state.put(link)
        return state

    @classmethod
    def remove(cls, link: chainer.Link, weight_name: str) -> None:
        del link.__dict__[cls._key(weight_name)]

    @staticmethod
    def _key(weight_name: str) -> str:
        return f'_{weight_name}_sn_state'

    def is_stale(self, W: Any, u: Any) -> bool:
        """Whether u was copied and the weight then initialized anew."""
        if self._copied is None:
            return False
        W_then, u_then = self._copied
        self._copied = None
        if u is None or W_then() is W or type(u) is not type(u_then):
            return False
        # Unless a snapshot was loaded after that.
        return bool(backend.get_array_module(u).array_equal(u, u_then))

    def __copy__(self) -> LinkState:
        other = LinkState(self.weight_name, self.gamma_name)
        other.start = self.start
        other._link = lambda: None  # type: ignore[assignment]
        return other

    def __deepcopy__(self, memo: Any) -> LinkState:
        other = copy.copy(self)
        other.start = copy.deepcopy(self.start, memo)
        link = self._link()
        if link is not None and id(link) in memo:
            W = copy.deepcopy(link.__dict__[self.weight_name], memo).array
            u = link.__dict__[self.weight_name + '_u']
            if W is not None and u is not None:
                other._copied = weakref.ref(W), u.copy()
            other._link = weakref.ref(memo[id(link)])
        return other

    def __reduce__(self) -> Any:
        return _unpickle, (self.weight_name, self.gamma_name, self.start)


def _unpickle(weight_name: str, gamma_name: str | None, start: Any) -> Any:
    state = LinkState(weight_name, gamma_name)
    state.start = start
    return copy.copy(state)
