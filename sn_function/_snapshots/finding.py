"""Finds the weights of a snapshot, by the names and shapes of its entries."""
from __future__ import annotations

import re
from typing import Iterator, Sequence

from sn_function import errors
from sn_function._snapshots import layouts
from sn_function._snapshots.layouts import WeightKeys
from sn_function._snapshots.readers import Reader

_TORCH = re.compile(r'((?:.*\.)?)([^.]+)_(?:orig|bar|u|v)')
_PARAMETRIZED = re.compile(
    r'((?:.*\.)?)parametrizations\.([^.]+)\.(?:original|0\._u|0\._v)')
_BIGGAN = re.compile(r'((?:.*\.)?)(?:u|sv)0')
# Names of weights, where no vector tells them; the last is of n-step RNNs.
_WEIGHT = re.compile('W|weight|w[0-9]+')


def find(reader: Reader, prefix: str) -> list[WeightKeys]:
    """Returns the weights below ``prefix`` that have a vector.

    Raises:
        SnapshotNoVectorError: There are only weights without one.
        SnapshotLayoutError: There is no weight, or of two libraries, or a
            vector without its weight.
        SnapshotGammaError: A gamma may belong to either of two weights.

    """
    found = find_any(reader, prefix)
    if found:
        return found
    plain = plain_keys(reader, prefix, found)
    if plain:
        raise errors.SnapshotNoVectorError(reader.path, plain)
    raise errors.SnapshotLayoutError(
        reader.path, 'no weight with spectral normalization was found in it',
        reader.keys)


def find_any(reader: Reader, prefix: str) -> list[WeightKeys]:
    """Returns the weights with a vector, where there may be none."""
    keys = keys_below(reader, prefix)
    found = [*_find_chainer(reader, keys), *_find_torch(reader, keys)]
    if len({weight.is_torch for weight in found}) > 1:
        raise errors.SnapshotLayoutError(
            reader.path, 'it has weights both as Chainer and as PyTorch name '
            'them', [weight.W for weight in found])
    known = set(keys)
    return in_order([
        weight._replace(gamma=_gamma(reader, weight, found, known),
                        us=others_of(weight, known)) for weight in found])


def prefix_for(reader: Reader, model: str | None, layout: str) -> str:
    """Returns the prefix of what a file of a layout gets.

    A state dict is of one model: from a trainer's snapshot it gets the only
    one with such weights.
    """
    known = layouts.models(reader.keys)
    if model is not None or not known or layout not in layouts.OF_TORCH:
        return layouts.prefix_of(reader, model)
    with_weights = layouts.models(
        each.W for each in find(reader, 'updater/model:'))
    if len(with_weights) != 1:
        raise errors.SnapshotModelError(reader.path, None, known)
    return layouts.prefix_of(reader, with_weights[0])


def keys_below(reader: Reader, prefix: str) -> list[str]:
    return [key for key in reader.keys if key.startswith(prefix)
            and not key.startswith(layouts.OPTIMIZER)]


def in_order(weights: Sequence[WeightKeys]) -> list[WeightKeys]:
    return sorted(weights, key=lambda weight: layouts.natural(weight.W))


# Without a vector

def plain_keys(
        reader: Reader, prefix: str, found: Sequence[WeightKeys],
) -> list[str]:
    """Returns each W, or weight, that is none of those found."""
    taken = taken_by(found)
    return sorted((
        key for key in keys_below(reader, prefix)
        if key not in taken and is_weight(reader, key)),
        key=layouts.natural)


def taken_by(found: Sequence[WeightKeys]) -> set[str]:
    return {key for weight in found for key in weight.keys}


def is_weight(reader: Reader, key: str) -> bool:
    """Whether it seems to be a weight, by its name, shape and dtype."""
    if _WEIGHT.fullmatch(layouts.split(key)[1]) is None:
        return False
    entry = reader.entry(key)
    return is_matrix(reader, key) and entry.is_float and 0 not in (
        entry.shape or ())


def is_matrix(reader: Reader, key: str) -> bool:
    return len(reader.entry(key).shape or ()) >= 2


# Of Chainer

def others_of(weight: WeightKeys, known: set[str]) -> str | None:
    """Returns the entry of the vectors beside ``u``, if it has one."""
    us = f'{weight.u}s'
    return us if weight.layout == layouts.CHAINER and us in known else None


def _find_chainer(reader: Reader, keys: Sequence[str]) -> list[WeightKeys]:
    found, known = [], set(keys)
    for key in keys:
        path, name = layouts.split(key)
        if name.endswith('_u') and not path.endswith('.'):
            W = key[:-2]
            # A PyTorch weight_u at the top has no separator either.
            if (W not in known and name != 'W_u') or f'{W}_orig' in known:
                continue
            if W not in known:
                raise _missing_weight(reader, W, key, path)
            shape = reader.entry(W).shape
            if name == 'W_u' or shape is None or len(shape) > 1:
                found.append(WeightKeys(
                    layouts.CHAINER, path, name[:-2], W, key))
        elif name == 'W_map' and _is_of_map(reader, path, known):
            found.append(WeightKeys(
                layouts.CHAINER, path, 'W', path + 'W', key))
        elif name == 'u' and path + 'W' in known and not (
                {f'{path}W_u', f'{path}W_map'} & known):
            found.append(WeightKeys(
                layouts.SNGAN, path, 'W', path + 'W', key))
    return found


