"""Links whose calls no hook sees, as their class has a ``__call__``.

``Link.__call__`` calls the hooks, and then ``forward``.  A class that defines
``__call__`` in the place of ``forward``, as all did before Chainer 5, hides
it.  One whose ``__call__`` goes on to ``super().__call__`` does not, nor does
one that comes after ``Link`` in the order of the bases.
"""
from __future__ import annotations

import types
from typing import Any, Iterator

import chainer


def bypasses_hooks(link: chainer.Link) -> bool:
    """Whether a call of the link surely calls no hook.

    Decided from names in the code of ``__call__``, of what it is decorated
    with, and of the methods that it uses.  Where it may reach
    ``Link.__call__``, the answer is ``False``.
    """
    cls = type(link)
    for base in cls.__mro__[:cls.__mro__.index(chainer.Link)]:
        call = vars(base).get('__call__')
        if call is None:
            continue
        if call is chainer.Link.__call__:
            return False
        names = _names(call, cls)
        if names is None:
            return False
        if '__call__' not in names:
            return True
        if 'super' not in names:
            return False  # Link.__call__(self, x) is possible
    return False


def _names(call: Any, cls: type) -> set[str] | None:
    """All names in the code of a method, and in what it uses.

    ``None`` if something is not written in Python.
    """
    found: set[str] = set()
    todo, seen = [call], set()
    while todo:
        function = todo.pop()
        if not isinstance(function, types.FunctionType):
            return None
        if function in seen:
            continue
        seen.add(function)
        names = set(_names_of_code(function.__code__))
        found |= names
        todo += _wrapped(function)
        todo += _methods(cls, names)
    return found


def _names_of_code(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):  # of getattr
            yield constant
        if isinstance(constant, types.CodeType):
            yield from _names_of_code(constant)


def _wrapped(function: types.FunctionType) -> Iterator[Any]:
    """What a decorator has put into a function."""
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # empty
            continue
        if callable(content) and not isinstance(content, type):
            yield content


def _methods(cls: type, names: set[str]) -> Iterator[types.FunctionType]:
    """The methods of these names, but for ``__call__`` and those of Link."""
    for base in cls.__mro__[:cls.__mro__.index(chainer.Link)]:
        for name in names - {'__call__'}:
            method = vars(base).get(name)
            if isinstance(method, types.FunctionType):
                yield method
