"""Checks of what users pass, before anything is computed or changed."""
from __future__ import annotations

import math
import numbers
import operator
from typing import Any, Sequence

import chainer
import numpy
from chainer import backend
from chainer.backends import cuda

from sn_function import errors
from sn_function._arithmetic import matrix
from sn_function._arithmetic.choose import is_on_device
from sn_function._arithmetic.convolution import Convolution
from sn_function._arithmetic.groups import Groups, length_of_u, most_vectors


def check_settings(
        n_power_iteration: int, factor: float | None, eps: float,
        cap: float | None) -> tuple[float, float, float]:
    """Raises an error that names the setting that is out of its range.

    Returns:
        The factor, the floor on sigma, and what stands for a sigma of zero.
        With a cap all three are ``cap``, as ``W / max(1, sigma / cap)`` is
        ``cap W / max(sigma, cap)``.

    """
    check_count('n_power_iteration', n_power_iteration, 1)
    factor = 1.0 if factor is None else factor
    if not 0 < as_float(factor) < math.inf:
        raise errors.FactorError(factor)
    if not 0 <= as_float(eps) < math.inf:
        raise errors.EpsError(eps)
    if cap is None:
        return float(factor), float(eps), 1.0
    if not 0 < as_float(cap) < math.inf:
        raise errors.CapError(cap)
    if factor != 1:
        raise errors.CapConflictError('factor', factor)
    return float(cap), float(cap), float(cap)


def check_tolerance(rtol: Any, max_iterations: Any, least: int) -> None:
    """Raises an error unless both are in their ranges; rtol may be None."""
    if rtol is not None and not 0 < as_float(rtol) < math.inf:
        raise errors.RtolError(rtol)
    check_count('max_iterations', max_iterations,
                1 if rtol is None else least)


def check_count(name: str, value: int, least: int) -> None:
    try:
        valid = operator.index(value) >= least
    except TypeError:
        valid = False
    if not valid or isinstance(value, bool):
        raise errors.IterationCountError(name, value, least)


def check_norm(
        norm: Any, groups: Any, insize: Any) -> int | tuple[int, ...] | None:
    """Checks a hook's norm, and what has to fit it; returns ``insize``."""
    if not isinstance(norm, str) or norm not in ('matrix', 'operator'):
        raise errors.NormError(norm)
    if norm == 'operator' and groups is not None:
        raise errors.NormConflictError(norm, 'groups', groups)
    if insize is None:
        return None
    if norm == 'matrix':
        raise errors.NormConflictError(norm, 'insize', insize)
    is_one = not isinstance(insize, (tuple, list))
    sizes = [insize] if is_one else insize
    try:
        checked = check_sizes('insize', sizes, len(sizes) or 1, 1)
    except errors.SizeError:
        raise errors.InsizeError(insize) from None
    return checked[0] if is_one else checked


def check_axis(axis: Any, norm: str) -> int | None:
    """Checks the axis of a hook, which may have been left out."""
    if axis is None:
        return None
    if norm == 'operator':
        raise errors.NormConflictError(norm, 'axis', axis)
    try:
        index = operator.index(axis)
    except TypeError:
        raise errors.AxisError(axis) from None
    if isinstance(axis, bool):
        raise errors.AxisError(axis)
    return index


def check_update(update_u: Any) -> None:
    """Checks when a hook moves its vectors on."""
    if not isinstance(update_u, str) or update_u not in ('train', 'always'):
        raise errors.UpdateModeError(update_u)


def as_insize(
        insize: int | Sequence[int], owner: str, ndim: int,
) -> tuple[int, ...]:
    """Returns a number for each axis, if the owner has as many."""
    try:
        return check_sizes('insize', insize, ndim, 1)
    except errors.SizeError:
        raise errors.InsizeError(insize, owner, ndim) from None


def check_groups(groups: Any) -> Groups | None:
    """Returns the groups along the first axis of a weight, if several."""
    try:
        count = operator.index(groups)
    except TypeError:
        count = 0
    if count < 1 or isinstance(groups, bool):
        raise errors.GroupCountError(groups)
    return Groups(count) if count > 1 else None


def check_convolution(
        W: Any, stride: Any, pad: Any, dilate: Any, groups: Any,
        is_transposed: bool, outsize: Any, cover_all: bool,
        shape: Sequence[int]) -> Convolution:
    """Returns the convolution that maps an input of a shape, if W fits it.

    Args:
        W: Its weight, an array or a Variable.
        stride, pad, dilate: Numbers, or one for each axis of images.
        groups: Number of groups of channels.
        is_transposed: Whether it is a deconvolution.
        outsize: Size of the outputs of that, or ``None``.
        cover_all: As in :class:`chainer.links.ConvolutionND`.
        shape: Of the input: ``(c, *size)``, or ``(b, c, *size)``.

    """
    W_shape = tuple(array_of_weight(W).shape)
    ndim = len(W_shape) - 2
    if ndim == 0:
        raise errors.MapWeightError(W_shape)
    stride, pad, dilate = [
        check_sizes(name, x, ndim, least) for name, x, least in (
            ('stride', stride, 1), ('pad', pad, 0), ('dilate', dilate, 1))]
    split = check_groups(groups)
    if split is not None:
        split.count_in(W_shape)
    channels = W_shape[0] if is_transposed else W_shape[1] * int(groups)
    if len(shape) not in (ndim + 1, ndim + 2) or (
            shape[-ndim - 1] != channels):
        raise errors.MapShapeError(shape, W_shape, channels)
    convolution = Convolution(
        stride, pad, dilate, int(groups), bool(cover_all), is_transposed,
        None if outsize is None else check_sizes(
            'outsize', outsize, ndim, 1), insize=tuple(shape[-ndim:]))
    if outsize is not None and not is_transposed:
        raise errors.OutputSizeError(outsize, shape[-ndim:], W_shape)
    check_insize(convolution, W_shape)
    return convolution


