"""The norm of a link's map, in an interval that surely holds it."""
from __future__ import annotations

import copy
import math
import sys
import time
from typing import Any, Callable

import chainer
import numpy
from chainer import links as L
from chainer.backends import cuda

from sn_function import _checks, _models, errors
from sn_function._arithmetic.convolution import Convolution
from sn_function._certificate.interval import Interval, norm_interval
from sn_function._links import call
from sn_function._links.weight import convolution_of

# Seconds before the first line on progress, and between two.
DELAY, PAUSE = 2., 1.


def certify(
        link: chainer.Link, rtol: float = 1e-3,
        time_limit: float | None = 10., insize: Any = None,
        progress: Callable[[Interval], Any] | None = None) -> Interval:
    """Returns an interval that surely holds the norm of a link's map.

    The norm is the largest factor by which the link, without its bias, makes
    an input longer: its Lipschitz constant.  That of a
    :class:`~chainer.links.Linear` or :class:`~chainer.links.EmbedID` is the
    largest singular value of the weight.  That of a convolution or a
    deconvolution is not, as the map takes images to images.  It depends on
    their size; the supremum for all sizes, with any padding of zeros, is

    .. math::

        \\sup_\\omega \\|F(\\omega)\\|_2, \\quad
        F(\\omega) = \\sum_j F_j e^{i \\langle j, \\omega \\rangle},

    where the :math:`F_j` are matrices of the taps of the kernel, by phases of
    the stride.  ``hi`` is above the norm for every size; ``lo`` is below the
    supremum, and the norms of growing images come close to that.

    With a hook, this package's or Chainer's, the weight is the normalized one
    of a call in test mode.  The link and its state are left alone.  All is
    computed in float64 on the host, and both ends allow for every rounding:
    the interval holds the norm of the weight as it is stored.

    Args:
        link (~chainer.Link): One of the links above, of 1 to N dimensions,
            with any stride, padding, dilation and groups, or
            :class:`~chainer.links.DepthwiseConvolution2D`; or another link
            with a hook on its ``W``, if that is a matrix.
        rtol (float): The width of the interval that is wanted, in units of
            the norm.
        time_limit (float or None): Seconds after which the interval may be
            wider, if that was not enough; ``None`` for no limit.  A step that
            cannot be interrupted, such as the decomposition of a large
            matrix, may take a little longer.
        insize (int, tuple of int or None): Size of the images, to get the
            norm of the map for this size.  Where this map is too large to be
            made a matrix, of some thousand entries, ``hi`` is that for all
            sizes.  Links that do not map images take no notice of it.
            A deconvolution with a fixed ``outsize`` takes only some sizes,
            and ``lo`` may be above the norms of these unless it is given.
        progress (callable or None): Called with the interval that is proved
            so far, about each second, after the first two.  ``None``: a line
            on the standard error, if that is a terminal.

    Returns:
        Interval: A named tuple ``(lo, hi)``.  ``hi <= (1 + rtol) * lo`` tells
        whether the tolerance has been reached.  It is (0, 0) for a weight of
        zeros, and (nan, nan) for one that holds NaN or Inf.

    Raises:
        CertifyLinkError: It is not known what the link does with its weight.
        UninitializedWeightError: The weight has no array yet.
        CertifyArgumentError: An argument is out of its range.
        InputSizeError: Images of ``insize`` are too small.

    .. admonition:: Example

        >>> import numpy as np
        >>> import chainer.links as L
        >>> import sn_function
        >>> layer = L.Convolution2D(1, 1, 3, pad=1)
        >>> layer.W.array[...] = 1  # a sum of 9 pixels
        >>> lo, hi = sn_function.certify(layer)
        >>> bool(lo <= 9 <= hi <= 1.001 * lo)
        True
        >>> lo, hi = sn_function.certify(layer, insize=2)
        >>> print(f'{lo:.6f} {hi:.6f}')
        4.000000 4.000000

    """
    check(rtol, time_limit)
    W, convolution = _map_of(link)
    if convolution is not None and insize is not None:
        size = _checked_size(insize, len(convolution.stride))
        convolution = convolution._replace(insize=size)
        if convolution.outsize and not convolution.fits_outsize(W.shape):
            raise errors.OutputSizeError(
                convolution.outsize, size, W.shape)
    return interval_of(W, convolution, rtol, time_limit, progress)


