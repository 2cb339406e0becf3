"""One thread at a time has the turn, and none waits for one that is over."""
import ctypes
import gc
import threading
import time

import chainer
import chainer.links as L
import pytest

from sn_function import errors
from sn_function._links import turn
from sn_function._links.turn import Turn

SECONDS = 10  # none of this takes so long


@pytest.fixture
def link():
    return L.Linear(2, 2)


class Thread(threading.Thread):
    """Runs a function, and raises what it raised."""

    def __init__(self, function):
        super().__init__(daemon=True)
        self.function = function
        self.error = None
        self.start()

    def run(self):
        try:
            self.function()
        except BaseException as e:
            self.error = e

    def wait(self):
        self.join(SECONDS)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(1e-3)


def test_others_wait_in_order(link):
    order = []

    def work(k):
        with Turn(link):
            order.append(k)

    threads = []
    with Turn(link):
        for k in range(3):
            threads.append(Thread(lambda k=k: work(k)))
            wait_for(lambda: len(turn.queue_of(link)) == k + 2)  # NOQA: B023
        assert order == []
    for thread in threads:
        thread.wait()
    assert order == [0, 1, 2]
    assert turn.queue_of(link) == []


def test_another_link_does_not_wait(link):
    other = L.Linear(2, 2)
    with Turn(link):
        def work():
            assert Turn(other).begin(waits=False)

        Thread(work).wait()


def test_within_a_turn_others_begin_at_once(link):
    """Also where another thread waits already."""
    def work(link):
        with Turn(link):
            assert turn.has_turn(link)

    with Turn(link):
        thread = Thread(lambda: work(link))
        wait_for(lambda: len(turn.queue_of(link)) == 2)
        work(link)
        another = Turn(link)
        assert another.begin(waits=False)
        another.end()
        assert turn.has_turn(link)
    thread.wait()
    assert turn.queue_of(link) == []


def test_without_waiting(link):
    found = []

    def work():
        mine = Turn(link)
        found.append(mine.begin(waits=False))
        mine.end()

    with Turn(link):
        Thread(work).wait()
        assert len(turn.queue_of(link)) == 1
    Thread(work).wait()
    assert found == [False, True]


def test_the_outer_turn_may_end_first(link):
    outer, inner = Turn(link), Turn(link)
    outer.begin()
    inner.begin()
    outer.end()
    assert turn.has_turn(link)
    inner.end()
    inner.end()
    assert not turn.has_turn(link)


def test_the_thread_ends_without_ending_its_turn(link):
    thread = Thread(lambda: Turn(link).begin())
    thread.wait()
    # A thread that begins now may get the number of that one.
    turn.queue_of(link)[0].thread = -1
    with Turn(link):
        assert turn.has_turn(link)
    assert turn.queue_of(link) == []


def test_an_interrupt_while_waiting(link):
    def work():
        with Turn(link):
            raise AssertionError('it is not its turn')

    with Turn(link):
        thread = Thread(work)
        wait_for(lambda: len(turn.queue_of(link)) == 2)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            thread.wait()
        assert len(turn.queue_of(link)) == 1


def test_a_thread_that_has_the_turn_does_not_wait_for_itself(link):
    """Another one was before it for a moment, when it asked for a second."""
    passing, second = Turn(link), Turn(link)
    passing.thread = -1
    passing.is_abandoned = lambda: False
    queue = turn.queue_of(link)
    with Turn(link):
        queue.insert(0, passing)
        thread = Thread(lambda: (
            wait_for(lambda: second in queue), passing.end()))
        assert second.begin()
        assert queue[0] is second
        second.end()
        thread.wait()
    assert queue == []


def test_a_circle_of_three(link):
    """Each has one, and waits for the next: the last one is told."""
    links = [link, L.Linear(2, 2), L.Linear(2, 2)]

    def work(k):
        with Turn(links[k]):
            barrier.wait(SECONDS)
            with Turn(links[(k + 1) % 3]):
                pass

    barrier = threading.Barrier(3)
    threads = [Thread(lambda k=k: work(k)) for k in range(3)]
    for thread in threads:
        thread.join(SECONDS)
    raised = {type(thread.error) for thread in threads if thread.error}
    assert raised == {errors.DeadlockError}
    assert not any(map(turn.queue_of, links))


def test_the_queue_goes_with_its_link():
    link = L.Linear(2, 2)
    key = id(link)
    with Turn(link):
        assert key in turn._queues
    del link
    gc.collect()
    assert key not in turn._queues


def test_whether_a_thread_is_in_a_call():
    class Hook(chainer.LinkHook):

        def forward_preprocess(self, args):
            seen.append(args)

    class Waits(chainer.Link):

        def forward(self):
            began.set()
            ends.wait(SECONDS)

    def is_in_call(args):
        return turn.is_in_call(thread.ident, id(args))

    seen, began, ends = [], threading.Event(), threading.Event()
    link = Waits().add_hook(Hook())
    thread = Thread(link)
    began.wait(SECONDS)
    assert is_in_call(seen[0])
    assert not is_in_call(seen)
    assert not turn.is_in_call(threading.get_ident(), id(seen[0]))
    ends.set()
    thread.wait()
    assert not is_in_call(seen[0])
