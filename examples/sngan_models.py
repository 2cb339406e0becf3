"""The generator, the discriminator and the hinge losses of the example.

Miyato et al., Spectral Normalization for Generative Adversarial Networks,
https://arxiv.org/abs/1802.05957, for images of any size.  Both networks get
the class of each image; the discriminator as in Miyato and Koyama, cGANs with
Projection Discriminator, https://arxiv.org/abs/1802.05637.
"""
from __future__ import annotations

from typing import Any, Tuple

import chainer
import chainer.functions as F
import chainer.links as L
import numpy

ImageShape = Tuple[int, int, int]  # channels, height, width
N_CLASSES = 10


def n_halvings(size: int) -> int:
    """Returns how often an even image size is halved to get 4 to 7.

    >>> [n_halvings(size) for size in (8, 28, 32)]
    [1, 2, 3]
    """
    n = 0
    while size % 2 == 0 and size > 7:
        size //= 2
        n += 1
    return n


class Generator(chainer.Chain):
    """Noise and classes to images with values in [-1, 1].

    A linear layer makes small feature maps, each deconvolution doubles their
    size and halves their number.

    Args:
        shape: (channels, height, width) of an image.
        n_hidden: Length of a noise vector.
        ch: Number of the last feature maps.
    """

    def __init__(
            self, shape: ImageShape, n_hidden: int = 32, ch: int = 32
    ) -> None:
        super().__init__()
        out_channels, height, width = shape
        n = n_halvings(height)
        ch *= 2 ** n
        self.n_hidden = n_hidden
        self.bottom = ch, height // 2 ** n, width // 2 ** n
        size = int(numpy.prod(self.bottom))
        with self.init_scope():
            self.linear = L.Linear(n_hidden, size, nobias=True)
            self.embed = L.EmbedID(N_CLASSES, size)
            self.bn = L.BatchNormalization(ch)
            self.deconvs = chainer.ChainList()
            self.bns = chainer.ChainList()
            self.conv = L.Convolution2D(ch // 2 ** n, out_channels, 3, pad=1)
        for _ in range(n):
            self.deconvs.append(L.Deconvolution2D(
                ch, ch // 2, 4, stride=2, pad=1, nobias=True))
            ch //= 2
            self.bns.append(L.BatchNormalization(ch))

    def forward(self, z: Any, labels: Any) -> chainer.Variable:
        h = self.linear(z) + self.embed(labels)
        h = F.reshape(h, (len(z), *self.bottom))
        h = F.relu(self.bn(h))
        for deconv, bn in zip(self.deconvs, self.bns):
            h = F.relu(bn(deconv(h)))
        return F.tanh(self.conv(h))

    def make_noise(self, n: int, random: Any = numpy.random) -> Any:
        """Returns ``n`` noise vectors, drawn by NumPy on any device.

        So a seed gives the same noise on a CPU and on a GPU.
        """
        z = random.normal(size=(n, self.n_hidden)).astype(numpy.float32)
        return self.device.send(z)

    def sample(
            self, z: Any, labels: numpy.ndarray, batchsize: int = 256
    ) -> numpy.ndarray:
        """Returns images, made in test mode, on the CPU."""
        images = []
        labels = self.device.send(labels)
        with chainer.using_config('train', False), chainer.no_backprop_mode():
            for i in range(0, len(z), batchsize):
                batch = slice(i, i + batchsize)
                images.append(self(z[batch], labels[batch]).array)
        return numpy.concatenate(
            [chainer.get_device('@numpy').send(x) for x in images])


class Discriminator(chainer.Chain):
    """Images and classes to one score each, high for real ones.

    Each convolution halves the size of the feature maps and doubles their
    number.

    Args:
        shape: (channels, height, width) of an image.
        ch: Number of the first feature maps.
    """

    def __init__(self, shape: ImageShape, ch: int = 64) -> None:
        super().__init__()
        in_channels, height, width = shape
        with self.init_scope():
            self.convs = chainer.ChainList()
            for _ in range(n_halvings(height) + 1):
                self.convs.append(
                    L.Convolution2D(in_channels, ch, 4, stride=2, pad=1))
                in_channels, ch = ch, ch * 2
                height, width = height // 2, width // 2
            size = in_channels * height * width
            self.linear = L.Linear(size, 1)
            self.embed = L.EmbedID(
                N_CLASSES, size, chainer.initializers.LeCunNormal())

    def forward(self, x: Any, labels: Any) -> chainer.Variable:
        h = x
        for conv in self.convs:
            h = F.leaky_relu(conv(h), 0.1)
        h = F.reshape(h, (len(x), -1))
        projection = F.sum(h * self.embed(labels), axis=1, keepdims=True)
        return self.linear(h) + projection


def loss_dis(y_real: Any, y_fake: Any) -> chainer.Variable:
    """Hinge loss of the discriminator.

    E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))
    """
    return F.mean(F.relu(1. - y_real)) + F.mean(F.relu(1. + y_fake))


def loss_gen(y_fake: Any) -> chainer.Variable:
    """Loss of the generator: -E D(G(z))."""
    return -F.mean(y_fake)
