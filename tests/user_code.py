"""A program that names all that is public, for the type checkers.

See test_types.py.
"""
# Chainer's modules do not say what they export.
# pyright: reportPrivateImportUsage=false
from typing import Any, List, Optional, Tuple

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np
from chainer import links as L

from sn_function import (
    chain,
    distributed,
    errors,
    extensions,
    functions,
    link_hooks,
    optimizer_hooks,
    snapshot,
)
from sn_function.bake import bake

VERSION: str = sn_function.__version__
HOOKS = [link_hooks.SpectralNormalization, chain.ChainSpectralNormalization]


def use_functions() -> Tuple[chainer.Variable, ...]:
    W, u = np.eye(3, 4, dtype='f'), np.ones(3, 'f')
    C, x = np.ones((3, 4, 3, 3), 'f'), np.ones((4, 8, 8), 'f')
    Y: chainer.Variable = sn_function.spectral_normalize(W, u, update_u=True)
    Y, sigma = functions.spectral_normalize(W, u, return_sigma=True)
    map_: chainer.Variable = sn_function.conv_spectral_normalize(C, x, pad=1)
    true = sn_function.spectral_norm(W)
    return (Y, sigma, map_, true, sn_function.spectral_norm(W, u, 3),
            *sn_function.spectral_normalize_all([W], [u]))


class Model(chainer.Chain):

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.first = L.Linear(4, 4)
            self.plain = L.Linear(4, 4)
            self.last = L.Linear(4, 4)
        self.first.add_hook(sn_function.SpectralNormalization(
            detach_uv=True, update_u='always'))
        self.add_hook(sn_function.ChainSpectralNormalization(
            L.Linear, exclude=['/first', '/plain'], cap=2.0, rtol=1e-2))

    def forward(self, x: Any) -> Any:
        return self.last(self.plain(self.first(x)))


def look(model: Model, x: Any) -> List[str]:
    found: sn_function.Summary = sn_function.summary(model, lambda m: m(x))
    row: sn_function.SummaryRow = found.rows[0]
    assert found.all_normalized, found.remarks
    layers: extensions.Layers = sn_function.norms(model)
    layer: extensions.Layer = layers[0]
    norm: Optional[float] = layer.norm
    interval: sn_function.Interval = sn_function.certify(model.last)
    report = extensions.SpectralNormReport(model, certify=1e-2)
    bound: float = report.lipschitz_bound()
    return [row.path, row.status, f'{norm} {interval.hi} {bound}', str(layers),
            *(each.name for each in report.measure())]


def train(model: Model, x: Any) -> Model:
    optimizer = chainer.optimizers.SGD().setup(model)
    optimizer.add_hook(optimizer_hooks.SpectralNormPenalty(
        1e-2, filter='/plain'))
    optimizer.add_hook(optimizer_hooks.SpectralNormProjection(2.0))
    state = extensions.SpectralNormPenaltyState(optimizer)
    assert isinstance(state, chainer.training.Extension)
    with sn_function.cached(model), sn_function.normalized(model):
        loss = chainer.functions.sum(model(x))
    model.cleargrads()
    loss.backward()
    optimizer.update()
    sn_function.refresh(model, gamma=True)
    baked: Model = bake(model)
    assert baked.first.W.shape == (4, 4)
    return sn_function.bake(model, certified=True, time_limit=None)


def ship(path: str, out: str) -> List[str]:
    assert 'torch' in snapshot.LAYOUTS
    try:
        reports: List[snapshot.WeightReport] = snapshot.inspect(path)
        done: snapshot.Outcome = snapshot.bake(path, out, overwrite=True)
        snapshot.convert(path, out, 'torch', fill=True, overwrite=True)
        snapshot.repair(path, out, all=True, overwrite=True)
    except errors.SpectralNormalizationError as e:
        return [str(e)]
    change: snapshot.WeightChange = done.weights[0]
    return [reports[0].key, change.key, change.note]


def on_several_ranks(communicator: Any, model: Model) -> Any:
    sn_function.install(hook=False)
    distributed.bcast_data(communicator, model)
    distributed.assert_synchronized(communicator, model)
    Y = distributed.sharded_spectral_normalize(
        communicator, np.ones((3, 4)), np.ones(3), n_power_iteration=2)
    return Y, distributed.create_multi_node_optimizer(
        chainer.optimizers.Adam(), communicator)
