"""How a weight is dealt out to blocks: each entry once, nothing overlaps."""
import types

import numpy as np

from sn_function._arithmetic import kernels, workspace


def log_uniform(most):
    return int(np.exp(np.random.uniform(0, np.log(most + 1))))


def random_plans(n, most):
    """Yields plans of up to about ``most`` entries, and their settings."""
    for _ in range(n):
        # Sizes that packs of 16 bytes divide, and others.
        unit = int(np.random.choice([1, 1, 2, 8]))
        sizes = [log_uniform(min(most, 1 << 27)) for _ in range(2)]
        while np.prod(sizes) > most:
            sizes[np.random.randint(2)] //= 2
            sizes = [max(1, size) for size in sizes]
        n_l = log_uniform(sizes[0])
        l, m, r = [  # NOQA: E741
            (n_l, sizes[1], max(1, sizes[0] // n_l)), (1, *sizes),
            (*sizes, 1)][np.random.randint(3)]
        if unit > 1:
            l, m, r = (  # NOQA: E741
                (l, m * unit, 1) if r == 1 else (l, m, r * unit))
        settings = types.SimpleNamespace(
            l=l, m=m, r=r, K=np.random.randint(1, 4),
            itemsize=int(np.random.choice([2, 4, 8])),
            is_aligned=bool(np.random.randint(2)),
            is_small=bool(np.random.randint(5) == 0),
            threads=int(np.random.choice([32, 64, 256, 512])))
        yield settings, workspace.Plan(**vars(settings))


def check_places(places, end, size):
    """Places are (start, length in bytes, alignment)."""
    for start, _, unit in places:
        assert start % unit == 0
    for start, length, _ in sorted(places):
        assert start >= end
        end = start + length
    assert end <= size
    assert size % 16 == 0  # the next weight starts there


def test_places_do_not_overlap():
    for s, plan in random_plans(2000, 1 << 26):
        a, n = max(4, s.itemsize), s.l * s.r
        numbers = 8 * (len(kernels.NUMBERS) + 2 * s.K)
        us, vs = plan.us, plan.vs
        assert us == numbers  # where the kernels look for them
        assert vs == us + a * (-(-(s.K + 1) * s.m // 4) * 4)
        tbars, sbars = plan.tbars, plan.sbars
        assert (plan.m_step, plan.n_step) == (a * s.m, a * n)
        assert tbars == 8 * len(kernels.COEFFICIENTS)
        assert sbars == tbars + a * (-(-s.K * s.m // 4) * 4)
        kept = [(us, a * (s.K + 1) * s.m, 16), (vs, a * s.K * n, 16)]
        bars = [(tbars, a * s.K * s.m, 16), (sbars, a * s.K * n, 16)]
        if not s.is_small:
            parts = a * max([0, *[
                p.n * int(p.arguments[1]) for p in (plan.s, plan.t)
                if p.arguments and p.arguments[1] > 1]])
            sums = [24 * int(p.n_sums) for p in (plan.s, plan.t)]
            kept += [
                (plan.norms, 16 * s.K, 8), (plan.s_sums, sums[0], 8),
                (plan.t_sums, sums[1], 8),
                (plan.extras, 8 * int(plan.s.blocks), 8),
                (plan.parts, parts, 8)]
            bars += [
                (plan.bar_sums, max(sums), 8),
                (plan.bar_extras,
                 8 * max(int(plan.s.blocks), int(plan.blocks)), 8),
                (plan.bar_parts, parts, 8)]
        check_places(kept, numbers, plan.size)
        check_places(bars, tbars, plan.bar_size)


def test_numbers_of_blocks():
    for s, plan in random_plans(2000, 1 << 32):
        most = workspace.MAX_BLOCKS
        for p in (plan.s, plan.t):
            assert 1 <= p.n_sums <= most
            assert p.is_middle == (p is plan.t and s.l > 1 and s.r > 1)
            if p.is_middle:
                assert p.is_gathered
                assert p.blocks == 0
                continue
            lanes, parts, is_wide = map(int, p.arguments)
            assert 1 <= p.blocks <= most
            assert p.is_gathered == (parts > 1)
            assert p.is_gathered or p.n_sums == p.blocks
            assert 1 <= lanes <= s.threads
            assert lanes & lanes - 1 == 0
            assert s.is_aligned or not is_wide
        assert (plan.s.n, plan.t.n) == (s.l * s.r, s.m)
        assert 1 <= plan.blocks <= most
        assert 1 <= plan.of_n[1] <= most
        assert plan.is_wide == s.is_aligned
        chunk, is_wide, blocks = map(int, plan.correct)
        assert chunk >= 1
        assert 1 <= blocks <= most
        assert is_wide == s.is_aligned


def jobs(n, blocks):
    for block in range(blocks):
        yield from range(block, n, blocks)


def up(a, b):
    return -(-a // b)


def cover_product(s, product, is_transposed, rows=1):
    """How often each term of each sum is added; see grid.cuh.

    By rows, a thread has as many rows as is given.
    """
    lanes, parts, is_wide = map(int, product.arguments)
    n_out, n_in = (
        (s.l * s.r, s.m) if is_transposed else (s.m, s.l * s.r))
    count = np.zeros((n_out, n_in), int)
    if is_transposed == (s.r == 1):
        V = 16 // s.itemsize if is_wide else 1
        assert n_in % V == 0
        height, n = s.threads // lanes * rows, n_in // V
        tiles, chunk = up(n_out, height), up(n, parts)
        for job in jobs(tiles * parts, int(product.blocks)):
            p, end = job // tiles, n_out - job % tiles * height
            count[max(0, end - height):end,
                  p * chunk * V:min(n, (p + 1) * chunk) * V] += 1
        return count
    V = max(1, 4 // s.itemsize) if is_wide else 1
    inner = s.r if is_transposed else s.m
    assert inner % V == 0
    tiles, chunk = up(n_out // V, lanes), up(n_in, parts)
    for job in jobs(tiles * parts, int(product.blocks)):
        p, start = job // tiles, job % tiles * lanes * V
        count[start:start + lanes * V, p * chunk:(p + 1) * chunk] += 1
    return count


def cover_correction(s, plan):
    """How often each entry of gW is written; see entries.cuh."""
    chunk, is_wide, blocks = map(int, plan.correct)
    matrices, rows, columns = (
        (1, s.l, s.m) if s.r == 1 else (s.l, s.m, s.r))
    V = 16 // s.itemsize
    if not is_wide or columns % V:
        V = 1
    strips = up(columns // V, s.threads)
    lanes = up(columns // V, strips)
    if strips > 1:
        lanes = up(lanes, 32) * 32
    assert 1 <= lanes <= s.threads
    chunks = up(rows, chunk)
    count = np.zeros((matrices, rows, columns), int)
    for job in jobs(matrices * strips * chunks, blocks):
        matrix, rest = divmod(job, strips * chunks)
        column, row = rest % strips * lanes * V, rest // strips * chunk
        count[matrix, row:row + chunk, column:column + lanes * V] += 1
    return count


def test_each_entry_is_in_one_job():
    n_parts = 0
    for s, plan in random_plans(1000, 1 << 16):
        for p, is_transposed in ((plan.s, True), (plan.t, False)):
            if not p.is_middle:
                assert (cover_product(s, p, is_transposed) == 1).all()
                n_parts += p.is_gathered
        assert (cover_correction(s, plan) == 1).all()
    assert n_parts > 10  # there were such


# The same of several vectors.

def random_subspace_plans(n, most):
    for s, _ in random_plans(n, most):
        b = np.random.randint(1, min(32, s.m, s.l * s.r) + 1)
        yield s, b, workspace.SubspacePlan(
            s.l, s.m, s.r, b, s.itemsize, s.is_aligned, s.is_small, s.threads)


def test_places_of_several_vectors_do_not_overlap():
    for s, b, plan in random_subspace_plans(2000, 1 << 26):
        a, n = max(4, s.itemsize), s.l * s.r
        of_one = workspace.Plan(
            s.l, s.m, s.r, 1, s.itemsize, s.is_aligned, True, s.threads)
        assert plan.values == of_one.norms  # a backward looks before that
        values = 8 * (b + 2 + b % 2)
        matrices = 8 * (b * b + b % 2) + a * b * b
        kept = [(plan.values, values + matrices, 16),
                *[(place, a * b * s.m, 16)
                  for place in (plan.start, plan.basis, plan.T)],
                (plan.S, a * b * n, 16)]
        if not s.is_small:
            kept += [
                (plan.found, 16, 8),
                (plan.grams, 8 * b * b * int(plan.n_grams), 8),
                (plan.sums, 24 * int(plan.n_sums), 8),
                (plan.parts, a * b * max([0, *[
                    p.n * int(p.arguments[1]) for p in (plan.s, plan.t)
                    if p.is_gathered]]), 16)]
        check_places(kept, plan.values, plan.size)


def test_each_entry_is_in_one_job_for_several_vectors():
    n_parts = 0
    for s, b, plan in random_subspace_plans(1000, 1 << 16):
        rows = kernels.rows_of_a_thread(b, s.itemsize)
        for p, is_transposed in ((plan.s, True), (plan.t, False)):
            assert not p.is_middle
            assert 1 <= p.blocks <= workspace.MAX_BLOCKS
            lanes = int(p.arguments[0])
            assert lanes & lanes - 1 == 0
            if is_transposed == (s.r == 1):
                # What a block adds up in shared memory.
                assert s.threads // min(32, lanes) * rows * b <= (
                    4 * s.threads)
                assert lanes <= s.threads
            assert (cover_product(s, p, is_transposed, rows) == 1).all()
            n_parts += p.is_gathered
        assert 1 <= plan.n_grams <= workspace.MAX_GRAMS
    assert n_parts > 10
