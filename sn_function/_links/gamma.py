"""gamma, the trainable factor of a normalized weight.

It starts as the largest singular value of the weight, so that the first
normalized weight is the weight itself.
"""
from __future__ import annotations

import math
from typing import Any

import chainer
import numpy
from chainer.backends import cuda

from sn_function import errors
from sn_function._arithmetic import singular
from sn_function._arithmetic.choose import is_on_device
from sn_function._arithmetic.groups import Groups
from sn_function._arithmetic.matrix import accumulator_dtype


def free_name(link: chainer.Link, weight_name: str) -> str:
    """Returns the name that gamma gets on the link."""
    for name in ('gamma', weight_name + '_gamma'):
        if not hasattr(link, name):
            return name
    raise errors.HookCollisionError(link, name, weight_name)


def register(
        link: chainer.Link, name: str, W: chainer.Parameter, axis: int,
        groups: Groups | None = None,
) -> None:
    """Adds gamma to the parameters of the link."""
    gamma = chainer.Parameter(LargestSingularValue(W, axis, groups))
    gamma.to_device(link.device)
    with link.init_scope():
        setattr(link, name, gamma)


def initialize(
        gamma: chainer.Parameter, W: Any, is_made_anew: bool = False) -> None:
    """Initializes gamma from ``W``, unless that was done.

    Args:
        gamma: The parameter.
        W: The weight, a Variable with an array.
        is_made_anew: Whether to do it again.

    """
    if gamma.array is not None and not is_made_anew:
        return
    if isinstance(W, chainer.Parameter):
        # A copy of a copy that shares has the weight of the latter.
        gamma.initializer.W = W
    if gamma.array is None:
        gamma.cleargrad()  # or its dtype may be another by now
        gamma.initialize(())
    else:
        gamma.initializer(gamma.array)


def fits(gamma: chainer.Parameter, W: Any) -> bool:
    """Whether gamma was not initialized from a weight of another shape."""
    initializer = gamma.initializer  # of Chainer's hook, in the same place
    return not isinstance(initializer, LargestSingularValue) or (
        initializer.shape in (None, W.shape))


def initial(gamma: chainer.Parameter, W: Any) -> Any:
    """Returns what gamma was initialized with, an array of shape ``()``.

    Returns:
        ``None`` where gamma must be left alone, as an optimizer has updated it
        or the weight: then it is not the norm of the weight any more.

    """
    initializer = gamma.initializer
    if _is_trained(gamma) or _is_trained(W) or (
            not isinstance(initializer, LargestSingularValue)):
        return None
    value = initializer.value
    if value is not None and type(value) is not type(gamma.array):
        # The link was moved.  Versions before 0.2 kept a float.
        value = initializer.value = gamma.device.send(
            cuda.to_cpu(value) if is_on_device(value)
            else numpy.asarray(value, gamma.dtype))
    return value


def _is_trained(x: Any) -> bool:
    rule = getattr(x, 'update_rule', None)
    return rule is not None and rule.t > 0


class LargestSingularValue:
    """Initializer of gamma, from the weight as it is then.

    Where the weight is zero, or has no finite norm, as before a snapshot is
    loaded, gamma is 1: a zero or a NaN would stay.

    Args:
        W: The weight, which may be initialized later.
        axis: Its output axis.
        groups: Its groups, if the norm is that of the largest one.

    Attributes:
        value: What gamma was initialized with, an array of shape ``()``.
        shape: Shape of the weight then.

    """

    value: Any = None
    shape: Any = None
    groups: Groups | None = None  # in pickles of versions before 0.2

    def __init__(
            self, W: chainer.Parameter, axis: int,
            groups: Groups | None = None) -> None:
        self.W = W
        self.axis = axis
        self.groups = groups
        self._dtype: Any = None

    @property
    def dtype(self) -> Any:
        # Once known it stays: Chainer asks for that of data and that of the
        # gradient at different times.
        if self._dtype is not None:
            return self._dtype
        W = self.W
        dtype = (getattr(W.initializer, 'dtype', None) if W.array is None
                 else W.array.dtype)
        # The norm of a float16 weight need not fit in float16.
        dtype = accumulator_dtype(chainer.get_dtype(dtype))
        if W.array is not None:
            self._dtype = dtype
        return dtype

    def __call__(self, array: Any) -> None:
        array[...] = 1
        W: Any = self.W.array
        if W is None:
            return
        norm = singular.norm(W, self.axis, self.groups)
        xp = chainer.backend.get_array_module(norm)
        array[...] = xp.where((norm > 0) & (norm < math.inf), norm, 1.)
        self.value = array.copy()
        self.shape = W.shape
