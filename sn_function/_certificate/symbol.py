"""The symbol of a convolution: what it does to waves, as a matrix for each.

A convolution with zero padding is a part of one of infinite images: rows and
columns of its matrix are left out.  The latter takes a wave of frequency
``w`` to one of the same frequency, by the matrix

    F(w) = sum_j F_j e^{i <j, w>},    |conv| = sup_w |F(w)|_2,

so ``sup_w |F(w)|_2`` bounds the norm of the map of images of every size, with
every padding, and the norms tend to it as images grow.  With a stride s, an
image is the s images of its phases, and the channels of each are channels of
F.  With a dilation d as well, the taps i and i + s / gcd(s, d) of the kernel
are of one phase, and d / gcd(s, d) pixels of it apart; as the supremum is
over all w, neither the distance nor where a phase starts changes it.  So

    F_j[o, (c, r)] = W[o, c, s' j + r],    s' = s / gcd(s, d),  0 <= r < s'.

A transposed convolution is the adjoint of one, and has its norm; of groups
it is the largest one.

What is computed with is the Gram matrix of the smaller side,

    G(w) = F(w) F(w)^* = sum_t G_t e^{i <t, w>},    G_t = sum_j F_{j+t} F_j^T,

as products of real matrices give it for many w at once.
"""
from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy

from sn_function._arithmetic.convolution import Convolution
from sn_function._certificate import proofs
from sn_function._certificate.proofs import EPS, frobenius, rounding


def grouped(W: Any, convolution: Convolution | None) -> Any:
    """Returns the groups of a weight, shape ``(g, m, n, *k)``.

    Args:
        W: The weight, an array of NumPy.
        convolution: The convolution, or ``None`` for a matrix, whose rows
            are along the first axis of W.

    """
    if convolution is None:
        return W.reshape(1, len(W), -1)
    if convolution.is_depthwise:
        return W.swapaxes(0, 1)[:, :, None]
    return W.reshape(
        convolution.groups, -1, *W.shape[1:])


