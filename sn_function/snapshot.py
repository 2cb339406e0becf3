"""Snapshots of models with spectral normalization, without their models.

:func:`inspect` tells the norm of each weight and how good its vector is,
:func:`bake` puts the normalized weights in the place of the raw ones,
:func:`convert` goes between Chainer, sngan_projection and PyTorch, and
:func:`repair` makes vectors anew that are zero or not finite.  The files may
be those of :func:`chainer.serializers.save_npz` and ``save_hdf5``, of a model
or of a trainer, or state dicts of PyTorch in .npz, .safetensors or .pt.

One weight at a time is in memory, and nothing is unpickled.  An output is
written to a temporary file, which takes its name when it is complete.
``python -m sn_function`` has the same for the shell.
"""
from __future__ import annotations

import os
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple

import numpy

from sn_function import _checks, errors, functions
from sn_function._arithmetic import singular
from sn_function._arithmetic.power_iteration import power_iteration, unfold
from sn_function._snapshots import entries as _entries
from sn_function._snapshots import layouts, readers, writers
from sn_function._snapshots.entries import Arrays, Axes
from sn_function._snapshots.layouts import Weight
from sn_function._snapshots.readers import Path, Reader

LAYOUTS = layouts.LAYOUTS
# An estimate of sigma that is further below it than that is told.
LAG = 0.1

Progress = Callable[[Iterable[Any]], Iterable[Any]]  # passes them on


class WeightReport(NamedTuple):
    """What :func:`inspect` finds of a weight.

    Attributes:
        key: Entry of the weight.
        layout: One of :data:`LAYOUTS`.
        shape: Shape of the weight, ``None`` if it was not initialized.
        dtype: Its dtype.
        axis: Its output axis.
        sigma: Its largest singular value.
        estimate: What its vectors give for sigma, in test mode.
        condition: ``sigma`` over the smallest singular value; ``inf`` where
            that is zero, but for rounding.
        status: ``'ok'``; ``'lags'``, for an estimate more than 10% too low;
            or what is wrong with the vector, or the weight.
        healthy: Whether the vector can be used: ``'ok'`` or ``'lags'``.
        note: What else there is to say.

    What cannot be told is ``None``.
    """

    key: str
    layout: str
    shape: tuple[int, ...] | None = None
    dtype: str = ''
    axis: int | None = None
    sigma: float | None = None
    estimate: float | None = None
    condition: float | None = None
    status: str = 'not initialized'
    note: str = ''

    @property
    def healthy(self) -> bool:
        return self.status in ('ok', 'lags')


class WeightChange(NamedTuple):
    """What was done to a weight.

    Attributes:
        key: Entry of the weight in the output.
        action: ``'baked'``, ``'converted'``, ``'repaired'`` or ``'kept'``.
        sigma: The estimate of its largest singular value that was used, or
            that its vectors give now.
        difference: How far that is from the one of the input, relative to
            it, where vectors were converted.
        note: What else there is to say.
    """

    key: str
    action: str
    sigma: float | None = None
    difference: float | None = None
    note: str = ''


class Outcome(NamedTuple):
    """What was written.

    Attributes:
        path: The file.
        weights: What was done to each weight.
        left_out: Entries that a file of this kind cannot hold.
        unknown: Entries whose name in the other library is not known; they
            keep the last part of it.
    """

    path: str
    weights: list[WeightChange]
    left_out: list[str]
    unknown: list[str]


# Inspecting

def inspect(
        path: Path, *, model: str | None = None, axes: Axes | None = None,
        progress: Progress = iter) -> list[WeightReport]:
    """Tells of each weight its norm, and whether its vector can be used.

    Args:
        path (path): A snapshot.
        model (str or None): Only the model of this name in the snapshot of a
            trainer, or what is below this path.
        axes (dict or None): Output axes of weights, by their entry or by a
            pattern; see :doc:`cli`.
        progress (callable): Given the weights, passes them on.

    Returns:
        list of WeightReport: One for each weight, in the order of the file.

    Raises:
        SnapshotError: The file is damaged, or has no such weight.

    .. admonition:: Example

        >>> import os, tempfile
        >>> import sn_function
        >>> import chainer.links as L
        >>> from chainer import serializers
        >>> from sn_function import snapshot
        >>> layer = L.Linear(4, 3).add_hook(
        ...     sn_function.SpectralNormalization(n_warmup=200))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = os.path.join(directory, 'model.npz')
        ...     serializers.save_npz(path, layer)
        ...     report, = snapshot.inspect(path)
        >>> report.key, report.shape, report.status
        ('W', (3, 4), 'ok')
        >>> abs(report.estimate / report.sigma - 1) < 1e-3
        True

    """
    with readers.open_snapshot(path) as reader:
        prefix = '' if model is None else layouts.prefix_of(reader, model)
        weights = _entries.find(reader, prefix, axes or {})
        reports = [_report(reader, weight, axes or {})
                   for weight in progress(weights)]
        were_read = {each.key for each in reports if each.shape is not None}
        for key in reader.keys:
            if key not in were_read:
                reader.verify(key)
    return reports


