"""Turns of a link: one thread at a time replaces or moves what it has.

A weight that is replaced for one call is replaced for all threads, so the
calls of one link wait for each other.  Each link has a queue of turns, and
the thread of the first one goes on.  There is no lock that could stay locked:
each step is one operation of a list, which no other thread, interrupt or
finalizer divides.  What wakes a thread that waits is a hint only: it looks at
the queue again after a while, also for a turn that nobody will end.
"""
from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from typing import Any

import chainer

from sn_function import errors

_CALL = chainer.Link.__call__.__code__
# In seconds: how long a thread waits before it looks again.
WAIT = 0.05

# By the id of a link: a weak reference to it, and its queue.
_queues: dict[int, tuple[Any, list[Turn]]] = {}
# What each thread waits for.
_awaited: dict[int, Turn] = {}


def queue_of(link: chainer.Link) -> list[Turn]:
    """Returns the turns of a link that have begun or wait, first one first."""
    key = id(link)
    found = _queues.get(key)
    if found is None:
        # Another thread may be quicker.
        found = _queues.setdefault(key, (
            weakref.ref(link, lambda _: _queues.pop(key, None)), []))
    return found[1]


def has_turn(link: chainer.Link) -> bool:
    """Whether this thread is the one that goes on."""
    for first in queue_of(link)[:1]:
        return first.thread == threading.get_ident()
    return False


class Turn:
    """A turn of the present thread, from :meth:`begin` to :meth:`end`.

    It is a context, too.  A thread that has the turn may take further ones,
    which begin at once.

    Args:
        link: The link.

    Attributes:
        thread (int): Identifies the thread.

    """

    # A copy, such as within a copy of a link that is being called, has no
    # part in the queue.
    _queue: Any = ()
    _wake: Any = None

    def __init__(self, link: chainer.Link) -> None:
        self.link = link
        self.thread = threading.get_ident()
        self._queue = queue_of(link)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop('_queue', None)
        state.pop('_wake', None)
        return state

    def __enter__(self) -> None:
        try:
            self.begin()
        except BaseException:
            self.end()
            raise

    def __exit__(self, *_: Any) -> None:
        self.end()

    def begin(self, waits: bool = True) -> bool:
        """Joins the queue, and returns when this turn has come.

        Args:
            waits: Whether to wait for other threads, or to go without.

        Returns:
            Whether it has come; if not, there is nothing to end.

        Raises:
            DeadlockError: The turn will never come.

        """
        queue = self._queue
        if queue and self._begins_within():
            return True
        queue.append(self)
        if queue[0] is self:
            return True
        if waits:
            self._wait()
            return True
        self.end()
        return False

    def end(self) -> None:
        """Leaves the queue; that it was left already is no error."""
        queue = self._queue
        if self not in queue:
            return
        try:
            queue.remove(self)
        except ValueError:  # another thread was quicker
            return
        for first in queue[:1]:
            if first._wake is not None:
                with contextlib.suppress(RuntimeError):  # it is awake
                    first._wake.release()

    def _begins_within(self) -> bool:
        """Begins at once if this thread has the turn."""
        queue = self._queue
        if not has_turn(self.link):
            return False
        queue.insert(0, self)
        # An earlier turn of this thread may have been ended by another one,
        # as turns end with the death of an object.
        if all([turn.thread == self.thread for turn in queue[:2]]):
            return True
        self.end()
        return False

    def _wait(self) -> None:
        self._wake = threading.Lock()
        self._wake.acquire()
        _awaited[self.thread] = self
        try:
            while self._queue[0] is not self:
                if not self._wake.acquire(timeout=WAIT):
                    self._look_again()
        finally:
            _awaited.pop(self.thread, None)

    def _look_again(self) -> None:
        queue = self._queue
        first, *others = queue[:2]
        if first.thread == self.thread and not first.is_abandoned():
            # For a moment another thread was before it, and then was not: see
            # the end of `_begins_within`.
            self.end()
            if not self._begins_within():
                queue.append(self)
        # Of those that wait, one acts.
        elif others == [self] and first.is_abandoned():
            first.finish()
        elif self._waits_for_itself():
            raise errors.DeadlockError(self.link)

    def _waits_for_itself(self) -> bool:
        """Whether the first one waits, maybe by others, for this thread."""
        path: list[tuple[Turn, Turn]] = []
        waiting: Turn | None = self
        while waiting is not None:
            first, = waiting._queue[:1] or [waiting]
            if first is waiting or (waiting, first) in path:
                return False
            path.append((waiting, first))
            if first.thread == self.thread:
                # Not one after another, but all at one moment.
                return len(path) > 1 and all([
                    _awaited.get(waiting.thread) is waiting
                    and waiting._queue[:1] == [first]
                    for waiting, first in path])
            waiting = _awaited.get(first.thread)
        return False

    def is_abandoned(self) -> bool:
        """Whether the thread is gone, as after a fork."""
        return self.thread not in sys._current_frames()

    def finish(self) -> None:
        """Ends a turn that was abandoned."""
        self.end()


def is_in_call(thread: int, args: int) -> bool:
    """Whether a thread is in a call of a link.

    Args:
        thread: Identifies the thread.
        args: The id of the arguments of the callback before the call.

    """
    if thread == threading.get_ident():
        return _has_call(sys._getframe(1), args)
    for _ in range(100):
        top = sys._current_frames().get(thread)
        if top is None:
            return False
        place = top.f_lasti
        if _has_call(top, args):
            return True
        # If the thread ran on meanwhile, what was read is not one stack.
        if sys._current_frames().get(thread) is top and top.f_lasti == place:
            return False
    return True  # as far as is known


def is_calling(link: chainer.Link) -> bool:
    """Whether this thread is in a call of the link."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals['self'] is link:
            return True
        frame = frame.f_back
    return False


def _has_call(frame: Any, args: int) -> bool:
    while frame is not None:
        if frame.f_code is _CALL and args in map(
                id, frame.f_locals.values()):
            return True
        frame = frame.f_back
    return False