def _is_of_map(reader: Reader, path: str, known: set[str]) -> bool:
    """Whether the W of a link may be of a convolution with a ``W_map``."""
    W = f'{path}W'
    if W not in known or f'{W}_u' in known or path.endswith('.'):
        return False
    shape = reader.entry(W).shape
    return shape is None or len(shape) > 2


def _gamma(
        reader: Reader, weight: WeightKeys, found: Sequence[WeightKeys],
        known: set[str]) -> str | None:
    """Returns the entry of the gamma of a weight, if it has one."""
    if weight.is_torch:
        return None
    # The first hook of a link calls it gamma, others W_gamma.
    own, shared = f'{weight.plain}_gamma', f'{weight.path}gamma'
    if own in known:
        return own
    shape = reader.entry(shared).shape if shared in known else None
    if shape is None or not set(shape) <= {1}:
        return None
    for other in found:
        if other.path == weight.path and other is not weight and (
                f'{other.plain}_gamma' not in known):
            raise errors.SnapshotGammaError(
                reader.path, shared, f'it may be the gamma of '
                f'{weight.W!r} or of {other.W!r}')
    return shared


# Of PyTorch

def _find_torch(reader: Reader, keys: Sequence[str]) -> list[WeightKeys]:
    known = set(keys)
    found = []
    # Several entries are of one weight: these are an ordered set.
    for weight in dict.fromkeys(_torch_weights(keys, known)):
        there = _marks(reader, weight, known)
        if weight.W in known and there:
            found.append(weight)
        elif len(there) > 1 or (
                there and weight.layout == layouts.PARAMETRIZED):
            raise _missing_weight(reader, weight.W, there[0], weight.path)
        # Others are of weight_norm, of pruning, or of something else.
    return found


def _marks(
        reader: Reader, weight: WeightKeys, known: set[str]) -> list[str]:
    """Returns the entries that show that a weight is normalized."""
    marks = [weight.u, weight.v]
    if weight.layout == layouts.BIGGAN:
        log_of_sigma = weight.extras[0]
        if log_of_sigma not in known and (
                len(reader.entry(weight.u).shape or ()) != 2):
            return []  # some other u0
        marks = [weight.u, log_of_sigma]
    return [key for key in marks if key is not None and key in known]


def _torch_weights(
        keys: Sequence[str], known: set[str]) -> Iterator[WeightKeys]:
    """Yields the weight that an entry is of by its name, if any."""
    for key in keys:
        if '/' in key:
            continue
        for pattern, keys_of in ((_PARAMETRIZED, _parametrized),
                                 (_TORCH, _reparametrized),
                                 (_BIGGAN, _biggan)):
            match = pattern.fullmatch(key)
            if match:
                yield keys_of(match, known)
                break


def _parametrized(match: re.Match[str], known: set[str]) -> WeightKeys:
    return layouts.torch_keys(layouts.PARAMETRIZED, match[1], match[2])


def _reparametrized(match: re.Match[str], known: set[str]) -> WeightKeys:
    path, name = match[1], match[2]
    stem = path + name
    weight = layouts.torch_keys(layouts.TORCH, path, name)
    if f'{stem}_bar' in known and weight.W not in known:
        child = path if path == 'module.' or path.endswith(
            '.module.') else ''
        return weight._replace(
            layout=layouts.WRAPPER, W=f'{stem}_bar', child=child,
            path=path[:-len('module.')] if child else path)
    if weight.W in known:
        if stem in known:  # a buffer, stale since the last step
            weight = weight._replace(extras=(stem,))
        if weight.u in known and weight.v not in known:
            return weight._replace(layout=layouts.TORCH_OLD, v=None)
    return weight


def _biggan(match: re.Match[str], known: set[str]) -> WeightKeys:
    path = match[1]
    extras = [f'{path}sv0']
    while f'{path}u{len(extras)}' in known:
        extras += [f'{path}u{len(extras)}']
    others = [f'{path}sv{i}' for i in range(1, len(extras))]
    return WeightKeys(
        layouts.BIGGAN, path, 'weight', f'{path}weight', f'{path}u0',
        extras=tuple(extras + [key for key in others if key in known]))


def _missing_weight(
        reader: Reader, key: str, vector: str, path: str,
) -> errors.SnapshotLayoutError:
    return errors.SnapshotLayoutError(
        reader.path, f'{vector!r} is there, and no weight {key!r} for it',
        [key for key in reader.keys if key.startswith(path)])
