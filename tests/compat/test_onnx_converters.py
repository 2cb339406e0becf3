"""Functions that onnx_chainer could not export, and models that need them.

The models are what generators and discriminators of public repositories do,
in a few layers.
"""
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import onnx_chainer
import pytest

from sn_function import SpectralNormalization
from sn_function.bake import bake
from tests.compat.test_onnx_chainer import (
    OPSETS,
    Function,
    check,
    ints,
    run,
    x,
)


def unpooling(*args, **kwargs):
    return Function(lambda a: F.unpooling_2d(a, *args, **kwargs))


class TestUnpooling:

    @pytest.mark.parametrize(('shape', 'ksize', 'kwargs', 'outsize'), [
        ((3, 4), 2, {'outsize': (6, 8)}, (6, 8)),
        ((1, 1), 2, {'outsize': (2, 2)}, (2, 2)),
        ((3, 4), 2, {}, (5, 7)),
        ((3, 4), 2, {'outsize': (6, 7)}, (6, 7)),
        ((3, 4), 2, {'cover_all': False}, (6, 8)),
        ((3, 4), 2, {'cover_all': False, 'outsize': (6, 8)}, (6, 8)),
        ((3, 4), 2, {'stride': 2, 'pad': 0, 'outsize': (6, 8)}, (6, 8)),
        ((3, 4), (2, 3), {'outsize': (6, 12)}, (6, 12)),
        ((4, 4), 3, {}, (10, 10)),
        ((4, 5), 3, {'outsize': (11, 15)}, (11, 15)),
        ((4, 4), 8, {'outsize': (32, 32)}, (32, 32)),
        ((5, 2), (1, 7), {'outsize': (5, 14)}, (5, 14)),
        ((3, 2), 1, {}, (3, 2)),
    ])
    def test_is_nearest(self, shape, ksize, kwargs, outsize):
        kh, kw = np.broadcast_to(ksize, 2)
        images = x(2, 3, *shape)
        expected = images.repeat(kh, axis=2).repeat(kw, axis=3)
        expected = expected[:, :, :outsize[0], :outsize[1]]
        assert expected.shape[2:] == outsize
        for opset in OPSETS:
            model = check(unpooling(ksize, **kwargs), images, rtol=0, atol=0,
                          opset_version=opset)
            actual, = run(model, images)
            np.testing.assert_array_equal(actual, expected)

    @pytest.mark.slow
    @pytest.mark.parametrize('factor', range(2, 17))
    def test_factors(self, factor):
        """Rounding of the coordinates moves no pixel."""
        for opset in OPSETS:
            check(unpooling(factor, cover_all=False), x(1, 1, 13, 7),
                  rtol=0, atol=0, opset_version=opset)

    def test_any_batch_size(self):
        model = onnx_chainer.export(
            unpooling(2, outsize=(6, 7)), x(2, 3, 3, 4),
            input_shapes=('b', 3, 3, 4))
        images = x(5, 3, 3, 4)
        actual, = run(model, images)
        np.testing.assert_array_equal(
            actual, images.repeat(2, 2).repeat(2, 3)[:, :, :, :7])

    @pytest.mark.parametrize(('kwargs', 'reason'), [
        ({'ksize': 3, 'stride': 2}, 'overlap'),
        ({'ksize': 2, 'stride': 3}, 'gaps'),
        ({'ksize': 2, 'stride': (2, 1)}, r'stride=\(2, 1\)'),
        ({'ksize': 2, 'pad': 1}, r'has a pad'),
        ({'ksize': 2, 'pad': (0, 1)}, r'pad=\(0, 1\)'),
        ({'ksize': 2, 'outsize': (7, 8), 'cover_all': False},
         r'outsize=\(7, 8\).* larger than \(6, 8\)'),
    ])
    @pytest.mark.parametrize('opset', [7, 11])
    def test_other_unpooling_is_refused(self, kwargs, reason, opset):
        with pytest.raises(RuntimeError, match=reason):
            onnx_chainer.export(
                unpooling(**kwargs), x(1, 1, 3, 4), opset_version=opset)


def sn(link):
    return link.add_hook(SpectralNormalization())


class ConditionalBatchNormalization(chainer.Chain):
    """Of fixed statistics, with a gamma and a beta for each class."""

    def __init__(self, size, n_classes):
        super().__init__()
        self.mean, self.var = x(size) - .5, x(size)
        with self.init_scope():
            self.gammas = L.EmbedID(n_classes, size)
            self.betas = L.EmbedID(n_classes, size)

    def forward(self, h, y):
        ones = chainer.Variable(np.ones_like(self.mean))
        zeros = chainer.Variable(np.zeros_like(self.mean))
        normalized = F.fixed_batch_normalization(
            h, ones, zeros, chainer.Variable(self.mean),
            chainer.Variable(self.var))
        gamma, beta = (
            F.broadcast_to(F.reshape(a, (*a.shape, 1, 1)), h.shape)
            for a in (self.gammas(y), self.betas(y)))
        return gamma * normalized + beta


def upsample(h):
    height, width = h.shape[2:]
    return F.unpooling_2d(h, 2, outsize=(height * 2, width * 2))


