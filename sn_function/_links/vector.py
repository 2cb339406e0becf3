"""The left singular vectors of a weight: attributes of its link.

The leading one is ``W_u``, of shape ``(m,)``.  A hook with several vectors
keeps the others in ``W_us``, of shape ``(b - 1, m)``.  The arithmetic gets all
of them as one array of shape ``(b, m)``, of which both are views until one is
replaced.  With groups each vector is that of all groups, one after another,
and ``(m,)`` is ``(G m,)``.

Where the norm is that of a map of images, the leading one is ``W_map``, of the
shape of an input, ``(c_in, *insize)``: so it tells the size, which nothing
else keeps.  The others are ``W_maps``.  The arithmetic gets them flat.
"""
from __future__ import annotations

import math
from typing import Any, Sequence

import chainer

from sn_function import _checks
from sn_function._arithmetic.choose import arithmetic_of, is_on_device
from sn_function._arithmetic.convolution import Convolution
from sn_function._arithmetic.groups import length_of_u, most_vectors
from sn_function._arithmetic.interface import Array
from sn_function._links.weight import (
    axis_of,
    check_map,
    convolution_of,
    groups_of,
    is_map,
)


def names(hook: Any, link: chainer.Link) -> list[str]:
    """Returns the names of what a hook, ours or Chainer's, keeps on a link."""
    name = hook.weight_name + ('_map' if is_map(link, hook) else '_u')
    return [name, name + 's'] if getattr(hook, 'n_vectors', 1) > 1 else [name]


def optional_names(hook: Any, link: chainer.Link) -> list[str]:
    """Returns those that a snapshot may lack: all but ``W_u``."""
    return names(hook, link)[0 if is_map(link, hook) else 1:]


def map_of(
        link: chainer.Link, hook: Any,
        insize: int | Sequence[int] | None = None,
) -> Convolution | None:
    """Returns the map whose norm a hook takes, if that is not the weight's.

    Args:
        link: The link.
        hook: The hook.
        insize: Size of the images, where neither the link's vector nor the
            hook says one.

    Returns:
        The map, whose ``insize`` is ``None`` if nothing says it; and ``None``
        if the norm is that of the weight as a matrix.

    """
    if not is_map(link, hook):
        return None
    convolution = convolution_of(link)
    if convolution is None:
        return None
    ndim = len(convolution.stride)
    u = getattr(link, names(hook, link)[0], None)
    given = insize if hook.insize is None else hook.insize
    size: tuple[int, ...] | None = None
    if u is not None and u.ndim == ndim + 1:
        size = u.shape[1:]
    elif given is not None:
        size = _checks.as_insize(given, type(link).__name__, ndim)
    return convolution._replace(insize=size)


def shape_of(
        link: chainer.Link, hook: Any, shape: tuple[int, ...],
        convolution: Convolution | None = None) -> tuple[int, ...] | None:
    """Returns the shape of one vector, as the link keeps it.

    Args:
        link: The link.
        hook: The hook.
        shape: Shape of the weight.
        convolution: What :func:`map_of` returns.

    Returns:
        ``None`` if it depends on a size of images that is not known.

    """
    if convolution is None:
        return length_of_u(
            shape, axis_of(link, hook, len(shape)), groups_of(link, hook)),
    return convolution.insize and convolution.in_shape(shape)


def count(
        link: chainer.Link, hook: Any, shape: tuple[int, ...],
        convolution: Convolution | None = None) -> int:
    """Returns how many vectors a weight of that shape has."""
    n = getattr(hook, 'n_vectors', 1)
    if n == 1:
        return 1
    if convolution is not None:
        return min(n, convolution.most_vectors(
            shape, groups_of(link, hook)))
    return min(n, most_vectors(
        shape, axis_of(link, hook, len(shape)), groups_of(link, hook)))


def find(
        link: chainer.Link, hook: Any, W: Array,
        convolution: Convolution | None = None) -> Array:
    """Returns the vectors on the device and in the dtype of the weight.

    A link that has none, or too few, gets new ones.

    Args:
        link: The link.
        hook: The hook, for the names of the vectors, their number, and the
            number of iterations that new ones start with.
        W: The weight.
        convolution: The map whose norm is wanted, with ``insize``, if that is
            not the weight as a matrix.

    Returns:
        Shape ``(m,)`` for one vector, else ``(b, m)``.  What is written there
        is what the link has.

    """
    n = count(link, hook, W.shape, convolution)
    if n == 1:
        return _find_one(link, hook, W, convolution)
    name, name_of_others = names(hook, link)
    u = _joined(getattr(link, name, None),
                getattr(link, name_of_others, None), n, W)
    if u is None:
        u = _complete(link, hook, n, W, convolution)
        shape = shape_of(link, hook, W.shape, convolution) or ()
        _set(link, name, u[0].reshape(shape))
        _set(link, name_of_others, u[1:].reshape(-1, *shape))
    return u


def _complete(
        link: chainer.Link, hook: Any, n: int, W: Array,
        convolution: Convolution | None) -> Array:
    """Returns what the link has, in a new array, and others up to ``n``."""
    u = at_hand(link, hook, W, convolution)
    n_there = 0 if u is None else len(u)
    if n_there < n:
        drawn = _draw(link, hook, W, convolution, n - n_there)
        u = drawn if u is None else _concatenate(link, u, drawn)
        warm_up(link, hook, W, u, convolution)
    return u


