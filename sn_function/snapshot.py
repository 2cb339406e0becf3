"""Snapshots of models with spectral normalization, without their models.

:func:`inspect` reports the norm of each weight and how good its vector is,
:func:`bake` puts the normalized weights in the place of the raw ones,
:func:`convert` converts between Chainer, sngan_projection and PyTorch, and
:func:`repair` replaces vectors that are zero or not finite, and makes those
that are missing.  The files may
be those of :func:`chainer.serializers.save_npz` and ``save_hdf5``, of a model
or of a trainer, or state dicts of PyTorch in .npz, .safetensors or .pt.

One weight at a time is in memory, and nothing is unpickled.  An output is
written to a temporary file, which takes its name when it is complete.
``python -m sn_function`` has the same for the shell.
"""
from __future__ import annotations

import os
from typing import Any, Iterator, NamedTuple, Sequence

import numpy

from sn_function import _certify, _checks, errors
from sn_function._arithmetic import singular
from sn_function._arithmetic.convolution import Convolution
from sn_function._certificate.interval import norm_interval
from sn_function._snapshots import (
    defaults,
    entries,
    finding,
    given,
    lacking,
    layouts,
    readers,
    vectors,
    writers,
)
from sn_function._snapshots.given import Axes, Given, Numbers
from sn_function._snapshots.layouts import WeightKeys
from sn_function._snapshots.plan import Entries, Plan, Progress
from sn_function._snapshots.readers import Path, Reader
from sn_function._snapshots.renaming import Names, Rename
from sn_function._snapshots.vectors import WeightArrays

__all__ = [
    'LAYOUTS', 'Outcome', 'WeightChange', 'WeightReport', 'bake', 'convert',
    'inspect', 'repair']

#: The layouts that :func:`convert` writes.
LAYOUTS = layouts.LAYOUTS
# The largest relative error of an estimate of sigma that is not reported.
LAG = 0.1
# Those of the hook, where they are not given.
N_WARMUP = defaults.N_WARMUP
EPS = 1e-6
# The status of a weight that no vector can help.
LOST = 'the weight holds NaN or Inf'


class WeightReport(NamedTuple):
    """What :func:`inspect` finds of a weight.

    Attributes:
        key: Entry of the weight.
        layout: One of :data:`LAYOUTS`, or of those that are only read:
            ``'torch-0.4'``, ``'torch-wrapper'`` and ``'biggan'``; see
            :doc:`cli`.  ``'plain'`` for a weight without a vector.
        shape: Shape of the weight, ``None`` if it was not initialized.
        dtype: Its dtype.
        axis: Its output axis.
        sigma: Its largest singular value; that of the map of images, for a
            vector of ``norm='operator'``.
        estimate: What its vectors give for sigma, in test mode, by a hook
            with the default settings.
        condition: ``sigma`` over the smallest singular value; ``inf`` where
            that is zero, up to the rounding of an SVD in float64.
        status: ``'ok'``; ``'lags'``, for an estimate more than 10% too low;
            ``'stale'``, where the hook first iterates to a vector of this
            weight, as the stored one alone gives 10% less than the estimate;
            ``'map'``, for a vector of ``norm='operator'`` where the stride
            and the padding are not given, without which there is no estimate;
            ``'no vector'``, which :func:`repair` makes with ``add_u``; or
            what is wrong with the vector, or the weight.
        healthy: Whether the vector, if any, can be used: ``'ok'``,
            ``'lags'``, ``'stale'``, ``'map'`` or ``'no vector'``.
        note: What else there is to say.
        certified: With ``certify``, ``(lo, hi)``, which surely hold the norm
            of the weight: of its map of images of every size, if it has more
            than 2 dimensions.
        normalized: The same of the weight that test mode uses, by a hook with
            the default settings, with its gamma.

    What is not known is ``None``.
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
    certified: tuple[float, float] | None = None
    normalized: tuple[float, float] | None = None

    @property
    def healthy(self) -> bool:
        return self.status in ('ok', 'lags', 'stale', 'map', 'no vector')


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
        weights: What was done to each weight, in the order of the paths.
        left_out: Entries that a file of this kind cannot hold.
        unknown: Entries whose name in the other library is not known; they
            keep the last part of it.
    """

    path: str
    weights: list[WeightChange]
    left_out: list[str]
    unknown: list[str]