class ConditionalGenerator(chainer.Chain):
    """A residual block that doubles the image."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.first = L.Linear(5, 6 * 3 * 3)
            self.b1 = ConditionalBatchNormalization(6, 4)
            self.c1 = L.Convolution2D(6, 4, 3, pad=1)
            self.b2 = ConditionalBatchNormalization(4, 4)
            self.c2 = L.Convolution2D(4, 4, 3, pad=1)
            self.shortcut = L.Convolution2D(6, 4, 1)
            self.b3 = L.BatchNormalization(4)
            self.last = L.Convolution2D(4, 3, 3, pad=1)

    def forward(self, z, y):
        h = F.reshape(self.first(z), (len(z), -1, 3, 3))
        short = self.shortcut(upsample(h))
        h = self.c1(upsample(F.relu(self.b1(h, y))))
        h = self.c2(F.relu(self.b2(h, y))) + short
        return F.tanh(self.last(F.relu(self.b3(h))))


class ProjectionDiscriminator(chainer.Chain):
    """The class goes in between the layers, and beside the last one."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.c1 = sn(L.Convolution2D(3, 4, 3, pad=1))
            self.c2 = sn(L.Convolution2D(4 + 2, 8, 3, pad=1))
            self.shortcut = sn(L.Convolution2D(3, 4, 1))
            self.within = sn(L.EmbedID(4, 2))
            self.last = sn(L.Linear(8, 1))
            self.beside = sn(L.EmbedID(4, 8))

    def forward(self, images, y):
        h = F.average_pooling_2d(F.relu(self.c1(images)), 2)
        h = h + self.shortcut(F.average_pooling_2d(images, 2))
        e = self.within(y)
        e = F.broadcast_to(F.reshape(e, (*e.shape, 1, 1)),
                           (*e.shape, *h.shape[2:]))
        h = F.relu(self.c2(F.concat([h, e], axis=1)))
        h = F.sum(h, axis=(2, 3))
        out = self.last(h)
        out += F.sum(self.beside(y) * h, axis=1, keepdims=True)
        return out


class ProgressiveGenerator(chainer.Chain):
    """Pixels are normalized, and two resolutions are blended."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.c0 = L.Convolution2D(5, 6, 4, pad=3)
            self.out0 = L.Convolution2D(6, 3, 1)
            self.c1 = L.Convolution2D(6, 6, 3, pad=1)
            self.out1 = L.Convolution2D(6, 3, 1)

    def forward(self, z):
        h = F.reshape(z, (len(z), 5, 1, 1))
        h = F.leaky_relu(self.normalize(self.c0(.3 * h)))
        low = self.out0(upsample(h))
        high = F.leaky_relu(self.normalize(self.c1(upsample(h))))
        images = .75 * low + .25 * self.out1(high)
        return F.unpooling_2d(images, 4, 4, 0, outsize=(32, 32))

    @staticmethod
    def normalize(h):
        factor = 1. / F.sqrt(F.mean(h * h, axis=1, keepdims=True) + 1e-8)
        return F.broadcast_to(factor, h.shape) * h


class StandardDeviationDiscriminator(chainer.Chain):
    """Sees how much a batch varies: by deviations, and by distances."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.c = sn(L.Convolution2D(4, 6, 3))
            self.distances = L.Linear(6 * 4, 3 * 2)
            self.last = sn(L.Linear(6 * 4 + 3, 1))

    def forward(self, images):
        n, _, height, width = images.shape
        mean = F.mean(images, axis=0, keepdims=True)
        d = images - F.broadcast_to(mean, images.shape)
        std = F.mean(F.sqrt(F.mean(d * d, axis=0) + 1e-8), keepdims=True)
        std = F.broadcast_to(std, (n, 1, height, width))
        h = F.leaky_relu(self.c(F.concat([images, std])))
        h = F.reshape(h, (n, -1))
        m = F.reshape(self.distances(h), (n, 6, 1))
        m = F.broadcast_to(m, (n, 6, n))
        d = F.absolute(F.reshape(
            m - F.transpose(m, (2, 1, 0)), (n, 3, 2, n)))
        d = F.sum(F.exp(-F.sum(d, axis=2)), axis=2) - 1
        return self.last(F.concat([h, d]))


class Autoencoder(chainer.Chain):
    """A discriminator whose output is how badly it restores its input."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.c = sn(L.Convolution2D(3, 4, 4, 2, 1))
            self.d = sn(L.Deconvolution2D(4, 3, 4, 2, 1))

    def forward(self, images):
        restored = F.tanh(self.d(F.leaky_relu(self.c(images))))
        return F.mean_absolute_error(restored, images)


@pytest.mark.parametrize(('model', 'args'), [
    (ConditionalGenerator, [x(3, 5), ints(3, 0, 1)]),
    (ProjectionDiscriminator, [x(3, 3, 6, 6), ints(3, 0, 1)]),
    (ProgressiveGenerator, [x(2, 5)]),
    (StandardDeviationDiscriminator, [x(3, 3, 4, 4)]),
    (Autoencoder, [x(2, 3, 6, 6)]),
])
def test_models_of_public_repositories(model, args):
    np.random.seed(0)
    model = model()
    model(*(chainer.Variable(a) if a.dtype.kind == 'f' else a for a in args))
    if any(link.local_link_hooks for link in model.links()):
        model = bake(model)
    for opset in OPSETS:
        if opset >= 8:  # which has Expand, for F.broadcast_to
            check(model, *args, opset_version=opset)
