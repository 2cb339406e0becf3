"""An invertible residual network, and its inverse by fixed points.

Behrmann et al., Invertible Residual Networks,
https://arxiv.org/abs/1811.00995.  A block is y = x + g(x).  Where g has a
Lipschitz constant L < 1, one x belongs to each y: the limit of

    x_0 = y,  x_k+1 = y - g(x_k)

whose distance from it falls by the factor L, or faster, in each iteration.
"""
from __future__ import annotations

import math
from typing import Any, Callable

import chainer
import chainer.functions as F
import chainer.links as L

import sn_function

N_CLASSES = 10


class Block(chainer.Chain):
    """x + g(x), where g is three normalized convolutions, with ELUs between.

    The Lipschitz constant of an ELU is 1.  So that of g is at most the product
    of the norms of the convolutions, as maps of images.

    Args:
        channels: Number of channels of x.
        width: Number of channels within g.
        norm: Which norm of a convolution is kept below ``cap``.
        cap: Its largest value.
    """

    def __init__(
            self, channels: int, width: int, norm: str, cap: float) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(channels, width, 3, pad=1)
            self.conv2 = L.Convolution2D(width, width, 1)
            self.conv3 = L.Convolution2D(width, channels, 3, pad=1)
        # In each call, iterate until sigma is right, from several vectors: one
        # lags behind a weight in training, so that norms come near to 1.
        for conv in self.children():
            conv.add_hook(sn_function.SpectralNormalization(
                norm=norm, cap=cap, rtol=0.01, n_vectors=4))

    def g(self, x: Any) -> chainer.Variable:
        return self.conv3(F.elu(self.conv2(F.elu(self.conv1(x)))))

    def forward(self, x: Any) -> chainer.Variable:
        return x + self.g(x)


class IResNet(chainer.Chain):
    """A classifier, linear in features that determine the image.

    The 2 x 2 pixels of a square become channels, then channels of zeros are
    added.  Both keep distances, and so does undoing them.
    """

    def __init__(
            self, norm: str, cap: float, n_blocks: int = 4,
            channels: int = 8, width: int = 16) -> None:
        super().__init__()
        self.channels = channels
        with self.init_scope():
            self.blocks = chainer.ChainList(*[
                Block(channels, width, norm, cap) for _ in range(n_blocks)])
            self.linear = L.Linear(None, N_CLASSES)

    def forward(self, images: Any) -> chainer.Variable:
        return self.linear(self.features(images))

    def features(self, images: Any) -> chainer.Variable:
        """Returns (N, channels, H / 2, W / 2) of images (N, 1, H, W)."""
        h = F.space2depth(images, 2)
        n_zeros = self.channels - h.shape[1]
        h = F.pad(h, [(0, 0), (0, n_zeros), (0, 0), (0, 0)], 'constant')
        for block in self.blocks:
            h = block(h)
        return h

    def images(self, features: Any) -> tuple[Any, int]:
        """Returns the inverse of :meth:`features`.

        Returns:
            The images, and the most iterations of any block.
        """
        h, counts = features, []
        with chainer.no_backprop_mode(), sn_function.cached(self.blocks):
            for block in reversed([*self.blocks]):
                h, n_iterations = fixed_point(block.g, h)
                counts.append(n_iterations)
        return F.depth2space(h[:, :4], 2).array, max(counts)


def fixed_point(
        g: Callable, y: Any, max_iterations: int = 100,
        tolerance: float = 1e-6) -> tuple[Any, int]:
    """Iterates x = y - g(x) until no entry of x changes by more.

    Returns:
        The last x, and the number of iterations.
    """
    x, change, n = y, math.inf, 0
    while change > tolerance and n < max_iterations:    # NaN ends it, too
        last, x = x, y - g(x).array
        change, n = abs(x - last).max(), n + 1
    return x, n
