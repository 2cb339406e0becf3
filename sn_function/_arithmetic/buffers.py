"""Memory for arrays computed from one weight, reused when they are gone.

Fresh memory of a large array is slow: the system has to find its pages, one
by one, and to fill them with zeros.  For a weight that does not fit in the
cache this takes as long as the whole computation.
"""
from __future__ import annotations

import math
import sys
import weakref
from typing import Any, Callable

import numpy

# In bytes; smaller arrays are left to NumPy.
MIN_SIZE = 1 << 18
# The normalized weight and its gradient.
MAX_KEPT = 2
# The size of a cache line.  NumPy does not align arrays to it, and whole lines
# are written faster.
ALIGNMENT = 64


# By the id of the weight's array: a weak reference to it, and its buffers.
_of: dict[int, tuple[Any, Buffers]] = {}


def empty_of(array: Any, reuse: bool = True) -> Callable[..., Any]:
    """Returns a function like :func:`numpy.empty`, for results of a weight.

    Args:
        array: The array of the weight.  Its buffers go when it does.
        reuse: Whether to use memory of earlier results that is free by now.

    """
    if not reuse or array.nbytes < MIN_SIZE:
        return numpy.empty
    key = id(array)
    found = _of.get(key)
    if found is None or found[0]() is not array:
        found = _of[key] = (
            weakref.ref(array, lambda _: _of.pop(key, None)), Buffers())
    return found[1].empty


def release(array: Any) -> None:
    """Frees the memory that is kept for the array of a weight."""
    _of.pop(id(array), None)


class Buffers:
    """Makes arrays in the memory of those that nothing refers to."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """As :func:`numpy.empty`."""
        dtype = numpy.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        if size < MIN_SIZE:
            return numpy.empty(shape, dtype)
        memory = self._take(size + ALIGNMENT)
        offset = -memory.__array_interface__['data'][0] % ALIGNMENT
        array = numpy.ndarray(shape, dtype, memory, offset)
        # Only now: the array holds the memory, so no other thread takes it.
        self._kept.append(memory)
        if len(self._kept) > MAX_KEPT:
            del self._kept[0]
        return array

    def _take(self, size: int) -> Any:
        """Returns memory that no array uses, and does not keep it."""
        for _ in range(len(self._kept)):
            try:
                memory, is_free = _pop(self._kept)
            except IndexError:  # another thread was quicker
                break
            if memory.size == size and is_free:
                return memory
            self._kept.append(memory)
        return numpy.empty(size, numpy.uint8)


def _pop(memories: list[Any]) -> tuple[Any, bool]:
    """Returns the first, and whether nothing else refers to it.

    An array, and each view of it, holds its memory as its base.
    """
    memory = memories.pop(0)
    other = numpy.empty(0)  # which nothing else refers to
    # Both are counted in one place: versions of Python differ in how many
    # references the question makes, and a tracer may hold all locals.
    of_other, of_memory = map(sys.getrefcount, (other, memory))
    return memory, of_memory <= of_other
