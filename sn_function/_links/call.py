"""Changes for the time of one call of a link, such as another weight.

``Link.__call__`` does not tell a hook of an exception.  So ``forward`` of the
link is shadowed, too: by one that removes itself first, and undoes the change
whatever happens.  An exception outside of it, in another hook, leaves the
change in place; it is undone when the arguments of the callback die, or when
another call of the link finds it.

A change is seen by all threads, so it is a turn: the others wait.
"""
from __future__ import annotations

import threading
from typing import Any, Callable

import chainer

from sn_function._links import turn

# In link.__dict__ during a call only: {weight name: (replacements)}, the
# outer ones first.  None of these is changed, so that another thread finds
# all or nothing of a step.
_REPLACEMENTS = '_sn_replacements'


def original(link: chainer.Link, name: str) -> Any:
    """Returns the link's own weight, also while it is being called."""
    W = vars(link).get(name)
    if W is None:
        return getattr(link, name)
    if isinstance(W, chainer.Parameter):
        return W
    # As they are at one moment: another thread may be in a call.
    attributes = link.__dict__.copy()
    stack = _stack(attributes, name)
    return stack[0].previous if stack else attributes.get(name, W)


def _stack(
        attributes: dict[str, Any], name: str) -> tuple[_Replacement, ...]:
    return attributes.get(_REPLACEMENTS, {}).get(name, ())


def replace_weight(cb_args: Any, name: str, make: Callable[[], Any]) -> None:
    """Puts another array in the place of a weight until the call ends.

    Args:
        cb_args: Arguments of the link hook's callback.
        name: Name of the weight.
        make: Makes the other one, a Variable, when no other thread is in a
            call of the link.

    """
    apply(cb_args, name, _Replacement(cb_args.link, name), make)


def restore_weight(link: chainer.Link, name: str) -> None:
    """Puts the weight back if the call did not go through ``forward``."""
    stack = _stack(link.__dict__, name)
    # By now another thread may be in a call.
    if stack and stack[-1].thread == threading.get_ident():
        stack[-1].restore_unless_called()


def apply(
        cb_args: Any, name: str, change: TemporaryChange, *args: Any) -> None:
    """Changes something until the call with these arguments ends.

    Args:
        cb_args: Arguments of the link hook's callback.
        name: Identifies the change among those of a call.
        change: The change.
        args: Passed to its method ``change``.

    """
    change.cb_args = id(cb_args)
    # Before anything changes: an interrupt may come between any two lines.
    cb_args.__dict__['_sn_finalizer_' + name] = _Finalizer(change)
    change.start(*args)


