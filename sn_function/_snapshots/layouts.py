"""How snapshots name a weight, its vectors and its gamma.

=================== ====================================================
layout              entries of a weight ``W`` of a link ``l``
=================== ====================================================
chainer             ``l/W``, ``l/W_u (m,)``, ``l/gamma ()``
sngan-projection    ``l/W``, ``l/u (1, m)``, ``l/gamma (1, ..., 1)``
torch               ``l.weight_orig``, ``l.weight_u (m,)``,
                    ``l.weight_v (n,)``
torch-parametrized  ``l.parametrizations.weight.original``,
                    ``l.parametrizations.weight.0._u (m,)``, ``0._v (n,)``
=================== ====================================================

The first is that of Chainer's hook and of this package's.  A trainer's
snapshot has the entries of a model below ``updater/model:NAME/``, and those
of its optimizer below ``updater/optimizer:NAME/``.
"""
from __future__ import annotations

import re
from typing import Iterable, NamedTuple, Sequence

from sn_function import errors
from sn_function._snapshots import readers

CHAINER, SNGAN = 'chainer', 'sngan-projection'
TORCH, PARAMETRIZED = 'torch', 'torch-parametrized'
LAYOUTS = CHAINER, SNGAN, TORCH, PARAMETRIZED

_MODEL = re.compile(r'updater/model:([^/]+)/')
_OPTIMIZER = 'updater/optimizer:'
_TORCH = re.compile(r'(?:(.*)\.)?([^.]+)_(orig|u|v)')
_PARAMETRIZED = re.compile(
    r'(?:(.*)\.)?parametrizations\.([^.]+)\.(original|0\._u|0\._v)')


class Weight(NamedTuple):
    """The entries of one weight.  ``path`` is that of its link."""

    layout: str
    path: str
    name: str
    weight: str
    u: str
    v: str | None = None
    gamma: str | None = None

    @property
    def is_torch(self) -> bool:
        return self.layout in (TORCH, PARAMETRIZED)

    @property
    def entries(self) -> list[str]:
        return [key for key in (self.weight, self.u, self.v, self.gamma)
                if key is not None]


def split(key: str) -> tuple[str, str]:
    """The path of an entry with its separator, and its name."""
    i = max(key.rfind('/'), key.rfind('.')) + 1
    return key[:i], key[i:]


def models(keys: Iterable[str]) -> list[str]:
    """The models of a trainer's snapshot, by name."""
    found = (match for match in map(_MODEL.match, keys) if match)
    return sorted({match[1] for match in found})


def prefix_of(reader: readers.Reader, model: str) -> str:
    """Returns what the entries of a model, or of a link, begin with."""
    for prefix in f'updater/model:{model}/', f'{model.rstrip("/.")}/', (
            f'{model.rstrip("/.")}.'):
        if any(key.startswith(prefix) for key in reader.keys):
            return prefix
    raise errors.SnapshotModelError(reader.path, model, models(reader.keys))


def optimizer_prefix(weight: Weight) -> str | None:
    """Where a trainer's snapshot has the optimizer's state of the gamma."""
    match = _MODEL.match(weight.gamma or '')
    if match is None or weight.gamma is None:
        return None
    return f'{_OPTIMIZER}{match[1]}/{weight.gamma[match.end():]}/'


def find(reader: readers.Reader, prefix: str) -> list[Weight]:
    """Returns the weights below ``prefix``, in the order of the file.

    Raises:
        SnapshotLayoutError: There is none, or of two libraries.
        SnapshotWeightError: There is a vector without its weight.
        SnapshotGammaError: A gamma may belong to either of two weights.

    """
    keys = [key for key in reader.keys if key.startswith(prefix)
            and not key.startswith(_OPTIMIZER)]
    found = [*_find_chainer(reader, keys), *_find_torch(reader, keys)]
    if not found:
        raise errors.SnapshotLayoutError(
            reader.path, 'no weight with spectral normalization was found in '
            'it', reader.keys)
    if len({weight.is_torch for weight in found}) > 1:
        raise errors.SnapshotLayoutError(
            reader.path, 'it has weights both as Chainer and as PyTorch name '
            'them', [weight.weight for weight in found])
    order = {key: i for i, key in enumerate(keys)}
    found.sort(key=lambda weight: order[weight.weight])
    return _with_gammas(reader, found, set(keys))


def _find_chainer(
        reader: readers.Reader, keys: Sequence[str]) -> list[Weight]:
    found, known = [], set(keys)
    for key in keys:
        path, name = split(key)
        if name.endswith('_u') and not path.endswith('.'):
            W = key[:-2]
            # A PyTorch weight_u at the top has no separator either.
            if (W not in known and name != 'W_u') or f'{W}_orig' in known:
                continue
            _require(reader, W, key, known)
            shape = reader.entry(W).shape
            if name == 'W_u' or shape is None or len(shape) > 1:
                found.append(Weight(CHAINER, path, name[:-2], W, key))
        elif name == 'u' and path + 'W' in known and (
                f'{path}W_u' not in known):
            found.append(Weight(SNGAN, path, 'W', path + 'W', key))
    return found


