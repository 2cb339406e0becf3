"""Repairs MultiprocessIterator where its processes are renewed.

With `maxtasksperchild` a process ends after some tasks, and the pool starts
another.  In between it may have none.  `Pool.map_async` divides by their
number, so the thread of the iterator ended with a ZeroDivisionError, and the
iterator waited forever.

:mod:`.repairs` says when the repair is needed.
"""
import multiprocessing
import multiprocessing.pool
import types
from typing import Any, Callable, Iterable, Optional

from chainer.iterators import multiprocess_iterator


def try_pool() -> None:
    made = multiprocess_iterator.multiprocessing.Pool
    kind: Any = (
        made if isinstance(made, type) else multiprocessing.pool.Pool)
    pool = kind.__new__(kind)
    vars(pool).update(_state=multiprocessing.pool.RUN, _pool=[], _processes=1)
    try:
        pool.map_async(abs, [0])
    except AttributeError:
        pass        # it came further: a pool without processes has no queue
    finally:
        pool._state = multiprocessing.pool.CLOSE


class Pool(multiprocessing.pool.Pool):
    """It divides by the number of processes that it should have."""

    _processes: int

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(context=multiprocessing.get_context(), **kwargs)

    def map_async(self, func: Callable, iterable: Iterable,
                  chunksize: Optional[int] = None,
                  *args: Any, **kwargs: Any) -> Any:
        items = list(iterable)
        if chunksize is None:
            chunksize = max(1, -(-len(items) // (self._processes * 4)))
        return super().map_async(func, items, chunksize, *args, **kwargs)


def repair_pool() -> None:
    richer = types.ModuleType('multiprocessing')
    vars(richer).update(vars(multiprocessing), Pool=Pool)
    multiprocess_iterator.multiprocessing = richer
