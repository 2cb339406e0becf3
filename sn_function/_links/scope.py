"""The scopes, of this thread, in which weights are normalized once."""
from __future__ import annotations

import threading
from typing import Any

import chainer


class _Scopes(threading.local):

    def __init__(self) -> None:
        self.opened: list[Any] = []  # outer first


_scopes = _Scopes()


def begin(scope: Any) -> None:
    """Opens a scope, which has ``links``, a dict of links by their ids."""
    _scopes.opened.append(scope)


def end(scope: Any) -> None:
    """Closes a scope; that it is closed already is no error."""
    # A new list: an interrupt leaves the one or the other.
    _scopes.opened = [x for x in _scopes.opened if x is not scope]


def covering(link: chainer.Link) -> Any:
    """Returns the outermost open scope that has the link, or ``None``."""
    for scope in _scopes.opened:
        if id(link) in scope.links:
            return scope
    return None