def _find_one(
        link: chainer.Link, hook: Any, W: Array,
        convolution: Convolution | None) -> Array:
    name, *names_of_others = names(hook, link)
    found = getattr(link, name, None)
    if found is None:
        u = _draw(link, hook, W, convolution)
        warm_up(link, hook, W, u, convolution)
        u = u.reshape(shape_of(link, hook, W.shape, convolution))
    else:
        u = _send(link, found, W)
    if u is not found:
        _set(link, name, u)
    for each in names_of_others:  # not None, which few readers of files take
        others = getattr(link, each, None)
        if others is None or len(others) > 0:
            _set(link, each, u[None][:0])
    return u if u.ndim == 1 else _flat(u, 1)


def at_hand(
        link: chainer.Link, hook: Any, W: Array,
        convolution: Convolution | None = None) -> Array | None:
    """Returns those of :func:`find` that are there, or ``None``.

    The link is left as it is.
    """
    name, *names_of_others = names(hook, link)
    u = getattr(link, name, None)
    if u is None:
        return None
    shape = u.shape
    u = _flat(_send(link, u, W), 1)
    n = count(link, hook, W.shape, convolution)
    if n == 1:
        return u
    others = getattr(link, names_of_others[0], None)
    if others is None or others.shape[1:] != shape:
        return u[None]
    others = _flat(_send(link, others, W)[:n - 1], 2)
    return _concatenate(link, u[None], others)


def _flat(u: Array, ndim: int) -> Array:
    """Returns vectors as the arithmetic takes them, ``(m,)`` or ``(b, m)``."""
    return u if u.ndim == ndim else u.reshape(
        *u.shape[:ndim - 1], math.prod(u.shape[ndim - 1:]))


def store(
        link: chainer.Link, hook: Any, u: Array,
        shape: tuple[int, ...] | None = None) -> None:
    """Overwrites what :func:`find` has returned, or returns from now on.

    Args:
        link: The link.
        hook: The hook.
        u: Shape ``(m,)`` or ``(b, m)``.
        shape: Of one vector, as the link keeps it, if not ``(m,)``.

    """
    parts = [u] if u.ndim == 1 else [u[0], u[1:]]
    for k, (name, x) in enumerate(zip(names(hook, link), parts)):
        put(link, name, x if shape is None else x.reshape(
            *x.shape[:k], *shape))


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


def unsound_names(hook: Any, link: chainer.Link) -> list[str]:
    """Returns the names of those that are not finite, or hold a zero one."""
    found = []
    for ndim, name in enumerate(names(hook, link), 1):
        u = getattr(link, name, None)
        if u is None:
            continue
        u = _flat(u, ndim)
        xp = chainer.backend.get_array_module(u)
        if not (xp.isfinite(u).all() and u.any(axis=-1).all()):
            found.append(name)
    return found


def _joined(
        u: Array | None, others: Array | None, n: int, W: Array,
) -> Array | None:
    """Returns the array that both are the rows of, if there is one."""
    if u is None or others is None:
        return None
    base = u.base
    if type(base) is type(W) and base.size == n * u.size and (
            base.dtype == u.dtype == others.dtype == W.dtype
            and others.shape == (n - 1, *u.shape)
            and base.flags.c_contiguous and u.flags.c_contiguous
            and others.flags.c_contiguous and _place(u) == _place(base)
            and _place(others) == _place(base) + u.nbytes):
        return base if base.ndim == 2 else base.reshape(n, u.size)
    return None


def _place(x: Array) -> int:
    """Returns where in memory an array begins."""
    return x.data.ptr if is_on_device(x) else (
        x.__array_interface__['data'][0])


def _send(link: chainer.Link, u: Array, W: Array) -> Array:
    if u.dtype == W.dtype and type(u) is type(W) and (
            u.ndim == 1 or u.flags.c_contiguous):
        return u
    # A snapshot loaded before the first call, or a new dtype of W.
    with chainer.using_device(link.device):
        return link.xp.ascontiguousarray(
            link.device.send(u).astype(W.dtype, copy=False))


def _concatenate(link: chainer.Link, *us: Array) -> Array:
    with chainer.using_device(link.device):
        return link.xp.ascontiguousarray(link.xp.concatenate(us))


def _draw(
        link: chainer.Link, hook: Any, W: Array,
        convolution: Convolution | None, *n: int) -> Array:
    _checks.check_weight(W)
    check_map(link, hook, W)
    length = math.prod(shape_of(link, hook, W.shape, convolution) or ())
    with chainer.using_device(link.device):
        return link.xp.random.normal(size=(*n, length)).astype(W.dtype)


def _set(link: chainer.Link, name: str, x: Array | None) -> None:
    setattr(link, name, x)
    if name not in link._persistent:  # the hook has more vectors than it had
        link.register_persistent(name)


def warm_up(
        link: chainer.Link, hook: Any, W: Array, u: Array,
        convolution: Convolution | None = None) -> None:
    """Moves new vectors on, in place, as the hook asks for.

    Raises:
        VectorValueError: One is zero or not finite.

    """
    if hook.n_warmup > 0:
        with chainer.using_device(link.device):
            arithmetic_of(W).warm_up(
                W, u, axis_of(link, hook, W.ndim), hook.n_warmup,
                groups_of(link, hook), hook.rtol, convolution)
