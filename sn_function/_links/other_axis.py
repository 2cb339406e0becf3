"""Vectors of another output axis than that of the hook, as in snapshots of
older code.

Links of SN-GANs take the first axis of every weight, that of the inputs of a
deconvolution, too.  The norm along another axis is another one, so training
that goes on along it is not the same.
"""
from __future__ import annotations

import warnings
from typing import Any

import chainer
import numpy
from chainer.backends import cuda

from sn_function import errors
from sn_function._arithmetic.interface import SETTLED, Array
from sn_function._arithmetic.matrix import as_matrix
from sn_function._links import vector
from sn_function._links.weight import (
    axis_of,
    groups_in,
    is_map,
    name_of,
    output_axis,
)

# How far a vector turns in an iteration, at least, if it is of another axis.
# After 200 steps of training with the first axis it was 0.013 or more along
# the second one for 16 channels and more, and 1e-4 or less along the first.
OTHER_LIMIT = 0.01


def by_length(
        link: chainer.Link, hook: Any, shape: tuple[int, ...],
        u_shape: tuple[int, ...]) -> int | None:
    """Returns the axis that a vector has the length of, if it is another.

    Args:
        link: The link.
        hook: The hook.
        shape: Shape of the weight.
        u_shape: Shape of the vector, or of one of several.

    Returns:
        ``None`` if the vector has the length that the hook needs, or that of
        neither of the first two axes; or if the weight has groups, as it may
        be the vector of each group.

    """
    if is_map(link, hook) or groups_in(link) is not None or (
            u_shape == vector.shape_of(link, hook, shape)):
        return None
    return next((
        k for k, m in enumerate(shape[:2]) if u_shape == (m,)), None)


def by_values(
        link: chainer.Link, hook: Any, W: Array, u: Array) -> int | None:
    """The same for a deconvolution with as many inputs as outputs.

    Returns:
        The other one of the first two axes if the vector is settled along
        that, and not along the one of the hook.

    """
    axis = axis_of(link, hook, W.ndim)
    if output_axis(link) == 0 or axis > 1 or is_map(link, hook) or (
            groups_in(link) is not None or u.shape != (W.shape[1 - axis],)):
        return None
    W, u = [cuda.to_cpu(x).astype(numpy.float64) for x in (W, u)]
    is_other = _turn(as_matrix(W, 1 - axis), u) <= SETTLED and (
        _turn(as_matrix(W, axis), u) > OTHER_LIMIT)
    return 1 - axis if is_other else None


@numpy.errstate(all='ignore')
def _turn(A: Any, u: Any) -> float:
    """Returns how far an iteration turns a vector; NaN of a bad one."""
    t = A @ (A.T @ u)
    return float(1 - u @ t / (numpy.linalg.norm(u) * numpy.linalg.norm(t)))


def check(
        link: chainer.Link, hook: Any, name: str, W: Array, u: Array) -> None:
    """Checks a vector of a snapshot.

    Args:
        link: The link.
        hook: The hook.
        name: Name of the vector.
        W: The weight, which is loaded.
        u: The vector, as it is in the snapshot.

    Raises:
        VectorAxisError: It is of another axis.  Where only its values say
            that, there is a warning.

    """
    axis = axis_of(link, hook, W.ndim)
    other = by_length(link, hook, W.shape, u.shape)
    if other is not None:
        raise errors.VectorAxisError(
            name_of(link), name, len(u), W.shape, axis, other)
    other = by_values(link, hook, W, u)
    if other is not None:
        warnings.warn(errors.VectorAxisWarning(
            name_of(link), name, axis, other), stacklevel=2)
