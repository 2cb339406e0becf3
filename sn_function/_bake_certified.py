"""Weights that surely have a norm, for :func:`sn_function.bake`.

A certificate is an interval that holds the norm of the map of a weight.  With
its upper end hi, and c = gamma factor, or the cap,

    Y = c W / max(hi, eps)

has a norm of at most ``|c|``, up to the rounding of Y.  So Y gets a
certificate, too, and is made smaller by what that is above ``|c|``.
"""
from __future__ import annotations

import math
from typing import Any, Callable, NamedTuple

import chainer
import numpy
from chainer.backends import cuda

from sn_function import errors
from sn_function._certify import interval_of
from sn_function._links.weight import convolution_of
from sn_function._models import gamma_of


class Certificate(NamedTuple):
    """How near, and how long it may take; see :func:`sn_function.certify`."""

    rtol: float
    time_limit: float | None


def is_known(link: chainer.Link, hook: Any, W: Any) -> bool:
    """Whether the map of the weight is known: a matrix, or a convolution."""
    return W.ndim == 2 or (
        hook.weight_name == 'W' and convolution_of(link) is not None)


def normalize_weight(
        where: str, link: chainer.Link, hook: Any, W: Any,
        certificate: Certificate) -> Any:
    """Returns the weight with a norm that is certified.

    Args:
        where: What an error calls the link.
        link: The link.
        hook: A hook that normalizes a weight of it.
        W: That weight, an array.
        certificate: How it is certified.

    Raises:
        CertifiedNormError: The norm is not finite.

    """
    W = cuda.to_cpu(W).copy()
    convolution = convolution_of(link) if W.ndim > 2 else None

    def upper_end(W: Any) -> float:
        hi = interval_of(W, convolution, *certificate).hi
        if not math.isfinite(hi):
            raise errors.CertifiedNormError(where, hook.weight_name)
        return hi

    hi, cap = upper_end(W), getattr(hook, 'cap', None)
    if hi == 0 or (cap is not None and hi <= cap):
        return W
    if cap is not None:
        return _scaled(W, cap, hi, upper_end)
    gamma = gamma_of(link, hook)
    c = 1.0 if gamma is None else float(gamma.array)
    c *= 1.0 if hook.factor is None else hook.factor
    if not math.isfinite(c):
        raise errors.CertifiedNormError(where, hook.weight_name)
    return _scaled(W, c, max(hi, hook.eps), upper_end)


def _scaled(
        W: Any, c: float, divisor: float,
        upper_end: Callable[[Any], float]) -> Any:
    """Returns ``c W / divisor``, made smaller until its norm is ``|c|``."""
    margin = float(numpy.finfo(W.dtype).eps) / 4
    while True:
        # For what rounding adds.  It may undo a small change, so the next
        # one is larger.
        divisor *= 1 + margin
        margin *= 4
        # No entry of W is above its norm, so the quotient is in the range.
        with numpy.errstate(all='ignore'):
            Y = (W.astype(numpy.float64) / divisor * c).astype(W.dtype)
        hi = upper_end(Y)
        if hi <= abs(c):
            return Y
        divisor *= hi / abs(c)
