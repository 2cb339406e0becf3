"""How a weight is dealt out to the blocks of a device, and what is kept where.

Numbers only: nothing here knows of arrays.  Sizes and places are in bytes.
"""
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy

from sn_function._arithmetic import kernels

# Of an H100, and of an H200.
MULTIPROCESSORS = 132
# What runs at the same time, as the registers of the kernels allow.  One more
# block would start when another has ended, and begin by adding up what all
# have left.
MAX_BLOCKS = 2 * MULTIPROCESSORS
# With fewer, many multiprocessors have nothing to do.
FEW_BLOCKS = MULTIPROCESSORS // 2
# A tile of columns has at least so many bytes next to each other.
NARROWEST = 64
# Bytes that a thread has on their way at once, in a product.
BATCH = 64
# For several vectors, by rows: what neighbouring threads have found is added
# up in shared memory.
FEWEST_LANES = 8
# Entries of a vector for each block that multiplies several with each other.
OF_A_GRAM, MAX_GRAMS = 256, 64
# From so many batches in turn on, and with few blocks, a sum is cut in parts.
LONG_SUM = 8

DOUBLE = 8

Int32 = Any  # numpy.int32, as raw kernels take it


class Product(NamedTuple):
    """How ``W^T x`` or ``W x`` is computed.

    Attributes:
        n (int): Length of the result.
        is_middle (bool): Whether by ``sn_middle_product``, not ``sn_product``.
        is_gathered (bool): Whether ``sn_gather`` follows.
        n_sums (int): Number of blocks that leave sums.
        blocks (int): Number of blocks of the product.
        arguments (tuple of int): Threads next to each other, in how many parts
            each sum is made, whether several entries are read at once.

    """

    n: int
    is_middle: bool
    is_gathered: bool
    n_sums: Int32
    blocks: Int32
    arguments: tuple[Int32, ...] = ()


