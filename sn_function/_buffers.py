"""Memory of the outputs of one weight, used again when they have died.

Fresh memory of a large array is slow: the system has to find its pages, one
by one, and to fill them with zeros.  For a weight that does not fit in the
cache that takes as long as all that is done with it.
"""
from __future__ import annotations

import math
import weakref
from typing import Any, Callable, cast

import numpy

# Smaller arrays are left to NumPy, in bytes.
MIN_SIZE = 1 << 18
# The normalized weight and its gradient.
MAX_FREE = 2


class Buffers:
    """Makes arrays, out of the memory of those that nobody has any more."""

    def __init__(self) -> None:
        self._free: list[_Memory] = []
        self._give_back = weakref.WeakMethod(self._take_back)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """As :func:`numpy.empty`."""
        dtype = numpy.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        if size < MIN_SIZE:
            return numpy.empty(shape, dtype)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or memory.size != size:
            memory = _Memory(size, numpy.uint8)
        lent = memory.view()
        lent.give_back = self._give_back
        return numpy.ndarray(shape, dtype, lent)

    def _take_back(self, memory: _Memory) -> None:
        if len(self._free) < MAX_FREE:
            self._free.append(memory)


class _Memory(numpy.ndarray):
    """Bytes; a view of them is what a lent array has as its base.

    That is of another type than the array, so NumPy does not pass it over
    when it looks for the base of the array's own views; and so it dies when
    the array and all its views have died.
    """

    give_back: Callable[[], Callable[[_Memory], None] | None] | None = None

    def __del__(self) -> None:
        take_back = self.give_back and self.give_back()
        if take_back:
            take_back(cast(_Memory, self.base))
