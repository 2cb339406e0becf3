"""What is changed for the time of one call of a link, such as its weight.

``Link.__call__`` gives a hook no word of an exception.  So the link's
``forward`` is shadowed, too, by one that undoes the change whatever happens,
and that removes itself before anything else.  What remains is an exception
between the two, in another hook: then the arguments of the callback die, and
the change is undone by that.
"""
from __future__ import annotations

from typing import Any

import chainer

# In link.__dict__ during a call only: {weight name: [exchanges, outer first]}
_STATE = '_sn_exchanges'


def original(link: chainer.Link, name: str) -> Any:
    """Returns the link's own weight, also from within a call of it."""
    stack = link.__dict__.get(_STATE, {}).get(name)
    return stack[0].previous if stack else getattr(link, name)


def exchange(cb_args: Any, name: str, Y: Any) -> None:
    """Puts ``Y`` in the place of the weight until the call ends."""
    begin(cb_args, name, _Exchange(cb_args.link, name, Y))


def restore_uncalled(link: chainer.Link, name: str) -> None:
    """Puts the weight back where the call did not go through ``forward``."""
    stack = link.__dict__.get(_STATE, {}).get(name)
    if stack:
        stack[-1].restore_uncalled()


def begin(cb_args: Any, name: str, call: Call) -> None:
    """Changes something until the call that has these arguments ends."""
    # Before anything changes: an interrupt may come between any two lines.
    cb_args.__dict__['_sn_lifeline_' + name] = _Lifeline(call)
    call.begin()


class Call:
    """Something that is changed for the time of one call of a link.

    Args:
        link: The link.

    """

    def __init__(self, link: chainer.Link) -> None:
        self.link = link
        self.is_called = False
        self.is_active = True
        self.shadowed = link.__dict__.get('forward')

    def change(self) -> None:
        """Changes it."""
        raise NotImplementedError

    def undo(self) -> None:
        """Undoes :meth:`change`; either may be interrupted, and this redone.
        """
        raise NotImplementedError

    def repair(self) -> None:
        """Does what is left to do when all is over."""
        self.restore()

    def begin(self) -> None:
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
        while isinstance(getattr(shadowed, '__self__', None), Call):
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

    def restore_uncalled(self) -> None:
        """Restores where the call did not go through ``forward``.

        A class may inject its own ``__call__``, which Chainer then prefers.
        If that raises, all is restored when the exception has been handled.

        """
        if not self.is_called:
            self.restore()


class _Exchange(Call):

    def __init__(self, link: chainer.Link, name: str, Y: Any) -> None:
        super().__init__(link)
        self.name = name
        self.Y = Y
        self.previous = link.__dict__[name]

    def change(self) -> None:
        attributes = self.link.__dict__
        attributes.setdefault(_STATE, {}).setdefault(
            self.name, []).append(self)
        attributes[self.name] = self.Y

    def undo(self) -> None:
        attributes = self.link.__dict__
        # A forward that gave the link a new parameter keeps it.
        if not isinstance(attributes[self.name], chainer.Parameter):
            attributes[self.name] = self.previous
        stacks = attributes.get(_STATE, {})
        stack = stacks.get(self.name, [])
        if self in stack:
            stack.remove(self)
        if not stack:
            stacks.pop(self.name, None)
        if not stacks:
            attributes.pop(_STATE, None)

    def repair(self) -> None:
        super().repair()
        # Another hook may have put back what it found before forward.
        attributes = self.link.__dict__
        if attributes[self.name] is self.Y:
            attributes[self.name] = self.previous


def _has_injected_call(link: chainer.Link) -> bool:
    # It may call forward more than once, and all of these with Y.
    # (In Chainer's own words: callable() would ask another question.)
    base = super(chainer.Link, link)
    return getattr(base, '__call__', None) is not None  # NOQA: B004


class _Lifeline:

    def __init__(self, call: Call) -> None:
        self.call = call

    def __del__(self) -> None:
        self.call.repair()
