"""The weight of a link: its output axis, and its initialization by a call."""
from __future__ import annotations

import inspect
from typing import Any

import chainer
from chainer import links as L
from chainer.utils import size_of_shape
from chainer.utils.conv_nd import as_tuple

from sn_function import errors
from sn_function._arithmetic.convolution import Convolution
from sn_function._arithmetic.groups import Groups

DECONVOLUTIONS = (L.Deconvolution2D, L.DeconvolutionND)
# Links whose weight may have groups, one after another along axis 0.
GROUPED = (L.Convolution2D, L.ConvolutionND, *DECONVOLUTIONS)
N_DIMENSIONAL = (L.ConvolutionND, L.DeconvolutionND)
CONVOLUTIONS = (*GROUPED, L.DilatedConvolution2D, L.DepthwiseConvolution2D)


def output_axis(link: chainer.Link) -> int:
    """Returns the output axis of the link's weight."""
    return int(isinstance(link, DECONVOLUTIONS))


def axis_of(link: chainer.Link, hook: Any, ndim: int) -> int:
    """Returns the output axis that a hook, ours or Chainer's, takes.

    Args:
        link: The link.
        hook: The hook.
        ndim: Number of dimensions of the weight.

    Raises:
        AxisError: The hook has one that the weight lacks.

    """
    axis: int | None = getattr(hook, 'given_axis', None)
    if axis is None:
        return output_axis(link)
    if not -ndim <= axis < ndim:
        raise errors.AxisError(
            axis, ndim, f'the weight {hook.weight_name} of {name_of(link)},')
    return axis % ndim


def name_of(link: chainer.Link) -> str:
    """Returns how messages name a link: its class, and its name in a chain.
    """
    text = type(link).__name__
    return text if link.name is None else f'{text} {link.name!r}'


def groups_of(link: chainer.Link, hook: Any) -> Groups | None:
    """Returns the groups that a hook sees in its weight, if several.

    Where it takes the norm of each, or of the map, which is that of the
    largest, they are those of the convolution's ``W``.  Chainer's hook does
    not.
    """
    if hook.weight_name != 'W' or (
            getattr(hook, 'groups', None) is None and not is_map(link, hook)):
        return None
    return groups_in(link)


def groups_in(link: chainer.Link) -> Groups | None:
    """Returns the groups of a convolution's ``W``, if there are several."""
    if isinstance(link, L.DepthwiseConvolution2D):
        return Groups(None, axis=1)  # one for each channel of the input
    if not isinstance(link, GROUPED):
        return None
    count = getattr(link, 'groups', 1)
    return Groups(count) if count > 1 else None


def is_map(link: chainer.Link, hook: Any) -> bool:
    """Whether a hook takes the norm of what the link makes of images."""
    return getattr(hook, 'norm', 'matrix') == 'operator' and (
        hook.weight_name == 'W' and isinstance(link, CONVOLUTIONS))


def check_map(link: chainer.Link, hook: Any, W: Any) -> None:
    """Raises an error if a hook takes the norm of a map that is unknown.

    That of a weight with 2 dimensions is the weight itself.
    """
    if getattr(hook, 'norm', 'matrix') == 'operator' and (
            W.ndim > 2 and not is_map(link, hook)):
        raise errors.UnknownMapError(link, hook.weight_name)


def convolution_of(link: chainer.Link) -> Convolution | None:
    """Returns what the link does beside its weight, if it is a convolution.
    """
    if not isinstance(link, CONVOLUTIONS):
        return None
    # Of 2 dimensions it may be a number.
    ndim = len(link.ksize) if isinstance(link, N_DIMENSIONAL) else 2
    outsize = getattr(link, 'outsize', None)
    if outsize is not None:
        outsize = None if None in outsize else tuple(outsize)
    stride, pad, dilate = [
        as_tuple(getattr(link, name, 1), ndim)
        for name in ('stride', 'pad', 'dilate')]
    return Convolution(
        stride, pad, dilate,
        groups=getattr(link, 'groups', 1),
        cover_all=getattr(link, 'cover_all', False),
        is_transposed=isinstance(link, DECONVOLUTIONS), outsize=outsize,
        is_depthwise=isinstance(link, L.DepthwiseConvolution2D))


def initialize(cb_args: Any, W: chainer.Parameter, weight_name: str) -> None:
    """Initializes the weight for the input of a call, as its link does.

    Args:
        cb_args: Arguments of the link hook's callback.
        W: The weight, which has no array.
        weight_name: Its name.

    Raises:
        UninitializedWeightError: The link does more than that, or there is
            no input whose size is known.

    """
    link = cb_args.link
    bound, x = _arguments(cb_args)
    if getattr(x, 'ndim', 0) >= 2 and _needs_input_size_only(link):
        if isinstance(link, L.Linear):
            n_batch_axes = bound.arguments.get('n_batch_axes', 1)
            in_size = size_of_shape(x.shape[n_batch_axes:])
        else:
            in_size = _semantic_shape(link, x)[1]
        link._initialize_params(in_size)
    if W.array is None:
        raise errors.UninitializedWeightError(
            type(link).__name__, weight_name)


def insize_of(cb_args: Any) -> tuple[int, ...] | None:
    """Returns the size of the images in a call of a convolution.

    Args:
        cb_args: Arguments of the link hook's callback.

    Returns:
        ``None`` where there is no input of as many dimensions as its weight.

    """
    link = cb_args.link
    _, x = _arguments(cb_args)
    if getattr(x, 'ndim', 0) != link.W.ndim:
        return None
    return tuple(_semantic_shape(link, x)[2:])


def _arguments(cb_args: Any) -> tuple[inspect.BoundArguments, Any]:
    """Returns those of a call, and the first of them, or ``None``."""
    link = cb_args.link
    # Of the class: the instance's may be shadowed by another hook.
    bound = inspect.signature(type(link).forward).bind(
        link, *cb_args.args, **cb_args.kwargs)
    _, x, *_ = [*bound.args, *bound.kwargs.values(), None]
    return bound, x


def _semantic_shape(link: chainer.Link, x: Any) -> tuple[int, ...]:
    return chainer.memory_layouts.get_semantic_shape(
        chainer.as_variable(x),
        assumed_layout=getattr(link, 'x_layout', None))


def _needs_input_size_only(link: chainer.Link) -> bool:
    initialize: Any = getattr(link, '_initialize_params', None)
    try:
        inspect.signature(initialize).bind(1)
    except TypeError:
        return False
    return True
