"""What users say of weights, as no snapshot holds it.

That is the output axis, and what a convolution does beside its weight.
"""
from __future__ import annotations

import fnmatch
import operator
from types import MappingProxyType
from typing import Any, Mapping, NamedTuple, Sequence

from sn_function import errors
from sn_function._arithmetic.convolution import Convolution
from sn_function._arithmetic.matrix import normalize_axis
from sn_function._snapshots.layouts import WeightKeys

Axes = Mapping[str, int]  # of patterns of weights
# For all weights, or by patterns; for all axes of images, or for each.
Numbers = Any
DEPTHWISE = 'depthwise'  # as many groups as channels
_LEAST = {'stride': 1, 'pad': 0, 'dilate': 1, 'groups': 1}


class Given(NamedTuple):
    """Values by patterns of weights; the first one that fits counts."""

    axis: Axes = MappingProxyType({})
    stride: Mapping[str, Any] = MappingProxyType({})
    pad: Mapping[str, Any] = MappingProxyType({})
    dilate: Mapping[str, Any] = MappingProxyType({})
    groups: Mapping[str, Any] = MappingProxyType({})

    def of(self, name: str, weight: WeightKeys) -> Any:
        """Returns what is given for a weight, or ``None``."""
        return next((value for pattern, value in getattr(self, name).items()
                     if _fits(pattern, weight)), None)

    def check(self, path: str, weights: Sequence[WeightKeys]) -> None:
        """Raises an error unless each pattern fits a weight."""
        for name, values in self._asdict().items():
            for pattern in values:
                if not any(_fits(pattern, weight) for weight in weights):
                    what = {'axis': 'an axis', 'groups': 'groups'}.get(
                        name, f'a {name}')
                    raise errors.SnapshotPatternError(
                        path, pattern, f'no weight fits the pattern of {what}',
                        [weight.W for weight in weights])

    def has_map(self, weight: WeightKeys) -> bool:
        """Whether it is known which map a convolution is."""
        return None not in (self.of('stride', weight), self.of('pad', weight))

    def convolution(
            self, path: str, weight: WeightKeys, shape: Sequence[int],
    ) -> Convolution | None:
        """Returns the convolution of a weight, if it is one by its shape.

        What is not given is 1, and without padding.

        Raises:
            SnapshotMapError: The weight is of no such convolution.

        """
        if len(shape) == 2:
            return None
        numbers: dict[str, Any] = {}
        for name in 'stride', 'pad', 'dilate':
            value = self.of(name, weight)
            value = _LEAST[name] if value is None else value
            values = (value,) * (len(shape) - 2) if isinstance(
                value, int) else value
            if len(values) != len(shape) - 2:
                raise errors.SnapshotMapError(
                    path, weight.W, f'{name} {values} is not for the '
                    f'{len(shape) - 2} axes of its images')
            numbers[name] = values
        groups = self.of('groups', weight) or 1
        if groups == DEPTHWISE:
            return Convolution(**numbers, is_depthwise=True)
        if shape[0] % groups:
            raise errors.SnapshotMapError(
                path, weight.W, f'its shape {tuple(shape)} is not one of '
                f'{groups} groups')
        return Convolution(**numbers, groups=groups)

    def map(
            self, path: str, weight: WeightKeys, shape: Sequence[int],
            in_shape: Sequence[int]) -> Convolution:
        """Returns the convolution that maps inputs of that shape.

        It is a deconvolution where its output axis is 1, or where only that
        has so many channels.
        """
        convolution = self.convolution(path, weight, shape)
        assert convolution is not None
        axis = self.of('axis', weight)
        kinds = (False, True) if axis is None else (
            normalize_axis(axis, len(shape)) == 1,)
        for is_transposed in kinds:
            choice = convolution._replace(
                is_transposed=is_transposed, insize=tuple(in_shape[1:]))
            if choice.in_shape(shape) == tuple(in_shape):
                return choice
        raise errors.SnapshotMapError(
            path, weight.W, f'its shape {tuple(shape)} does not fit its '
            f'vector of {in_shape[0]} channels, with the groups and the axis '
            f'that are given')


def _fits(pattern: str, weight: WeightKeys) -> bool:
    return pattern == weight.W or fnmatch.fnmatchcase(weight.W, pattern)


def make(axes: Axes | None, **options: Numbers) -> Given:
    """Returns what is given to a function, checked.

    Raises:
        MapOptionError: A number is out of its range.

    """
    return Given(axes or {}, **{
        name: _by_pattern(name, value) for name, value in options.items()})


def _by_pattern(name: str, value: Numbers) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        value = {'*': value}
    return {pattern: _checked(name, each) for pattern, each in value.items()}


def _checked(name: str, value: Any) -> Any:
    if name == 'groups' and isinstance(value, str) and value == DEPTHWISE:
        return value
    is_one = not isinstance(value, (list, tuple)) or name == 'groups'
    try:
        numbers = tuple(map(operator.index, [value] if is_one else value))
    except TypeError:
        numbers = ()
    if not numbers or min(numbers) < _LEAST[name]:
        raise errors.MapOptionError(name, value)
    return numbers[0] if is_one else numbers
