"""The output axis of a weight, and its initialization by a call."""
import types

import chainer
import chainer.links as L
import numpy as np
import pytest

from sn_function import errors
from sn_function._links import weight


@pytest.mark.parametrize(('link', 'axis'), [
    (L.Linear(2, 3), 0), (L.EmbedID(2, 3), 0), (L.Convolution2D(2, 3, 2), 0),
    (L.ConvolutionND(1, 2, 3, 2), 0), (L.DilatedConvolution2D(2, 3, 2), 0),
    (L.Deconvolution2D(2, 3, 2), 1), (L.DeconvolutionND(1, 2, 3, 2), 1),
    (type('Own', (L.Deconvolution2D,), {})(2, 3, 2), 1),
    (chainer.Link(), 0)])
def test_output_axis(link, axis):
    assert weight.output_axis(link) == axis


@pytest.mark.parametrize(('link', 'x_shape', 'kwargs', 'shape'), [
    (L.Linear(None, 3), (2, 4, 5), {}, (3, 20)),
    (L.Linear(None, 3), (2, 4, 5), {'n_batch_axes': 2}, (3, 5)),
    (L.Convolution2D(None, 3, 2), (2, 4, 5, 5), {}, (3, 4, 2, 2)),
    (L.Deconvolution2D(None, 3, 2), (2, 4, 5, 5), {}, (4, 3, 2, 2))])
def test_initialize(link, x_shape, kwargs, shape):
    args = types.SimpleNamespace(
        link=link, args=(np.ones(x_shape, 'f'),), kwargs=kwargs)
    weight.initialize(args, link.W, 'W')
    assert link.W.shape == shape


@pytest.mark.parametrize('x', [3, np.ones(4, 'f')])
def test_an_input_without_a_size(x):
    link = L.Linear(None, 3)
    args = types.SimpleNamespace(link=link, args=(x,), kwargs={})
    with pytest.raises(errors.UninitializedWeightError, match=r'Linear\.W'):
        weight.initialize(args, link.W, 'W')


def call_of(link, *args, **kwargs):
    return types.SimpleNamespace(link=link, args=args, kwargs=kwargs)


@pytest.mark.parametrize(('link', 'shape', 'expected'), [
    (L.Convolution1D(2, 3, 2), (1, 2, 5), (5,)),
    (L.Convolution2D(2, 3, 2), (1, 2, 5, 6), (5, 6)),
    (L.Deconvolution3D(2, 3, 2), (1, 2, 5, 6, 7), (5, 6, 7)),
    (L.Convolution2D(2, 3, 2), (2, 5, 6), None),
    (L.Convolution2D(2, 3, 2), (1, 2, 5, 6, 7), None)])
def test_insize(link, shape, expected):
    x = np.ones(shape, 'f')
    assert weight.insize_of(call_of(link, x)) == expected
    assert weight.insize_of(call_of(link, x=x)) == expected
    assert weight.insize_of(call_of(link, chainer.Variable(x))) == expected
    assert weight.insize_of(call_of(link, None)) is None


def test_insize_of_channels_that_come_last():
    link = L.Convolution2D(2, 3, 2)
    link.x_layout = chainer.memory_layouts.CUDNN_CHANNEL_LAST_X
    x = chainer.Variable(np.ones((1, 5, 6, 2), 'f'), layout=link.x_layout)
    assert weight.insize_of(call_of(link, x)) == (5, 6)


@pytest.mark.parametrize(('link', 'settings', 'expected'), [
    (L.Convolution2D(2, 3, 2), {}, True),
    (L.DepthwiseConvolution2D(2, 3, 2), {}, True),
    (L.DilatedConvolution2D(2, 3, 2), {}, True),
    (L.DeconvolutionND(1, 2, 3, 2), {}, True),
    (L.Convolution2D(2, 3, 2), dict(norm='matrix'), False),
    (L.Convolution2D(2, 3, 2), dict(weight_name='V'), False),
    (L.Linear(2, 3), {}, False), (L.EmbedID(2, 3), {}, False)])
def test_is_map(link, settings, expected):
    hook = types.SimpleNamespace(
        **{'norm': 'operator', 'weight_name': 'W', **settings})
    assert weight.is_map(link, hook) is expected
    del hook.norm  # Chainer's
    assert weight.is_map(link, hook) is False
