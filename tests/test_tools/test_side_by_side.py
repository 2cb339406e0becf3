"""tests.tools.side_by_side tells the same normalization from another."""
from __future__ import annotations

import sys

from tests.tools import side_by_side

# Code of the old kind, in our own words: `UPSIDE_DOWN` is a mistake in it.
LINKS = '''
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.link_hooks import SpectralNormalization

UPSIDE_DOWN = {upside_down}

class SNLinear(L.Linear):
    def __init__(self, in_size, out_size, use_gamma=False, nobias=False,
                 Ip=1):
        super().__init__(in_size, out_size, nobias)
        self.Ip = Ip
        self.u = None

    @property
    def W_bar(self):
        u = self.u
        for _ in range(self.Ip):
            v = u @ self.W.array
            v /= np.linalg.norm(v)
            u = v @ self.W.array.T
            u /= np.linalg.norm(u)
        self.u = u
        sigma = F.sum(F.matmul(u, self.W) * v)
        if UPSIDE_DOWN:
            sigma = 1 / sigma
        return self.W / F.broadcast_to(sigma, self.W.shape)

    def __call__(self, x):
        return F.linear(x, self.W_bar, self.b)

def build():
    class Net(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.a = SNLinear(6, 5, Ip=2)
                self.b = L.Linear(5, 3).add_hook(SpectralNormalization())
        def __call__(self, x):
            return self.b(F.tanh(self.a(x)))
    net = Net()
    optimizer = chainer.optimizers.Adam().setup(net)
    def step():
        x = np.random.normal(size=(8, 6)).astype('f')
        loss = F.mean(net(x) ** 2)
        net.cleargrads()
        loss.backward()
        optimizer.update()
        chainer.report({{'loss': loss}}, net)
    return step, {{'net': net}}
'''


def row(tmp_path, monkeypatch, upside_down):
    path = tmp_path / 'adapter.py'
    path.write_text(LINKS.format(upside_down=upside_down))
    monkeypatch.setitem(sys.modules, 'adapter', None)    # gone afterwards
    adapter = side_by_side.load(str(path))
    return side_by_side.compare(adapter.build, 20, 0, {})


def test_the_same(tmp_path, monkeypatch):
    n_hooks, *differences, _ = row(tmp_path, monkeypatch, False)
    assert n_hooks == '2'
    assert all(float(d) < 1e-4 for d in differences)


def test_another(tmp_path, monkeypatch):
    _, losses, vectors, way, rounding, _ = row(tmp_path, monkeypatch, True)
    # The vectors are those of the same weights.
    assert float(rounding) < 1e-4 > float(vectors)
    assert float(losses) > .01 < float(way)
