"""Reads a weight, its vectors and its gamma from a snapshot.

A snapshot does not say which link had a weight, and so not which axis is that
of its outputs: :func:`_output_axis` finds out.
"""
from __future__ import annotations

from typing import Any, Callable, Iterator, Sequence

import numpy

from sn_function import errors
from sn_function._arithmetic import singular
from sn_function._arithmetic.matrix import normalize_axis
from sn_function._snapshots import finding, layouts, vectors
from sn_function._snapshots.given import Given
from sn_function._snapshots.layouts import WeightKeys
from sn_function._snapshots.readers import Reader
from sn_function._snapshots.vectors import WeightArrays

# Arrays

def read(reader: Reader, weight: WeightKeys, given: Given) -> WeightArrays:
    """Reads a weight with all that it has.

    Raises:
        SnapshotError: An entry is damaged, or the weight or its gamma is no
            such array.  That of a vector is returned as a ``fault``.

    """
    W = _read_weight(reader, weight)
    gamma = None if weight.gamma is None else _read_gamma(
        reader, weight, weight.gamma)
    if weight.is_map:
        return _read_map(reader, weight, W, gamma, given)
    axis, is_unclear = _output_axis(reader, weight, W, given)
    m = W.shape[axis]
    u, fault = _read_vector(reader, weight.u, weight.u_shape(m))
    v = None
    if weight.v is not None:
        v, fault_of_v = _read_vector(reader, weight.v, (W.size // m,))
        fault = fault or fault_of_v
    if weight.layout == layouts.WRAPPER:
        v = None  # made anew from u in each call
    arrays = WeightArrays(W, axis, u, v, gamma, fault, is_unclear)
    if fault is None and weight.us is not None:
        arrays = _with_others(reader, weight.us, arrays, (m,))
    if fault is None and weight.is_torch:
        with numpy.errstate(all='ignore'):  # of a weight that is not finite
            return _checked_of_torch(weight, arrays)
    return arrays


def _read_map(
        reader: Reader, weight: WeightKeys, W: Any, gamma: Any, given: Given,
) -> WeightArrays:
    """The same of a weight whose vectors are inputs of its convolution."""
    shape = reader.entry(weight.u).shape
    u, fault = _read_vector(reader, weight.u, shape or ())
    if shape is not None and not _is_input(shape, W.shape):
        u, fault = None, f'of shape {shape}, which is no input of it'
    arrays = WeightArrays(W, 0, u, gamma=gamma, fault=fault, map_shape=shape)
    if shape is None or fault is not None:
        return arrays
    if given.has_map(weight):
        convolution = given.map(reader.path, weight, W.shape, shape)
        arrays = arrays._replace(
            axis=int(convolution.is_transposed), convolution=convolution)
        arrays = arrays._replace(fault=_fault_of(arrays.by_group(u)))
    if arrays.fault is None and weight.us is not None:
        arrays = _with_others(reader, weight.us, arrays, shape)
    return arrays


def _is_input(shape: Sequence[int], of_W: Sequence[int]) -> bool:
    """Whether an input of a convolution may have that shape."""
    return len(shape) == len(of_W) - 1 and min(shape) > 0 and (
        shape[0] == of_W[0] or shape[0] % of_W[1] == 0)


def _with_others(
        reader: Reader, key: str, arrays: WeightArrays,
        shape_of_u: tuple[int, ...]) -> WeightArrays:
    """Adds the vectors beside ``u``, or says what is wrong with them."""
    shape = reader.entry(key).shape
    if shape is None:  # the hook makes them in its next call
        return arrays
    n_rows = shape[0] if len(shape) == 1 + len(shape_of_u) else 0
    expected = n_rows, *shape_of_u
    if shape != expected:
        return arrays._replace(
            fault_of_us=f'of shape {shape} instead of {expected}')
    us = reader.read(key)
    if us.dtype.char not in 'efd':
        return arrays._replace(fault_of_us=f'of dtype {us.dtype}')
    us = us[:arrays.most_vectors - 1].reshape(-1, len(arrays.u))
    fault = _fault_of(arrays.by_group(us)) if us.size else None
    arrays = arrays._replace(us=us, fault_of_us=fault)
    if fault is None and not vectors.are_independent(arrays):
        return arrays._replace(fault_of_us='not independent')
    return arrays


def _checked_of_torch(
        weight: WeightKeys, arrays: WeightArrays) -> WeightArrays:
    if weight.layout == layouts.TORCH_OLD:
        A = singular.as_matrix(arrays.W, arrays.axis)
        return arrays._replace(v=vectors.partner(A, arrays.u))
    if arrays.v is not None and vectors.estimate(arrays) < 0:
        return arrays._replace(fault='opposite to v')
    return arrays


def read_usable(
        reader: Reader, weight: WeightKeys, given: Given) -> WeightArrays:
    """Reads a weight that can be used as it is.

    Raises:
        SnapshotError: It cannot.

    """
    arrays = read(reader, weight, given)
    check_finite(reader, weight.W, arrays.W)
    if weight.is_map and not given.has_map(weight):
        raise errors.SnapshotMapError(
            reader.path, weight.W, "it is one of a hook with "
            "norm='operator', and the file does not hold the stride and the "
            "padding that its norm depends on")
    check_axis(reader, weight, arrays)
    fault = fault_of(weight, arrays)
    if fault is not None:
        raise errors.SnapshotVectorError(
            reader.path, weight.u if arrays.fault else weight.us or '',
            f'the vector of {weight.W!r} is {fault}')
    if weight.gamma is not None:
        check_finite(reader, weight.gamma, arrays.gamma)
    return arrays


def fault_of(weight: WeightKeys, arrays: WeightArrays) -> str | None:
    """Says what is wrong with the vectors, if so."""
    if arrays.fault_of_us is None:
        return arrays.fault
    return f'{arrays.fault_of_us} in {layouts.split(weight.us or "")[1]}'


def n_others(
        reader: Reader, weight: WeightKeys, arrays: WeightArrays,
) -> int | None:
    """Returns how many vectors are to be made beside ``u``.

    That is ``None`` where there are none, or none yet.
    """
    shape = None if weight.us is None else reader.entry(weight.us).shape
    if shape is None:
        return None
    n_rows = shape[0] if len(shape) == 2 else 0
    return min(n_rows, arrays.most_vectors - 1)


def named(
        weight: WeightKeys, arrays: WeightArrays) -> Iterator[tuple[str, Any]]:
    """Yields the entries of a weight, in the shapes of its layout."""
    yield weight.W, arrays.W
    yield weight.u, arrays.u.reshape(weight.u_shape(arrays.u.size))
    if weight.us is not None and arrays.us is not None:
        yield weight.us, arrays.us
    if weight.v is not None:
        yield weight.v, arrays.v
    if weight.gamma is not None:
        yield weight.gamma, arrays.gamma.reshape(
            weight.gamma_shape(arrays.W.ndim))


def repaired_name(weight: WeightKeys) -> str:
    """Returns the name of a weight beside its vectors.

    It is another one where PyTorch had no vectors.
    """
    if weight.layout == layouts.TORCH:
        return layouts.torch_keys(weight.layout, weight.path, weight.name).W
    return weight.W


def note_of(
        reader: Reader, weight: WeightKeys, new: WeightKeys | None = None,
) -> str:
    """Says what belongs to a weight and is of no use, there or in ``new``."""
    if new is not None and weight.us is not None and new.us is None:
        return (f'{weight.us!r} is dropped, as {new.layout} has no place for '
                f'it')
    if weight.layout == layouts.BIGGAN:
        return '' if weight.extras[0] in reader.keys else (
            f'{weight.extras[0]!r} is missing, and is not needed')
    return ''.join(f'{key!r} is of an earlier step, and not used'
                   for key in weight.extras)


def gamma_state(
        reader: Reader, key: str, weight: WeightKeys, new: WeightKeys,
) -> Iterator[tuple[str, Any]]:
    """Yields an optimizer's entry for a gamma, for another layout.

    Its entries have the shape of the gamma, except for the number of updates.
    """
    state = reader.read(key)
    shape = reader.entry(weight.gamma or '').shape
    if state.shape == shape and not key.endswith('/t'):
        ndim = len(reader.entry(weight.W).shape or ())
        state = state.reshape(new.gamma_shape(ndim))
    yield key, state


def _read_weight(reader: Reader, weight: WeightKeys) -> Any:
    W = reader.read(weight.W)
    if W.dtype.char not in 'efd' or W.ndim < 2 or W.size == 0:
        raise errors.SnapshotLayoutError(
            reader.path, f'a weight is an array of float16, float32 or '
            f'float64 with 2 or more dimensions, none of them empty, and '
            f'{weight.W!r} has shape {W.shape} and dtype {W.dtype}',
            _there(reader, weight))
    return W


def _read_gamma(reader: Reader, weight: WeightKeys, key: str) -> Any:
    gamma = reader.read(key)
    if gamma.dtype.char not in 'efd' or gamma.size != 1:
        raise errors.SnapshotLayoutError(
            reader.path, f'a gamma is one number, a float, and {key!r} has '
            f'shape {gamma.shape} and dtype {gamma.dtype}',
            _there(reader, weight))
    return gamma.reshape(())


def _there(reader: Reader, weight: WeightKeys) -> list[str]:
    return [key for key in weight.keys if key in reader.keys]


def _read_vector(
        reader: Reader, key: str, shape: tuple[int, ...],
) -> tuple[Any, str | None]:
    """Returns a vector, if it can be used, and otherwise why not."""
    if key not in reader.keys:
        return None, 'missing'
    entry = reader.entry(key)
    if not entry.is_plain:
        return None, 'not initialized'
    if entry.shape != shape:
        return None, f'of shape {entry.shape} instead of {shape}'
    x = reader.read(key)
    if x.dtype.char not in 'efd':
        return None, f'of dtype {x.dtype}'
    x = x.reshape(-1)
    fault = _fault_of(x)
    return (x, None) if fault is None else (None, fault)


def _fault_of(x: Any) -> str | None:
    if not numpy.isfinite(x).all():
        return 'NaN' if numpy.isnan(x).any() else 'Inf'
    return None if x.any(axis=-1).all() else 'zero'


def vector_dtype(reader: Reader, weight: WeightKeys, W: Any) -> Any:
    """Returns the dtype of the vector in the file, else that of ``W``."""
    dtype = (reader.entry(weight.u).dtype if weight.u in reader.keys
             else '')
    if dtype in ('float16', 'float32', 'float64'):
        return numpy.dtype(dtype)
    return W.dtype


def check_finite(reader: Reader, key: str, array: Any) -> None:
    if not numpy.isfinite(array).all():
        raise errors.SnapshotWeightError(
            reader.path, key, 'it holds NaN or Inf')


# Axes

def find(
        reader: Reader, prefix: str, given: Given,
        find: Callable[..., list[WeightKeys]] = finding.find, *args: Any,
) -> list[WeightKeys]:
    """Returns what ``find`` does below a path; each pattern must fit one."""
    weights = find(reader, prefix, *args)
    given.check(reader.path, weights)
    return weights


def _output_axis(
        reader: Reader, weight: WeightKeys, W: Any, given: Given,
) -> tuple[int, bool]:
    """Returns the output axis, and whether it is doubtful."""
    axis = given.of('axis', weight)
    if axis is not None:
        return normalize_axis(axis, W.ndim), False
    # PyTorch may have dim=1 for a matrix; Chainer has 0.
    if weight.layout in layouts.FIRST_AXIS or (
            W.ndim == 2 and not weight.is_torch):
        return 0, False
    shape = _shape_of_u(reader, weight)
    if shape is None or len(shape) != 1:
        return 0, False
    if W.shape[0] != W.shape[1]:
        return int(shape[0] == W.shape[1]), False
    if shape[0] != W.shape[0] or not numpy.isfinite(W).all():
        return 0, False
    return _axis_by_vectors(reader, weight, W)


def _shape_of_u(
        reader: Reader, weight: WeightKeys) -> tuple[int, ...] | None:
    return (reader.entry(weight.u).shape if weight.u in reader.keys
            else None)


def _axis_by_vectors(
        reader: Reader, weight: WeightKeys, W: Any) -> tuple[int, bool]:
    """The same where the lengths of the first two axes are equal."""
    m = W.shape[0]
    u, fault = _read_vector(reader, weight.u, (m,))
    if fault is not None:
        return 0, False
    if weight.v is not None:
        v, fault = _read_vector(reader, weight.v, (W.size // m,))
        if fault is None:  # PyTorch has u = W v / |W v|, which decides
            angles = [vectors.angle(singular.as_matrix(W, axis), u, v)
                      for axis in (0, 1)]
            return int(angles[1] > angles[0]), False
    fits = [vectors.fit(singular.as_matrix(W, axis), u) for axis in (0, 1)]
    is_unclear = fits[1] > fits[0] + 0.1
    return int(is_unclear), is_unclear


def check_axis(
        reader: Reader, weight: WeightKeys, arrays: WeightArrays) -> None:
    if arrays.axis_is_unclear:
        raise errors.SnapshotAxisError(
            reader.path, weight.W, f'its shape {arrays.W.shape} leaves '
            f'open which axis is that of its outputs, and its vector fits '
            f'axis 1 better')


def axis_is_guessed(
        reader: Reader, weight: WeightKeys, arrays: WeightArrays, given: Given,
) -> bool:
    """Whether the axis is 0 only because nothing says which it is."""
    if arrays.W.ndim == 2 or weight.layout in layouts.FIRST_AXIS or (
            arrays.fault is None) or given.of('axis', weight) is not None:
        return False
    first, second = arrays.W.shape[:2]
    return first == second or _shape_of_u(reader, weight) not in (
        (first,), (second,))