def _outcome(
        dst: Path, changes: Sequence[WeightChange], left_out: list[str],
        unknown: Sequence[str] = ()) -> Outcome:
    in_order = sorted(changes, key=lambda each: layouts.natural(each.key))
    return Outcome(os.fspath(dst), in_order, left_out, list(unknown))


# Inspecting

def inspect(
        path: Path, *, model: str | None = None, axes: Axes | None = None,
        certify: float | None = None, time_limit: float | None = 10.0,
        stride: Numbers = None, pad: Numbers = None, dilate: Numbers = None,
        groups: Numbers = None, progress: Progress = iter,
) -> list[WeightReport]:
    """Reports the norm of each weight, and whether its vector can be used.

    Other weights are each ``W``, ``w0`` and so on of an n-step RNN, and
    ``weight`` of 2 or more dimensions that has no vector.  They are reported,
    too, if their model has a vector for some weight, or if the file has none
    at all.

    Args:
        path (str or os.PathLike): A snapshot.
        model (str or None): Only the model of this name in the snapshot of a
            trainer, or what is below this path.
        axes (dict or None): Output axes of weights, by their entry or by a
            pattern; see :doc:`cli`.
        certify (float or None): How near ``certified`` is to the norm,
            relative to it, such as 1e-3; ``None`` for no certificate.  With
            it, all other weights are reported.
        time_limit (float or None): The most seconds of each certificate; see
            :func:`sn_function.certify`.
        stride (int, tuple or dict): Of the convolutions; a tuple has one for
            each axis of their images, and a dictionary has either by entries
            or patterns, as ``axes``.
        pad (int, tuple or dict): Likewise, for vectors of
            ``norm='operator'``; no certificate depends on it.
        dilate (int, tuple or dict): Likewise; 1 where it is not given.
        groups (int, str or dict): Their numbers of groups, or ``'depthwise'``
            for a :class:`~chainer.links.DepthwiseConvolution2D`; 1 where it is
            not given.
        progress (callable): Given the weights, passes them on.

    Returns:
        list of WeightReport: One for each weight, in the order of the paths.

    Raises:
        SnapshotError: The file is damaged, or has no weight.
        CertifyArgumentError: ``certify`` or ``time_limit`` is out of its
            range.
        MapOptionError: A stride, padding, dilation or number of groups is.

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
        ...
        >>> report.key, report.shape, report.status
        ('W', (3, 4), 'ok')
        >>> abs(report.estimate / report.sigma - 1) < 1e-3
        True

    """
    known = given.make(
        axes, stride=stride, pad=pad, dilate=dilate, groups=groups)
    if certify is not None:
        _certify.check(certify, time_limit)
    find = lacking.find_beside if certify is None else lacking.find_all
    with readers.open_snapshot(path) as reader:
        weights = entries.find(
            reader, layouts.prefix_of(reader, model), known, find)
        reports = [_report(reader, weight, known, certify, time_limit)
                   for weight in progress(weights)]
        were_read = {each.key for each in reports if each.shape is not None}
        for key in reader.keys:
            if key not in were_read:
                reader.verify(key)
    return reports


def _report(
        reader: Reader, weight: WeightKeys, known: Given,
        certify: float | None, time_limit: float | None) -> WeightReport:
    if not reader.entry(weight.W).is_plain:
        return WeightReport(weight.W, weight.layout)
    arrays = entries.read(reader, weight, known)
    W, axis = arrays.W, arrays.axis
    report = WeightReport(
        weight.W, weight.layout, W.shape, str(W.dtype),
        None if arrays.is_unknown_map else axis,
        note='; '.join(filter(None, _notes(reader, weight, arrays))))
    if not numpy.isfinite(W).all():
        return report._replace(status=LOST)
    with numpy.errstate(all='ignore'):
        if arrays.map_shape is None:
            sigma, condition = singular.singular_values(W, axis)
            report = report._replace(sigma=sigma, condition=condition)
        elif arrays.convolution is not None:
            report = report._replace(sigma=float(singular.norm(
                W, axis, convolution=arrays.convolution)))
    report = _with_status(report, weight, arrays)
    if certify is None:
        return report
    return _with_certificates(report, weight, arrays, known.convolution(
        reader.path, weight, W.shape), certify, time_limit)