def _report(reader: Reader, weight: Weight, axes: Axes) -> WeightReport:
    entry = reader.entry(weight.weight)
    report = WeightReport(
        weight.weight, weight.layout, entry.shape, entry.dtype)
    if not entry.is_plain:
        return report._replace(dtype='')
    arrays = _entries.read_all(reader, weight, axes)
    W, axis = arrays.W, arrays.axis
    report = report._replace(axis=axis, dtype=str(W.dtype))
    if arrays.axis_is_unclear:
        report = report._replace(
            note=f'axis 0 or 1; u fits 1: give --axis {weight.weight}=1')
    if not numpy.isfinite(W).all():
        return report._replace(status='the weight holds NaN or Inf')
    with numpy.errstate(all='ignore'):
        sigma, condition = singular.singular_values(W, axis)
    report = report._replace(sigma=sigma, condition=condition)
    if arrays.fault is not None:
        return report._replace(status=arrays.fault)
    estimate = _entries.estimate(weight, arrays)
    lags = abs(estimate - sigma) > LAG * sigma
    return report._replace(
        estimate=estimate, status='lags' if lags else 'ok')


# Writing

_Make = Callable[[], 'list[tuple[str, Any]]']


def _write(
        reader: Reader, path: str, compress: bool | None,
        makes: Mapping[str, _Make | None],
        name_of: Callable[[str], str | None], progress: Progress,
) -> list[str]:
    """Writes all entries, in their order; returns those left out.

    Args:
        reader: The input.
        path: The output.
        compress: Whether a .npz or HDF5 file is compressed.
        makes: What makes the entries that take the place of one.
        name_of: The name of any other entry, ``None`` to drop it.
        progress: Given the entries, passes them on.

    """
    written: set[str] = set()
    left_out = list(reader.ignored)

    def check_name(key: str) -> None:
        if key in written:
            raise errors.SnapshotTargetError(
                reader.path, key, 'two entries would get this name')
        written.add(key)

    with writers.create(path, reader, compress) as writer:
        for key in progress(reader.keys):
            make = makes.get(key)
            if make is not None:
                for new_key, array in make():
                    check_name(new_key)
                    writer.write(new_key, array)
            elif key not in makes:
                name = name_of(key)
                if name is not None:
                    check_name(name)
                    if not writer.copy(reader, key, name):
                        left_out.append(key)
    return left_out


def _without(prefix: str) -> Callable[[str], str | None]:
    return lambda key: (
        key[len(prefix):] if key.startswith(prefix) else None)


def _gamma_state(reader: Reader, weight: Weight) -> Iterator[str]:
    """The optimizer's entries for the gamma of a weight."""
    prefix = layouts.optimizer_prefix(weight)
    if prefix is not None:
        for key in reader.keys:
            if key.startswith(prefix):
                yield key


