"""A bound on the Lipschitz constant of a network, from those of its layers.

Layers one after another multiply, and branches whose outputs are added add
up.  The numbers are exact fractions until the end, which rounds up once.
"""
from __future__ import annotations

import fnmatch
import functools
import inspect
import math
from fractions import Fraction
from typing import Any, Callable, Iterable, Iterator

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer import link_hooks

from sn_function import errors
from sn_function._models import SUPPORTED_BY_GROUP, check_filter, takes

CHAINS = chainer.Chain, chainer.ChainList
# What they do, beside calling their children, is up to subclasses.
CONTAINERS = (chainer.Link, *CHAINS, chainer.Sequential)
BATCH_NORMALIZATIONS = (L.BatchNormalization, L.BatchRenormalization)

# A fraction, or a float that is not finite.
Number = Any


def bound(
        model: chainer.Link, interval: Callable[[chainer.Link], Any],
        residual: Any = None) -> float:
    """Returns a bound for calls in test mode, in exact arithmetic.

    Args:
        model: The network.
        interval: Returns the interval ``(lo, hi)`` of the norm of a Linear,
            an EmbedID or a convolution.
        residual: As in :class:`~sn_function.extensions.SpectralNormReport`.

    Raises:
        LipschitzError: The network has layers that are not understood.
        UninitializedWeightError: Some have no parameters yet.

    """
    for path, parameter in model.namedparams():
        if parameter.array is None:
            raise errors.UninitializedWeightError(
                type(model).__name__, path[1:])
    walk = _Walk(interval, residual)
    value = walk.link('/', model)
    if walk.unknown:
        raise errors.LipschitzError(model, walk.unknown)
    return _rounded_up(value)


def check_residual(residual: Any) -> None:
    """Raises an error unless :func:`bound` can use it."""
    if residual is not None:
        for filter, shortcut in _sums(residual):
            check_filter(filter)
            if not (shortcut is None or isinstance(shortcut, str)):
                raise errors.ShortcutError(shortcut)


def _sums(residual: Any) -> Iterable[tuple[Any, str | None]]:
    """Returns pairs of a filter and the pattern of the shortcut."""
    if residual is None:
        return ()
    if isinstance(residual, dict):
        return residual.items()
    return ((residual, None),)


class _Walk:
    """Goes through a network, in the order of its layers.

    Attributes:
        unknown (list of str): The layers that are not understood.

    """

    def __init__(
            self, interval: Callable[[chainer.Link], Any], residual: Any,
    ) -> None:
        self.unknown: list[str] = []
        self._interval = interval
        self._sums = _sums(residual)
        self._is_first = True

    def link(self, path: str, link: chainer.Link) -> Number:
        for filter, shortcut in self._sums:
            # A pattern of chains may take the links in them, too.
            if isinstance(link, CHAINS) and takes(filter, path, link):
                return self._sum(path, link, shortcut)
        kind = _kind(link)
        if kind in CONTAINERS and not link._params:
            return _product(value for _, value in self._parts(path, link))
        is_first, self._is_first = self._is_first, False
        if _is_overridden(link, kind):
            kind = None
        if kind is L.EmbedID and not is_first:
            # It has no output of another layer for an input: so the layers
            # are not in a row, as where classes are projected.
            kind = None
        if kind in SUPPORTED_BY_GROUP:
            return _number(self._interval(link)[1])
        if kind in BATCH_NORMALIZATIONS:
            return _batch_normalization(link)
        return self._unknown(f'{type(link).__name__} {path}')

    def _sum(
            self, path: str, link: chainer.Link, pattern: str | None,
    ) -> Number:
        """Of a chain that adds its shortcut to what its other layers do."""
        if link._params:
            return self._unknown(f'{type(link).__name__} {path}')
        branches: dict[bool, list[Number]] = {False: [], True: []}
        for name, value in self._parts(path, link):
            is_shortcut = pattern is not None and fnmatch.fnmatchcase(
                name, pattern)
            branches[is_shortcut].append(value)
        return _product(branches[False]) + _product(branches[True])

    def _parts(
            self, path: str, link: chainer.Link,
    ) -> Iterator[tuple[str, Number]]:
        """Yields names and bounds of what the link is made of."""
        is_sequential = isinstance(link, chainer.Sequential)
        for i, part in enumerate(link if is_sequential else link.children()):
            if isinstance(part, chainer.Link):
                yield part.name, self.link(
                    f'{path.rstrip("/")}/{part.name}', part)
                continue
            value = _function(part)
            if value is None:
                value = self._unknown(f'{_text(part)} (layer {i} of {path})')
            yield '', value

    def _unknown(self, name: str) -> Number:
        self.unknown.append(name)
        return Fraction(1)


# Numbers

def _number(x: float) -> Number:
    return Fraction(x) if math.isfinite(x) else x


def _product(values: Iterable[Number]) -> Number:
    return math.prod(values, start=Fraction(1))


def _rounded_up(value: Number) -> float:
    try:
        x = float(value)
    except OverflowError:
        return math.inf
    if math.isfinite(x) and Fraction(x) < value:
        x = float(numpy.nextafter(x, numpy.inf))
    return x