def _notes(
        reader: Reader, weight: WeightKeys, arrays: WeightArrays,
) -> Iterator[str]:
    yield entries.note_of(reader, weight)
    if arrays.us is not None and len(arrays.us):
        yield f'{len(arrays.us) + 1} vectors'
    if arrays.axis_is_unclear:
        yield f'axis 0 or 1; u fits 1: give --axis {weight.W}=1'
    if arrays.map_shape is not None:
        yield f'map of {" x ".join(map(str, arrays.map_shape))}'
    if arrays.is_unknown_map and arrays.fault is None:
        yield 'its estimate needs --stride and --pad'


def _with_status(
        report: WeightReport, weight: WeightKeys, arrays: WeightArrays,
) -> WeightReport:
    fault = entries.fault_of(weight, arrays)
    if weight.layout == layouts.PLAIN:
        return report._replace(status='no vector')
    if fault is not None:
        return report._replace(status=fault)
    if report.sigma is None:
        return report._replace(status='map')
    return _with_estimate(report, weight, arrays, report.sigma)


def _with_estimate(
        report: WeightReport, weight: WeightKeys, arrays: WeightArrays,
        sigma: float) -> WeightReport:
    estimate = vectors.estimate(arrays, n_warmup=weight.warmup(N_WARMUP))
    of_u = vectors.estimate(arrays)
    status, note = 'ok', report.note
    if of_u < (1 - LAG) * estimate:
        status = 'stale'
        remedy = ('sn_function.refresh(model)' if weight.is_map
                  else 'repair --all')
        note = '; '.join(filter(None, (
            f'u is of another weight, and gives {of_u:#.6g} by itself: '
            f'{remedy} makes it anew', note)))
    if abs(estimate - sigma) > LAG * sigma:
        status = 'lags'
    return report._replace(estimate=estimate, status=status, note=note)


def _with_certificates(
        report: WeightReport, weight: WeightKeys, arrays: WeightArrays,
        convolution: Convolution | None, rtol: float,
        time_limit: float | None) -> WeightReport:
    def interval(W: Any) -> tuple[float, float]:
        lo, hi = norm_interval(W, convolution, rtol, time_limit)
        return lo, hi

    report = report._replace(certified=interval(arrays.W))
    if report.estimate is None:
        return report
    Y, _ = vectors.normalized(
        arrays, 1, weight.warmup(N_WARMUP), 1.0, EPS)
    return report._replace(normalized=interval(Y))


# Baking

