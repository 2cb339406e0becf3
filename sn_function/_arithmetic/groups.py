"""The groups of a weight: each is a map of its own.

A grouped convolution applies one weight to each group of its channels.  Where
they are stored one after another along an axis of one array, that array seen
as a matrix is the norm of none of them.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple, Sequence

from sn_function import errors


class Groups(NamedTuple):
    """Where the groups of a weight are.

    Attributes:
        number: Number ``G`` of groups; ``None`` for one at each index.
        axis: The axis along which one group follows another.

    """

    number: int | None
    axis: int = 0

    def count_in(self, shape: Sequence[int]) -> int:
        """Returns ``G`` for a weight of that shape.

        Raises:
            GroupCountError: The axis has no such number of equal parts.

        """
        length = shape[self.axis]
        number = length if self.number is None else self.number
        if length % number:
            raise errors.GroupCountError(number, shape)
        return number

    def split(self, W: Any, axis: int) -> Any:
        """Returns the weight as an array of shape ``(G, l, m, r)``.

        Each group is a weight with the same axes; ``m`` is the length of its
        output axis, ``l`` the product of the axes before that, and ``r`` that
        of the axes after it.  It is a view if ``W`` is C-contiguous.

        Args:
            W: An array of NumPy or CuPy, or a Variable.
            axis: Output axis, from 0 to ``W.ndim - 1``.

        """
        shape, k = W.shape, self.axis
        G = self.count_in(shape)
        if k:
            W = W.reshape(*shape[:k], G, shape[k] // G, *shape[k + 1:])
            W = W.transpose([k, *(i for i in range(W.ndim) if i != k)])
        of_group = *shape[:k], shape[k] // G, *shape[k + 1:]
        return W.reshape(G, math.prod(of_group[:axis]), of_group[axis],
                         math.prod(of_group[axis + 1:]))


def length_of_u(
        shape: Sequence[int], axis: int, groups: Groups | None) -> int:
    """Returns the length of the start vector of a weight of that shape.

    With groups it is the vectors of all groups, one after another.
    """
    m = shape[axis]
    if groups is None:
        return m
    G = groups.count_in(shape)
    return m if groups.axis == axis else G * m


def most_vectors(
        shape: Sequence[int], axis: int, groups: Groups | None) -> int:
    """Returns how many vectors a weight, or each group of it, has at most."""
    length = length_of_u(shape, axis, groups)
    m = length if groups is None else length // groups.count_in(shape)
    return min(m, math.prod(shape) // length if length else 0)
