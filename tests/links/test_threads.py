"""A hooked link that several threads use at the same time."""
import copy
import pickle
import threading
import time

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import sn_function
from sn_function import SpectralNormalization, errors
from sn_function._links import call, turn
from sn_function._links import scope as scopes
from tests.links.test_turn import SECONDS, Thread, wait_for
from tests.tools.threads import switch_interval


class Slow(L.Linear):
    """Stays in its forward until it may go on, where it is told to."""

    began = ends = None

    def forward(self, x):
        if self.began is not None:
            self.began.set()
            assert self.ends.wait(SECONDS)
        return super().forward(x)


class Raises(chainer.LinkHook):
    name = 'Raises'
    raises = True

    def forward_preprocess(self, args):
        if self.raises:
            raise ZeroDivisionError


X = np.random.RandomState(0).randn(2, 3).astype('f')


@pytest.fixture
def link():
    np.random.seed(0)
    link = Slow(3, 4).add_hook(SpectralNormalization())
    link.W.array[...] *= 8
    return link


@pytest.fixture
def in_call(link, monkeypatch):
    """The link while another thread is in its forward."""
    monkeypatch.setattr(Slow, 'began', threading.Event())
    monkeypatch.setattr(Slow, 'ends', threading.Event())
    W = link.W
    thread = Thread(lambda: link(X))
    assert Slow.began.wait(SECONDS)
    assert link.W is not W
    yield link, W
    Slow.ends.set()
    thread.wait()
    assert link.W is W
    assert turn.queue_of(link) == []


def norm(W):
    return np.linalg.norm(W.array.astype('d'), 2)


def test_original(in_call):
    link, W = in_call
    assert call.original(link, 'W') is W


def test_normalize_weight_waits(in_call):
    link, _ = in_call
    hook = link.local_link_hooks['SpectralNormalization']
    made = []
    thread = Thread(lambda: made.append(hook.normalize_weight(link)))
    wait_for(lambda: len(turn.queue_of(link)) == 2)
    assert made == []
    Slow.ends.set()
    thread.wait()
    assert abs(norm(made[0]) - 1) < 0.01


def test_forward_alone(link):
    """It is no call, and must not end that of the other thread."""
    class Waits(chainer.LinkHook):

        def forward_preprocess(self, args):
            began.set()
            assert ends.wait(SECONDS)

    began, ends = threading.Event(), threading.Event()
    link.add_hook(Waits())
    ys = []
    thread = Thread(lambda: ys.append(link(X)))
    assert began.wait(SECONDS)
    assert 'forward' in vars(link)
    assert link.forward(X).shape == (2, 4)
    assert 'forward' in vars(link)
    ends.set()
    thread.wait()
    assert 'forward' not in vars(link)
    expected = X @ link.W.array.T / np.linalg.norm(link.W.array, 2)
    np.testing.assert_allclose(ys[0].array, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize('copy_of', [
    copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x)),
    lambda x: x.copy('copy'), lambda x: x.copy('share')],
    ids=['deepcopy', 'shallow', 'pickle', 'copy', 'share'])
def test_a_copy_in_a_call(in_call, copy_of):
    """Also while a third thread waits."""
    link, W = in_call
    thread = Thread(lambda: link(X))
    wait_for(lambda: len(turn.queue_of(link)) == 2)
    other = copy_of(link)
    assert turn.queue_of(other) == []
    np.testing.assert_array_equal(
        call.original(other, 'W').array, W.array)
    Slow.ends.set()
    thread.wait()
    with chainer.using_config('train', False):
        np.testing.assert_allclose(
            other(X).array, link(X).array, rtol=1e-3)


@pytest.mark.parametrize('same_thread', [False, True])
def test_after_another_hook_raised(link, same_thread):
    """Its traceback, and so the arguments of the callback, are kept."""
    link.add_hook(Raises())
    W = link.W
    with pytest.raises(ZeroDivisionError) as info:
        link(X)
    assert link.W is not W
    link.local_link_hooks['Raises'].raises = False
    ys = []

    def work():
        ys.append(link(X))
        assert link.W is W

    work() if same_thread else Thread(work).wait()
    expected = X @ W.array.T / np.linalg.norm(W.array, 2)
    np.testing.assert_allclose(ys[0].array, expected, rtol=1e-2, atol=1e-4)
    del info
    assert link.W is W
    assert turn.queue_of(link) == []
    assert 'forward' not in vars(link)


def test_after_a_hook_of_a_chain_raised():
    """The scope is closed in the thread that opened it."""
    model = chainer.Sequential(L.Linear(3, 4)).add_hook(
        sn_function.ChainSpectralNormalization()).add_hook(Raises())
    with pytest.raises(ZeroDivisionError) as info:
        model(X)
    assert scopes.covering(model) is not None
    model.local_link_hooks['Raises'].raises = False
    Thread(lambda: model(X)).wait()
    assert scopes.covering(model) is None
    assert 'forward' not in vars(model)
    assert turn.queue_of(model) == []
    del info


