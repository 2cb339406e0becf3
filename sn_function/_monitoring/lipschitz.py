"""A bound on the Lipschitz constant of layers that are called in a row."""
from __future__ import annotations

import math
from typing import Any, Iterable

import chainer

from sn_function._models import is_supported
from sn_function.link_hooks import output_axis


def bound(layers: Iterable[tuple[chainer.Link, float]]) -> float:
    """Returns the product of bounds on the norms of layers as operators.

    Args:
        layers: The links and the norms of their weights.

    """
    return math.prod(
        [norm * math.sqrt(n_windows(link)) for link, norm in layers],
        start=1.)


def n_windows(link: chainer.Link) -> int:
    """Returns the largest number of outputs that an entry of the input is in.

    Written as a matrix, a convolution repeats its weight for every window of
    the input, and a pixel is in ``n`` of these; so its norm is at most
    ``sqrt(n)`` times that of the weight.
    """
    kernel = link.W.shape[2:] if is_supported(link, groups='each') else ()
    if not kernel:
        return 1
    if output_axis(link) == 1:  # a deconvolution
        return math.prod(kernel)
    ndim = len(kernel)
    return math.prod(
        -(-k * math.gcd(stride, dilate) // stride)
        for k, stride, dilate in zip(
            kernel, _each(link.stride, ndim),
            _each(getattr(link, 'dilate', 1), ndim)))


def _each(x: Any, ndim: int) -> Any:
    return tuple(x) if hasattr(x, '__getitem__') else (x,) * ndim