def bake(
        src: Path, dst: Path, *, n_power_iteration: int = 1,
        factor: float | None = None, eps: float = 1e-6,
        cap: float | None = None, model: str | None = None,
        axes: Axes | None = None, overwrite: bool = False,
        compress: bool | None = None, progress: Progress = iter) -> Outcome:
    """Writes a snapshot with normalized weights, for a model without hooks.

    The weights are, bit for bit, those that a model of Chainer with the hook
    of this package uses in test mode.  Vectors, gammas and the state that an
    optimizer has for a gamma are dropped; all other entries are copied.

    Args:
        src (path): A snapshot.
        dst (path): The output.  Its extension tells its kind.
        n_power_iteration (int): That of the hook, which a snapshot does not
            hold.  PyTorch has the sigma of its vectors instead.
        factor (float or None): That of the hook.
        eps (float): That of the hook.
        cap (float or None): That of the hook.
        model (str or None): Write only the model of this name in the
            snapshot of a trainer, or what is below this path, without that
            path in the names.
        axes (dict or None): Output axes of weights, by their entry or by a
            pattern; see :doc:`cli`.
        overwrite (bool): Whether ``dst`` may exist, or be ``src``.
        compress (bool or None): Whether a .npz or HDF5 file is compressed;
            ``None``: as the input is.
        progress (callable): Given the entries, passes them on.

    Returns:
        Outcome: What was written.

    Raises:
        SnapshotError: The file is damaged, has no such weight, or a vector
            of it cannot be used.  Nothing is written.
        SpectralNormalizationError: A setting is out of its range.

    .. admonition:: Example

        >>> import os, tempfile
        >>> import numpy as np
        >>> import sn_function
        >>> import chainer.links as L
        >>> from chainer import serializers
        >>> from sn_function import snapshot
        >>> layer = L.Linear(4, 3).add_hook(
        ...     sn_function.SpectralNormalization(n_warmup=200))
        >>> plain = L.Linear(4, 3)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     src = os.path.join(directory, 'model.npz')
        ...     dst = os.path.join(directory, 'baked.npz')
        ...     serializers.save_npz(src, layer)
        ...     _ = snapshot.bake(src, dst)
        ...     serializers.load_npz(dst, plain)
        >>> print('%.3f' % np.linalg.norm(plain.W.array, 2))
        1.000

    """
    factor_, eps_ = _checks.check_settings(
        n_power_iteration, 1.0 if factor is None else factor, eps, cap)
    path = writers.check_output(dst, src, overwrite)
    changes = []
    with readers.open_snapshot(src) as reader:
        prefix = '' if model is None else layouts.prefix_of(reader, model)

        def make(weight: Weight) -> list[tuple[str, Any]]:
            if weight.gamma is not None and cap is not None:
                raise errors.SnapshotGammaError(
                    reader.path, weight.gamma,
                    'a weight that is capped has no gamma')
            arrays = _entries.require_vectors(reader, weight, axes or {})
            sigma = _entries.estimate(weight, arrays, n_power_iteration)
            if weight.is_torch:
                Y = arrays.W * arrays.W.dtype.type(
                    factor_ / max(sigma, eps_))
            else:
                out: Any = functions.spectral_normalize(
                    arrays.W, arrays.u.astype(arrays.W.dtype),
                    n_power_iteration, arrays.gamma, factor_, eps_,
                    arrays.axis)
                Y = out.array
            key = layouts.plain_name(weight)[len(prefix):]
            changes.append(WeightChange(key, 'baked', sigma))
            return [(key, Y)]

        makes: dict[str, _Make | None] = {}
        weights = _entries.find(reader, prefix, axes or {})
        for weight in weights:
            makes.update(dict.fromkeys(weight.entries))
            makes.update(dict.fromkeys(_gamma_state(reader, weight)))
            makes[weight.weight] = _bind(make, weight)
        left_out = _write(
            reader, path, compress, makes, _without(prefix), progress)
    return Outcome(os.fspath(dst), changes, left_out, [])


def _bind(make: Callable[[Weight], Any], weight: Weight) -> _Make:
    return lambda: make(weight)


# Converting

