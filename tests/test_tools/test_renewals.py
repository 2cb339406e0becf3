"""What tests.tools.renewals counts, and that its tables are in the docs."""
from __future__ import annotations

import csv
import pathlib

import numpy as np
import pytest

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer.links as L

from tests.tools import renewals

DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs/accuracy.rst'


def drawn_anew(n_warmup):
    link = L.Linear(16, 16).add_hook(
        sn_function.SpectralNormalization(n_warmup=n_warmup))
    x = np.ones((1, 16), 'f')
    with renewals.watching() as count:
        for _ in range(10):
            link(x)
        link.W.array[...] = np.random.normal(size=(16, 16))
        link(x)
        # Its creation is no call.
        L.Linear(16, 16).add_hook(sn_function.SpectralNormalization())
    return count


def test_a_weight_drawn_anew_is_one():
    count = drawn_anew(15)
    assert (len(count.turns), count.n_renewed) == (11, 1)
    assert max(count.turns[:10]) < .05 < count.turns[10] < 1


def test_none_without_a_warm_up():
    count = drawn_anew(0)
    assert count.n_renewed == 0
    assert count.turns[10] > .05


def test_turn():
    W = np.diag([2., 1.])
    assert renewals.turn(W, 0, np.array([1., 0.])) == 0
    # From (1, 1) to (4, 1).
    assert renewals.turn(W, 0, np.array([3., 3.])) == pytest.approx(
        1 - 5 / 34 ** .5)


@pytest.mark.slow
def test_parity_makes_no_vector_anew():
    count = renewals.counted(renewals.parity)
    assert len(count.turns) >= 1000
    assert count.n_renewed == 0


@pytest.mark.slow
def test_training_does_not_make_vectors_anew():
    pytest.importorskip('sklearn')
    count = renewals.counted(lambda: renewals.digits(
        renewals.OPTIMIZERS['Adam, 0.0001'], False, 200))
    assert (len(count.turns), count.n_renewed) == (600, 0)


def test_cost():
    row = renewals.cost((16, 16), True, 5, .002)
    assert row[:2] == ('16x16', 'training')
    assert float(row[-1]) > 0


def test_command(capsys, monkeypatch):
    monkeypatch.setattr(renewals, 'parity', lambda: drawn_anew(0))
    renewals.main(['--only', 'parity'])
    assert '| parity, `n_warmup=0` | 11 | 0 | 0.' in capsys.readouterr().out


def test_command_for_the_cost(capsys, monkeypatch):
    monkeypatch.setattr(renewals, 'SHAPES', [(16, 16)])
    renewals.main(['--cost', '--rounds', '3', '--rst'])
    out = capsys.readouterr().out
    assert '    16x16,training,' in out
    assert '    16x16,test,' in out


def test_tables_of_the_docs():
    text = DOCS.read_text(encoding='utf-8')
    rows = list(csv.reader(
        line.strip() for line in text.splitlines() if ',' in line))
    names = [row[0] for row in rows if len(row) == 6]
    assert names == ['training', *(
        name.replace('`', '``') for name in renewals.trainings(0))]
    assert [tuple(row[:2]) for row in rows if row[0] in map(
        shape_name, renewals.SHAPES)] == [
            (shape_name(shape), mode) for shape in renewals.SHAPES
            for mode in ('training', 'test')]


def shape_name(shape):
    return 'x'.join(map(str, shape))
