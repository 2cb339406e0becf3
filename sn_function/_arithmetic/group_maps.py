"""The maps of the groups of a convolution, in the place of matrices.

A convolution applies each group of its weight to channels of its own, so each
is a map of images by itself, and the norm is that of the largest.  Iterations
on all of them as one map would settle in one group, as no product mixes them:
when training makes another one the largest, none of u is left there.  So each
group gets iterations of its own, by :mod:`.group_iterations` or
:mod:`.group_subspace`, of all groups in one convolution.
"""
from __future__ import annotations

from typing import Any

from sn_function._arithmetic.convolution import (
    Convolution,
    ConvolutionMatrix,
)
from sn_function._arithmetic.groups import Groups


class GroupMaps:
    """Stands for an array of shape ``(G, 1, m, n)``, a matrix of each group.

    Args:
        W: Weight of the convolution, an array.
        groups: Its groups.
        convolution: The convolution, with ``insize``.

    Attributes:
        blocks: The weight as an array of shape ``(G, l, k, r)``.
        shape, dtype: Those of the array.

    """

    def __init__(
            self, W: Any, groups: Groups, convolution: Convolution) -> None:
        self._groups = groups
        self._convolution = convolution
        self._matrix = A = ConvolutionMatrix(W, convolution)
        self.blocks = groups.split(W, 0)
        G = len(self.blocks)
        self.shape = G, 1, A.m // G, A.n // G
        self.dtype = W.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def xp(self) -> Any:
        """The module of the arrays: NumPy or CuPy."""
        return self._matrix.xp

    def astype(self, dtype: Any, copy: bool = True) -> GroupMaps:
        """As that of an array, but never a copy without need."""
        return self._of(self._matrix.array.astype(dtype, copy=False))

    def divided_by(self, scale: Any) -> GroupMaps:
        """Returns them divided by numbers, shape ``(G, 1, 1, 1)``, or one."""
        W = self.xp.empty(self._matrix.array.shape, self.dtype)
        self._groups.split(W, 0)[...] = self.blocks / scale
        return self._of(W)

    def _of(self, W: Any) -> GroupMaps:
        return GroupMaps(W, self._groups, self._convolution)

    def pick(self, index: Any) -> GroupMaps:
        """Returns one group, as that of a convolution without groups."""
        W = self.blocks[index].reshape(
            self._convolution.shape_of_group(self._matrix.array.shape))
        return GroupMaps(W, Groups(1), self._convolution.of_group())

    def dot(self, V: Any) -> Any:
        """Returns ``W v`` of ``V``, shape ``(G, 1, b, n)``."""
        return _as_groups(self._matrix.dot_all(_as_rows(V)), len(self))

    def tdot(self, U: Any) -> Any:
        """Returns ``W^T u`` of ``U``, shape ``(G, 1, b, m)``."""
        return _as_groups(self._matrix.tdot_all(_as_rows(U)), len(self))

    def row_sizes(self) -> Any:
        """Returns what is largest where rows are, shape ``(G, m)``."""
        return self._matrix.row_sums().reshape(len(self), -1)

    def gradient(self, P: Any, Q: Any) -> Any:
        """Returns that of ``sum_k p_k W q_k`` of one group that was picked.

        Args:
            P: Shape ``(1, 1, k, m)``.
            Q: Shape ``(1, 1, k, n)``.

        """
        return self._matrix.combination(0., None, 1., _as_rows(P), _as_rows(Q))


def _as_groups(X: Any, G: int) -> Any:
    """Rows of all groups, one after another, as ``(G, 1, b, m)``."""
    return X.reshape(1, len(X), G, -1).transpose(2, 0, 1, 3)


def _as_rows(X: Any) -> Any:
    return X.transpose(1, 2, 0, 3).reshape(X.shape[2], -1)