def bake(
        src: Path, dst: Path, *, n_power_iteration: int = 1,
        n_warmup: int = N_WARMUP, factor: float | None = None,
        eps: float = EPS, cap: float | None = None,
        stride: Numbers = None, pad: Numbers = None, dilate: Numbers = None,
        groups: Numbers = None, model: str | None = None,
        axes: Axes | None = None,
        rename: Rename | None = None, overwrite: bool = False,
        compress: bool | None = None, progress: Progress = iter) -> Outcome:
    """Writes a snapshot with normalized weights, for a model without hooks.

    The weights are, bit for bit, those that a model of Chainer with the hook
    of this package uses in test mode.  Vectors, gammas and the state that an
    optimizer has for a gamma are dropped; all other entries are copied.

    Such a hook iterates first where ``u`` has not settled, as one of another
    weight.  Other libraries do not, so for their layouts nor does this.

    Args:
        src (str or os.PathLike): A snapshot.
        dst (str or os.PathLike): The output, of the kind that its extension
            names.
        n_power_iteration (int): That of the hook, which a snapshot does not
            hold.  PyTorch has the sigma of its vectors instead.
        n_warmup (int): That of the hook; 0 for Chainer's own hook.
        factor (float or None): That of the hook.
        eps (float): That of the hook.
        cap (float or None): That of the hook.
        stride (int, tuple or dict): Of the convolutions; a tuple has one for
            each axis of their images, and a dictionary has either by entries
            or patterns, as ``axes``.
        pad (int, tuple or dict): Likewise.  A vector of ``norm='operator'``
            needs both, as its link has them.
        dilate (int, tuple or dict): Likewise; 1 where it is not given.
        groups (int, str or dict): Their numbers of groups, or ``'depthwise'``
            for a :class:`~chainer.links.DepthwiseConvolution2D`; 1 where it is
            not given.
        model (str or None): Write only the model of this name in the
            snapshot of a trainer, or what is below this path, without that
            path in the names.
        axes (dict or None): Output axes of weights, by their entry or by a
            pattern; see :doc:`cli`.
        rename (dict or None): New paths by old ones, as of
            :func:`convert`.
        overwrite (bool): Whether ``dst`` may exist, or be ``src``.
        compress (bool or None): Whether a .npz or HDF5 file is compressed;
            ``None``: as the input is.
        progress (callable): Given the entries, passes them on.

    Returns:
        Outcome: What was written.

    Raises:
        SnapshotError: The file is damaged, has no such weight, or a vector
            of it cannot be used, or is one of ``norm='operator'`` without a
            stride and a padding.  Nothing is written.
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
        ...
        >>> print('%.3f' % np.linalg.norm(plain.W.array, 2))
        1.000

    """
    changes: list[WeightChange] = []
    known = given.make(
        axes, stride=stride, pad=pad, dilate=dilate, groups=groups)
    factor_, eps_, _ = _checks.check_settings(
        n_power_iteration, 1.0 if factor is None else factor, eps, cap)
    _checks.check_count('n_warmup', n_warmup, 0)
    with readers.open_snapshot(src) as reader:
        writers.check_output(dst, src, overwrite)
        plan = Plan(layouts.prefix_of(reader, model))

        def bake_weight(weight: WeightKeys) -> Entries:
            if weight.gamma is not None and cap is not None:
                raise errors.SnapshotGammaError(
                    reader.path, weight.gamma,
                    'a weight that is capped has no gamma')
            Y, sigma = vectors.normalized(
                entries.read_usable(reader, weight, known),
                weight.iterations(n_power_iteration),
                weight.warmup(n_warmup), factor_, eps_)
            name = names.plain(weight)
            changes.append(WeightChange(
                plan.name_of(name), 'baked', sigma,
                note=entries.note_of(reader, weight)))
            yield name, Y

        weights = entries.find(reader, plan.prefix, known)
        others = lacking.beside(reader, plan.prefix, weights)
        names = Names(reader, plan.prefix, weights, None, rename or {})
        for weight in weights:
            plan.drop([*weight.keys, *layouts.gamma_state(reader, weight)])
            plan.replace(weight.W, bake_weight, weight)
            names.plain(weight)
        _rename_others(plan, reader, names)
        changes += [
            WeightChange(plan.name_of(names.other(key)[0]), 'kept',
                         note='it has no vector') for key in others]
        left_out = plan.write(reader, dst, compress, progress)
    return _outcome(dst, changes, left_out)


# Converting

