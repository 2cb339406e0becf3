"""What tests.tools.bounds and tests.tools.symbols compute, and print."""
from __future__ import annotations

import numpy as np
import pytest

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L

from tests import maps, reference
from tests.tools import bounds, symbols

assert sn_function  # it is imported for what it does


@pytest.fixture(autouse=True)
def without_ideep():
    with chainer.using_config('use_ideep', 'never'):
        yield


@pytest.mark.parametrize(('make', 'shape'), [
    (lambda: L.Convolution2D(2, 3, 3, pad=1), (2, 5, 6)),
    (lambda: L.Convolution2D(2, 3, (4, 3), stride=(2, 1)), (2, 7, 6)),
    (lambda: L.Convolution2D(2, 3, 2, stride=2), (2, 6, 6)),
    (lambda: L.Convolution2D(4, 6, 3, groups=2), (4, 5, 5)),
    (lambda: L.Convolution2D(1, 2, 3, stride=2, dilate=2, pad=2), (1, 7, 7)),
    (lambda: L.Convolution2D(1, 2, 3, stride=2, dilate=3, pad=3), (1, 9, 9)),
    (lambda: L.DilatedConvolution2D(1, 2, 3, dilate=2, pad=2), (1, 6, 6)),
    (lambda: L.ConvolutionND(1, 2, 3, 5, stride=3), (2, 14)),
    (lambda: L.Deconvolution2D(2, 3, 3), (2, 4, 5)),
    (lambda: L.Deconvolution2D(2, 3, 4, stride=2, pad=1), (2, 4, 4)),
    (lambda: L.DeconvolutionND(1, 2, 3, 5, stride=3), (2, 6)),
    (lambda: L.Linear(4, 3), (4,)),
])
@pytest.mark.parametrize('is_constant', [False, True])
def test_norms_of_a_layer(make, shape, is_constant):
    """That of Lanczos is right, and that by windows is a bound."""
    link = make()
    link.W.array = (np.ones if is_constant else np.random.standard_normal)(
        link.W.shape).astype('d')
    link.b = None
    norm = np.linalg.norm(maps.dense(link, shape), 2)
    assert bounds.map_norm(link, shape[1:]) == pytest.approx(norm, rel=1e-6)
    bound = bounds.windows_bound(link)
    assert norm <= bound * (1 + 1e-12)
    if is_constant:
        assert norm > 0.3 * bound


class Net(chainer.Chain):
    """Its layers are not called in the order of their names."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.z = L.Convolution2D(1, 8, 4, stride=2, pad=1)
            self.a = L.Convolution2D(8, 4, 3)
            self.b = L.Linear(144, 1)

    def forward(self, x):
        return self.b(self.a(self.z(x)))


@pytest.mark.parametrize('norm', ['matrix', 'operator'])
def test_rows(norm):
    model = Net().add_hook(sn_function.ChainSpectralNormalization(
        norm=norm, n_warmup=60, n_vectors=4))
    x = np.zeros((1, 1, 16, 16), 'f')
    model(x)
    rows = bounds.measured(model, lambda model: model(x), 1e-2, None)
    assert [row.name for row in rows] == ['z', 'a', 'b']
    for row in rows:
        assert row.norm <= row.hi_at_size * (1 + 1e-6)
        assert row.hi_at_size <= row.hi * (1 + 1e-9)
        assert row.lo <= row.hi <= min(1.011 * row.lo, 1.01 * row.windows)
        if norm == 'operator':
            assert row.norm == pytest.approx(1, rel=1e-3)
            assert row.hi_at_size < 1.01
    if norm == 'matrix':
        assert rows[0].norm > 1.1
        assert rows[0].windows == pytest.approx(2, rel=1e-3)
    cells = bounds.cells(rows)
    assert [len(cell) for cell in cells] == [7] * 5
    assert cells[-1][2] == f'{np.prod([row.norm for row in rows]):.5g}'


# Symbols

@pytest.mark.parametrize('stride', [1, 2])
def test_symbol(stride):
    """Its norms on a grid are those of a circular convolution."""
    link = L.Convolution2D(2, 3, 4, stride=stride, nobias=True)
    link.W.array = W = np.random.normal(size=link.W.shape)
    units = np.eye(2 * 6 * 6).reshape(-1, 2, 6, 6)
    wrapped = np.pad(units, ((0, 0), (0, 0), (0, 3), (0, 3)), 'wrap')
    with chainer.no_backprop_mode():
        rows = link(wrapped[..., :6 + 4 - stride, :6 + 4 - stride]).array
    assert rows.shape[2:] == (6 // stride,) * 2
    norm = np.linalg.norm(rows.reshape(len(units), -1), 2)
    assert symbols.norms(W, stride, symbols.grid(
        6 // stride)).max() == pytest.approx(norm)


def test_cells():
    """They fill all frequencies, and in none is the norm larger."""
    W = np.random.normal(size=(3, 2, 3, 3))
    largest = symbols.norms(W, 1, symbols.grid(200)).max()
    found = list(symbols.cells(W, 0.05))
    assert sum((2 * cell.half) ** 2 for cell in found) == pytest.approx(
        4 * np.pi ** 2)
    assert len({cell.half for cell in found}) > 1
    for cell in found:
        w = cell.center + np.random.uniform(-1, 1, (20, 2)) * cell.half
        assert symbols.norms(W, 1, w).max() <= 1.05 * largest


def test_bounds_beside_each_other():
    for link in symbols.drawn()[1:], symbols.flattened()[1:]:
        reshaped, windows, tensor, on_grid, lo, hi = symbols.ratios(link[0])
        assert 1 <= hi <= 1.011 * lo
        assert hi <= min(windows, tensor) * 1.01
        assert reshaped == pytest.approx(windows / 3)
        assert on_grid <= hi


def test_a_matrix_with_equal_singular_values():
    W = symbols.flat(np.random.normal(size=(4, 3, 2, 2)))
    np.testing.assert_allclose(
        np.linalg.svd(W.reshape(4, -1), compute_uv=False), 1)
    assert reference.true_norm(W) == pytest.approx(1)


def test_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(symbols, 'SOURCES', {
        'Gaussian': ('^', lambda: symbols.drawn()[5:6])})
    assert symbols.main([str(tmp_path)]) == 0
    for name in 'symbol.png', 'bounds.png':
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b'\x89PNG')
        assert len(data) < 100_000