def _power_of_two_from(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def blocks_for(n: int, of_a_block: int) -> int:
    """The number of blocks for ``n`` entries."""
    return min(MAX_BLOCKS, -(-n // of_a_block))


def product(
        l: int, m: int, r: int, is_transposed: bool,  # NOQA: E741
        itemsize: int, is_aligned: bool, threads: int,
        rows: int | None = None) -> Product:
    """Returns how to compute a product of an ``(l, m, r)`` array.

    For several vectors a thread has several rows, if it is by rows.
    """
    if is_transposed == (r == 1):  # by rows
        n_out, n_in = (l, m) if is_transposed else (m, l * r)
        if rows is None and not is_transposed and l > 1:
            return Product(m, True, True, *_int32(blocks_for(m, threads), 0))
        width = _width(
            n_in if rows is None or r == 1 else r, 16 // itemsize, is_aligned)
        batch = _batch(width, itemsize)
        n_in //= width
        if rows is None:
            lanes = _lanes_of_rows(n_out, n_in, batch, threads)
        else:
            batch = max(1, batch // rows)
            lanes = max(FEWEST_LANES, min(32, _power_of_two_from(n_in)))
            while lanes < threads and n_in > lanes * batch:
                lanes *= 2
        tiles = -(-n_out // (rows or 1) * lanes // threads)
        batches = n_in // (lanes * batch)
    else:
        n_out, n_in = (l * r, m) if is_transposed else (m, l)
        width = _width(
            r if is_transposed else m,
            min(4, 16 // itemsize) if rows is None else max(1, 4 // itemsize),
            is_aligned)
        batch = _batch(width, itemsize)
        n = n_out // width
        lanes = _lanes_of_columns(
            n, n_in, batch, threads,
            NARROWEST // (width * itemsize) if rows is None else 32)
        tiles, batches = -(-n // lanes), n_in * lanes // (threads * batch)
    parts = 1
    if tiles < FEW_BLOCKS and batches > LONG_SUM:
        parts = min(-(-2 * FEW_BLOCKS // tiles), batches // 2)
    blocks = min(tiles * parts, MAX_BLOCKS)
    n_sums = blocks if parts == 1 else blocks_for(n_out, threads)
    n_sums, blocks = _int32(n_sums, blocks)
    return Product(n_out, False, parts > 1, n_sums, blocks,
                   _int32(lanes, parts, width > 1))


def _lanes_of_rows(
        n_out: int, n_in: int, batch: int, threads: int) -> int:
    """How many threads share a row: more where there are few rows."""
    lanes = min(32, _power_of_two_from(n_in))
    while (lanes < threads and n_in > lanes * batch
           and n_out * lanes < MULTIPROCESSORS * threads):
        lanes *= 2
    return lanes


def _lanes_of_columns(
        n: int, n_in: int, batch: int, threads: int, fewest: int) -> int:
    """How many threads are next to each other in a tile: fewer where there
    are few columns, and more where these are short."""
    lanes = min(32, _power_of_two_from(n))
    while (lanes > fewest and n < MULTIPROCESSORS * lanes
           and n_in * lanes >= 2 * threads * batch):
        lanes //= 2
    while (lanes < threads and n_in * lanes < threads * batch
           and n >= 4 * FEW_BLOCKS * lanes):
        lanes *= 2
    return lanes


def _batch(width: int, itemsize: int) -> int:
    """As ``batch_of`` of the kernels has it."""
    return max(1, (16 if itemsize == 2 else BATCH // itemsize) // width)


def _width(n: int, width: int, is_aligned: bool) -> int:
    return width if is_aligned and n % width == 0 else 1


class Plan:
    """Everything about a weight that follows from its shape.

    Args:
        l, m, r: Its shape.
        K: Number of iterations.
        itemsize: Bytes of an entry.
        is_aligned: Whether all arrays of its shape start at multiples of 16.
        is_small: Whether one block does all.
        threads: Threads of a block of many.

    Attributes:
        s, t (Product): How ``W^T x`` and ``W x`` are computed.
        m_step, n_step (int): From a vector of length m, or n, to the next.
        us, vs, norms, s_sums, t_sums, extras, parts (int): Places in what a
            forward keeps: of ``u_0 .. u_K`` and ``v_1 .. v_K``, and of what is
            only for its own launches.
        size (int): Of all that.
        tbars, sbars, bar_sums, bar_extras, bar_parts (int): Places in what a
            backward keeps: of ``tbar_1 .. tbar_{K-1}`` and ubar, of
            ``sbar_1 .. sbar_K``, and of what is only for its own launches.
        bar_size (int): Of all that.
        sizes (tuple of int): ``l``, ``m`` and ``r``.
        of_n (tuple of int): ``n``, and blocks for so many entries.
        is_wide (bool): Whether a pass over all entries takes 16 bytes at once.
        blocks (int): For such a pass.
        correct (tuple of int): Rows of a job of ``sn_correct_bwd``, whether it
            takes 16 bytes at once, its blocks.

    """

    def __init__(
            self, l: int, m: int, r: int, K: int, itemsize: int,  # NOQA: E741
            is_aligned: bool, is_small: bool, threads: int) -> None:
        n = l * r
        a = max(4, itemsize)  # of what sums are made in
        self.s, self.t = s, t = [
            product(l, m, r, is_transposed, itemsize, is_aligned, threads)
            for is_transposed in (True, False)]
        self.sizes = _int32(l, m, r)
        self.of_n = _int32(n, blocks_for(n, threads))
        self.is_wide, self.blocks = _int32(
            is_aligned, blocks_for(m * n, threads * 4 * 16 // itemsize))
        n_sums, n_parts = max(int(s.n_sums), int(t.n_sums)), max([0, *[
            p.n * int(p.arguments[1]) for p in (s, t)
            if p.is_gathered and not p.is_middle]])
        self.m_step, self.n_step = a * m, a * n
        self.us = DOUBLE * (len(kernels.NUMBERS) + 2 * K)
        self.vs = self.us + _padded((K + 1) * a * m, 4 * a)
        self.norms = _padded(self.vs + K * a * n, 16)
        self.s_sums = self.norms + DOUBLE * 2 * K
        self.t_sums = self.s_sums + DOUBLE * 3 * int(s.n_sums)
        self.extras = self.t_sums + DOUBLE * 3 * int(t.n_sums)
        self.parts = self.extras + DOUBLE * int(s.blocks)
        self.size = _padded(
            self.norms if is_small else self.parts + a * n_parts, 16)
        self.tbars = DOUBLE * len(kernels.COEFFICIENTS)
        self.sbars = self.tbars + _padded(K * a * m, 4 * a)
        self.bar_sums = _padded(self.sbars + K * a * n, 16)
        self.bar_extras = self.bar_sums + DOUBLE * 3 * n_sums
        self.bar_parts = self.bar_extras + DOUBLE * max(
            int(s.blocks), int(self.blocks))
        self.bar_size = _padded(
            self.bar_sums if is_small else self.bar_parts + a * n_parts, 16)
        # A job of sn_correct_bwd is a chunk of the rows of a strip of columns.
        matrices, rows, columns = (1, l, m) if r == 1 else (l, m, r)
        columns //= _width(columns, 16 // itemsize, is_aligned)
        strips = -(-columns // threads)
        lanes = -(-columns // strips)
        if strips > 1:
            lanes = _padded(lanes, 32)
        batch = 4 * (threads // lanes)  # 4 loads on their way
        # The vectors along the columns are read once a job.
        chunk = _padded(
            -(-matrices * strips * rows // (4 * FEW_BLOCKS)), batch)
        jobs = matrices * strips * -(-rows // chunk)
        self.correct = _int32(chunk, is_aligned, min(jobs, MAX_BLOCKS))


plan = functools.lru_cache(maxsize=1024)(Plan)


def with_vector(of: Plan, dtype: Any) -> int:
    """The size of what a forward keeps, and a further vector of length n."""
    return of.size + _padded(int(of.of_n[0]) * dtype.itemsize, 16)


class SubspacePlan:
    """The same of a forward of several vectors.

    What it keeps begins as that for one vector with one iteration.

    Args:
        l, m, r, itemsize, is_aligned, is_small, threads: As for a plan.
        b: Number of vectors.

    Attributes:
        s, t (Product): How ``U W`` and ``W S`` are computed.
        values, start, basis, T, S (int): Places: of singular values, of the
            vectors before and after, and of ``W^T`` of them.
        parts, found, grams, sums (int): Places of what is only for its own
            launches.
        size (int): Of all that.
        n_grams, n_sums (int): Blocks that leave matrices, or sums.

    """

    def __init__(
            self, l: int, m: int, r: int, b: int, itemsize: int,  # NOQA: E741
            is_aligned: bool, is_small: bool, threads: int) -> None:
        n = l * r
        a = max(4, itemsize)
        self.s, self.t = s, t = [
            product(l, m, r, is_transposed, itemsize, is_aligned, threads,
                    kernels.rows_of_a_thread(b, itemsize))
            for is_transposed in (True, False)]
        of_m, of_n = _padded(m * b * a, 4 * a), _padded(n * b * a, 4 * a)
        self.values = plan(
            l, m, r, 1, itemsize, is_aligned, True, threads).norms
        # As Space of the kernels has it.
        mix = self.values + DOUBLE * _padded(b + 2, 2) + DOUBLE * _padded(
            b * b, 2)
        self.start = mix + _padded(b * b * a, 4 * a)
        self.basis = self.start + of_m
        self.T = self.basis + of_m
        self.S = self.T + of_m
        self.found = self.S + of_n
        self.n_grams = numpy.int32(min(MAX_GRAMS, -(-n // OF_A_GRAM)))
        self.n_sums = numpy.int32(min(MAX_BLOCKS, -(-m // threads)))
        self.grams = self.found + DOUBLE * 2
        self.sums = self.grams + DOUBLE * b * b * int(self.n_grams)
        self.parts = _padded(self.sums + DOUBLE * 3 * int(self.n_sums), 16)
        n_parts = max([0, *[
            p.n * b * int(p.arguments[1]) for p in (s, t) if p.is_gathered]])
        self.size = _padded(
            self.found if is_small else self.parts + a * n_parts, 16)


subspace_plan = functools.lru_cache(maxsize=1024)(SubspacePlan)


def _int32(*numbers: int) -> tuple[Int32, ...]:
    return tuple([numpy.int32(x) for x in numbers])


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