def _root(value: Fraction) -> Fraction:
    """Returns the square root, rounded up."""
    x = math.sqrt(value)
    while Fraction(x) ** 2 < value:
        x = float(numpy.nextafter(x, numpy.inf))
    return Fraction(x)


# Links

def _kind(link: chainer.Link) -> Any:
    """Returns the first class of the link that is one of Chainer's."""
    return next(cls for cls in type(link).__mro__
                if cls.__module__.split('.')[0] in ('chainer', 'chainermn'))


def _is_overridden(link: chainer.Link, kind: Any) -> bool:
    """Whether a call of the link does something else than its kind does."""
    return any([
        *[getattr(type(link), name, None) is not getattr(kind, name, None)
          for name in ('forward', '__call__')],
        *[isinstance(hook, link_hooks.WeightStandardization)
          for hook in link.local_link_hooks.values()]])


def _batch_normalization(link: Any) -> Number:
    """max |gamma| / sqrt(var + eps)"""
    if link.avg_var is None:
        raise errors.UninitializedWeightError(type(link).__name__, 'avg_var')
    var = chainer.get_device('@numpy').send(link.avg_var)
    gamma = 1. if link.gamma is None else chainer.get_device('@numpy').send(
        link.gamma.array)
    with numpy.errstate(all='ignore'):
        ratios = abs(numpy.float64(gamma)) / numpy.sqrt(
            numpy.float64(var) + link.eps)
    # The sum, the root and the quotient round by less than 2 eps together.
    return _number(float(ratios.max())) * Fraction(1 + 2 ** -51)


# Functions

def _elu(alpha: float, scale: float = 1.) -> Number:
    return _number(abs(scale)) * _number(max(1., abs(alpha)))


def _n_windows(ndim: int, ksize: Any, stride: Any) -> int:
    """Returns the largest number of windows that an entry is in."""
    ksize = _each(ksize, ndim)
    stride = ksize if stride is None else _each(stride, ndim)
    return math.prod([-(-k // s) for k, s in zip(ksize, stride)])


def _each(x: Any, ndim: int) -> Any:
    return tuple(x) if hasattr(x, '__getitem__') else (x,) * ndim


def _max_pooling(
        ndim: int, ksize: Any, stride: Any, **kwargs: Any) -> Number:
    return _root(Fraction(_n_windows(ndim, ksize, stride)))


def _average_pooling(
        ndim: int, ksize: Any, stride: Any, pad: Any, pad_value: Any = 0,
) -> Number:
    """By sums of rows and columns; exact where strides divide windows."""
    n_windows = _n_windows(ndim, ksize, stride)
    if pad_value is None and any(_each(pad, ndim)):  # windows are cut off
        return _root(Fraction(n_windows))
    return _root(Fraction(n_windows, math.prod(_each(ksize, ndim))))


def _unpooling(
        ndim: int, ksize: Any, stride: Any, **kwargs: Any) -> Number:
    """The adjoint of average pooling, times the size of a window."""
    return _root(Fraction(
        _n_windows(ndim, ksize, stride) * math.prod(_each(ksize, ndim))))


# Those that magnify no difference, whatever their arguments are; dropout in
# test mode.
NEVER_MAGNIFY = (
    F.absolute, F.clipped_relu, F.dropout, F.expand_dims, F.flatten,
    F.hard_sigmoid, F.identity, F.relu, F.relu6, F.reshape, F.rollaxis,
    F.softplus, F.squeeze, F.swapaxes, F.tanh, F.transpose)
# The others: of their arguments, without the input.
RULES: dict[Any, Callable[..., Number]] = {
    F.sigmoid: lambda: Fraction(1, 4),
    F.elu: _elu,
    F.selu: _elu,
    F.leaky_relu: lambda slope: _elu(slope),
    F.max_pooling_1d: functools.partial(_max_pooling, 1),
    F.max_pooling_2d: functools.partial(_max_pooling, 2),
    F.max_pooling_3d: functools.partial(_max_pooling, 3),
    F.average_pooling_1d: functools.partial(_average_pooling, 1),
    F.average_pooling_2d: functools.partial(_average_pooling, 2),
    F.average_pooling_3d: functools.partial(_average_pooling, 3),
    F.unpooling_1d: functools.partial(_unpooling, 1),
    F.unpooling_2d: functools.partial(_unpooling, 2),
    F.unpooling_3d: functools.partial(_unpooling, 3),
}


def _function(function: Any) -> Number | None:
    """Returns a bound for a function in a Sequential, if one is known."""
    keywords: dict[str, Any] = {}
    if isinstance(function, functools.partial) and not function.args:
        function, keywords = function.func, function.keywords
    if not inspect.isfunction(function):
        return None
    if function in NEVER_MAGNIFY:
        return Fraction(1)
    rule = RULES.get(function)
    if rule is None:
        return None
    arguments = inspect.signature(function).bind_partial(**keywords)
    arguments.apply_defaults()
    return rule(**{name: value for name, value in arguments.arguments.items()
                   if name != 'x'})


def _text(function: Any) -> str:
    return getattr(function, '__name__', None) or repr(function)
