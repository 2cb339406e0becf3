"""Layouts: how snapshots name a weight, its vectors and its gamma.

=================== ====================================================
layout              entries of a weight ``W`` of a link ``l``
=================== ====================================================
chainer             ``l/W``, ``l/W_u (m,)``, ``l/gamma ()``; with several
                    vectors ``l/W_us (b - 1, m)``, those beside ``W_u``.
                    With ``norm='operator'`` they are inputs of the layer:
                    ``l/W_map (c, *size)``, ``l/W_maps (b - 1, c, *size)``
sngan-projection    ``l/W``, ``l/u (1, m)``, ``l/gamma (1, ..., 1)``
torch               ``l.weight_orig``, ``l.weight_u (m,)``,
                    ``l.weight_v (n,)``
torch-parametrized  ``l.parametrizations.weight.original``,
                    ``l.parametrizations.weight.0._u (m,)``, ``0._v (n,)``
torch-0.4           ``l.weight_orig``, ``l.weight_u (m,)``, and the buffer
                    ``l.weight`` of the last call in training mode
torch-wrapper       ``l.module.weight_bar``, ``l.module.weight_u (m,)``,
                    ``l.module.weight_v (n,)``
biggan              ``l.weight``, ``l.u0 (1, m)``, ``l.sv0 (1,)``
=================== ====================================================

The first is that of Chainer's hook and of this package's.  The last three are
read, and not written.  A trainer's snapshot has the entries of a model below
``updater/model:NAME/``, and those of its optimizer below
``updater/optimizer:NAME/``.
"""
from __future__ import annotations

import re
from typing import Any, Iterable, NamedTuple

from sn_function import errors
from sn_function._snapshots import defaults, readers

LAYOUTS = defaults.LAYOUTS
CHAINER, SNGAN, TORCH, PARAMETRIZED = LAYOUTS
OF_TORCH = TORCH, PARAMETRIZED
# Those that are read alone: of PyTorch before 1.0, of the module that wraps
# a layer (christiancosgrove/pytorch-spectral-normalization-gan), and of
# ajbrock/BigGAN-PyTorch.
TORCH_OLD, WRAPPER, BIGGAN = 'torch-0.4', 'torch-wrapper', 'biggan'
READ_ONLY = TORCH_OLD, WRAPPER, BIGGAN
# Of a weight without a vector.
PLAIN = 'plain'
# With u of shape (1, m), and with the first axis as that of the outputs.
_ROWS = SNGAN, BIGGAN
FIRST_AXIS = SNGAN, WRAPPER, BIGGAN
# What DataParallel and torch.compile put before the names of a model.
DATA_PARALLEL, COMPILED = 'module', '_orig_mod'
_WRAPPERS = 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'

_MODEL = re.compile(r'updater/model:([^/]+)/')
OPTIMIZER = 'updater/optimizer:'


class WeightKeys(NamedTuple):
    """The names of the entries of one weight.

    ``path`` is that of its link, with a separator, and ``name`` that of the
    weight there.  ``child`` is the path of the layer in a module that wraps
    it.  ``extras`` are entries that have no use without the vectors, and
    ``us`` has the vectors beside ``u``, if there are any.
    """

    layout: str
    path: str
    name: str
    W: str
    u: str
    v: str | None = None
    gamma: str | None = None
    child: str = ''
    extras: tuple[str, ...] = ()
    us: str | None = None

    @property
    def is_torch(self) -> bool:
        return self.layout in OF_TORCH + READ_ONLY

    @property
    def is_map(self) -> bool:
        """Whether ``u`` is an input of the layer, for the norm of its map."""
        return self.layout == CHAINER and self.u == f'{self.W}_map'

    @property
    def keys(self) -> list[str]:
        return [key for key in (self.W, self.u, self.us, self.v, self.gamma)
                if key is not None] + list(self.extras)

    @property
    def plain(self) -> str:
        """The name of the weight where nothing normalizes it."""
        return f'{self.path}{self.name}'

    def u_shape(self, m: int) -> tuple[int, ...]:
        return (1, m) if self.layout in _ROWS else (m,)

    def gamma_shape(self, ndim: int) -> tuple[int, ...]:
        return (1,) * ndim if self.layout == SNGAN else ()

    def iterations(self, n: int) -> int:
        """How many of them test mode has, where the hook has ``n``."""
        return 1 if self.layout == BIGGAN else n

    def warmup(self, n: int) -> int:
        """How many it may have before, where the hook may have ``n``."""
        return n if self.layout == CHAINER else 0


def torch_keys(layout: str, path: str, name: str) -> WeightKeys:
    """Returns the names of the entries in a layout of PyTorch."""
    if layout == TORCH:
        stem, ends = f'{path}{name}', ('_orig', '_u', '_v')
    else:
        stem = f'{path}parametrizations.{name}.'
        ends = 'original', '0._u', '0._v'
    W, u, v = (stem + end for end in ends)
    return WeightKeys(layout, path, name, W, u, v)


def split(key: str) -> tuple[str, str]:
    """Returns the path of an entry with its separator, and its name."""
    i = max(key.rfind('/'), key.rfind('.')) + 1
    return key[:i], key[i:]


def natural(key: str) -> tuple[tuple[Any, ...], ...]:
    """Returns what sorts entries by their paths, numbers by their values."""
    return tuple(
        tuple(_value(each) if i % 2 else each
              for i, each in enumerate(re.split('([0-9]+)', part)))
        for part in re.split('[./]', key))


def _value(digits: str) -> tuple[int, str]:
    """Returns what sorts as the number does; int() limits how long it is."""
    digits = digits.lstrip('0')
    return len(digits), digits


# Models of a trainer

def models(keys: Iterable[str]) -> list[str]:
    """Returns the models of a trainer's snapshot, by name."""
    found = (match for match in map(_MODEL.match, keys) if match)
    return sorted({match[1] for match in found})


def model_of(key: str) -> str:
    """Returns what the entries of the same model begin with."""
    match = _MODEL.match(key)
    return '' if match is None else match[0]


def prefix_of(reader: readers.Reader, model: str | None) -> str:
    """Returns what the entries of a model, or of a link, begin with."""
    if model is None:
        return ''
    path = model.rstrip('/.')
    for prefix in (f'updater/model:{model}/', f'{path}/', f'{path}.', *(
            f'{wrapper}{path}.' for wrapper in _WRAPPERS)):
        if any(key.startswith(prefix) for key in reader.keys):
            return prefix
    raise errors.SnapshotModelError(reader.path, model, models(reader.keys))


def gamma_state(reader: readers.Reader, weight: WeightKeys) -> list[str]:
    """Returns the entries of a trainer's optimizer for a gamma."""
    match = _MODEL.match(weight.gamma or '')
    if match is None or weight.gamma is None:
        return []
    prefix = f'{OPTIMIZER}{match[1]}/{weight.gamma[match.end():]}/'
    return [key for key in reader.keys if key.startswith(prefix)]