def taps(blocks: Any, convolution: Convolution | None) -> Any:
    """Returns the F_j of all groups, shape ``(g, *T, m, n)``, m <= n.

    Axes of length 1 are left out of T, where the symbol is constant.

    Args:
        blocks: Groups of the weight, shape ``(g, m, n, *k)``.
        convolution: The convolution, or ``None`` for a matrix.

    """
    g, m, n, *ksize = blocks.shape
    ndim = len(ksize)
    steps = [] if convolution is None else [
        min(k, s // math.gcd(s, d)) for k, s, d in zip(
            ksize, convolution.stride, convolution.dilate)]
    lengths = [-(-k // s) for k, s in zip(ksize, steps)]
    padded = numpy.zeros(
        (g, m, n, *[length * s for length, s in zip(lengths, steps)]))
    padded[tuple(map(slice, blocks.shape))] = blocks
    pairs = [each for pair in zip(lengths, steps) for each in pair]
    F = padded.reshape(g, m, n, *pairs).transpose(
        0, *range(3, 3 + 2 * ndim, 2), 1, 2, *range(4, 4 + 2 * ndim, 2))
    F = F.reshape(g, *[T for T in lengths if T > 1], m, -1)
    return F if m <= F.shape[-1] else F.swapaxes(-1, -2)


class Symbol:
    """The symbols of the groups of a convolution, none of them constant.

    Attributes:
        degrees: D of each axis: ``|F(w)^* x|^2`` is a trigonometric
            polynomial of these degrees.
        q: Number of rows.
        sizes: For each group ``sum_j |F_j|_F``, which bounds its norm.
        bounds: Better bounds of the norms: with T taps

            |F(w)|^2 <= T |sum_j F_j F_j^T|_2 = T |G_0|_2
            |F(w)|^2 <= sum_t |G_t|_2

        gram_error: For each group a bound of the rounding error of
            :meth:`gram`, in the spectral norm.
        curvatures: For each group ``|G_t|_2`` at each of ``lags``, or more.
        lags: Half of the t, without zero, shape ``(L, d)``.

    Args:
        taps: Array of shape ``(g, *T, m, n)``, m <= n.

    """

    def __init__(self, taps: Any) -> None:
        g, *lengths, self.q, n = taps.shape
        self.degrees = numpy.array(lengths) - 1
        self.shifts = numpy.array(
            list(product(*map(range, lengths)))).reshape(-1, len(lengths))
        self.taps = taps.reshape(g, -1, self.q, n)
        self.sizes = frobenius(self.taps).sum(axis=1) * (
            1 + rounding(len(self.shifts)))
        lags = [t for t in product(*[range(-D, D + 1) for D in self.degrees])
                if t > (0,) * len(t)]
        self.lags = numpy.array(lags).reshape(-1, len(lengths))
        zero = _coefficient(taps, (0,) * len(lengths))
        others = [_coefficient(taps, t) for t in lags]
        transposed = [G.swapaxes(1, 2) for G in others]
        # What cos(<t, w>) and sin(<t, w>) are multiplied with.
        self._even = numpy.stack(
            [zero, *[G + H for G, H in zip(others, transposed)]], axis=1)
        self._odd = numpy.stack(
            [G - H for G, H in zip(others, transposed)], axis=1)
        self.gram_error = self.sizes ** 2 * (
            rounding(n * len(self.shifts)) + rounding(2 * len(lags) + 1)
            + 2 * self._wave_error())
        self.curvatures = numpy.stack(
            list(map(_norm_bounds, others)), axis=1)
        n_taps, of_zero = len(self.shifts), _norm_bounds(zero)
        squares = numpy.minimum(
            n_taps * of_zero, of_zero + 2 * self.curvatures.sum(axis=1))
        self.bounds = numpy.minimum(self.sizes, (1 + 1e-6) * numpy.sqrt(
            squares + n_taps * self.gram_error))

    def _wave_error(self) -> float:
        """Bounds the error of ``e^{i <t, w>}``, |t| <= D and |w| < 10."""
        return EPS * (
            8 + 10 * self.degrees.sum() * (1 + len(self.degrees)))

    def gram(self, group: int, w: Any) -> Any:
        """Returns G at each of the frequencies ``w``, shape ``(B, d)``."""
        angles = w @ self.lags.T
        ones = numpy.ones((len(w), 1))
        G = numpy.empty((len(w), self.q, self.q), complex)
        shape = G.shape
        G.real = (numpy.concatenate([ones, numpy.cos(angles)], axis=1)
                  @ self._even[group].reshape(-1, self.q ** 2)).reshape(shape)
        G.imag = (numpy.sin(angles)
                  @ self._odd[group].reshape(-1, self.q ** 2)).reshape(shape)
        return G

    def lower_bound(self) -> float:
        """Returns a lower bound of the largest norm of a group.

        The mean of ``|F(w)^* x|^2`` over all w is ``sum_j |F_j^T x|^2``.
        """
        squares = (self.taps ** 2).sum(axis=(1, 3))
        return math.sqrt(squares.max()) * (
            1 - rounding(self.taps[0, :, 0].size))

    def value(self, group: int, w: Any, x: Any) -> float:
        """Returns a lower bound of ``|F(w)|_2``: what it does to ``x``."""
        y = numpy.exp(-1j * (self.shifts @ w)) @ self.responses(group, x)
        return proofs.lower_bound(y, x, self.sizes[group] * (
            rounding(self.q) + rounding(len(self.shifts))
            + self._wave_error()))

    def responses(self, group: int, x: Any) -> Any:
        """Returns ``F_j^T x`` for each j, shape ``(T, n)``."""
        real, imaginary = numpy.moveaxis(
            numpy.stack([x.real, x.imag]) @ self.taps[group], 1, 0)
        return real + 1j * imaginary


def _coefficient(taps: Any, t: Any) -> Any:
    """Returns G_t of all groups, shape ``(g, q, q)``."""
    g, *_, q, n = taps.shape
    later = tuple(slice(max(a, 0), a or None if a < 0 else None) for a in t)
    earlier = tuple(slice(max(-a, 0), -a or None if a > 0 else None)
                    for a in t)
    A, B = (taps[(slice(None), *part)].reshape(g, -1, q, n).swapaxes(
        1, 2).reshape(g, q, -1) for part in (later, earlier))
    return A @ B.swapaxes(1, 2)


def _norm_bounds(A: Any) -> Any:
    """Bounds the spectral norms of matrices, by ``|(A A^T)^4|_F^(1/8)``.

    This is at most ``q^(1/16)`` times as large.  What rounding adds is a
    part of ``q^2 EPS``, and the last factor more.
    """
    scales = frobenius(A)
    H = A / numpy.where(scales > 0, scales, 1)[:, None, None]
    H = H @ H.swapaxes(1, 2)
    for _ in range(2):
        H = H @ H
    return frobenius(H) ** 0.125 * scales * (1 + 1e-4)
