"""What was tried for the speed of one weight on the CPU, and what it gave.

``python -m tests.tools.benchmarks.tried`` prints, for some shapes, the time of
each way to do one thing, taken in turn in one process: what is in use, and
what is not as it did not pay.  Set ``OPENBLAS_NUM_THREADS=1`` and
``OMP_NUM_THREADS=1``.
"""
from __future__ import annotations

import argparse
import contextlib
import math
import mmap
from typing import Any, Callable, Dict, Iterator

import numpy as np

from sn_function._arithmetic import matrix
from sn_function._arithmetic.buffers import Buffers
from tests.tools.benchmarks import cpu
from tests.tools.benchmarks.report import Budget, measure, number, text_table

SHAPES = ((128, 1024), (512, 2304), (1024, 9216), (4096, 4096))
Ways = Dict[str, Callable[[], Any]]


def in_huge_pages(shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
    """Memory that the system is asked to map in pages of 2 MB."""
    size = math.prod(shape) * 4
    page = 1 << 21
    memory = mmap.mmap(-1, (size // page + 2) * page)
    if hasattr(mmap, 'MADV_HUGEPAGE'):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = np.frombuffer(memory, np.uint8).ctypes.data
    return np.ndarray(shape, 'f', memory, -start % page + offset)


class Example:
    """A matrix, an upstream gradient, and vectors, in float32."""

    def __init__(self, shape: tuple[int, int]) -> None:
        random = np.random.RandomState(0)
        self.shape = shape
        self.W, self.gY = (
            random.standard_normal(shape).astype('f') for _ in range(2))
        self.out, self.unaligned = (in_huge_pages(shape, k) for k in (0, 16))
        self.A = matrix.Matrix(self.W, 0)
        self.P = random.standard_normal((2, shape[0])).astype('f')
        self.Q = random.standard_normal((2, shape[1])).astype('f')

    def blocks(self, size: int) -> Iterator[slice]:
        step = max(1, size // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield slice(start, start + step)


def correction(example: Example, rank: int) -> Ways:
    """gW = a gY + c P^T Q, into memory that is there."""
    x, P, Q = example, example.P[:rank], example.Q[:rank]

    def in_use(out: np.ndarray = x.out, **constants: Any
               ) -> Callable[[], Any]:
        def run() -> None:
            before = {name: getattr(matrix, name) for name in constants}
            try:
                for name, value in constants.items():
                    setattr(matrix, name, value)
                x.A.combination(1.5, x.gY, 0.5, P, Q, lambda *_: out)
            finally:
                for name, value in before.items():
                    setattr(matrix, name, value)
        return run

    def in_scratch() -> None:
        rows = P.T * 0.5
        scratch: Any = None
        for part in x.blocks(matrix.BLOCK_SIZE):
            block = x.out[part]
            np.multiply(x.gY[part], 1.5, out=block)
            if scratch is None:
                scratch = np.empty_like(block)
            product = scratch[:len(block)]
            matrix._product(rows[part], Q, product)
            block += product

    def at_once() -> None:
        out = (P.T * 0.5).dot(Q)
        out += x.gY * 1.5

    ways = {
        'blocks of 2^17 (in use)': in_use(),
        'between cache lines': in_use(x.unaligned),
        'blocks of 2^13': in_use(BLOCK_SIZE=1 << 13),
        'blocks of 2^15': in_use(BLOCK_SIZE=1 << 15),
        'one block': in_use(BLOCK_SIZE=x.W.size),
        'with a scratch block': in_scratch,
        'at once (small ones)': at_once}
    if rank == 1:
        ways["with NumPy's buffer"] = in_use(
            _short_buffer=contextlib.nullcontext)
    with contextlib.suppress(ImportError):
        from scipy.linalg import blas

        def in_blas() -> None:
            for part in x.blocks(matrix.BLOCK_SIZE):
                np.multiply(x.gY[part], 1.5, out=x.out[part])
                if rank == 1:
                    blas.sger(0.5, Q[0], P[0, part], a=x.out[part].T,
                              overwrite_a=1)
                else:
                    blas.sgemm(0.5, Q.T, P[:, part], beta=1.0,
                               c=x.out[part].T, overwrite_c=1)

        ways["added by SciPy's BLAS"] = in_blas
    return ways


def two_products(example: Example) -> Ways:
    """<gY, W> and W^T u, of the exact gradient."""
    x, u = example, example.P[0]

    def one_pass() -> None:
        inner, y = 0.0, np.zeros(x.shape[1], 'f')
        for part in x.blocks(matrix.BLOCK_SIZE):
            inner += float(x.gY[part].ravel().dot(x.W[part].ravel()))
            y += u[part].dot(x.W[part])

    return {'two passes': lambda: (x.A.inner(x.gY), x.A.tdot(u)),
            'one pass (from 2^22 entries on)': one_pass}


def forward_products(example: Example) -> Ways:
    """W^T u, then W v: from the end, it may find some of W in the cache."""
    x, u, v = example, example.P[0], example.Q[0]

    def backwards() -> None:
        x.A.tdot(u)
        t = np.empty(x.shape[0], 'f')
        for part in reversed(list(x.blocks(matrix.BLOCK_SIZE))):
            np.dot(x.W[part], v, out=t[part])

    return {'both from the start (in use)':
            lambda: (x.A.tdot(u), x.A.dot(v)),
            'the second from the end': backwards}


def scaling(example: Example) -> Ways:
    """Y = W coefficient."""
    x, buffers = example, Buffers()
    return {
        'huge pages': lambda: np.multiply(x.W, 0.3, out=x.out),
        'memory used again (in use)': lambda: np.multiply(
            x.W, 0.3, out=buffers.empty(x.shape, 'f')),
        'fresh memory': lambda: x.W * 0.3}


def half(example: Example) -> Ways:
    """What a float16 weight costs before anything is computed."""
    W = example.W.astype('e')
    u = example.P[0]
    return {'float16 to float32': lambda: W.astype('f'),
            'a product of it, then': lambda: u.dot(example.W)}


QUESTIONS = {
    'gW = a gY + p q^T': lambda x: correction(x, 1),
    'gW = a gY + P^T Q, of rank 2': lambda x: correction(x, 2),
    '<gY, W> and W^T u': two_products,
    'W^T u and W v': forward_products,
    'Y = W coefficient': scaling,
    'a float16 weight': half}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--largest', type=int, default=2 ** 30,
                        help='number of entries, of the weights')
    args = parser.parse_args(argv)
    print(cpu.machine())
    shapes = [shape for shape in SHAPES if math.prod(shape) <= args.largest]
    columns: dict[str, dict[str, list[str]]] = {}
    for shape in shapes:
        example = Example(shape)
        for question, make in QUESTIONS.items():
            found = measure(
                make(example), cpu.time_on_host, Budget(math.inf),
                args.rounds, 0.01)
            rows = columns.setdefault(question, {})
            for way, numbers in found.items():
                rows.setdefault(way, []).append(
                    number(numbers['wall']['median']))
    for question, rows in columns.items():
        header = (question, *('x'.join(map(str, shape)) for shape in shapes))
        print('\n' + text_table(
            header, [(way, *row) for way, row in rows.items()]))


if __name__ == '__main__':
    main()
