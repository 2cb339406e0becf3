"""The maps of convolutions as dense matrices: the oracle for their norms.

A link of Chainer is applied to images that are zero but for one entry.
"""
import chainer
import chainer.links as L
import numpy as np


def dense(link, shape, W=None):
    """The map of a link without bias, transposed: a row for each input entry.

    Args:
        link: The link.
        shape: Shape of one input, ``(c, *size)``.
        W: Weight to use instead of its own.

    """
    own = link.W.array
    link.W.array = own if W is None else W
    units = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    with chainer.no_backprop_mode():
        rows = type(link).forward(link, units).array.reshape(len(units), -1)
    link.W.array = own
    return rows


def random_link(ndim, kind):
    """A link without bias, with a float64 weight of random numbers."""
    draw = np.random.randint
    groups = 1 if kind == 'dilated' else int(draw(1, 5))
    stride, pad, dilate, k = (
        tuple(map(int, draw(low, high, ndim)))
        for low, high in ((1, 4), (0, 3), (1, 3), (1, 4)))
    c_in, c_out = (groups * int(draw(1, 3)) for _ in range(2))
    more = dict(stride=stride, pad=pad, nobias=True)
    if kind == 'depthwise':
        link = L.DepthwiseConvolution2D(c_in, 2, k, **more)
    elif kind == 'dilated':
        link = L.DilatedConvolution2D(c_in, c_out, k, dilate=dilate, **more)
    elif kind == 'transposed':
        link = L.DeconvolutionND(
            ndim, c_in, c_out, k, dilate=dilate, groups=groups, **more)
    else:
        link = L.ConvolutionND(
            ndim, c_in, c_out, k, dilate=dilate, groups=groups,
            cover_all=kind == 'cover_all', **more)
    link.W.array = np.random.normal(size=link.W.shape)
    return link, c_in


KINDS = 'plain', 'plain', 'transposed', 'cover_all', 'depthwise', 'dilated'


def random_links(n):
    """Yields links of 1 to 3 dimensions, and a shape that they map."""
    found = 0
    while found < n:
        kind = str(np.random.choice(KINDS))
        ndim = 2 if kind in ('depthwise', 'dilated') else (
            int(np.random.choice((1, 2, 2, 3))))
        link, c_in = random_link(ndim, kind)
        shape = (c_in, *np.random.randint(1, 5 if ndim == 3 else 7, ndim))
        try:
            rows = dense(link, shape)
        except AssertionError:  # no output of images so small
            continue
        if kind == 'transposed' and np.random.rand() < .5:
            y = link(np.zeros((1, *shape)))
            link.outsize = [
                size + np.random.randint(stride) for size, stride in zip(
                    y.shape[2:], link.stride)]
            rows = dense(link, shape)
        if rows.any():
            found += 1
            yield link, tuple(map(int, shape))

