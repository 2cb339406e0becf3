"""The names of entries in the file that is written.

Chainer separates paths by ``/``, PyTorch by ``.``, and both have names of
their own for the arrays of a layer.  Modules that wrap others are no links of
Chainer, and so have no place in its paths.  What users rename is renamed
last, and is the path that they see in the file otherwise.
"""
from __future__ import annotations

import re
from typing import Mapping, Sequence

from sn_function import errors
from sn_function._snapshots import layouts
from sn_function._snapshots.layouts import WeightKeys
from sn_function._snapshots.readers import Reader

Rename = Mapping[str, str]  # of paths of links, or of entries

# Names in Chainer and in PyTorch, of batch normalization, of layer and group
# normalization, and of other layers.
_BATCH = {'gamma': 'weight', 'beta': 'bias', 'avg_mean': 'running_mean',
          'avg_var': 'running_var', 'N': 'num_batches_tracked'}
_NORM = {'gamma': 'weight', 'beta': 'bias'}
_OTHER = {'W': 'weight', 'b': 'bias'}


class Names:
    """New names of the entries below ``prefix``, which all of them keep.

    Args:
        reader: The file.
        prefix: What the names of entries begin with.
        weights: The weights there, of one library.
        to_torch: Whether the output is for PyTorch; ``None``: for the library
            of the input.
        rename: New paths by old ones.

    """

    def __init__(
            self, reader: Reader, prefix: str, weights: Sequence[WeightKeys],
            to_torch: bool | None, rename: Rename) -> None:
        is_torch = weights[0].is_torch
        self._reader = reader
        self._known = set(reader.keys)
        self._prefix = prefix
        self._separator = '.' if is_torch else '/'
        self._to_torch = is_torch if to_torch is None else to_torch
        self.is_other_library = self._to_torch != is_torch
        self._children = [each.child for each in weights if each.child]
        self._n_wrappers = 0  # none is taken away before they are counted
        self._n_wrappers = self._count_wrappers()
        self._rename = _Rename(reader.path, {
            old: (self._parts(prefix + ''.join(
                part + self._separator for part in _parts_of(old))),
                _parts_of(new)) for old, new in rename.items()})

    def of_weight(self, weight: WeightKeys, layout: str) -> WeightKeys:
        """Returns the names of a weight's entries in a layout."""
        path, name, is_given = self._new(weight.path, weight.name)
        if self.is_other_library and not is_given:
            names = {'W': 'weight'} if self._to_torch else {'weight': 'W'}
            name = names.get(name, name)
        if layout in layouts.OF_TORCH:
            return layouts.torch_keys(layout, path, name)
        u = path + (f'{name}_u' if layout == layouts.CHAINER else 'u')
        if weight.is_map and layout == layouts.CHAINER:
            u = f'{path}{name}_map'
        gamma = None if weight.gamma is None else path + (
            'gamma' if layout == layouts.SNGAN
            else layouts.split(weight.gamma)[1])
        us = f'{u}s' if weight.us and layout == layouts.CHAINER else None
        return WeightKeys(
            layout, path, name, path + name, u, None, gamma, us=us)

    def plain(self, weight: WeightKeys) -> str:
        """Returns the name of a weight that nothing normalizes."""
        path, name, _ = self._new(weight.path, weight.name)
        return path + name

    def other(self, key: str) -> tuple[str, bool]:
        """Returns the name of any other entry, and if it is a known one."""
        path, name = layouts.split(key)
        path, new, is_given = self._new(path, name)
        if is_given or not self.is_other_library:
            return path + new, True
        names = self._names_beside(key)
        return path + names.get(new, new), new in names

    def check(self) -> None:
        """Raises an error if there was nothing to rename by some name."""
        self._rename.check()

    def _new(self, path: str, name: str) -> tuple[str, str, bool]:
        """Returns a new path, a name, and whether that is a given one."""
        parts, name, is_given = self._rename(self._parts(path), name)
        if not self.is_other_library and parts == self._split(path) and (
                path.startswith(self._prefix)):
            return path, name, is_given
        separator = '.' if self._to_torch else '/'
        return self._prefix + ''.join(
            part + separator for part in parts), name, is_given

    def _parts(self, path: str) -> tuple[str, ...]:
        """Returns the path of a link without what wraps it."""
        for child in self._children:
            if path.startswith(child):
                path = child[:-len('module.')] + path[len(child):]
        parts = self._split(path)
        if self._to_torch or not self.is_other_library:
            return parts
        parts = tuple(x for x in parts if x != layouts.COMPILED)
        return parts[min(self._n_wrappers, _depth(parts)):]

    def _split(self, path: str) -> tuple[str, ...]:
        rest = path[len(self._prefix):]
        return tuple(rest[:-1].split(self._separator)) if rest else ()

    def _count_wrappers(self) -> int:
        """Returns how often DataParallel is before all names."""
        return min(_depth(self._parts(layouts.split(key)[0]))
                   for key in self._reader.keys
                   if key.startswith(self._prefix))

    def _names_beside(self, key: str) -> dict[str, str]:
        """Returns the names of the arrays of the layer that has an entry."""
        path = layouts.split(key)[0]
        known = self._known
        if self._to_torch:
            if f'{path}avg_mean' in known:
                return _BATCH
            return _NORM if {f'{path}gamma', f'{path}beta'} <= known else (
                _OTHER)
        names = _OTHER
        if f'{path}running_mean' in known:
            names = _BATCH
        elif {f'{path}weight', f'{path}bias'} <= known and all(
                len(self._reader.entry(each).shape or ()) == 1
                for each in (key, f'{path}weight')):
            names = _NORM  # of layers, groups or instances
        return {theirs: ours for ours, theirs in names.items()}


class _Rename:
    """What users rename: of the old paths that fit, the longest counts."""

    def __init__(
            self, path: str,
            rename: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]],
    ) -> None:
        self._path = path
        self._new: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._given: dict[tuple[str, ...], str] = {}
        self._seen: dict[str, None] = {}  # an ordered set
        for old, (parts, new) in rename.items():
            if parts in self._new:
                raise errors.SnapshotRenameError(
                    path, old, f'so is {self._given[parts]!r}, which is the '
                    f'same', [])
            self._given[parts], self._new[parts] = old, new
        self._unused = dict(self._given)

    def __call__(
            self, parts: tuple[str, ...], name: str,
    ) -> tuple[tuple[str, ...], str, bool]:
        """Returns the new path and name, and if it was the name that fits."""
        self._seen['.'.join(parts) or name] = None
        full = (*parts, name)
        for n in range(len(full), -1, -1):
            new = self._new.get(full[:n])
            if new is not None:
                self._unused.pop(full[:n], None)
                whole = new + full[n:]
                if not whole:
                    raise errors.SnapshotRenameError(
                        self._path, self._given[full], 'nothing is left of '
                        'it', list(self._seen))
                return whole[:-1], whole[-1], n == len(full)
        return parts, name, False

    def check(self) -> None:
        for old in self._unused.values():
            raise errors.SnapshotRenameError(
                self._path, old, 'no entry is below it', list(self._seen))


def _depth(parts: tuple[str, ...]) -> int:
    """How many of the first parts are those of DataParallel."""
    return next((i for i, part in enumerate(parts)
                 if part != layouts.DATA_PARALLEL), len(parts))


def _parts_of(path: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r'[./]', path) if part)
