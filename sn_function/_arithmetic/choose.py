"""Which arithmetic an array needs."""
from __future__ import annotations

from chainer.backends import cuda

from sn_function._arithmetic import device, host
from sn_function._arithmetic.interface import Arithmetic, Array


def is_on_device(x: object) -> bool:
    """Whether an array is CuPy's."""
    return isinstance(x, cuda.ndarray)


def arithmetic_of(array: Array) -> Arithmetic:
    """Returns the module that computes on this kind of array."""
    return device if is_on_device(array) else host
