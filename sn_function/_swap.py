"""A link's weight, exchanged for another for the time of one call.

``Link.__call__`` gives a hook no word of an exception.  So the link's
``forward`` is shadowed, too, by one that puts the weight back whatever
happens, and that removes itself before anything else.  What remains is an
exception between the two, in another hook: then the arguments of the callback
die, and the weight is put back by that.
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
    new = _Exchange(cb_args.link, name, Y)
    # Before anything changes: an interrupt may come between any two lines.
    cb_args.__dict__['_sn_lifeline_' + name] = _Lifeline(new)
    new.begin()


def restore_uncalled(link: chainer.Link, name: str) -> None:
    """Puts the weight back where the call did not go through ``forward``.

    A class may inject its own ``__call__``, which Chainer then prefers.  If
    that raises, the weight is put back when the exception has been handled.

    """
    stack = link.__dict__.get(_STATE, {}).get(name)
    if stack and not stack[-1].is_called:
        stack[-1].restore()


class _Exchange:

    def __init__(self, link: chainer.Link, name: str, Y: Any) -> None:
        self.link = link
        self.name = name
        self.Y = Y
        self.is_called = False
        self.is_active = True
        self.previous = link.__dict__[name]
        self.shadowed = link.__dict__.get('forward')

    def begin(self) -> None:
        attributes = self.link.__dict__
        attributes.setdefault(_STATE, {}).setdefault(
            self.name, []).append(self)
        if not _has_injected_call(self.link):
            attributes['forward'] = self.forward
        attributes[self.name] = self.Y

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
        while isinstance(getattr(shadowed, '__self__', None), _Exchange):
            if shadowed.__self__.is_active:
                break
            shadowed = shadowed.__self__.shadowed
        if shadowed is None:
            del attributes['forward']
        else:
            attributes['forward'] = shadowed

    def restore(self) -> None:
        """Undoes :meth:`begin`; either may be interrupted, and this redone."""
        if not self.is_active:
            return
        self._unshadow()
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
        self.is_active = False

    def repair(self) -> None:
        self.restore()
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

    def __init__(self, exchange: _Exchange) -> None:
        self.exchange = exchange

    def __del__(self) -> None:
        self.exchange.repair()
