"""State dicts of PyTorch, converted and loaded into a model with hooks."""
from __future__ import annotations

import os
import tempfile
from typing import Any

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np
from chainer import serializers

from tests.tools.silent.cases import (
    Hook,
    Outcome,
    case,
    linear,
    text_of_norms,
    used_norm,
)

assert sn_function  # it is imported for what it does


def arrays() -> Any:
    """A weight, and its first singular vectors."""
    W = np.random.RandomState(0).randn(7, 5).astype('f')
    U, _, V = np.linalg.svd(W)
    return W, U[:, 0], V[0]


def converted(
        make_hook: Hook, state: dict[str, Any], path: str = 'l1',
        **kwargs: Any) -> Outcome:
    """Converts a state dict; returns the norm of the layer at the path."""
    from sn_function import snapshot
    model = chainer.Chain(**{path: linear(5, 7).add_hook(make_hook())})
    with tempfile.TemporaryDirectory() as directory:
        src, dst = (os.path.join(directory, name)
                    for name in ('torch.npz', 'chainer.npz'))
        np.savez(src, **state)
        snapshot.convert(src, dst, 'chainer', **kwargs)
        serializers.load_npz(dst, model)
    link = model[path]
    text, ok = text_of_norms(used_norm(link))
    return text, ok and bool((link.W.array == arrays()[0]).all())


def torch(prefix: str = 'l1.') -> dict[str, Any]:
    W, u, v = arrays()
    return {f'{prefix}weight_orig': W, f'{prefix}weight_u': u,
            f'{prefix}weight_v': v}


@case('PyTorch 0.4: `weight_orig`, `weight_u`, no `weight_v`')
def torch_04(make_hook: Hook) -> Outcome:
    state = torch()
    del state['l1.weight_v']
    return converted(make_hook, state)


@case('PyTorch: a stale buffer `weight` beside `weight_orig`')
def stale_buffer(make_hook: Hook) -> Outcome:
    return converted(make_hook, {**torch(), 'l1.weight': arrays()[0] / 3})


@case('PyTorch: `module.weight_bar` of a wrapper')
def weight_bar(make_hook: Hook) -> Outcome:
    W, u, v = arrays()
    return converted(make_hook, {
        'l1.module.weight_bar': W, 'l1.module.weight_u': u,
        'l1.module.weight_v': v})


@case('PyTorch: `weight`, `u0`, `sv0` of BigGAN')
def biggan(make_hook: Hook) -> Outcome:
    W, u, _ = arrays()
    return converted(make_hook, {
        'l1.weight': W, 'l1.u0': u[None], 'l1.sv0': np.ones(1, 'f')})


@case('PyTorch: all below `module.`, of DataParallel')
def data_parallel(make_hook: Hook) -> Outcome:
    return converted(make_hook, torch('module.l1.'))


@case('PyTorch: all below `_orig_mod.`, of `torch.compile`')
def compiled(make_hook: Hook) -> Outcome:
    return converted(make_hook, torch('_orig_mod.l1.'))


@case('PyTorch: `main.0` for a link `l1`, by `--rename`')
def rename(make_hook: Hook) -> Outcome:
    return converted(
        make_hook, torch('main.0.'), rename={'main.0': 'l1'})