def convert(
        src: Path, dst: Path, layout: str, *, converge: bool = False,
        fill: bool | None = None, n_power_iteration: int = 1,
        model: str | None = None, axes: Axes | None = None,
        rename: Rename | None = None, overwrite: bool = False,
        compress: bool | None = None, progress: Progress = iter) -> Outcome:
    """Writes a snapshot as another library names and stores it.

    :doc:`cli` lists what is read.  Of the names of PyTorch, those of modules
    that wrap a model or a layer are no parts of Chainer's paths.

    The vectors are such that the normalized weights, in test mode, stay the
    same: those of Chainer with ``n_power_iteration`` iterations, and those of
    PyTorch with none, are equal up to rounding.  For that, PyTorch gets the
    vectors that the iterations end with, and Chainer a vector from which one
    iteration comes to the sigma of PyTorch, if there is one; :class:`Outcome`
    has the difference that is left.  Of several vectors of one weight, PyTorch
    gets those that they come to, and sngan_projection the leading one.

    Here Chainer is its own hook, or that of this package with ``n_warmup=0``.
    By default that of this package iterates further, in test mode, from a
    vector that has not settled: then its norms are nearer to 1.

    No other library has the vectors of ``norm='operator'``, so a weight with
    one goes to the layout ``'chainer'`` only, as it is.

    Args:
        src (str or os.PathLike): A snapshot, or a state dict.
        dst (str or os.PathLike): The output, of the kind that its extension
            names.
        layout (str): One of :data:`LAYOUTS`.
        converge (bool): Give each weight the converged vectors instead.
        fill (bool or None): What becomes of each other weight, as of
            :func:`inspect`, of a model that has vectors for some: ``True``, it
            gets a converged one; ``False``, it stays as it is, as that of a
            layer without a hook; ``None``, it is an error if there is one, as
            a model with hooks on all of them could not load the output.  A
            state dict of PyTorch has no such weights: its names tell which
            are normalized.
        n_power_iteration (int): That of the hook in Chainer, where that is
            converted to PyTorch.
        model (str or None): Write only the model of this name in the
            snapshot of a trainer, or what is below this path, without that
            path in the names.  PyTorch takes a model only: of a trainer's
            snapshot the one that has such weights.
        axes (dict or None): Output axes of weights, by their entry or by a
            pattern; see :doc:`cli`.
        rename (dict or None): New paths of links, or names of entries, by
            those of the input.  Dots and slashes are the same, only whole
            parts count, and of those that fit the longest.
        overwrite (bool): Whether ``dst`` may exist, or be ``src``.
        compress (bool or None): Whether a .npz or HDF5 file is compressed;
            ``None``: as the input is.
        progress (callable): Given the entries, passes them on.

    Returns:
        Outcome: What was written.

    Raises:
        SnapshotError: The file is damaged, has no such weight, or one that
            the layout has no place for, or it is not said what becomes of
            those without a vector, or a path to rename is not there.
            Nothing is written.

    .. admonition:: Example

        >>> import os, tempfile
        >>> import numpy as np
        >>> import sn_function
        >>> import chainer
        >>> import chainer.links as L
        >>> from chainer import serializers
        >>> from sn_function import snapshot
        >>> state_dict = {
        ...     'main.0.weight_orig': np.diag([3., 1.]),
        ...     'main.0.weight_u': np.array([1., 0.]),
        ...     'main.0.weight_v': np.array([1., 0.]),
        ...     'main.0.bias': np.zeros(2)}
        >>> model = chainer.Chain(l1=L.Linear(2, 2).add_hook(
        ...     sn_function.SpectralNormalization()))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     src = os.path.join(directory, 'torch.npz')
        ...     dst = os.path.join(directory, 'chainer.npz')
        ...     np.savez(src, **state_dict)
        ...     _ = snapshot.convert(
        ...         src, dst, 'chainer', rename={'main.0': 'l1'})
        ...     serializers.load_npz(dst, model)
        ...
        >>> float(model.l1.W.array[0, 0])
        3.0

    """
    if layout not in LAYOUTS:
        raise errors.LayoutNameError(layout, LAYOUTS)
    _checks.check_count('n_power_iteration', n_power_iteration, 1)
    known, changes = given.make(axes), []
    to_torch = layout in layouts.OF_TORCH
    with readers.open_snapshot(src) as reader:
        writers.check_output(dst, src, overwrite)
        plan = Plan(finding.prefix_for(reader, model, layout))

        def convert_weight(weight: WeightKeys, new: WeightKeys) -> Entries:
            arrays = entries.read_usable(reader, weight, known)
            _check_target(reader, weight, new, arrays)
            n = weight.iterations(n_power_iteration)
            converted = vectors.converted(arrays, to_torch, n, converge)
            if new.us is None:
                converted = converted._replace(us=None)
            sigma, difference = vectors.compare(converted, arrays, n)
            changes.append(WeightChange(
                plan.name_of(new.W), 'converted', sigma, difference,
                entries.note_of(reader, weight, new)))
            return entries.named(new, converted)

        def fill_weight(weight: WeightKeys, new: WeightKeys) -> Entries:
            arrays = entries.read(reader, weight, known)
            entries.check_finite(reader, weight.W, arrays.W)
            _check_target(reader, weight, new, arrays)
            filled = vectors.filled(arrays, to_torch)
            changes.append(WeightChange(
                plan.name_of(new.W), 'converted', vectors.estimate(filled),
                note=_note_of_new(reader, weight, arrays, known)))
            return entries.named(new, filled)

        def is_new(weight: WeightKeys) -> bool:
            return bool(fill) and weight.u not in reader.keys

        weights = entries.find(
            reader, plan.prefix, known, lacking.find_filled, fill)
        names = Names(
            reader, plan.prefix, weights, to_torch, rename or {})
        moved: dict[str, str] = {}
        for weight in weights:
            new = names.of_weight(weight, layout)
            if weight.is_map:
                _check_target_of_map(reader, weight, new)
                moved.update(zip(weight.keys, new.keys))
            elif converge or weight != new or is_new(weight):
                plan.drop(weight.keys)
                plan.replace(
                    weight.W, fill_weight if is_new(weight)
                    else convert_weight, weight, new)
                _plan_gamma_state(plan, reader, weight, new)
        unknown = _rename_others(plan, reader, names)
        for key, name in moved.items():
            plan.rename(key, name)
        left_out = plan.write(reader, dst, compress, progress)
    changes += [WeightChange(
        plan.name_of(moved.get(weight.W, weight.W)), 'kept',
        note=_note_of_map(reader, weight, converge))
        for weight in weights if weight.W not in plan]
    return _outcome(dst, changes, left_out, unknown)


