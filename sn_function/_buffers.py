"""Memory of the outputs of one weight, used again when they have died.

Fresh memory of a large array is slow: the system has to find its pages, one
by one, and to fill them with zeros.  For a weight that does not fit in the
cache that takes as long as all that is done with it.
"""
from __future__ import annotations

import math
import sys
from typing import Any

import numpy

# Smaller arrays are left to NumPy, in bytes.
MIN_SIZE = 1 << 18
# The normalized weight and its gradient.
MAX_KEPT = 2
# Of a cache line, which NumPy does not look to; whole ones are written faster.
ALIGNMENT = 64


class Buffers:
    """Makes arrays, out of the memory of those that nobody has any more."""

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
        """Returns memory that no array is in, and does not keep it."""
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
    # Counted here and now: versions of Python differ in how many references
    # are made by the asking, and whoever traces this may hold all locals.
    of_other, of_memory = map(sys.getrefcount, (other, memory))
    return memory, of_memory <= of_other
