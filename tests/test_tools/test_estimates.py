"""What tests.tools.estimates measures: the methods, the norms, the tables."""
from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L

from tests.tools import estimates

assert sn_function  # it is imported for what it does


def weights(shape, n=6, rate=.1):
    return list(itertools.islice(estimates.drifting(shape, rate, 0), n))


def subspace_iteration(Ws, U, K=1):
    """The estimates for each weight, in float64."""
    sigmas = []
    for W in Ws:
        for _ in range(K):
            Q, _ = np.linalg.qr(U.T)
            S = Q.T @ W
            s = np.linalg.svd(S, compute_uv=False)
            U = S @ W.T - .45 * s[-1] ** 2 * Q.T
        sigmas.append(s[0])
    return sigmas


def power_iteration(Ws, u, K):
    """The estimates for each weight, in float64."""
    sigmas = []
    for W in Ws:
        for _ in range(K):
            v = u @ W / np.linalg.norm(u @ W)
            u = W @ v
        sigmas.append(np.linalg.norm(u))
    return sigmas


def golub_kahan(Ws, u, n_steps):
    """Likewise, by a basis of the Krylov space."""
    sigmas = []
    for W in Ws:
        V = [u @ W]
        for _ in range(n_steps - 1):
            V.append(V[-1] @ W.T @ W)
        U, s, _ = np.linalg.svd(W @ np.linalg.qr(np.array(V).T)[0])
        sigmas.append(s[0])
        u = U[:, 0]
    return sigmas


@pytest.mark.parametrize(('method', 'oracle'), [
    (estimates.power(1), lambda Ws, u: power_iteration(Ws, u, 1)),
    (estimates.power(5), lambda Ws, u: power_iteration(Ws, u, 5)),
    (estimates.golub_kahan(3), lambda Ws, u: golub_kahan(Ws, u, 3)),
    (estimates.vectors(3), subspace_iteration),
    (estimates.vectors(3, 2), lambda Ws, U: subspace_iteration(Ws, U, 2)),
], ids=lambda x: getattr(x, 'name', ''))
@pytest.mark.parametrize('shape', [(60, 40), (40, 60)])
def test_replay(shape, method, oracle):
    Ws = weights(shape)
    replay = estimates.Replay([method], 3)
    u = estimates.Replay([method], 3).draw(Ws[0], method.n_vectors)
    for W in Ws:
        replay.add(W)
    A = [W.astype('d') for W in Ws]
    norms = np.array([np.linalg.norm(W, 2) for W in A])
    expected = 100 * (norms / oracle(A, u.astype('d')) - 1)
    assert expected.max() > 1
    # The package adds a little to the shift, which keeps vectors independent.
    np.testing.assert_allclose(replay.excess[0], expected, atol=.01)


def test_no_more_vectors_than_rows():
    method = estimates.vectors(16)
    replay = estimates.Replay([method], 0)
    for i, W in enumerate(weights((5, 9))):
        replay.add(W, counts=i > 0)
    assert replay.us[0].shape == (5, 5)
    # They span all rows.
    np.testing.assert_allclose(replay.excess[0], np.zeros(5), atol=1e-3)


def test_drifting():
    Ws = weights((50, 40), rate=.01)
    for before, after in zip(Ws, Ws[1:]):
        assert np.linalg.norm(after - before) / np.linalg.norm(before) == (
            pytest.approx(.01, rel=.1))
    assert Ws[-1].std() == pytest.approx(1, rel=.05)
    assert Ws[0].dtype == 'f'


def test_watch():
    link = L.Linear(8, 6).add_hook(
        sn_function.SpectralNormalization(n_warmup=0))
    watch = estimates.Watch()
    link.add_hook(watch)
    link.W_u[...] = [0, 0, 0, 1, 0, 0]
    W = link.W.array.astype('d')
    expected, = power_iteration([W], link.W_u.astype('d'), 1)
    x = np.ones((1, 8), 'f')
    watch.is_on = True
    link(x)
    watch.is_on = False
    link(x)
    assert watch.excess == [pytest.approx(
        100 * (np.linalg.norm(W, 2) / expected - 1), abs=1e-3)]


def test_cell():
    assert estimates.cell([[1, 2.346], [-1e-9, .5]]) == '2.35 / 0.750'
    assert estimates.cell([-1e-9]) == '0.00 / 0.000'