@pytest.mark.parametrize('interval', [1e-6, 5e-3])
def test_a_long_call_is_not_taken_for_an_abandoned_one(interval):
    """Although its thread runs on while others read its stack."""
    class Long(L.Linear):

        def forward(self, x):
            end = time.monotonic() + 5 * turn.WAIT
            while time.monotonic() < end:
                sum(k for k in range(10))  # frames come and go
            return super().forward(x)

    np.random.seed(0)
    link = Long(3, 4).add_hook(SpectralNormalization())
    with chainer.using_config('train', False):
        expected = link(X).array

    def work():
        with chainer.using_config('train', False):
            np.testing.assert_array_equal(link(X).array, expected)

    with switch_interval(interval):
        threads = [Thread(work) for _ in range(3)]
        for thread in threads:
            thread.wait()


def test_a_lazy_weight_is_made_once():
    for seed in range(20):
        np.random.seed(seed)
        link = L.Linear(None, 64).add_hook(SpectralNormalization())
        ys, barrier = [], threading.Barrier(4)

        def work(link=link, ys=ys, barrier=barrier):
            barrier.wait(SECONDS)
            with chainer.using_config('train', False):
                ys.append(link(X).array)

        with switch_interval(1e-6):
            threads = [Thread(work) for _ in range(4)]
            for thread in threads:
                thread.wait()
        for y in ys:
            np.testing.assert_array_equal(y, ys[0])


@pytest.mark.parametrize('train', [False, True])
def test_scopes_that_call_links_in_other_orders(train):
    """Nobody waits for a link while others wait for his."""
    np.random.seed(0)
    links = [L.Linear(3, 3).add_hook(SpectralNormalization(n_warmup=50))
             for _ in range(4)]
    model = chainer.ChainList(*links)

    def work(step):
        with chainer.using_config('train', train):
            for _ in range(100):
                with sn_function.cached(model):
                    for link in links[::step]:
                        y = link(X).array - link.b.array
                        expected = X @ link_weight[link].T
                        np.testing.assert_allclose(y, expected, atol=1e-3)

    link_weight = {link: link.W.array / np.linalg.norm(
        link.W.array.astype('d'), 2) for link in links}
    with switch_interval(1e-6):
        threads = [Thread(lambda s=s: work(s)) for s in (1, -1, 1, -1)]
        for thread in threads:
            thread.wait()


def test_links_that_call_each_other():
    """Entered by different ones: at least one thread is told."""
    class Link(L.Linear):

        def forward(self, x, goes_on=True):
            if not goes_on:
                return super().forward(x)
            barrier.wait(SECONDS)
            return self.other[0](x, False)

    barrier = threading.Barrier(2)
    links = [Link(3, 3).add_hook(SpectralNormalization()) for _ in range(2)]
    Ws = [link.W for link in links]
    for link, other in zip(links, links[::-1]):
        link.other = [other]
    threads = [Thread(lambda link=link: link(X)) for link in links]
    for thread in threads:
        thread.join(SECONDS)
    raised = [thread.error for thread in threads if thread.error]
    assert raised
    assert {type(error) for error in raised} == {errors.DeadlockError}
    for link, W in zip(links, Ws):
        assert link.W is W
        assert link(X, False).shape == (2, 3)


def test_calls_of_a_chain_do_not_wait():
    """Two threads are in the forward of one chain at the same time."""
    class Meets(chainer.Chain):

        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.layer = L.Linear(3, 4)

        def forward(self, x):
            barrier.wait(SECONDS)
            return F.relu(self.layer(x))

    barrier = threading.Barrier(2)
    model = Meets().add_hook(sn_function.ChainSpectralNormalization())
    threads = [Thread(lambda: model(X)) for _ in range(2)]
    for thread in threads:
        thread.wait()
    assert 'forward' not in vars(model)


def test_u_is_a_good_vector_after_training():
    """Large enough that NumPy lets other threads run in a copy of u."""
    np.random.seed(0)
    link = L.Linear(64, 1000).add_hook(SpectralNormalization(n_warmup=0))
    link.W.array += np.outer(np.ones(1000), np.ones(64)).astype('f') * 0.1
    x = np.ones((1, 64), 'f')

    def work():
        for _ in range(30):
            with sn_function.cached(link):
                link(x)

    with switch_interval(1e-6):
        threads = [Thread(work) for _ in range(4)]
        for thread in threads:
            thread.wait()
    U, _, _ = np.linalg.svd(link.W.array.astype('d'), full_matrices=False)
    assert abs(abs(U[:, 0] @ link.W_u) - 1) < 1e-5
