"""A convolution as a map of images, and that map seen as a matrix.

What bounds a layer is the norm of the map ``x -> conv(x, W)`` of images of
one size, not that of its weight as a matrix of output channels.  The map is
linear in W, too, so power iteration needs no more than three products:

    conv(x, W)             the map
    deconv(y, W)           its adjoint:  <y, conv(x, W)> = <deconv(y, W), x>
    correlation(x, y)      that of W:    <y, conv(x, W)> = <correlation, W>
        = sum_p y[o, p] x[c, s p + d i - pad]  at the indices [o, c, i] of W

which Chainer computes, on NumPy and CuPy.  The weight of a deconvolution is
that of the convolution which it is the adjoint of.
"""
from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple, Sequence

import chainer
import numpy
from chainer.backends import cuda
from chainer.functions.connection import convolution_nd, deconvolution_nd
from chainer.utils.conv import get_conv_outsize, get_deconv_outsize

from sn_function import errors
from sn_function._arithmetic.groups import Groups
from sn_function._arithmetic.matrix import Matrix


class Convolution(NamedTuple):
    """What a convolution or a deconvolution does, beside its weight.

    Attributes:
        stride, pad, dilate (tuple of int): A number for each axis of images.
        groups (int): Number of groups of channels.
        cover_all (bool): As in :class:`chainer.links.ConvolutionND`.
        is_transposed (bool): Whether it is a deconvolution.
        outsize (tuple of int or None): Of a deconvolution, if it is given.
        is_depthwise (bool): Whether the weight is one of shape
            ``(multiplier, channels, *k)``, of as many groups as channels.
        insize (tuple of int or None): Size of the images that are mapped.

    """

    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilate: tuple[int, ...]
    groups: int = 1
    cover_all: bool = False
    is_transposed: bool = False
    outsize: tuple[int, ...] | None = None
    is_depthwise: bool = False
    insize: tuple[int, ...] | None = None

    # Shapes

    def in_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns that of what is mapped, by a weight of the shape given."""
        assert self.insize is not None
        channels = (
            shape[0] if self.is_transposed else shape[1] if self.is_depthwise
            else shape[1] * self.groups)
        return channels, *self.insize

    def out_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns that of what it is mapped to.

        Raises:
            InputSizeError: Images of ``insize`` are too small.

        """
        assert self.insize is not None
        if self.is_transposed:
            outsize = self.outsize or self._sizes(
                get_deconv_outsize, self.insize, shape)
            channels = shape[1] * self.groups
        else:
            outsize = self._sizes(
                get_conv_outsize, self.insize, shape, self.cover_all)
            channels = (shape[0] * shape[1] if self.is_depthwise
                        else shape[0])
        if min(outsize) < 1 or min(self.insize) < 1:
            raise errors.InputSizeError(self.insize, tuple(shape))
        return channels, *outsize

    def fits_outsize(self, shape: Sequence[int]) -> bool:
        """Whether a deconvolution to ``outsize`` is the adjoint of one."""
        return self.insize in [
            self._sizes(get_conv_outsize, self.outsize or (), shape, covers)
            for covers in (False, True)]

    def groups_of(self, shape: Sequence[int]) -> int:
        """Returns the number of groups of a weight of that shape."""
        return shape[1] if self.is_depthwise else self.groups

    def most_vectors(
            self, shape: Sequence[int], groups: Groups | None = None) -> int:
        """Returns how many vectors the map, or each of its groups, has."""
        G = 1 if groups is None else groups.count_in(shape)
        return min(math.prod(self.in_shape(shape)),
                   math.prod(self.out_shape(shape))) // G

    @property
    def split(self) -> Groups | None:
        """The groups of its weight, if there are several."""
        if self.is_depthwise:
            return Groups(None, axis=1)
        return Groups(self.groups) if self.groups > 1 else None

    def of_group(self) -> Convolution:
        """Returns the convolution that one group is the weight of."""
        return self._replace(groups=1, is_depthwise=False)

    def shape_of_group(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of that weight."""
        if self.is_depthwise:
            return shape[0], 1, *shape[2:]
        return shape[0] // self.groups, *shape[1:]

    def _sizes(
            self, of_axis: Any, sizes: Sequence[int], shape: Sequence[int],
            cover_all: bool = False) -> tuple[int, ...]:
        return tuple([
            of_axis(size, k, s, p, cover_all, d)
            for size, k, s, p, d in zip(
                sizes, shape[2:], self.stride, self.pad, self.dilate)])

    # Products, of batches of images; arrays or Variables

    def apply(self, W: Any, x: Any) -> Any:
        """Returns the outputs of ``x``, shape ``(N, *in_shape)``."""
        product = self._adjoint if self.is_transposed else self._direct
        return product(W, x, self.out_shape(W.shape)[1:])

    def adjoint(self, W: Any, y: Any) -> Any:
        """Returns what the adjoint makes of ``y``, ``(N, *out_shape)``."""
        product = self._direct if self.is_transposed else self._adjoint
        return product(W, y, self.insize)

    def _direct(self, W: Any, x: Any, size: Any) -> Any:
        """The convolution that has the weight W, to images of that size."""
        return _run(convolution_nd.ConvolutionND(
            len(size), self.stride, self.pad,
            self._covers_all(W.shape, x.shape[2:], size), self.dilate,
            self.groups_of(W.shape)), x, self._plain(W))

    def _adjoint(self, W: Any, y: Any, size: Any) -> Any:
        return _run(deconvolution_nd.DeconvolutionND(
            len(size), self.stride, self.pad, size, self.dilate,
            self.groups_of(W.shape)), y, self._plain(W))

    def _covers_all(
            self, shape: Any, large: Any, small: Any) -> bool:
        """Whether the convolution of large images covers all of them."""
        return tuple(small) != self._sizes(get_conv_outsize, large, shape)

    def _plain(self, W: Any) -> Any:
        """Returns the weight of the convolution with groups."""
        if not self.is_depthwise:
            return W
        return W.transpose(1, 0, *range(2, W.ndim)).reshape(
            -1, 1, *W.shape[2:])

    def correlation(self, x: Any, y: Any, shape: Sequence[int]) -> Any:
        """Returns the gradient of ``<y, conv(x, W)>`` with respect to W.

        Args:
            x: Inputs, shape ``(N, *in_shape)``; arrays.
            y: Outputs, likewise.
            shape: Shape of the weight.

        Returns:
            An array of that shape, the sum over all N.

        """
        if self.is_transposed:
            x, y = y, x
        gW, = convolution_nd.ConvolutionNDGradW(SimpleNamespace(
            ndim=len(shape) - 2, stride=self.stride, pad=self.pad,
            cover_all=self._covers_all(shape, x.shape[2:], y.shape[2:]),
            dilate=self.dilate, groups=self.groups_of(shape),
            inputs=(None, SimpleNamespace(shape=shape, dtype=x.dtype)),
        )).forward((x, y))
        if self.is_depthwise:
            gW = gW.reshape(shape[1], shape[0], *shape[2:])
            gW = gW.transpose(1, 0, *range(2, gW.ndim))
        return gW


def _run(function: Any, *inputs: Any) -> Any:
    """Applies a function; to arrays without a graph, checks and hooks."""
    if any([isinstance(x, chainer.Variable) for x in inputs]):
        return function.apply(inputs)[0]
    return function.forward(inputs)[0]


class ConvolutionMatrix(Matrix):
    """The map of a convolution, transposed, as an ``(m, n)`` matrix.

    ``m`` counts the entries of an input, and ``n`` those of an output: so
    ``u``, which a link keeps, has the shape of an input, and tells its size.
    A row is the output of one entry.

    Args:
        W: Weight of the convolution.
        convolution: The convolution, with ``insize``.

    """

    __slots__ = ('_convolution', '_in', '_out')

    def __init__(self, W: Any, convolution: Convolution) -> None:
        self.array = W
        self._convolution = convolution
        self._in = convolution.in_shape(W.shape)
        self._out = convolution.out_shape(W.shape)
        self.m, self.n = math.prod(self._in), math.prod(self._out)

    def astype(self, dtype: Any) -> ConvolutionMatrix:
        return ConvolutionMatrix(
            self.array.astype(dtype, copy=False), self._convolution)

    def divided_by(self, number: float) -> ConvolutionMatrix:
        return ConvolutionMatrix(self.array / number, self._convolution)

    def is_zero(self) -> bool:
        """Whether all entries are zero; those of W need not be."""
        return not self.row_sums().any()

    def start_at_largest_row(self, dtype: Any) -> Any:
        u = self.xp.zeros(self.m, dtype)
        u[self.row_sums().argmax()] = 1
        return u

    def row_sums(self) -> Any:
        """Returns the sums of magnitudes in rows, as parts of the largest."""
        W = abs(self.array)
        return ConvolutionMatrix(
            W / (W.max() or 1), self._convolution).dot(
                self.xp.ones(self.n, W.dtype))

    def gram(self, U: Any) -> Any:
        return cuda.to_cpu(super().gram(U))

    def peaks(self, U: Any) -> Any:
        return cuda.to_cpu(super().peaks(U))

    def to_device(self, x: Any) -> Any:
        return self.xp.asarray(x)

    def dot(self, v: Any) -> Any:
        return self.dot_all(v).reshape(self.m)

    def tdot(self, u: Any) -> Any:
        return self.tdot_all(u).reshape(self.n)

    def dot_all(self, V: Any) -> Any:
        return self._convolution.adjoint(
            *self._alike(V.reshape(-1, *self._out))).reshape(-1, self.m)

    def tdot_all(self, U: Any) -> Any:
        return self._convolution.apply(
            *self._alike(U.reshape(-1, *self._in))).reshape(-1, self.n)

    def _alike(self, x: Any) -> tuple[Any, Any]:
        """Returns W and images in one dtype, that of their product.

        What Chainer returns has that of the images, also if W has more range.
        """
        dtype = numpy.result_type(self.array.dtype, x.dtype)
        return (self.array.astype(dtype, copy=False),
                x.astype(dtype, copy=False))

    def inner_and_tdot(self, X: Any, u: Any) -> tuple[float, Any]:
        return self.inner(X), self.tdot(u)

    def combination(
            self, a: float, X: Any, c: float, P: Any, Q: Any,
            empty: Any = numpy.empty) -> Any:
        out = self._convolution.correlation(
            P.reshape(-1, *self._in), (c * Q).reshape(-1, *self._out),
            self.array.shape)
        if X is not None:
            out += a * X
        return out