def test_command_for_drift(capsys, monkeypatch):
    monkeypatch.setattr(estimates, 'SHAPES', [(6, 9)])
    monkeypatch.setattr(estimates, 'RATES', [.1])
    estimates.main(['drift', '--iterations', '6', '--first', '2', '--rst'])
    out = capsys.readouterr().out
    assert '\n    weight,rate,"power, K = 1",' in out
    assert '\n    6x9,0.1,' in out
    # As many vectors as rows.
    assert out.rstrip().endswith(',0.00 / 0.000,0.00 / 0.000')


@pytest.fixture
def short(monkeypatch):
    """Two layers that take some steps, in the place of the example."""
    def train(settings, seed, n_iterations, step):
        np.random.seed(seed)
        model = chainer.ChainList(L.Linear(8, 6), L.Linear(6, 1))
        model[0].add_hook(sn_function.SpectralNormalization(**settings))

        def update():
            for _ in range(2):  # as the example calls it
                model[0](np.ones((1, 8), 'f'))
            model[0].W.array += .1

        for _ in range(n_iterations):
            step(update, model)
        return {'frechet_distance': 3., 'accuracy': .5}

    monkeypatch.setattr(estimates, 'train', train)


@pytest.mark.usefixtures('short')
def test_trajectory():
    replays = estimates.trajectory(
        0, 3, 1, [estimates.power(1), estimates.vectors(16)])
    power, vectors = replays.pop('0').excess
    assert not replays  # the other layer has one row
    assert len(power) == len(vectors) == 2
    assert min(power) > .01
    assert max(map(abs, vectors)) < 1e-3


@pytest.mark.usefixtures('short')
def test_watched(monkeypatch):
    monkeypatch.setattr(estimates, 'EVERY', 2)
    result = estimates.watched({'n_power_iteration': 1}, 0, 4, 1)
    assert 0 < result.pop('milliseconds') < 1e3
    excess = result['excess'].pop('0')
    assert result == {'excess': {}, 'distance': 3., 'accuracy': .5}
    assert len(excess) == 4
    assert min(excess) > 0


@pytest.mark.slow
def test_train(monkeypatch):
    """The example itself, without a classifier for its score."""
    pytest.importorskip('sklearn')
    program = estimates.example()
    trained = {'n': 1, 'frechet_distance': 3., 'accuracy': .5}
    monkeypatch.setattr(program.Samples, '__call__', lambda *args: None)
    monkeypatch.setattr(program.digits_score, 'Scorer', mock.Mock(**{
        'return_value.scores.return_value': {
            'n_features': 1, 'n_held_out': 1, 'accuracy_held_out': 1.,
            'images': {'trained generator': trained}}}))
    before = []

    def step(update, dis):
        found = estimates.layers(dis)
        assert list(found) == ['convs/0', 'convs/1', 'embed']
        assert found['embed'].local_link_hooks[
            'SpectralNormalization'].n_power_iteration == 3
        before.append(found['embed'].W.array.copy())
        update()
        assert abs(found['embed'].W.array - before[-1]).max() > 1e-4

    assert estimates.train({'n_power_iteration': 3}, 0, 2, step) == trained
    assert len(before) == 2


def test_the_demo_goes_on(capsys, monkeypatch, tmp_path):
    """What is done is not repeated, whatever stopped it."""
    seeds = []

    def watched(settings, seed, n_iterations, n_first):
        seeds.append(seed)
        return {'excess': {'embed': [seed, .5]}, 'distance': 2. + seed,
                'accuracy': .5, 'milliseconds': 3.}

    monkeypatch.setattr(estimates, 'watched', watched)
    monkeypatch.setattr(estimates, 'DEMO', {'power': {}})
    for given in [0], [0, 1]:
        estimates.main(['demo', '--out', str(tmp_path), '--rst', '--seeds',
                        *map(str, given)])
    assert seeds == [0, 1]
    *_, header, line = capsys.readouterr().out.splitlines()
    assert header.split() == [
        'setting,embed,distance,in', 'their', 'class,ms', 'a', 'step']
    assert line == (
        '    power,1.00 / 0.500,2.50 (2.00 to 3.00),50.0%,3.0')
