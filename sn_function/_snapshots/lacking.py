"""Finds the weights of a snapshot that have no vector, beside the others.

Models without hooks have such weights, those with hooks on some of their
links, and code that keeps vectors in attributes that are not saved.
"""
from __future__ import annotations

import fnmatch
from typing import Sequence

from sn_function import errors
from sn_function._snapshots import finding, layouts
from sn_function._snapshots.layouts import WeightKeys
from sn_function._snapshots.readers import Reader


def find_all(reader: Reader, prefix: str) -> list[WeightKeys]:
    """Returns the weights with a vector, and every other W and weight.

    Raises:
        SnapshotLayoutError: There is none.

    """
    found = finding.find_any(reader, prefix)
    plain = finding.plain_keys(reader, prefix, found)
    return _with_plain(reader, found, plain)


def find_beside(reader: Reader, prefix: str) -> list[WeightKeys]:
    """The same without models that have vectors for none of their weights.

    Where no model has any, it is all.
    """
    found = finding.find_any(reader, prefix)
    if not found:
        return find_all(reader, prefix)
    return _with_plain(reader, found, beside(reader, prefix, found))


def find_filled(
        reader: Reader, prefix: str, fill: bool | None) -> list[WeightKeys]:
    """Returns those with a vector, and to ``fill`` the others beside them.

    The vectors of these have names, and no entries yet.

    Raises:
        SnapshotPartialError: There are others, and it is not said whether
            they get one.

    """
    found = finding.find(reader, prefix)
    lacking = beside(reader, prefix, found)
    if fill is None and lacking:
        raise errors.SnapshotPartialError(reader.path, lacking, len(found))
    return _with_new(reader, found, lacking) if fill else found


def find_added(
        reader: Reader, prefix: str, patterns: Sequence[str],
) -> list[WeightKeys]:
    """Returns those with a vector, and the others that fit a pattern.

    The vectors of these have names, and no entries yet.

    Raises:
        SnapshotPatternError: There is none that fits.

    """
    if not patterns:
        return finding.find(reader, prefix)
    found = finding.find_any(reader, prefix)
    taken = finding.taken_by(found)
    plain = [key for key in finding.keys_below(reader, prefix)
             if key not in taken and finding.is_matrix(reader, key)]
    named = {key for key in plain if finding.is_weight(reader, key)}
    new = []
    for pattern in patterns:
        fitting = [key for key in plain if key == pattern or (
            key in named and fnmatch.fnmatchcase(key, pattern))]
        if not fitting:
            raise errors.SnapshotPatternError(
                reader.path, pattern, 'no weight without a vector fits the '
                'pattern' + ('' if named or not plain else ', and one that '
                             'is not called W, w0 or weight is given in full'),
                [key for key in plain if key in named] or plain)
        new += fitting
    return _with_new(reader, found, list(dict.fromkeys(new)))


def beside(
        reader: Reader, prefix: str, found: Sequence[WeightKeys],
) -> list[str]:
    """Returns each W and weight that may lack a vector.

    That is one in a model which has vectors for others.  In PyTorch there is
    none: the names there tell which weights are normalized.
    """
    models = {layouts.model_of(weight.W)
              for weight in found if not weight.is_torch}
    return [key for key in finding.plain_keys(reader, prefix, found)
            if layouts.model_of(key) in models]


def _with_plain(
        reader: Reader, found: Sequence[WeightKeys], plain: Sequence[str],
) -> list[WeightKeys]:
    if not found and not plain:
        raise errors.SnapshotLayoutError(
            reader.path, 'no weight was found in it', reader.keys)
    return finding.in_order([*found, *[
        WeightKeys(layouts.PLAIN, *layouts.split(key), key, f'{key}_u')
        for key in plain]])


def _with_new(
        reader: Reader, found: Sequence[WeightKeys], plain: Sequence[str],
) -> list[WeightKeys]:
    known = set(reader.keys)
    free = known - finding.taken_by(found)
    return finding.in_order([*found, *[
        weight._replace(gamma=_gamma_of_new(reader, weight, free),
                        us=finding.others_of(weight, known))
        for weight in map(_plain_keys, plain)]])


def _gamma_of_new(
        reader: Reader, weight: WeightKeys, free: set[str]) -> str | None:
    """Returns the gamma of a weight whose code saves no vector, if any."""
    for key in (f'{weight.plain}_gamma', f'{weight.path}gamma'):
        if not weight.is_torch and key in free:
            shape = reader.entry(key).shape
            if shape is not None and set(shape) <= {1}:
                return key
    return None


def _plain_keys(key: str) -> WeightKeys:
    path, name = layouts.split(key)
    if path.endswith('.') or (not path and name == 'weight'):
        return layouts.torch_keys(layouts.TORCH, path, name)._replace(W=key)
    return WeightKeys(layouts.CHAINER, path, name, key, f'{key}_u')