def check_insize(convolution: Convolution, shape: tuple[int, ...]) -> None:
    """Raises an error unless images of the size given are mapped.

    Args:
        convolution: The convolution, with ``insize``.
        shape: Shape of its weight.

    """
    convolution.out_shape(shape)
    insize, outsize = convolution.insize, convolution.outsize
    if insize and outsize and not convolution.fits_outsize(shape):
        raise errors.OutputSizeError(outsize, insize, shape)


def check_sizes(
        name: str, x: Any, ndim: int, least: int) -> tuple[int, ...]:
    """Returns a number for each axis, of one for all or one for each."""
    is_many = isinstance(x, (tuple, list)) or (
        isinstance(x, numpy.ndarray) and x.ndim == 1)
    sizes = tuple(x) if is_many else (x,) * ndim
    try:
        for size in sizes:
            check_count(name, size, least)
    except errors.IterationCountError:
        sizes = ()
    if len(sizes) != ndim:
        raise errors.SizeError(name, x, ndim, least)
    return tuple(map(int, sizes))


def is_real(x: Any) -> bool:
    return type(x) is float or (
        isinstance(x, numbers.Real) and not isinstance(x, bool))


def as_float(x: Any) -> float:
    """A number as a float; NaN for anything else, or if it is too large."""
    try:
        return float(x) if is_real(x) else math.nan
    except OverflowError:
        return math.nan


def array_of_weight(W: Any) -> Any:
    """Returns the array of a weight, if it is one that has a norm."""
    array = W.array if isinstance(W, chainer.Variable) else W
    if array is None and array is not W:
        raise errors.UninitializedWeightError('Parameter', W.name or 'W')
    check_weight(array)
    return array


def check_weight(W: Any) -> None:
    if not _is_float_array(W):
        raise errors.WeightTypeError(W)
    if len(W.shape) < 2 or 0 in W.shape:
        raise errors.WeightShapeError(W.shape)


def check_arrays(
        W: Any, u: Any, axis: int, update_u: bool,
        groups: Groups | None = None, is_part: bool = False,
        convolution: Convolution | None = None) -> int:
    """Checks W and u, and returns the axis counted from the front.

    There may be more vectors than rows where these are only a part of them.
    """
    array = W.array if isinstance(W, chainer.Variable) else W
    vector = u.array if isinstance(u, chainer.Variable) else u
    if groups is convolution is None and _are_plain(array, vector, axis) and (
            not update_u or (vector is u and _is_writable(u))):
        return axis
    shape = array_of_weight(W).shape
    axis = matrix.normalize_axis(axis, len(shape))
    accumulator = matrix.accumulator_dtype(array.dtype)
    if not (_is_float_array(vector)
            and vector.dtype in (array.dtype, accumulator)):
        raise errors.VectorTypeError(u, array.dtype)
    if convolution is not None:
        length = math.prod(convolution.in_shape(shape))
        most = convolution.most_vectors(shape, groups)
    else:
        length = length_of_u(shape, axis, groups)
        most = (math.prod(shape) // length if is_part
                else most_vectors(shape, axis, groups))
    if vector.shape[-1:] != (length,) or not (
            vector.ndim == 1
            or (vector.ndim == 2 and 1 <= len(vector) <= most)):
        raise errors.VectorShapeError(
            vector.shape, shape, axis, length, most)
    if not _are_on_one_device(vector, array):
        raise errors.VectorDeviceError(
            *map(backend.get_device_from_array, (vector, array)))
    if update_u and not (vector is u and _is_writable(u)):
        raise errors.VectorUpdateError(u)
    return axis


def _are_plain(W: Any, u: Any, axis: Any) -> bool:
    """Whether W and u fit at first sight; if not, a closer look decides."""
    kind = type(W)
    return kind is type(u) and kind in (numpy.ndarray, cuda.ndarray) and (
        type(axis) is int and 0 <= axis < W.ndim != 1
        and W.dtype == u.dtype and W.dtype.char in 'efd'
        and u.shape == (W.shape[axis],) and W.size > 0
        and (kind is numpy.ndarray or W.device == u.device))


def _is_float_array(x: Any) -> bool:
    return isinstance(x, (numpy.ndarray, cuda.ndarray)) and (
        x.dtype.char in 'efd')


def _is_writable(u: Any) -> bool:
    return is_on_device(u) or u.flags.writeable


def check_gamma(gamma: Any, W: Any) -> Any:
    """Checks gamma, and returns it; a number as a float."""
    if is_real(gamma):
        try:
            return float(gamma)
        except OverflowError:
            raise errors.GammaError(gamma) from None
    array = gamma.array if isinstance(gamma, chainer.Variable) else gamma
    W = W.array if isinstance(W, chainer.Variable) else W
    if not (_is_float_array(array) and array.shape == ()
            and _are_on_one_device(array, W)):
        raise errors.GammaError(gamma)
    return gamma


def _are_on_one_device(x: Any, y: Any) -> bool:
    if not (is_on_device(x) or is_on_device(y)):
        return True  # asking for their devices takes a while
    return backend.get_device_from_array(x) == backend.get_device_from_array(y)
