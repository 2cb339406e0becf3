"""``F.forget`` runs a function twice: both must start from the same u.

Each call of a link moves its u on, so the second run, in backward, must start
from where the first did, and not from where later calls have brought u.
Chainer tells a link that it is run again (``chainer.config.in_recomputing``),
but not for which call.  The ``Forget`` node that runs it is found on the call
stack, and keeps the vectors of its first run, in their order.
"""
from __future__ import annotations

import sys
import weakref
from typing import Any, Iterator

import chainer
from chainer.functions.util.forget import Forget

_FIRST_RUN = Forget.forward.__code__
_SECOND_RUN = Forget.backward.__code__


def is_second_run() -> bool:
    return chainer.config.in_recomputing


def start_vector(link: chainer.Link, name: str, u: Any) -> Any:
    """Returns the vector that this call of the link must start from.

    Args:
        link: The link being called.
        name: Name of its vector.
        u: The vector as it is now.

    """
    config = chainer.config
    if config.in_recomputing:
        # Without a Forget node it is the latest call that is run again.
        latest = link.__dict__.get(_latest(name))
        if type(latest) is type(u) and latest.dtype == u.dtype:
            u = latest
    elif config.train:
        link.__dict__[_latest(name)] = u.copy()
    if config.in_recomputing or config._will_recompute:
        key = (id(link), name)
        nodes = []
        for node, run in _forget_nodes():
            if run is not None:
                u = _replay(node, run, key, u)
                break
            nodes.append(node)
        for node in nodes:
            _starts(node, key).append(u.copy())
    return u


def forget(link: chainer.Link, name: str) -> None:
    """Removes what this module keeps on the link."""
    link.__dict__.pop(_latest(name), None)


def _latest(name: str) -> str:
    return f'_{name}_start'


def _forget_nodes() -> Iterator[tuple[Any, Any]]:
    """``Forget`` nodes being run, innermost first, until a second run.

    Yields:
        The node, and for a second run an object that identifies it.

    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _FIRST_RUN:
            yield frame.f_locals['self'], None
        elif frame.f_code is _SECOND_RUN:
            names = frame.f_locals
            yield names['self'], names['dummy_inputs'][0]
            return
        frame = frame.f_back


def _starts(node: Any, key: Any) -> list[Any]:
    return node.__dict__.setdefault('_sn_starts', {}).setdefault(key, [])


def _replay(node: Any, run: Any, key: Any, u: Any) -> Any:
    of_run, counts = node.__dict__.get('_sn_replay', (lambda: None, {}))
    if of_run() is not run:
        counts = {}
        node.__dict__['_sn_replay'] = weakref.ref(run), counts
    k = counts[key] = counts.get(key, -1) + 1
    starts = _starts(node, key)
    return starts[k] if k < len(starts) else u
