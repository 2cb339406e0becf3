"""Changes for the time of one call of a link, such as another weight.

``Link.__call__`` does not tell a hook of an exception.  So ``forward`` of the
link is shadowed, too: by one that removes itself first, and undoes the change
whatever happens.  An exception outside of it, in another hook, leaves the
change in place; it is undone when the arguments of the callback die.
"""
from __future__ import annotations

from typing import Any

import chainer

# In link.__dict__ during a call only: {weight name: [replacements]}, the
# outer ones first.
_REPLACEMENTS = '_sn_replacements'


def original(link: chainer.Link, name: str) -> Any:
    """Returns the link's own weight, also from within a call of it."""
    stack = link.__dict__.get(_REPLACEMENTS, {}).get(name)
    return stack[0].previous if stack else getattr(link, name)


def replace_weight(cb_args: Any, name: str, Y: Any) -> None:
    """Puts ``Y`` in the place of a weight until the call ends."""
    apply(cb_args, name, _Replacement(cb_args.link, name, Y))


def restore_weight(link: chainer.Link, name: str) -> None:
    """Puts the weight back if the call did not go through ``forward``."""
    stack = link.__dict__.get(_REPLACEMENTS, {}).get(name)
    if stack:
        stack[-1].restore_unless_called()


def apply(cb_args: Any, name: str, change: TemporaryChange) -> None:
    """Changes something until the call with these arguments ends."""
    # Before anything changes: an interrupt may come between any two lines.
    cb_args.__dict__['_sn_finalizer_' + name] = _Finalizer(change)
    change.start()


class TemporaryChange:
    """A change for the time of one call of a link.

    Args:
        link: The link.

    """

    def __init__(self, link: chainer.Link) -> None:
        self.link = link
        self.is_called = False
        self.is_active = True
        self.shadowed = link.__dict__.get('forward')

    def change(self) -> None:
        """Makes the change."""
        raise NotImplementedError

    def undo(self) -> None:
        """Undoes :meth:`change`; either may be interrupted, and this redone.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Restores what is not restored yet, when the arguments die."""
        self.restore()

    def start(self) -> None:
        if not _has_injected_call(self.link):
            self.link.__dict__['forward'] = self.forward
        self.change()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.is_called = True
        self._unshadow()
        try:
            return self.link.forward(*args, **kwargs)
        finally:
            self.restore()

    def _unshadow(self) -> None:
        attributes = self.link.__dict__
        if attributes.get('forward') != self.forward:
            return
        shadowed = self.shadowed
        while isinstance(getattr(shadowed, '__self__', None), TemporaryChange):
            if shadowed.__self__.is_active:
                break
            shadowed = shadowed.__self__.shadowed
        if shadowed is None:
            del attributes['forward']
        else:
            attributes['forward'] = shadowed

    def restore(self) -> None:
        if not self.is_active:
            return
        self._unshadow()
        self.undo()
        self.is_active = False

    def restore_unless_called(self) -> None:
        """Restores if the call did not go through ``forward``.

        A class may inject its own ``__call__``, which Chainer then prefers.
        If that raises, all is restored when the exception has been handled.

        """
        if not self.is_called:
            self.restore()


class _Replacement(TemporaryChange):
    """Another array in the place of a weight."""

    def __init__(self, link: chainer.Link, name: str, Y: Any) -> None:
        super().__init__(link)
        self.name = name
        self.Y = Y
        self.previous = link.__dict__[name]

    def change(self) -> None:
        attributes = self.link.__dict__
        attributes.setdefault(_REPLACEMENTS, {}).setdefault(
            self.name, []).append(self)
        attributes[self.name] = self.Y

    def undo(self) -> None:
        attributes = self.link.__dict__
        # A forward that gave the link a new parameter keeps it.
        if not isinstance(attributes[self.name], chainer.Parameter):
            attributes[self.name] = self.previous
        stacks = attributes.get(_REPLACEMENTS, {})
        stack = stacks.get(self.name, [])
        if self in stack:
            stack.remove(self)
        if not stack:
            stacks.pop(self.name, None)
        if not stacks:
            attributes.pop(_REPLACEMENTS, None)

    def finish(self) -> None:
        super().finish()
        # Another hook may have put back what it found before forward.
        attributes = self.link.__dict__
        if attributes[self.name] is self.Y:
            attributes[self.name] = self.previous


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
