"""What a link keeps for a hook, for one weight, beside u and gamma."""
from __future__ import annotations

import weakref
from typing import Any, Callable

import chainer

from sn_function import errors


class LinkState:
    """State of one weight, an attribute of its link.

    A copied or pickled link has its own: what it shares with the original, or
    got from a pickle, is replaced by a copy on first use.

    Attributes:
        gamma_name (str or None): Name of the link's parameter gamma.
        start (ndarray or None): The vector that the latest call started from.
        v (ndarray or None): The right vector that the latest call found.
        settings (tuple): Those of the hook, and the node's, made of them.

    """

    def __init__(
            self, weight_name: str, gamma_name: str | None,
            start: Any = None) -> None:
        self.weight_name = weight_name
        self.gamma_name = gamma_name
        self.start = start
        self.v: Any = None
        self.settings: Any = (None, None)
        self._link: Callable[[], Any] = lambda: None  # a weak reference

    def put(self, link: chainer.Link) -> None:
        link.__dict__[self._key(self.weight_name)] = self
        self._link = weakref.ref(link)

    @classmethod
    def of(cls, link: chainer.Link, weight_name: str) -> LinkState:
        state = link.__dict__.get(cls._key(weight_name))
        if state is None:
            raise errors.HookNotAddedError(link, weight_name)
        if state._link() is not link:  # a copy, or unpickled
            state = _unpickle(*state.__reduce__()[1])
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

    def __reduce__(self) -> Any:
        return _unpickle, (self.weight_name, self.gamma_name, self.start)


def _unpickle(
        weight_name: str, gamma_name: str | None, start: Any, *_: Any,
) -> LinkState:
    """Makes a state; ignores what versions before 0.2 kept beside that."""
    return LinkState(weight_name, gamma_name, start)