def convert(
        src: Path, dst: Path, layout: str, *, converge: bool = False,
        n_power_iteration: int = 1, model: str | None = None,
        axes: Axes | None = None, overwrite: bool = False,
        compress: bool | None = None, progress: Progress = iter) -> Outcome:
    """Writes a snapshot as another library names and stores it.

    The vectors are such that the normalized weights, in test mode, stay the
    same: those of Chainer with ``n_power_iteration`` iterations, and those of
    PyTorch with none, are equal but for rounding.  For that, PyTorch gets the
    vectors that the iterations end with, and Chainer a vector from which one
    iteration comes to the sigma of PyTorch, if there is one; :class:`Outcome`
    tells what is left of a difference.

    Args:
        src (path): A snapshot, or a state dict.
        dst (path): The output.  Its extension tells its kind.
        layout (str): One of :data:`LAYOUTS`.
        converge (bool): Give each weight the converged vectors instead.
        n_power_iteration (int): That of the hook in Chainer, where that is
            converted to PyTorch.
        model (str or None): Write only the model of this name in the
            snapshot of a trainer, or what is below this path, without that
            path in the names.  PyTorch takes a model only: of a trainer's
            snapshot the one that has such weights.
        axes (dict or None): Output axes of weights, by their entry or by a
            pattern; see :doc:`cli`.
        overwrite (bool): Whether ``dst`` may exist, or be ``src``.
        compress (bool or None): Whether a .npz or HDF5 file is compressed;
            ``None``: as the input is.
        progress (callable): Given the entries, passes them on.

    Returns:
        Outcome: What was written.

    Raises:
        SnapshotError: The file is damaged, has no such weight, or one that
            the layout has no place for.  Nothing is written.

    """
    if layout not in LAYOUTS:
        raise errors.LayoutNameError(layout, LAYOUTS)
    _checks.check_count('n_power_iteration', n_power_iteration, 1)
    path = writers.check_output(dst, src, overwrite)
    to_torch = layout in (layouts.TORCH, layouts.PARAMETRIZED)
    changes, unknown = [], []
    with readers.open_snapshot(src) as reader:
        prefix = _prefix_of_model(reader, model, to_torch)
        weights = _entries.find(reader, prefix, axes or {})
        is_same_library = weights[0].is_torch == to_torch
        known = set(reader.keys)

        def name_of(key: str) -> str | None:
            if not key.startswith(prefix):
                return None
            if is_same_library:
                return key[len(prefix):]
            name, is_known = layouts.other_name(key, to_torch, reader, known)
            if not is_known:
                unknown.append(key)
            return name[len(prefix):]

        def make(weight: Weight) -> list[tuple[str, Any]]:
            new = layouts.renamed(weight, layout)
            arrays = _entries.require_vectors(reader, weight, axes or {})
            _check_target(reader, weight, new, arrays)
            u, v = _vectors(
                weight, new, arrays, converge, n_power_iteration)
            dtype = arrays.u.dtype
            arrays_of_new = arrays._replace(
                u=u.astype(dtype), v=None if v is None else v.astype(dtype))
            n = 1 if weight.is_torch else n_power_iteration
            sigma = _entries.estimate(new, arrays_of_new, n)
            before = _entries.estimate(weight, arrays, n)
            changes.append(WeightChange(
                new.weight[len(prefix):], 'converted', sigma,
                abs(sigma - before) / (abs(before) or 1.0)))
            entries = [(new.weight, arrays.W),
                       (new.u, arrays_of_new.u[None] if layout
                        == layouts.SNGAN else arrays_of_new.u)]
            if new.v is not None:
                entries.append((new.v, arrays_of_new.v))
            if new.gamma is not None:
                entries.append((new.gamma, arrays.gamma.reshape(
                    _gamma_shape(layout, arrays.W))))
            return [(key[len(prefix):], array) for key, array in entries]

        makes: dict[str, _Make | None] = {}
        for weight in weights:
            if weight.layout == layout and not converge:
                continue  # as it is
            makes.update(dict.fromkeys(weight.entries))
            makes[weight.weight] = _bind(make, weight)
            for key in _gamma_state(reader, weight):
                if not prefix:
                    makes[key] = _reshape_state(reader, weight, key, layout)
        left_out = _write(reader, path, compress, makes, name_of, progress)
    for weight in weights:
        if weight.weight not in makes:
            changes.append(WeightChange(
                weight.weight[len(prefix):], 'kept'))
    return Outcome(os.fspath(dst), changes, left_out, unknown)


def _prefix_of_model(
        reader: Reader, model: str | None, to_torch: bool) -> str:
    if model is not None:
        return layouts.prefix_of(reader, model)
    models = layouts.models(reader.keys)
    if not (to_torch and models):
        return ''
    with_weights = set(layouts.models(
        each.weight for each in layouts.find(reader, 'updater/model:')))
    if len(with_weights) > 1:
        raise errors.SnapshotModelError(reader.path, None, models)
    return layouts.prefix_of(reader, with_weights.pop())


def _check_target(
        reader: Reader, weight: Weight, new: Weight, arrays: Arrays) -> None:
    if new.is_torch and weight.gamma is not None:
        raise errors.SnapshotGammaError(
            reader.path, weight.gamma,
            "PyTorch's spectral normalization has no gamma")
    if new.layout == layouts.SNGAN and (
            arrays.axis != 0 or new.name != 'W'):
        raise errors.SnapshotTargetError(
            reader.path, weight.weight,
            'sngan_projection has no deconvolutions, and normalizes no '
            'other weight of a link than W')
    if not new.is_torch and arrays.axis != 0 and arrays.W.ndim == 2:
        raise errors.SnapshotTargetError(
            reader.path, weight.weight,
            'Chainer normalizes a matrix along axis 0 only')


def _gamma_shape(layout: str, W: Any) -> tuple[int, ...]:
    return (1,) * W.ndim if layout == layouts.SNGAN else ()


def _reshape_state(
        reader: Reader, weight: Weight, key: str, layout: str) -> _Make:
    """An optimizer keeps arrays of the shape of the gamma."""
    def make() -> list[tuple[str, Any]]:
        state = reader.read(key)
        old = reader.entry(weight.gamma or '').shape
        shape = reader.entry(weight.weight).shape or ()
        if state.shape == old and key.rsplit('/', 1)[1] != 't':
            state = state.reshape(
                (1,) * len(shape) if layout == layouts.SNGAN else ())
        return [(key, state)]

    return make


