"""Memory of normalized weights and of their gradients, used again."""
import copy
import gc
import pickle
import subprocess
import sys
from concurrent import futures

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
import pytest

from sn_function._arithmetic import buffers as _buffers
from sn_function._arithmetic.buffers import Buffers

SHAPE = (3, _buffers.MIN_SIZE)


def address(array):
    return array.__array_interface__['data'][0]


@pytest.mark.parametrize('dtype', ['f', 'd', '>f4'])
def test_an_array_as_any_other(dtype):
    x = Buffers().empty(SHAPE, dtype)
    expected = np.empty(SHAPE, dtype)
    for name in ('shape', 'dtype', 'strides'):
        assert getattr(x, name) == getattr(expected, name)
    assert type(x) is np.ndarray
    assert x.flags.writeable
    assert x.flags.aligned
    assert x.flags.c_contiguous
    x[...] = 1
    for y in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.copy()):
        np.testing.assert_array_equal(x, y)
        assert not np.shares_memory(x, y)


def test_memory_is_used_again():
    buffers = Buffers()
    x = buffers.empty(SHAPE, 'f')
    first = address(x)
    del x
    x = buffers.empty(SHAPE, 'f')
    assert address(x) == first
    y = buffers.empty(SHAPE, 'f')
    assert not np.shares_memory(x, y)


@pytest.mark.parametrize('derive', [
    lambda x: x[1:], lambda x: x.reshape(-1)[::2], lambda x: x.T[5:7].T,
    memoryview, lambda x: chainer.Variable(x).reshape(-1),
    lambda x: np.asarray(memoryview(x[:1]))])
def test_not_before_the_last_view_has_died(derive):
    buffers = Buffers()
    x = buffers.empty(SHAPE, 'f')
    first = address(x)
    view = derive(x)
    del x
    assert address(buffers.empty(SHAPE, 'f')) != first
    del view
    gc.collect()
    found = [buffers.empty(SHAPE, 'f') for _ in range(2)]
    assert first in map(address, found)


def test_the_last_two_are_kept():
    buffers = Buffers()
    xs = [buffers.empty(SHAPE, 'f') for _ in range(5)]
    assert len(buffers._kept) == _buffers.MAX_KEPT
    last = {address(x) for x in xs[-2:]}
    del xs[-2:]
    assert {address(buffers.empty(SHAPE, 'f')) for _ in range(4)} <= last


@pytest.mark.parametrize('offset', range(0, 80, 16))
def test_it_begins_with_a_cache_line(monkeypatch, offset):
    empty = np.empty
    monkeypatch.setattr(_buffers.numpy, 'empty', lambda size, dtype: empty(
        size + offset, dtype)[offset:])
    x = Buffers().empty(SHAPE, 'f')
    assert address(x) % 64 == 0
    x[...] = 1


@pytest.mark.parametrize('watch', ['settrace', 'setprofile'])
@pytest.mark.parametrize('when', ['import', 'use'])
def test_whoever_looks_on_changes_nothing(watch, when):
    """A tracer that reads a frame's locals holds them for a while."""
    code = f'''
import sys
def look(frame, *_):
    if frame.f_code.co_filename.endswith('_buffers.py'):
        frame.f_locals
        return look
def begin():
    sys.{watch}(look)
def end():
    sys.{watch}(None)
if {when == 'import'}:
    begin()
from sn_function._arithmetic import buffers as _buffers
end()
if {when == 'use'}:
    begin()
import numpy as np
empty = _buffers.Buffers().empty
arrays = [empty({SHAPE}, 'f') for _ in range(2)]
end()
arrays.append(empty({SHAPE}, 'f'))
for i, x in enumerate(arrays):
    x[...] = i
assert [x.max() for x in arrays] == [0, 1, 2]
'''
    subprocess.run([sys.executable, '-c', code], check=True)


def test_threads_do_not_share():
    buffers = Buffers()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(number):
        for _ in range(300):
            x = buffers.empty(SHAPE, 'f')
            x[0] = number
            y = buffers.empty(SHAPE, 'f')
            y[0] = -number
            assert (x[0] == number).all()
            assert (y[0] == -number).all()
            del x, y
        return True

    try:
        with futures.ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(1, 5)))
    finally:
        sys.setswitchinterval(interval)


def test_another_size():
    buffers = Buffers()
    buffers.empty(SHAPE, 'f')
    assert buffers.empty(SHAPE, 'd').shape == SHAPE
    assert buffers.empty(SHAPE, 'd').shape == SHAPE
    assert len(buffers._kept) == 2


