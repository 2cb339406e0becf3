"""gamma, the trainable factor of a normalized weight.

It starts as the largest singular value of the weight, so that the first
normalized weight is the weight itself.
"""
from __future__ import annotations

import math
from typing import Any

import chainer

from sn_function import errors
from sn_function._arithmetic import singular
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


def initialize(gamma: chainer.Parameter, W: Any, is_stale: bool) -> None:
    """Initializes gamma from ``W``, unless that was done.

    Args:
        gamma: The parameter.
        W: The weight, a Variable with an array.
        is_stale: Whether the weight was initialized again.  Then gamma is,
            too, unless it was trained or loaded in the meantime.

    """
    if gamma.array is not None and not is_stale:
        return
    if isinstance(W, chainer.Parameter):
        # A copy of a copy that shares has the weight of the latter.
        gamma.initializer.W = W
    if gamma.array is None:
        gamma.cleargrad()  # or its dtype may be another by now
        gamma.initialize(())
    else:
        # Chainer initializes by name: maybe gamma before this weight.
        gamma.initializer.renew(gamma.array)


class LargestSingularValue:
    """Initializer of gamma, from the weight as it is then.

    Where the weight has no finite norm, as before a snapshot is loaded, gamma
    is 1: a NaN would stay.

    Args:
        W: The weight, which may be initialized later.
        axis: Its output axis.
        groups: Its groups, if the norm is that of the largest one.

    """

    groups: Groups | None = None  # in pickles of versions before 0.2

    def __init__(
            self, W: chainer.Parameter, axis: int,
            groups: Groups | None = None) -> None:
        self.W = W
        self.axis = axis
        self.groups = groups
        self.value: Any = None
        self._dtype: Any = None

    def renew(self, array: Any) -> None:
        """Overwrites gamma if it still has the value that this gave it."""
        if self.value is not None and bool((array == self.value).all()):
            self(array)

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
        if norm < math.inf:
            array[...] = norm
        self.value = float(array)