def interval_of(
        W: Any, convolution: Convolution | None, rtol: float,
        time_limit: float | None,
        progress: Callable[[Interval], Any] | None = None) -> Interval:
    """Returns the interval of a map, with progress as of :func:`certify`."""
    report = _Report(progress)
    try:
        return norm_interval(W, convolution, rtol, time_limit, report)
    finally:
        report.close()


def _map_of(link: chainer.Link) -> tuple[Any, Convolution | None]:
    """Returns the weight that a link uses, and what it does beside it."""
    _models.check_models('certify', link)
    is_hooked = bool(_hooks_of(link))
    convolution = convolution_of(link)
    is_matrix = is_hooked or isinstance(link, (L.Linear, L.EmbedID))
    if convolution is None and not is_matrix:
        raise errors.CertifyLinkError(link)
    W = call.original(link, 'W')
    if W.array is None:
        raise errors.UninitializedWeightError(type(link).__name__, 'W')
    if convolution is None and W.ndim != 2:
        raise errors.CertifyLinkError(link)
    _checks.check_weight(W.array)
    array = _normalized(link) if is_hooked else W.array
    return cuda.to_cpu(array), convolution


def _normalized(link: chainer.Link) -> Any:
    """Returns the weight of a call in test mode, that leaves no trace."""
    twin = copy.deepcopy(link)
    state = numpy.random.get_state()
    try:
        _models.normalize_weights(twin, _hooks_of(twin))
    finally:  # what was drawn is for the copy alone
        numpy.random.set_state(state)
    return vars(twin)['W'].array


def _hooks_of(link: chainer.Link) -> list[Any]:
    return [hook for hook in _models.hooks_of(link)
            if hook.weight_name == 'W']


def check(rtol: Any, time_limit: Any) -> None:
    """Raises an error unless both are in their ranges."""
    if not 0 < _checks.as_float(rtol) < math.inf:
        raise errors.CertifyArgumentError(
            'rtol', rtol, 'a finite number above 0, such as 1e-3')
    if time_limit is not None and not _checks.as_float(time_limit) >= 0:
        raise errors.CertifyArgumentError(
            'time_limit', time_limit,
            'a number of seconds, or None for no limit')


def _checked_size(insize: Any, ndim: int) -> tuple[int, ...]:
    try:
        return _checks.check_sizes('insize', insize, ndim, 1)
    except errors.SizeError:
        raise errors.CertifyArgumentError(
            'insize', insize, f'the size of images with {ndim} axes: a '
            f'number of at least 1, or a tuple of {ndim}') from None


class _Report:
    """Reports the interval from time to time, until it is closed."""

    def __init__(self, show: Callable[[Interval], Any] | None) -> None:
        if show is None and sys.stderr.isatty():
            show = self._print
        self._show = show
        self._start = time.monotonic()
        self._next = self._start + DELAY
        self._width = 0

    def __call__(self, lo: float, hi: float) -> None:
        now = time.monotonic()
        if self._show is not None and now >= self._next:
            self._next = now + PAUSE
            self._show(Interval(lo, hi))

    def _print(self, interval: Interval) -> None:
        seconds = time.monotonic() - self._start
        line = (f'certify: {interval.lo:#.6g} <= norm <= '
                f'{interval.hi:#.6g}, {seconds:.0f} s')
        self._width = max(self._width, len(line))
        sys.stderr.write('\r' + line.ljust(self._width))
        sys.stderr.flush()

    def close(self) -> None:
        if self._width:
            sys.stderr.write('\r' + ' ' * self._width + '\r')