def _check_target_of_map(
        reader: Reader, weight: WeightKeys, new: WeightKeys) -> None:
    if not new.is_map:
        raise errors.SnapshotTargetError(
            reader.path, weight.W, f"it is one of a hook with "
            f"norm='operator', and {new.layout} has no place for its vector "
            f"{layouts.split(weight.u)[1]}")


def _note_of_map(
        reader: Reader, weight: WeightKeys, is_to_change: bool) -> str:
    if not (is_to_change and weight.is_map):
        return ''
    return (f'{layouts.split(weight.u)[1]} stays as it is: '
            f'sn_function.refresh(model) makes it anew')


def _check_target(
        reader: Reader, weight: WeightKeys, new: WeightKeys,
        arrays: WeightArrays) -> None:
    if new.is_torch and weight.gamma is not None:
        raise errors.SnapshotGammaError(
            reader.path, weight.gamma,
            "PyTorch's spectral normalization has no gamma")
    if new.layout == layouts.SNGAN and (
            arrays.axis != 0 or new.name != 'W'):
        raise errors.SnapshotTargetError(
            reader.path, weight.W,
            'sngan_projection has no deconvolutions, and normalizes no '
            'other weight of a link than W')
    if not new.is_torch and arrays.axis != 0 and arrays.W.ndim == 2:
        raise errors.SnapshotTargetError(
            reader.path, weight.W,
            'Chainer normalizes a matrix along axis 0 only')


def _plan_gamma_state(
        plan: Plan, reader: Reader, weight: WeightKeys, new: WeightKeys,
) -> None:
    """Gives the state of a trainer's optimizer the shape of the gamma."""
    if not plan.prefix:  # otherwise no optimizer is in the output
        for key in layouts.gamma_state(reader, weight):
            plan.replace(
                key, entries.gamma_state, reader, key, weight, new)


def _rename_others(plan: Plan, reader: Reader, names: Names) -> list[str]:
    """Renames all other entries; returns those with no known name there."""
    unknown = []
    for key in reader.keys:
        if key.startswith(plan.prefix) and key not in plan:
            name, is_known = names.other(key)
            plan.rename(key, name)
            if not is_known:
                unknown.append(key)
    names.check()
    return unknown


# Repairing

def repair(
        src: Path, dst: Path, *, all: bool = False,
        add_u: Sequence[str] = (), axes: Axes | None = None,
        overwrite: bool = False, compress: bool | None = None,
        progress: Progress = iter) -> Outcome:
    """Writes a snapshot in which each vector can be used.

    Vectors that are zero, not finite, of the wrong shape, or were never
    initialized are replaced by the first singular vectors of their weights.
    Where one of several is bad, or they are not independent, all are.
    A bad vector of ``norm='operator'`` is left out, as a snapshot does not
    hold what it depends on: the hook makes one in its next call.  Everything
    else is copied.

    Args:
        src (str or os.PathLike): A snapshot.
        dst (str or os.PathLike): The output, of the kind that its extension
            names.
        all (bool): Replace the other vectors, too.
        add_u (list of str): Patterns of weights that have no vector, and get
            one: ``['*']`` is every one of those that :func:`inspect` finds.
            A weight of another name is given in full.
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

    .. admonition:: Example

        A snapshot of a model without hooks, for one with them:

        >>> import os, tempfile
        >>> import sn_function
        >>> import chainer.links as L
        >>> from chainer import serializers
        >>> from sn_function import snapshot
        >>> hooked = L.Linear(4, 3).add_hook(
        ...     sn_function.SpectralNormalization())
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     src = os.path.join(directory, 'plain.npz')
        ...     dst = os.path.join(directory, 'with-u.npz')
        ...     serializers.save_npz(src, L.Linear(4, 3))
        ...     outcome = snapshot.repair(src, dst, add_u=['*'])
        ...     serializers.load_npz(dst, hooked)
        ...
        >>> outcome.weights[0].note
        'it had no vector'

    """
    known, changes = given.make(axes), []
    with readers.open_snapshot(src) as reader:
        writers.check_output(dst, src, overwrite)
        plan = Plan()
        patterns = [add_u] if isinstance(add_u, str) else add_u
        for weight in progress(entries.find(
                reader, '', known, lacking.find_added, patterns)):
            # Without a weight its link makes both in the first call.
            if reader.entry(weight.W).is_plain:
                changes.append(_repair_weight(
                    plan, reader, weight, known, all))
        left_out = plan.write(reader, dst, compress, iter)
    return _outcome(dst, changes, left_out)


