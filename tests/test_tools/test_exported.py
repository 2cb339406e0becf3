"""What tests.tools.exported says of a model as ONNX."""
from __future__ import annotations

import sys

import pytest

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

pytest.importorskip('onnx.reference')
pytest.importorskip('onnxruntime')
import onnx_chainer.mapping

from tests.tools import exported

IMAGES = {'x': np.random.RandomState(0).uniform(
    -1, 1, (2, 3, 4, 4)).astype('f')}


class Model(chainer.Chain):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.c = L.Convolution2D(3, 4, 3, pad=1).add_hook(
                sn_function.SpectralNormalization())
            self.b = L.BatchNormalization(4)

    def forward(self, x, pad):
        h = F.leaky_relu(self.b(self.c(x)))
        return F.unpooling_2d(h, 2, pad=pad, cover_all=False)


def row_of(pad=0):
    case = exported.Case('name', Model, IMAGES, {'pad': pad})
    return exported.row_of(case, 11, with_graph=True)


def test_differences():
    name, n_normalized, *differences = row_of()
    assert (name, n_normalized) == ('name', '1')
    assert all(float(each) < limit
               for each, limit in zip(differences, (1e-5, 1e-5, 1e-7)))


def test_wrong_export_is_seen(monkeypatch):
    right = onnx_chainer.mapping.converters['LeakyReLU']

    def wrong(params):
        params.func.slope *= .9
        return right(params)

    monkeypatch.setitem(onnx_chainer.mapping.converters, 'LeakyReLU', wrong)
    _, _, in_runtime, rounding, graph = row_of()
    assert float(rounding) < 1e-5
    assert float(in_runtime) > 1e-3
    assert float(graph) > 1e-3


def test_error_is_named():
    row = row_of(pad=1)
    assert row[:2] == ['name', '1']
    assert row[2].startswith('RuntimeError: F.unpooling_2d with ksize=(2, 2)')
    assert len(row) == len(exported.HEADER)


def test_links_of_a_repository(monkeypatch):
    before = set(sys.modules)
    exported.provide_links('some')
    added = sorted(set(sys.modules) - before)
    assert added == ['some.sn_convolution_2d', 'some.sn_embed_id',
                     'some.sn_linear']
    link = sys.modules['some.sn_linear'].SNLinear(3, 2)
    for name in added:
        del sys.modules[name]
    assert isinstance(link, L.Linear)
    assert list(link.local_link_hooks) == ['SpectralNormalization']


def test_table(capsys):
    exported.main([])
    assert capsys.readouterr().out.splitlines()[-1].split() == list(
        exported.HEADER)
