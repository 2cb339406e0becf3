"""Reads a weight, its vectors and its gamma out of a snapshot.

A snapshot does not say which link had a weight, and so not which axis is that
of its outputs: :func:`_output_axis` finds out.
"""
from __future__ import annotations

import fnmatch
from typing import Any, Mapping, NamedTuple

import numpy

from sn_function import errors, functions
from sn_function._arithmetic import singular
from sn_function._arithmetic.matrix import normalize_axis
from sn_function._snapshots import layouts
from sn_function._snapshots.layouts import Weight
from sn_function._snapshots.readers import Reader

Axes = Mapping[str, int]  # of patterns of weights


class Arrays(NamedTuple):
    """The arrays of a weight, and what is wrong with its vectors, if so."""

    W: Any
    axis: int
    u: Any = None     # (m,)
    v: Any = None     # (n,), of PyTorch
    gamma: Any = None  # ()
    fault: str | None = None
    axis_is_unclear: bool = False


def _read_weight(reader: Reader, weight: Weight) -> Any:
    W = reader.read(weight.weight)
    if W.dtype.char not in 'efd' or W.ndim < 2 or W.size == 0:
        raise errors.SnapshotWeightError(
            reader.path, weight.weight, f'a weight is an array of float16, '
            f'float32 or float64 with 2 or more dimensions, none of them '
            f'empty, and this has shape {W.shape} and dtype {W.dtype}')
    return W


def check_finite(reader: Reader, key: str, array: Any) -> None:
    if not numpy.isfinite(array).all():
        raise errors.SnapshotWeightError(
            reader.path, key, 'it holds NaN or Inf')


def _read_vector(
        reader: Reader, key: str, shape: tuple[int, ...],
) -> tuple[Any, str | None]:
    """Returns a vector, if it can be used, and otherwise why not."""
    entry = reader.entry(key)
    if not entry.is_plain:
        return None, 'not initialized'
    if entry.shape != shape:
        return None, f'of shape {entry.shape} instead of {shape}'
    x = reader.read(key)
    if x.dtype.char not in 'efd':
        return None, f'of dtype {x.dtype}'
    if not numpy.isfinite(x).all():
        return None, 'NaN' if numpy.isnan(x).any() else 'Inf'
    if not x.any():
        return None, 'zero'
    return x.reshape(-1), None


def read_all(reader: Reader, weight: Weight, axes: Axes) -> Arrays:
    W = _read_weight(reader, weight)
    gamma = None
    if weight.gamma is not None:
        gamma = reader.read(weight.gamma)
        if gamma.dtype.char not in 'efd' or gamma.size != 1:
            raise errors.SnapshotWeightError(
                reader.path, weight.gamma, f'a gamma is one number, a float, '
                f'and this has shape {gamma.shape} and dtype {gamma.dtype}')
        gamma = gamma.reshape(())
    axis, is_unclear = _output_axis(reader, weight, W, axes)
    m = W.shape[axis]
    u, fault = _read_vector(
        reader, weight.u,
        (1, m) if weight.layout == layouts.SNGAN else (m,))
    v = None
    if weight.v is not None:
        v, fault_of_v = _read_vector(reader, weight.v, (W.size // m,))
        fault = fault or fault_of_v
    arrays = Arrays(W, axis, u, v, gamma, fault, is_unclear)
    if v is not None and fault is None and estimate(weight, arrays) < 0:
        return arrays._replace(fault='opposite to v')
    return arrays


def require_vectors(
        reader: Reader, weight: Weight, axes: Axes) -> Arrays:
    """Reads a weight that has all it needs."""
    arrays = read_all(reader, weight, axes)
    check_finite(reader, weight.weight, arrays.W)
    if arrays.axis_is_unclear:
        raise errors.SnapshotAxisError(
            reader.path, weight.weight, f'its shape {arrays.W.shape} leaves '
            f'open which axis is that of its outputs, and its vector fits '
            f'axis 1 better')
    if arrays.fault is not None:
        raise errors.SnapshotVectorError(
            reader.path, weight.u, f'the vector of {weight.weight!r} is '
            f'{arrays.fault}')
    if arrays.gamma is not None:
        check_finite(reader, weight.gamma or '', arrays.gamma)
    return arrays


def given_axis(weight: Weight, axes: Axes) -> int | None:
    """Returns the axis of the first pattern that fits, if there is one."""
    for pattern, axis in axes.items():
        if weight.weight == pattern or fnmatch.fnmatchcase(
                weight.weight, pattern):
            return axis
    return None


def find(reader: Reader, prefix: str, axes: Axes) -> list[Weight]:
    """Returns the weights below a path; each of the axes is that of one."""
    weights = layouts.find(reader, prefix)
    for pattern, axis in axes.items():
        if all(given_axis(weight, {pattern: axis}) is None
               for weight in weights):
            raise errors.SnapshotLayoutError(
                reader.path, f'no weight fits the pattern {pattern!r} of an '
                f'axis', [weight.weight for weight in weights])
    return weights


def _output_axis(
        reader: Reader, weight: Weight, W: Any, axes: Axes,
) -> tuple[int, bool]:
    """Returns the output axis, and whether it is doubtful."""
    given = given_axis(weight, axes)
    if given is not None:
        return normalize_axis(given, W.ndim), False
    entry = reader.entry(weight.u)
    # PyTorch may have dim=1 for a matrix; Chainer has 0.
    if (W.ndim == 2 and not weight.is_torch) or (
            weight.layout == layouts.SNGAN) or (
            entry.shape is None or len(entry.shape) != 1):
        return 0, False
    if entry.shape[0] != W.shape[0]:
        return int(entry.shape[0] == W.shape[1]), False
    if W.shape[0] != W.shape[1] or not numpy.isfinite(W).all():
        return 0, False
    u, fault = _read_vector(reader, weight.u, entry.shape)
    if fault is not None:
        return 0, False
    if weight.v is not None:
        v, fault = _read_vector(reader, weight.v, (W.size // W.shape[0],))
        if fault is None:  # PyTorch has u = W v / |W v|, which decides
            angles = [singular.angle(W, u, v, axis) for axis in (0, 1)]
            return int(angles[1] > angles[0]), False
    is_unclear = singular.fit(W, u, 1) > singular.fit(W, u, 0) + 0.1
    return int(is_unclear), is_unclear


def estimate(
        weight: Weight, arrays: Arrays, n_power_iteration: int = 1) -> float:
    """What the vectors give for sigma in test mode."""
    if weight.is_torch:
        A = singular.as_matrix(arrays.W, arrays.axis)
        return float(arrays.u @ (A @ arrays.v))
    sigma = functions.spectral_norm(
        arrays.W, arrays.u.astype(arrays.W.dtype), n_power_iteration,
        arrays.axis)
    return float(sigma.array)