def _vectors(
        weight: Weight, new: Weight, arrays: Arrays, converge: bool,
        n_power_iteration: int) -> tuple[Any, Any]:
    """Returns u and v, or ``None``, for the new layout."""
    if converge:
        _, u, v = singular.largest(
            singular.as_matrix(arrays.W, arrays.axis))
        return u, v if new.is_torch else None
    if weight.is_torch and not new.is_torch:
        return singular.start_vector(
            singular.as_matrix(arrays.W, arrays.axis), arrays.u,
            arrays.v), None
    if weight.is_torch or not new.is_torch:
        return arrays.u, arrays.v
    # As the hook does it: also for a u that W takes to zero.
    with numpy.errstate(all='ignore'):
        it = power_iteration(
            unfold(arrays.W.astype(numpy.float64), arrays.axis), arrays.u,
            n_power_iteration)
    if not it.sigma:
        _, u, v = singular.largest(
            singular.as_matrix(arrays.W, arrays.axis))
        return u, v
    return it.u, it.v


# Repairing

def repair(
        src: Path, dst: Path, *, all: bool = False,
        axes: Axes | None = None, overwrite: bool = False,
        compress: bool | None = None, progress: Progress = iter) -> Outcome:
    """Writes a snapshot in which each vector can be used.

    Vectors that are zero, not finite, of the wrong shape, or were never
    initialized are replaced by the first singular vectors of their weights.
    Everything else is copied.

    Args:
        src (path): A snapshot.
        dst (path): The output.  Its extension tells its kind.
        all (bool): Replace the other vectors, too.
        axes (dict or None): Output axes of weights, by their entry or by a
            pattern; see :doc:`cli`.
        overwrite (bool): Whether ``dst`` may exist, or be ``src``.
        compress (bool or None): Whether a .npz or HDF5 file is compressed;
            ``None``: as the input is.
        progress (callable): Given the weights, passes them on.

    Returns:
        Outcome: What was written.

    Raises:
        SnapshotError: The file is damaged, has no such weight, or one that
            holds NaN or Inf, which is lost.  Nothing is written.

    """
    path = writers.check_output(dst, src, overwrite)
    changes = []
    with readers.open_snapshot(src) as reader:
        makes: dict[str, _Make | None] = {}
        weights = _entries.find(reader, '', axes or {})
        for weight in progress(weights):
            if not reader.entry(weight.weight).is_plain:
                continue  # its link makes both in the first call
            arrays = _entries.read_all(reader, weight, axes or {})
            _entries.check_finite(reader, weight.weight, arrays.W)
            if arrays.fault is None and not all:
                changes.append(WeightChange(
                    weight.weight, 'kept', _entries.estimate(weight, arrays)))
                continue
            if arrays.axis_is_unclear:
                _entries.require_vectors(reader, weight, axes or {})
            sigma, u, v = singular.largest(
                singular.as_matrix(arrays.W, arrays.axis))
            dtype = _vector_dtype(reader, weight, arrays.W)
            u = u[None] if weight.layout == layouts.SNGAN else u
            makes[weight.u] = _constant(weight.u, u.astype(dtype))
            if weight.v is not None:
                makes[weight.v] = _constant(weight.v, v.astype(dtype))
            is_guess = (arrays.W.ndim > 2 and weight.layout != layouts.SNGAN
                        and arrays.fault is not None
                        and (arrays.W.shape[0] == arrays.W.shape[1]
                             or reader.entry(weight.u).shape not in (
                                 arrays.W.shape[:1], arrays.W.shape[1:2]))
                        and _entries.given_axis(weight, axes or {}) is None)
            changes.append(WeightChange(
                weight.weight, 'repaired', sigma, None,
                ('its vector was ' + (arrays.fault or 'usable')) + (
                    '; taken as a convolution, --axis tells otherwise'
                    if is_guess else '')))
        left_out = _write(
            reader, path, compress, makes, lambda key: key, iter)
    return Outcome(os.fspath(dst), changes, left_out, [])


def _constant(key: str, array: Any) -> _Make:
    return lambda: [(key, array)]


def _vector_dtype(reader: Reader, weight: Weight, W: Any) -> Any:
    """Returns the dtype of the old vector, else that of the weight."""
    entry = reader.entry(weight.u)
    if entry.dtype in ('float16', 'float32', 'float64'):
        return numpy.dtype(entry.dtype)
    return W.dtype

