"""What Chainer calls by another name than PyTorch, and the other way.

Chainer separates paths by ``/``, PyTorch by ``.``, and both have names of
their own for the arrays of a layer.
"""
from __future__ import annotations

from sn_function._snapshots import layouts
from sn_function._snapshots.layouts import WeightKeys
from sn_function._snapshots.readers import Reader


def renamed(weight: WeightKeys, layout: str) -> WeightKeys:
    """Returns the names of a weight's entries in another layout."""
    if layout in layouts.OF_TORCH:
        name = 'weight' if weight.name == 'W' else weight.name
        return layouts.torch_keys(layout, weight.path.replace('/', '.'), name)
    name = 'W' if weight.name == 'weight' else weight.name
    path = weight.path.replace('.', '/')
    u = path + (f'{name}_u' if layout == layouts.CHAINER else 'u')
    gamma = None if weight.gamma is None else path + (
        'gamma' if layout == layouts.SNGAN else layouts.split(weight.gamma)[1])
    return WeightKeys(layout, path, name, path + name, u, None, gamma)


# Names in Chainer and in PyTorch, of batch normalization, of layer and group
# normalization, and of other layers.
_BATCH = {'gamma': 'weight', 'beta': 'bias', 'avg_mean': 'running_mean',
          'avg_var': 'running_var', 'N': 'num_batches_tracked'}
_NORM = {'gamma': 'weight', 'beta': 'bias'}
_OTHER = {'W': 'weight', 'b': 'bias'}


def other_name(
        reader: Reader, key: str, to_torch: bool, known: set[str],
) -> tuple[str, bool]:
    """Returns the name of any other entry there, and if it is a known one.

    Args:
        reader: The file, for the shapes of entries.
        key: The entry.
        to_torch: From Chainer to PyTorch, or the other way.
        known: All entries.

    """
    path, name = layouts.split(key)
    names = _OTHER
    if to_torch:
        if f'{path}avg_mean' in known:
            names = _BATCH
        elif {f'{path}gamma', f'{path}beta'} <= known:
            names = _NORM
        path = path.replace('/', '.')
    else:
        if f'{path}running_mean' in known:
            names = _BATCH
        elif {f'{path}weight', f'{path}bias'} <= known and all(
                len(reader.entry(each).shape or ()) == 1
                for each in (key, f'{path}weight')):
            names = _NORM  # of layers, groups or instances
        names = {theirs: ours for ours, theirs in names.items()}
        path = path.replace('.', '/')
    return path + names.get(name, name), name in names
