"""``F.forget`` runs a function twice: both must start from the same u.

Each call of a link moves its u on, so the second run, in backward, must start
from the u of the first one, not from that of later calls.  Chainer tells a
link that it is run again (``chainer.config.in_recomputing``), but not for
which call.  So the ``Forget`` node that runs it is looked up on the call
stack, and keeps the vectors of its first run, in order.
"""
from __future__ import annotations

import sys
import weakref
from typing import Any, Iterator, Sequence

import chainer
from chainer.functions.util.forget import Forget

from sn_function._arithmetic.matrix import accumulator_dtype
from sn_function._links.state import LinkState

_FIRST_RUN = Forget.forward.__code__
_SECOND_RUN = Forget.backward.__code__

# By the id of a node, until that is gone: what its first run has read as
# normalized.
_reads: dict[int, set[tuple[int, str]]] = {}


def start_vector(link: chainer.Link, state: LinkState, u: Any) -> Any:
    """Returns the vector that this second run of a call must start from.

    Args:
        link: The link being called.
        state: Its state.
        u: The vector as it is now.

    """
    for node, run in _forget_nodes():
        if run is not None:
            return _replay(node, run, (id(link), state.weight_name), u)
    # Without a Forget node the latest call is run again.
    start = state.start
    is_usable = type(start) is type(u) and start.shape == u.shape and (
        start.dtype == accumulator_dtype(u.dtype))
    return start if is_usable else u


def record(link: chainer.Link, state: LinkState, start: Any) -> None:
    """Keeps the vector that a call started from, for a second run."""
    for node, run in _forget_nodes():
        if run is None:
            _starts(node, (id(link), state.weight_name)).append(start)


def first_runs() -> list[Any]:
    """Returns the ``Forget`` nodes that are being run for the first time."""
    return [node for node, run in _forget_nodes() if run is None]


def second_run() -> Any:
    """Returns the ``Forget`` node that is being run again, or ``None``."""
    if not chainer.config.in_recomputing:
        return None
    return next(
        (node for node, run in _forget_nodes() if run is not None), None)


def record_read(
        link: chainer.Link, name: str, but_for: Sequence[Any]) -> None:
    """Keeps that an attribute was read as normalized, for a second run.

    Args:
        link: The link.
        name: The attribute.
        but_for: Nodes whose functions open that scope, also when run again.

    """
    for node in first_runs():
        if node not in but_for:
            if id(node) not in _reads:
                weakref.finalize(node, _reads.pop, id(node), None)
            _reads.setdefault(id(node), set()).add((id(link), name))


def have_reads() -> bool:
    """Whether there may be second runs of calls that read it so."""
    return bool(_reads)


def was_read(link: chainer.Link, name: str) -> bool:
    """Whether this is the second run of a call that read it so."""
    return any((id(link), name) in _reads.get(id(node), ())
               for node, run in _forget_nodes() if run is not None)


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
    is_usable = k < len(starts) and starts[k].shape == u.shape
    return starts[k] if is_usable else u
