"""The left singular vectors of a weight: attributes of its link.

The leading one is ``W_u``, of shape ``(m,)``.  A hook with several vectors
keeps the others in ``W_us``, of shape ``(b - 1, m)``.  The arithmetic gets all
of them as one array of shape ``(b, m)``, of which both are views until one is
replaced.  With groups each vector is that of all groups, one after another,
and ``(m,)`` is ``(G m,)``.
"""
from __future__ import annotations

from typing import Any

import chainer

from sn_function import _checks
from sn_function._arithmetic.choose import arithmetic_of, is_on_device
from sn_function._arithmetic.groups import length_of_u, most_vectors
from sn_function._arithmetic.interface import Array
from sn_function._links.weight import groups_of, output_axis


def names(hook: Any) -> list[str]:
    """Returns the names of what a hook, ours or Chainer's, keeps on a link."""
    name = hook.vector_name
    return [name, name + 's'] if getattr(hook, 'n_vectors', 1) > 1 else [name]


def count(link: chainer.Link, hook: Any, shape: tuple[int, ...]) -> int:
    """Returns how many vectors a weight of that shape has."""
    n = getattr(hook, 'n_vectors', 1)
    if n == 1:
        return 1
    return min(n, most_vectors(
        shape, output_axis(link), groups_of(link, hook)))


def find(link: chainer.Link, hook: Any, W: Array) -> Array:
    """Returns the vectors on the device and in the dtype of the weight.

    A link that has none, or too few, gets new ones.

    Args:
        link: The link.
        hook: The hook, for the names of the vectors, their number, and the
            number of iterations that new ones start with.
        W: The weight.

    Returns:
        Shape ``(m,)`` for one vector, else ``(b, m)``.  What is written there
        is what the link has.

    """
    n = count(link, hook, W.shape)
    if n == 1:
        return _find_one(link, hook, W)
    name, name_of_others = names(hook)
    u = _joined(
        getattr(link, name), getattr(link, name_of_others, None), n, W)
    if u is None:
        u = _complete(link, hook, n, W)
        _set(link, name, u[0])
        _set(link, name_of_others, u[1:])
    return u


def _complete(link: chainer.Link, hook: Any, n: int, W: Array) -> Array:
    """Returns what the link has, in a new array, and others up to ``n``."""
    u = at_hand(link, hook, W)
    n_there = 0 if u is None else len(u)
    if n_there < n:
        drawn = _draw(link, hook, W, n - n_there)
        u = drawn if u is None else _concatenate(link, u, drawn)
        warm_up(link, hook, W, u)
    return u


def _find_one(link: chainer.Link, hook: Any, W: Array) -> Array:
    name, *names_of_others = names(hook)
    found = getattr(link, name)
    if found is None:
        u = _draw(link, hook, W)
        warm_up(link, hook, W, u)
    else:
        u = _send(link, found, W)
    if u is not found:
        _set(link, name, u)
    for each in names_of_others:  # not None, which few readers of files take
        others = getattr(link, each, None)
        if others is None or len(others) > 0:
            _set(link, each, u[None][:0])
    return u


def at_hand(link: chainer.Link, hook: Any, W: Array) -> Array | None:
    """Returns those of :func:`find` that are there, or ``None``.

    The link is left as it is.
    """
    u = getattr(link, hook.vector_name, None)
    if u is None:
        return None
    u = _send(link, u, W)
    n = count(link, hook, W.shape)
    if n == 1:
        return u
    others = getattr(link, names(hook)[1], None)
    if others is None or others.shape[1:] != u.shape:
        return u[None]
    return _concatenate(link, u[None], _send(link, others, W)[:n - 1])


def store(link: chainer.Link, hook: Any, u: Array) -> None:
    """Overwrites what :func:`find` has returned, or returns from now on."""
    parts = [u] if u.ndim == 1 else [u[0], u[1:]]
    for name, x in zip(names(hook), parts):
        put(link, name, x)


def put(link: chainer.Link, name: str, x: Array | None) -> None:
    """Overwrites one attribute, in place where it fits, as links may share it.
    """
    old = getattr(link, name, None)
    if x is None or old is None or (old.shape, old.dtype) != (
            x.shape, x.dtype):
        _set(link, name, None if x is None else link.device.send(x))
    elif type(old) is type(x):  # copyto takes longer to find that out
        old[...] = x
    else:
        chainer.backend.copyto(old, x)


def is_sound(u: Array | None) -> bool:
    """Whether vectors, if any, are finite and none is zero."""
    if u is None:
        return True
    xp = chainer.backend.get_array_module(u)
    return bool(xp.isfinite(u).all() and u.any(axis=-1).all())


def _joined(
        u: Array | None, others: Array | None, n: int, W: Array,
) -> Array | None:
    """Returns the array that both are the rows of, if there is one."""
    if u is None or others is None:
        return None
    base = u.base
    if type(base) is type(W) and base.shape == (n, *u.shape) and (
            base.dtype == u.dtype == others.dtype == W.dtype
            and others.shape == (n - 1, *u.shape)
            and base.flags.c_contiguous and u.flags.c_contiguous
            and others.flags.c_contiguous and _place(u) == _place(base)
            and _place(others) == _place(base) + u.nbytes):
        return base
    return None


def _place(x: Array) -> int:
    """Returns where in memory an array begins."""
    return x.data.ptr if is_on_device(x) else (
        x.__array_interface__['data'][0])


def _send(link: chainer.Link, u: Array, W: Array) -> Array:
    if u.dtype == W.dtype and type(u) is type(W):
        return u
    # A snapshot loaded before the first call, or a new dtype of W.
    with chainer.using_device(link.device):
        return link.device.send(u).astype(W.dtype, copy=False)


def _concatenate(link: chainer.Link, *us: Array) -> Array:
    with chainer.using_device(link.device):
        return link.xp.ascontiguousarray(link.xp.concatenate(us))


def _draw(link: chainer.Link, hook: Any, W: Array, *n: int) -> Array:
    _checks.check_weight(W)
    length = length_of_u(W.shape, output_axis(link), groups_of(link, hook))
    with chainer.using_device(link.device):
        return link.xp.random.normal(size=(*n, length)).astype(W.dtype)


def _set(link: chainer.Link, name: str, x: Array | None) -> None:
    setattr(link, name, x)
    if name not in link._persistent:  # the hook has more vectors than it had
        link.register_persistent(name)


def warm_up(link: chainer.Link, hook: Any, W: Array, u: Array) -> None:
    """Moves new vectors on, in place, as the hook asks for.

    Raises:
        VectorValueError: One is zero or not finite.

    """
    if hook.n_warmup > 0:
        with chainer.using_device(link.device):
            arithmetic_of(W).warm_up(
                W, u, output_axis(link), hook.n_warmup, groups_of(link, hook),
                hook.rtol)
