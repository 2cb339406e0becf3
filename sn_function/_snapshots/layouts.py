"""Layouts: how snapshots name a weight, its vectors and its gamma.

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
OF_TORCH = TORCH, PARAMETRIZED
LAYOUTS = CHAINER, SNGAN, *OF_TORCH

_MODEL = re.compile(r'updater/model:([^/]+)/')
_OPTIMIZER = 'updater/optimizer:'
_TORCH = re.compile(r'(?:(.*)\.)?([^.]+)_(orig|u|v)')
_PARAMETRIZED = re.compile(
    r'(?:(.*)\.)?parametrizations\.([^.]+)\.(original|0\._u|0\._v)')


class WeightKeys(NamedTuple):
    """The names of the entries of one weight.

    ``path`` is that of its link, with a separator, and ``name`` that of the
    weight there.
    """

    layout: str
    path: str
    name: str
    W: str
    u: str
    v: str | None = None
    gamma: str | None = None

    @property
    def is_torch(self) -> bool:
        return self.layout in OF_TORCH

    @property
    def keys(self) -> list[str]:
        return [key for key in (self.W, self.u, self.v, self.gamma)
                if key is not None]

    @property
    def plain(self) -> str:
        """The name of the weight where nothing normalizes it."""
        return f'{self.path}{self.name}'

    def u_shape(self, m: int) -> tuple[int, ...]:
        return (1, m) if self.layout == SNGAN else (m,)

    def gamma_shape(self, ndim: int) -> tuple[int, ...]:
        return (1,) * ndim if self.layout == SNGAN else ()


def split(key: str) -> tuple[str, str]:
    """Returns the path of an entry with its separator, and its name."""
    i = max(key.rfind('/'), key.rfind('.')) + 1
    return key[:i], key[i:]


# Models of a trainer

def models(keys: Iterable[str]) -> list[str]:
    """Returns the models of a trainer's snapshot, by name."""
    found = (match for match in map(_MODEL.match, keys) if match)
    return sorted({match[1] for match in found})


def prefix_of(reader: readers.Reader, model: str | None) -> str:
    """Returns what the entries of a model, or of a link, begin with."""
    if model is None:
        return ''
    path = model.rstrip('/.')
    for prefix in f'updater/model:{model}/', f'{path}/', f'{path}.':
        if any(key.startswith(prefix) for key in reader.keys):
            return prefix
    raise errors.SnapshotModelError(reader.path, model, models(reader.keys))


def prefix_for(
        reader: readers.Reader, model: str | None, layout: str) -> str:
    """Returns the prefix of what a file of a layout gets.

    A state dict is of one model: from a trainer's snapshot it gets the only
    one with such weights.
    """
    known = models(reader.keys)
    if model is not None or not known or layout not in OF_TORCH:
        return prefix_of(reader, model)
    with_weights = models(each.W for each in find(reader, 'updater/model:'))
    if len(with_weights) != 1:
        raise errors.SnapshotModelError(reader.path, None, known)
    return prefix_of(reader, with_weights[0])


def gamma_state(reader: readers.Reader, weight: WeightKeys) -> list[str]:
    """Returns the entries of a trainer's optimizer for a gamma."""
    match = _MODEL.match(weight.gamma or '')
    if match is None or weight.gamma is None:
        return []
    prefix = f'{_OPTIMIZER}{match[1]}/{weight.gamma[match.end():]}/'
    return [key for key in reader.keys if key.startswith(prefix)]


# Finding weights

def find(reader: readers.Reader, prefix: str) -> list[WeightKeys]:
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
            'them', [weight.W for weight in found])
    order = {key: i for i, key in enumerate(keys)}
    found.sort(key=lambda weight: order[weight.W])
    known = set(keys)
    return [weight._replace(gamma=_gamma(reader, weight, found, known))
            for weight in found]


def _find_chainer(
        reader: readers.Reader, keys: Sequence[str]) -> list[WeightKeys]:
    found, known = [], set(keys)
    for key in keys:
        path, name = split(key)
        if name.endswith('_u') and not path.endswith('.'):
            W = key[:-2]
            # A PyTorch weight_u at the top has no separator either.
            if (W not in known and name != 'W_u') or f'{W}_orig' in known:
                continue
            if W not in known:
                raise _missing_weight(reader, W, key)
            shape = reader.entry(W).shape
            if name == 'W_u' or shape is None or len(shape) > 1:
                found.append(WeightKeys(CHAINER, path, name[:-2], W, key))
        elif name == 'u' and path + 'W' in known and (
                f'{path}W_u' not in known):
            found.append(WeightKeys(SNGAN, path, 'W', path + 'W', key))
    return found


def _find_torch(
        reader: readers.Reader, keys: Sequence[str]) -> list[WeightKeys]:
    known = set(keys)
    found = []
    # Several entries are of one weight: these are an ordered set.
    for weight in dict.fromkeys(map(_torch_weight_of, keys)):
        if weight is None:
            continue
        vectors = weight.keys[1:]
        there = [key for key in vectors if key in known]
        if weight.layout == PARAMETRIZED and not there:
            continue  # parametrized by something else
        if weight.layout == TORCH and weight.W not in known and (
                there != vectors):
            continue  # some other entry whose name ends so
        if weight.W not in known:
            raise _missing_weight(reader, weight.W, there[0])
        for key in vectors:
            if key not in known:
                raise errors.SnapshotWeightError(
                    reader.path, key,
                    f'this vector of {weight.W!r} is missing')
        found.append(weight)
    return found


def _torch_weight_of(key: str) -> WeightKeys | None:
    """Returns the weight that an entry is of by its name, if any."""
    if '/' not in key:
        for layout, pattern in (PARAMETRIZED, _PARAMETRIZED), (TORCH, _TORCH):
            match = pattern.fullmatch(key)
            if match:
                path = '' if match[1] is None else match[1] + '.'
                return torch_keys(layout, path, match[2])
    return None


def torch_keys(layout: str, path: str, name: str) -> WeightKeys:
    """Returns the names of the entries in a layout of PyTorch."""
    if layout == TORCH:
        stem, ends = f'{path}{name}', ('_orig', '_u', '_v')
    else:
        stem = f'{path}parametrizations.{name}.'
        ends = 'original', '0._u', '0._v'
    return WeightKeys(layout, path, name, *(stem + end for end in ends))


def _missing_weight(
        reader: readers.Reader, key: str, vector: str,
) -> errors.SnapshotWeightError:
    return errors.SnapshotWeightError(
        reader.path, key,
        f'this weight is missing, and {vector!r} is there')


def _gamma(
        reader: readers.Reader, weight: WeightKeys,
        found: Sequence[WeightKeys], known: set[str]) -> str | None:
    """Returns the entry of the gamma of a weight, if it has one."""
    if weight.is_torch:
        return None
    # The first hook of a link calls it gamma, others W_gamma.
    own, shared = f'{weight.plain}_gamma', f'{weight.path}gamma'
    if own in known:
        return own
    if shared not in known or not _is_scalar(reader.entry(shared)):
        return None
    for other in found:
        if other.path == weight.path and other is not weight and (
                f'{other.plain}_gamma' not in known):
            raise errors.SnapshotGammaError(
                reader.path, shared, f'it may be the gamma of '
                f'{weight.W!r} or of {other.W!r}')
    return shared


def _is_scalar(entry: readers.Entry) -> bool:
    return entry.shape is not None and set(entry.shape) <= {1}
