"""gamma, the trainable factor of a normalized weight.

It starts as the largest singular value of the weight, so that the first
normalized weight is the weight itself.
"""
from __future__ import annotations

from typing import Any

import chainer
import numpy
from chainer.backends import cuda

from sn_function import errors
from sn_function._arithmetic import singular
from sn_function._arithmetic.choose import is_on_device
from sn_function._arithmetic.convolution import Convolution
from sn_function._arithmetic.groups import Groups
from sn_function._arithmetic.matrix import accumulator_dtype, normalize_axis


def free_name(link: chainer.Link, weight_name: str) -> str:
    """Returns the name that gamma gets on the link."""
    for name in ('gamma', weight_name + '_gamma'):
        if not hasattr(link, name):
            return name
    raise errors.HookCollisionError(link, name, weight_name)


def register(
        link: chainer.Link, name: str, W: chainer.Parameter, axis: int,
        groups: Groups | None = None, convolution: Convolution | None = None,
) -> None:
    """Adds gamma to the parameters of the link."""
    gamma = chainer.Parameter(
        LargestSingularValue(W, axis, groups, convolution))
    gamma.to_device(link.device)
    with link.init_scope():
        setattr(link, name, gamma)


def initialize(
        gamma: chainer.Parameter, W: Any, is_made_anew: bool = False,
        convolution: Convolution | None = None) -> None:
    """Initializes gamma from ``W``, unless that was done.

    Args:
        gamma: The parameter.
        W: The weight, a Variable with an array.
        is_made_anew: Whether to do it again.
        convolution: The map whose norm it is, if that is no matrix.

    """
    # The size of images may be known by now, whatever W is.
    if isinstance(gamma.initializer, LargestSingularValue):
        gamma.initializer.convolution = convolution
    initializer = _initializer_for(gamma, W)
    if initializer is not None:
        initializer.W = W  # in a copy of the link it was that of another
        if gamma.array is not None and initializer.shape is None:
            initializer.shape = W.shape  # gamma was loaded before its weight
    if gamma.array is None:
        gamma.cleargrad()  # or its dtype may be another by now
        gamma.initialize(())
    elif is_made_anew:
        gamma.initializer(gamma.array)


def _initializer_for(
        gamma: chainer.Parameter, W: Any) -> LargestSingularValue | None:
    """Returns what initializes gamma from this weight, if anything does.

    Nothing does where another hook has replaced the weight for this call, or
    where gamma is of Chainer's hook, which may be in the same place.
    """
    initializer = gamma.initializer
    is_ours = isinstance(initializer, LargestSingularValue)
    return initializer if is_ours and isinstance(
        W, chainer.Parameter) else None


def fits(gamma: chainer.Parameter, W: Any) -> bool:
    """Whether gamma was not initialized from a weight of another shape."""
    initializer = _initializer_for(gamma, W)
    return initializer is None or initializer.shape in (None, W.shape)


def initial(gamma: chainer.Parameter, W: Any) -> Any:
    """Returns what gamma was initialized with, an array of shape ``()``.

    Returns:
        ``None`` where gamma must be left alone: an optimizer has updated the
        weight since, so gamma is not its norm any more, or is not to update
        gamma; or gamma is not initialized from this weight.

    """
    initializer = _initializer_for(gamma, W)
    if initializer is None:
        return None
    rule = gamma.update_rule
    if (rule is not None and not rule.enabled) or (
            _n_updates(W) > initializer.n_updates):
        return None
    if not _is_alike(initializer.value, gamma.array):
        initializer.move_value(gamma)
    return initializer.value


def _is_alike(x: Any, y: Any) -> bool:
    return type(x) is type(y) and x.dtype == y.dtype and (
        not is_on_device(x) or x.device == y.device)


def _n_updates(W: Any) -> int:
    """How often an optimizer has updated a parameter."""
    rule = getattr(W, 'update_rule', None)
    return 0 if rule is None else rule.t


class LargestSingularValue:
    """Initializer of gamma, from the weight as it is then.

    Where the weight is zero, or has no finite norm, as before a snapshot is
    loaded, gamma is 1: a zero or a NaN would stay.

    Args:
        W: The weight, which may be initialized later.
        axis: Its output axis; may be negative.
        groups: Its groups, if the norm is that of the largest one.
        convolution: The map, if the norm is that of images.  While their size
            is not known, gamma is 1, as without a weight.

    Attributes:
        value: What gamma was initialized with, an array of shape ``()``.
        shape: Shape of the weight then.
        n_updates: How often an optimizer had updated the weight then.

    """

    value: Any = None
    shape: Any = None
    n_updates = 0
    groups: Groups | None = None  # in pickles of versions before 0.2
    convolution: Convolution | None = None  # likewise

    def __init__(
            self, W: chainer.Parameter, axis: int,
            groups: Groups | None = None,
            convolution: Convolution | None = None) -> None:
        self.W = W
        self.axis = axis
        self.groups = groups
        self.convolution = convolution
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
        convolution = self.convolution
        if W is None or (
                convolution is not None and convolution.insize is None):
            return
        with numpy.errstate(over='ignore'):
            array[...] = singular.norm(
                W, normalize_axis(self.axis, W.ndim), self.groups,
                convolution)
        xp = chainer.backend.get_array_module(array)
        array[...] = xp.where((array > 0) & xp.isfinite(array), array, 1.)
        self.value = array.copy()
        self.shape = W.shape
        self.n_updates = _n_updates(self.W)

    @property
    def origin(self) -> tuple[Any, Any, int]:
        """The value, on the host, the shape and the number of updates."""
        value = self.value
        if is_on_device(value):
            value = cuda.to_cpu(value)
        return value, self.shape, self.n_updates

    @origin.setter
    def origin(self, origin: tuple[Any, Any, int]) -> None:
        self.value, self.shape, self.n_updates = origin

    def move_value(self, gamma: chainer.Parameter) -> None:
        """Brings the value to the device and the dtype of gamma."""
        value, *_ = self.origin
        if value is not None:  # versions before 0.2 kept a float
            self.value = gamma.device.send(numpy.asarray(value, gamma.dtype))

    def __getstate__(self) -> dict[str, Any]:
        # For a machine without a device.
        return {**self.__dict__, 'value': self.origin[0]}
