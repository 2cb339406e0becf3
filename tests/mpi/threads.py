"""Ranks that are threads, so that most tests need no MPI.

A :class:`Communicator` does what those of ChainerMN do, as far as the tests
need it, and refuses what they refuse.
"""
from __future__ import annotations

import pickle
import threading

import chainer
import numpy as np

SECONDS = 60


class Communicator:

    def __init__(self, rank, size, slots, barrier):
        self.rank, self.size = rank, size
        self._slots, self._barrier = slots, barrier
        self.sent = []      # the names of what was called

    def _exchange(self, x):
        self._slots[self.rank] = x
        self._barrier.wait(SECONDS)
        xs = list(self._slots)
        self._barrier.wait(SECONDS)
        return xs

    def gather_obj(self, x):
        self.sent.append('gather_obj')
        xs = self._exchange(pickle.dumps(x))
        return list(map(pickle.loads, xs)) if self.rank == 0 else None

    def bcast_obj(self, x):
        self.sent.append('bcast_obj')
        assert (x is None) == (self.rank != 0)  # as in ChainerMN
        return pickle.loads(self._exchange(pickle.dumps(x))[0])

    def bcast_data(self, model):
        self.sent.append('bcast_data')
        for _, param in sorted(model.namedparams()):
            if param.array is not None:
                param.array[...] = self._exchange(param.array.copy())[0]

    def multi_node_mean_grad(self, model, zero_fill=False):
        self.sent.append('multi_node_mean_grad')
        for _, param in sorted(model.namedparams()):
            if param.array is not None:
                if param.grad is None and zero_fill:
                    param.grad = np.zeros_like(param.array)
                self._multi_node_mean(None, param.grad)

    def _multi_node_mean(self, _, x):
        xs = self._exchange(x.copy())
        x[...] = sum(xs) * x.dtype.type(1 / self.size)


def run(size, program, *args):
    """Returns what ``program(comm, *args)`` returns on each rank.

    Lists in args have one item for each rank.
    """
    slots, barrier = [None] * size, threading.Barrier(size)
    results, faults = [None] * size, []

    def work(rank):
        own = [x[rank] if isinstance(x, list) else x for x in args]
        try:
            results[rank] = program(
                Communicator(rank, size, slots, barrier), *own)
        except BaseException as e:
            faults.append(e)
            barrier.abort()     # so that the others do not wait for it

    threads = [threading.Thread(target=work, args=[rank])
               for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fault in faults:
        if not isinstance(fault, threading.BrokenBarrierError):
            raise fault
    assert not faults
    return results


def same(arrays):
    """Whether the arrays of all ranks are the same, bit by bit."""
    first, *others = map(np.asarray, map(chainer.cuda.to_cpu, arrays))
    return all(x.dtype == first.dtype and x.tobytes() == first.tobytes()
               for x in others)