class TemporaryChange(turn.Turn):
    """A change for the time of one call of a link.

    Args:
        link: The link.

    Attributes:
        cb_args (int): The id of the arguments of the callback.

    """

    cb_args = 0
    is_called = False
    is_active = True
    shadowed: Any = None
    # Whether other threads see it until the call ends.
    is_seen = True

    def change(self) -> None:
        """Makes the change."""
        raise NotImplementedError

    def undo(self) -> None:
        """Undoes :meth:`change`; either may be interrupted, and this redone.
        """
        raise NotImplementedError

    def leave(self) -> None:
        """Is called after the link's own forward, unless that raises."""
        self.restore()

    def start(self, *args: Any) -> None:
        try:
            for earlier in self._queue.copy():
                if earlier.thread == self.thread and earlier.is_abandoned():
                    earlier.finish()
            self.begin()
            self.change(*args)
            if not _has_injected_call(self.link):
                attributes = self.link.__dict__
                self.shadowed = attributes.get('forward')
                attributes['forward'] = self.forward
            elif not self.is_seen:
                self.end()
        except BaseException:
            self.restore()
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.thread != threading.get_ident():
            # Another thread, which does not call the link but its forward.
            forward = self._shadowed() or type(self.link).forward.__get__(
                self.link)
            return forward(*args, **kwargs)
        self._unshadow()
        self.is_called = True
        try:
            if not self.is_seen:
                self.end()
            out = self.link.forward(*args, **kwargs)
        except BaseException:
            self.restore()
            raise
        self.leave()
        return out

    def _shadowed(self) -> Any:
        """What was there before this change and those that have ended."""
        shadowed = self.shadowed
        while isinstance(getattr(shadowed, '__self__', None), TemporaryChange):
            if shadowed.__self__.is_active:
                break
            shadowed = shadowed.__self__.shadowed
        return shadowed

    def _unshadow(self) -> None:
        attributes = self.link.__dict__
        if attributes.get('forward') != self.forward:
            return
        shadowed = self._shadowed()
        if shadowed is None:
            del attributes['forward']
        else:
            attributes['forward'] = shadowed

    def restore(self) -> None:
        if self.is_active:
            if not self.is_called:
                self._unshadow()
            self.undo()
            self.is_active = False
        self.end()

    def restore_unless_called(self) -> None:
        """Restores if the call did not go through ``forward``.

        A class may inject its own ``__call__``, which Chainer then prefers.
        If that raises, all is restored when the exception has been handled.

        """
        if not self.is_called:
            self.restore()

    def is_abandoned(self) -> bool:
        """Whether its call has ended, and nothing has undone the change yet.
        """
        return not turn.is_in_call(self.thread, self.cb_args)

    def finish(self) -> None:
        """Restores what is not restored yet, after the call."""
        if not self.is_active:
            self.end()
            return
        # The arguments may die in one thread while another one waits for the
        # turn; a second try of the same thread comes after an interrupt.
        thread = threading.get_ident()
        if self.__dict__.setdefault('_finished_by', thread) == thread:
            self.restore()


class _Replacement(TemporaryChange):
    """Another array in the place of a weight."""

    Y: Any = None
    previous: Any = None

    def __init__(self, link: chainer.Link, name: str) -> None:
        super().__init__(link)
        self.name = name

    def change(self, make: Callable[[], Any]) -> None:  # type: ignore
        self.Y = make()
        attributes = self.link.__dict__
        self.previous = attributes[self.name]
        stacks = attributes.get(_REPLACEMENTS, {})
        stack = (*stacks.get(self.name, ()), self)
        attributes[_REPLACEMENTS] = {**stacks, self.name: stack}
        attributes[self.name] = self.Y

    def undo(self) -> None:
        if self.previous is None:
            return
        self._put_back()
        attributes = self.link.__dict__
        stacks = dict(attributes.get(_REPLACEMENTS, ()))
        stack = tuple([x for x in stacks.pop(self.name, ()) if x is not self])
        if stack:
            stacks[self.name] = stack
        if stacks:
            attributes[_REPLACEMENTS] = stacks
        else:
            attributes.pop(_REPLACEMENTS, None)

    def _put_back(self) -> None:
        attributes = self.link.__dict__
        # A forward that gave the link a new parameter keeps it.
        if not isinstance(attributes[self.name], chainer.Parameter):
            attributes[self.name] = self.previous

    def leave(self) -> None:
        W = self.link.__dict__[self.name]
        if W is self.Y or isinstance(W, chainer.Parameter):
            self.restore()
        else:
            # Another hook has replaced it in its turn, and may put back what
            # it found: nobody else begins before that.
            self._put_back()


def _has_injected_call(link: chainer.Link) -> bool:
    # It may call forward more than once, and all of these with Y.
    # (As Chainer asks it; callable(base) is about the super object itself.)
    base = super(chainer.Link, link)
    return getattr(base, '__call__', None) is not None  # NOQA: B004


class _Finalizer:
    """Finishes a change when it dies, with the arguments of a callback."""

    def __init__(self, change: TemporaryChange) -> None:
        self.change = change

    def __del__(self) -> None:
        self.change.finish()