def _require(
        reader: readers.Reader, key: str, vector: str,
        known: set[str]) -> None:
    if key not in known:
        raise errors.SnapshotWeightError(
            reader.path, key, f'this weight is missing, and {vector!r} is '
            f'there')


def _find_torch(
        reader: readers.Reader, keys: Sequence[str]) -> list[Weight]:
    known = set(keys)
    stems: dict[tuple[str, str, str], None] = {}  # an ordered set
    for key in keys:
        if '/' in key:
            continue
        for layout, pattern in (PARAMETRIZED, _PARAMETRIZED), (TORCH, _TORCH):
            match = pattern.fullmatch(key)
            if match:
                path = '' if match[1] is None else match[1] + '.'
                stems[layout, path, match[2]] = None
                break
    found = []
    for layout, path, name in stems:
        stem, ends = (f'{path}{name}', ('_orig', '_u', '_v')) if (
            layout == TORCH) else (
            f'{path}parametrizations.{name}.', ('original', '0._u', '0._v'))
        W, u, v = (stem + end for end in ends)
        there = {W, u, v} & known
        if layout == PARAMETRIZED and not {u, v} & known:
            continue  # parametrized by something else
        if layout == TORCH and W not in known and there != {u, v}:
            continue  # some other entry whose name ends so
        _require(reader, W, u if u in known else v, known)
        for vector in {u, v} - known:
            raise errors.SnapshotWeightError(
                reader.path, vector, f'this vector of {W!r} is missing')
        found.append(Weight(layout, path, name, W, u, v))
    return found


def _with_gammas(
        reader: readers.Reader, found: list[Weight],
        known: set[str]) -> list[Weight]:
    """Says of each weight which entry is its gamma."""
    result = []
    for weight in found:
        own = f'{weight.path}{weight.name}_gamma'
        # The first hook of a link calls it gamma, others W_gamma.
        others = [each.weight for each in found
                  if each.path == weight.path and each is not weight
                  and f'{each.path}{each.name}_gamma' not in known]
        shared = f'{weight.path}gamma'
        gamma = None
        if not weight.is_torch and own in known:
            gamma = own
        elif not weight.is_torch and shared in known and _is_scalar(
                reader.entry(shared)):
            if others:
                raise errors.SnapshotGammaError(
                    reader.path, shared, f'it may be the gamma of '
                    f'{weight.weight!r} or of {others[0]!r}')
            gamma = shared
        result.append(weight._replace(gamma=gamma))
    return result


def _is_scalar(entry: readers.Entry) -> bool:
    return entry.shape is not None and set(entry.shape) <= {1}


# Names in another layout

def renamed(weight: Weight, layout: str) -> Weight:
    """Returns the names of a weight's entries in another layout."""
    path = weight.path
    if layout in (CHAINER, SNGAN):
        path = path.replace('.', '/')
        name = 'W' if weight.name == 'weight' else weight.name
        gamma = None if weight.gamma is None else path + (
            'gamma' if layout == SNGAN else split(weight.gamma)[1])
        u = path + (f'{name}_u' if layout == CHAINER else 'u')
        return Weight(layout, path, name, path + name, u, None, gamma)
    path = path.replace('/', '.')
    name = 'weight' if weight.name == 'W' else weight.name
    if layout == TORCH:
        stem, ends = f'{path}{name}', ('_orig', '_u', '_v')
    else:
        stem = f'{path}parametrizations.{name}.'
        ends = 'original', '0._u', '0._v'
    return Weight(layout, path, name, *(stem + end for end in ends))


def plain_name(weight: Weight) -> str:
    """Returns the name of the weight where nothing normalizes it."""
    return f'{weight.path}{weight.name}'


# Names in Chainer and PyTorch, of batch normalization and of other layers.
_BATCH = {'gamma': 'weight', 'beta': 'bias', 'avg_mean': 'running_mean',
          'avg_var': 'running_var', 'N': 'num_batches_tracked'}
_NORM = {'gamma': 'weight', 'beta': 'bias'}
_OTHER = {'W': 'weight', 'b': 'bias'}


def other_name(
        key: str, to_torch: bool, reader: readers.Reader,
        known: set[str]) -> tuple[str, bool]:
    """Returns the name of any other entry there, and if it is a known one.

    Args:
        key: The entry.
        to_torch: From Chainer to PyTorch, or the other way.
        reader: The file, for the shape of the entry.
        known: All entries.

    """
    path, name = split(key)
    if to_torch:
        names = _OTHER
        if path + 'avg_mean' in known:
            names = _BATCH
        elif path + 'gamma' in known and path + 'beta' in known:
            names = _NORM
        path = path.replace('/', '.')
    else:
        names = _OTHER
        shape = reader.entry(key).shape
        if path + 'running_mean' in known:
            names = _BATCH
        elif path + 'bias' in known and shape is not None and len(
                shape) == 1 and path + 'weight' in known and len(
                reader.entry(path + 'weight').shape or ()) == 1:
            names = _NORM  # of layers, groups or instances
        names = {theirs: ours for ours, theirs in names.items()}
        path = path.replace('.', '/')
    return path + names.get(name, name), name in names
