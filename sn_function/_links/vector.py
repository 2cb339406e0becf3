"""u, the left singular vector of a weight: an attribute of its link."""
from __future__ import annotations

import chainer

from sn_function import _checks
from sn_function._arithmetic.choose import arithmetic_of
from sn_function._arithmetic.groups import Groups, length_of_u
from sn_function._arithmetic.interface import Array
from sn_function._links.weight import output_axis


def find(
        link: chainer.Link, name: str, W: Array, n_warmup: int,
        groups: Groups | None = None) -> Array:
    """Returns the vector on the device and in the dtype of the weight.

    A link that has none gets a new one.

    Args:
        link: The link.
        name: Name of the vector.
        W: The weight.
        n_warmup: Number of power iterations that a new vector starts with.
        groups: The groups of the weight, if each has a vector.

    """
    u = getattr(link, name)
    if u is None:
        u = _draw(link, W, groups)
        warm_up(link, W, u, n_warmup, groups)
        setattr(link, name, u)
    elif u.dtype != W.dtype or type(u) is not type(W):
        # A snapshot loaded before the first call, or a new dtype of W.
        with chainer.using_device(link.device):
            u = link.device.send(u).astype(W.dtype, copy=False)
        setattr(link, name, u)
    return u


def _draw(link: chainer.Link, W: Array, groups: Groups | None) -> Array:
    _checks.check_weight(W)
    length = length_of_u(W.shape, output_axis(link), groups)
    with chainer.using_device(link.device):
        return link.xp.random.normal(size=(length,)).astype(W.dtype)


def warm_up(
        link: chainer.Link, W: Array, u: Array, n: int,
        groups: Groups | None = None) -> None:
    """Moves the vector on by ``n`` power iterations, in place.

    Raises:
        VectorValueError: The vector is zero or not finite.

    """
    if n > 0:
        with chainer.using_device(link.device):
            arithmetic_of(W).warm_up(W, u, output_axis(link), n, groups)