def _repair_weight(
        plan: Plan, reader: Reader, weight: WeightKeys, known: Given,
        always: bool) -> WeightChange:
    arrays = entries.read(reader, weight, known)
    entries.check_finite(reader, weight.W, arrays.W)
    fault = entries.fault_of(weight, arrays)
    if weight.is_map:
        return _repair_map(plan, reader, weight, arrays, always)
    if fault is None and not always:
        return WeightChange(weight.W, 'kept', vectors.estimate(
            arrays, n_warmup=weight.warmup(N_WARMUP)))
    entries.check_axis(reader, weight, arrays)
    n_others = entries.n_others(reader, weight, arrays)
    sigma, u, v, us = vectors.converged(arrays, n_others or 0)
    dtype = entries.vector_dtype(reader, weight, arrays.W)
    new = {weight.u: u.astype(dtype).reshape(weight.u_shape(u.size))}
    if weight.v is not None:
        new[weight.v] = v.astype(dtype)
    if weight.us is not None and n_others is not None:
        new[weight.us] = us.astype(dtype)
    _plan_vectors(plan, reader, weight, new)
    _plan_gamma(plan, reader, weight, arrays)
    return WeightChange(
        entries.repaired_name(weight), 'repaired', sigma, None,
        _note_of_new(reader, weight, arrays, known))


def _note_of_new(
        reader: Reader, weight: WeightKeys, arrays: WeightArrays,
        known: Given) -> str:
    fault = entries.fault_of(weight, arrays)
    note = ('it had no vector' if fault == 'missing'
            else f'its vector was {fault or "usable"}')
    if entries.axis_is_guessed(reader, weight, arrays, known):
        note += '; taken as a convolution, unless --axis says otherwise'
    return note


def _plan_gamma(
        plan: Plan, reader: Reader, weight: WeightKeys,
        arrays: WeightArrays) -> None:
    """Gives a gamma the shape of the layout, if other code has saved it."""
    if weight.gamma is None:
        return
    shape = weight.gamma_shape(arrays.W.ndim)
    if reader.entry(weight.gamma).shape != shape:
        plan.put(weight.gamma, arrays.gamma.reshape(shape))
        _plan_gamma_state(plan, reader, weight, weight)


def _repair_map(
        plan: Plan, reader: Reader, weight: WeightKeys, arrays: WeightArrays,
        always: bool) -> WeightChange:
    """Leaves a vector out that the hook is to make anew."""
    fault = entries.fault_of(weight, arrays)
    if fault is None:
        return WeightChange(
            weight.W, 'kept', note=_note_of_map(reader, weight, always))
    if fault == 'not initialized':
        return WeightChange(
            weight.W, 'kept', note='its vector is made in the next call')
    bad = [key for key in (weight.u, weight.us) if key is not None][
        arrays.fault is None:]
    plan.drop(bad)
    names = ' and '.join(layouts.split(key)[1] for key in bad)
    return WeightChange(
        weight.W, 'repaired', note=f'its vector was {fault}: without {names} '
        f'the hook makes it anew in its next call')


def _plan_vectors(
        plan: Plan, reader: Reader, weight: WeightKeys,
        new: dict[str, Any]) -> None:
    """Puts vectors in their places, or after the weight if they have none."""
    added = {}
    for key, array in new.items():
        if key in reader.keys:
            plan.put(key, array)
        else:
            added[key] = array
    name = entries.repaired_name(weight)
    if added or name != weight.W:
        plan.replace(weight.W, lambda: [
            (name, reader.read(weight.W)), *added.items()])
