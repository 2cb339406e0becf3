"""What a link keeps for a hook, for one weight, beside u and gamma."""
from __future__ import annotations

import weakref
from typing import Any, Callable

import chainer

from sn_function import errors
from sn_function._arithmetic.interface import Iterations


class LinkState:
    """State of one weight, an attribute of its link.

    A copied or pickled link has its own: what it shares with the original, or
    got from a pickle, is replaced by a copy on first use.

    Attributes:
        gamma_name (str or None): Name of the link's parameter gamma.
        settings (tuple): Those of the hook, and the node's, made of them.
        has_warned (bool): Whether there was a warning of a tolerance that was
            not reached.

    """

    def __init__(
            self, weight_name: str, gamma_name: str | None,
            start: Any = None) -> None:
        self.weight_name = weight_name
        self.gamma_name = gamma_name
        self._start = start
        self._first_run: Any = None  # the iterations of the latest one
        self._latest: Any = None
        self._v_shape: Any = None
        self.settings: Any = (None, None)
        self.has_warned = False
        self._link: Callable[[], Any] = lambda: None  # a weak reference

    def put(self, link: chainer.Link) -> None:
        link.__dict__[self.key(self.weight_name)] = self
        self._link = weakref.ref(link)

    @classmethod
    def of(cls, link: chainer.Link, weight_name: str) -> LinkState:
        state = link.__dict__.get(cls.key(weight_name))
        if state is None:
            raise errors.HookNotAddedError(link, weight_name)
        if state._link() is not link:  # a copy, or unpickled
            state = _unpickle(*state.__reduce__()[1])
            state.put(link)
        return state

    @classmethod
    def remove(cls, link: chainer.Link, weight_name: str) -> None:
        del link.__dict__[cls.key(weight_name)]

    @classmethod
    def is_on(cls, link: chainer.Link, weight_name: str) -> bool:
        """Whether the link has a hook of ours for that weight."""
        return cls.key(weight_name) in link.__dict__

    @staticmethod
    def key(weight_name: str) -> str:
        """Returns the name of the link's attribute."""
        return f'_{weight_name}_sn_state'

    # Of the iterations both vectors are views, which are made on demand: on a
    # device each takes as long as half a launch.

    def keep(
            self, iterations: Iterations, is_second_run: bool,
            v_shape: tuple[int, ...] | None = None) -> None:
        """Keeps what a call found; a second run of it starts as the first.

        Args:
            iterations: What the call found.
            is_second_run: Whether it is one.
            v_shape: Shape of the right vector, unless it is that of a matrix.

        """
        self._latest = iterations
        self._v_shape = v_shape
        if not is_second_run:
            self._first_run = iterations

    @property
    def v(self) -> Any:
        """The right vector that the latest call found, or ``None``."""
        if self._latest is None:
            return None
        v = self._latest.v
        return v if self._v_shape is None else v.reshape(self._v_shape)

    @property
    def start(self) -> Any:
        """The vector that the latest call started from, or ``None``."""
        return (self._start if self._first_run is None
                else self._first_run.start)

    def forget_start(self) -> None:
        """Has the next call start from the vector of the link."""
        self._start = self._first_run = None

    def __reduce__(self) -> Any:
        return _unpickle, (self.weight_name, self.gamma_name, self.start)


def _unpickle(
        weight_name: str, gamma_name: str | None, start: Any, *_: Any,
) -> LinkState:
    """Makes a state; ignores what versions before 0.2 kept beside that."""
    return LinkState(weight_name, gamma_name, start)