def test_small_arrays_are_left_to_numpy():
    buffers = Buffers()
    assert buffers.empty((3, 4), 'f').flags.owndata
    assert not buffers._kept


def test_an_array_outlives_its_buffers():
    buffers = Buffers()
    x = buffers.empty(SHAPE, 'f')
    x[...] = 7
    del buffers
    gc.collect()
    assert (x == 7).all()


class Deleting(chainer.LinkHook):

    name = 'Deleting'

    def forward_preprocess(self, args):
        args.link.delete_hook('SpectralNormalization')


class TestLinks:

    def make(self):
        link = L.Linear(512, 512, nobias=True).add_hook(
            sn_function.SpectralNormalization())
        assert link.W.array.nbytes >= _buffers.MIN_SIZE
        return link

    def step(self, link):
        Y = link.local_link_hooks['SpectralNormalization'].normalize_weight(
            link)
        Y.grad = np.ones(Y.shape, 'f')
        link.W.cleargrad()
        Y.backward()
        return address(Y.array), address(link.W.grad)

    def test_each_step_has_the_same_memory(self):
        link = self.make()
        self.step(link)
        places = {frozenset(self.step(link)) for _ in range(5)}
        assert len(places) == 1

    def test_what_is_kept_is_not_overwritten(self):
        link = self.make()
        x = np.ones((1, 512), 'f')
        kept = []
        for _ in range(4):
            with sn_function.cached(link):
                y = link(x)
                Y = y.creator_node.inputs[1].get_variable().array
            kept.append((Y, Y.copy()))
            link.W.cleargrad()
            y.grad = np.ones(y.shape, 'f')
            y.backward()
            kept.append((link.W.grad, link.W.grad.copy()))
            link.W.array[...] *= 2
        for now, then in kept:
            np.testing.assert_array_equal(now, then)

    def test_nothing_is_kept_without_a_graph(self):
        link = self.make()
        with chainer.no_backprop_mode():
            link(np.ones((1, 512), 'f'))
        assert id(link.W.array) not in _buffers._of

    def test_copies_have_their_own(self):
        link = self.make()
        self.step(link)
        other = copy.deepcopy(link)
        assert id(other.W.array) not in _buffers._of
        assert not set(self.step(link)) & set(self.step(other))
        assert len(pickle.dumps(link)) < 2.5 * link.W.array.nbytes

    def test_it_goes_with_the_hook(self):
        link = self.make()
        self.step(link)
        assert id(link.W.array) in _buffers._of
        link.delete_hook('SpectralNormalization')
        assert id(link.W.array) not in _buffers._of

    def test_it_goes_with_a_hook_deleted_in_a_call(self):
        link = self.make()
        self.step(link)
        link.add_hook(Deleting())
        link(np.ones((1, 512), 'f'))
        assert id(link.W.array) not in _buffers._of

    def test_the_weight_may_be_gone_before_the_hook(self):
        link = self.make()
        self.step(link)
        del link.W
        link.delete_hook('SpectralNormalization')
        assert not hasattr(link, 'W_u')

    def test_it_goes_with_the_weight(self):
        link = self.make()
        self.step(link)
        before = len(_buffers._of)
        for _ in range(3):
            link.W.array = link.W.array.copy()
            self.step(link)
        gc.collect()
        assert len(_buffers._of) == before


@pytest.mark.parametrize('normalize', [
    lambda W, u: sn_function.spectral_normalize(W, u),
    lambda W, u: sn_function.spectral_normalize_all([W], [u])[0]])
@pytest.mark.parametrize('make', [
    lambda x: x, chainer.Variable, chainer.Parameter])
def test_functions_use_memory_again(normalize, make):
    """By the array of the weight; a weight of its own has its own."""
    W, V = (np.random.normal(size=(512, 512)).astype('f') for _ in range(2))
    u = np.ones(512, 'f')
    weight = make(W)
    places = set()
    for _ in range(5):
        Y = normalize(weight, u)
        places.add(address(Y.array))
        other = normalize(make(V), u)
        assert address(other.array) not in places
        del Y, other
    assert len(places) == 1
    del weight, W
    gc.collect()
    assert not [x for x in _buffers._of.values() if x[0]() is None]


def test_an_id_that_is_another_array_now():
    """As that of a weight that died when nobody looked on."""
    W, V = np.ones((2, 512, 512), 'f')
    empty = _buffers.empty_of(W)
    _buffers._of[id(V)] = _buffers._of[id(W)]
    assert _buffers.empty_of(V) is not empty
    assert _buffers.empty_of(V) == _buffers.empty_of(V)
    del V
    gc.collect()
    assert _buffers.empty_of(W) == empty
