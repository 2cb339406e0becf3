"""The table of docs/accuracy.rst is kept, and its formulas hold."""
from __future__ import annotations

import csv
import math
import pathlib

import numpy as np
import pytest

import sn_function  # isort: skip  # before chainer, which it repairs

from sn_function import functions as SF
from tests.tools import truth

assert sn_function  # it is imported for what it does

DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs/accuracy.rst'
# Large matrices, and many steps of float16.
SLOW = {'512 x 512 x 3 x 3', 'near 65504', 'near +-65504', 'near 6e-8'}
MEASUREMENTS = [
    pytest.param(case, char, id=f'{case.name}-{char}',
                 marks=[pytest.mark.slow] * (case.name in SLOW))
    for case in truth.CASES for char in case.dtypes]


# The table

@pytest.mark.parametrize(('case', 'char'), MEASUREMENTS)
def test_limits(case, char):
    row = truth.measure(case, char)
    eps = float(np.finfo(char).eps)
    for limit, sigma, norm in zip(case.limits, row.sigma, row.norm):
        limit += truth.slack(row.dtype) + truth.spread(row.dtype)
        assert sigma <= limit
        # Rounding all of Y in one direction changes its norm by eps / 2.
        assert norm <= limit / (1 - limit) + eps
    assert row.above <= truth.slack(row.dtype)
    assert row.rounding <= 2


def documented():
    """The rows of the table: the name, the bits and the numbers."""
    lines = DOCS.read_text(encoding='utf-8').splitlines()
    start = next(i for i, line in enumerate(lines)
                 if line.split(',')[0].strip() == 'case')
    found = []
    for row in csv.reader(lines[start + 1:]):
        if len(row) != len(truth.HEADER):
            break
        name, bits, *numbers = map(str.strip, row)
        found.append((name, int(bits), [float(x) for x in numbers]))
    return found


def test_table_has_every_case():
    assert [row[:2] for row in documented()] == [
        (case.name, 8 * np.dtype(char).itemsize)
        for case in truth.CASES for char in case.dtypes]


# It measures all once more where tests are spread over processes.
@pytest.mark.slow
@pytest.mark.parametrize('index', [
    pytest.param(i, id=x.id) for i, x in enumerate(MEASUREMENTS)])
def test_table_is_what_the_command_prints(index):
    row = truth.measure(*MEASUREMENTS[index].values)
    _, _, numbers = documented()[index]
    # What is rounding only differs from one BLAS to another.
    floors = 6 * [truth.slack(row.dtype)] + [1.0]
    for measured, printed, floor in zip(
            [*row.sigma, *row.norm, row.rounding], numbers, floors):
        assert measured <= 2 * printed + floor
        # The number is the first above, of one digit.
        assert printed <= 4 * measured + floor


@pytest.mark.parametrize(('x', 'text'), [
    (0, '0'), (1e-3, '1e-03'), (1.01e-3, '2e-03'), (9.5e-16, '1e-15'),
    (0.52, '6e-01')])
def test_numbers_are_rounded_up(x, text):
    assert truth.shown(x) == text
    assert x <= float(text) * (1 + 1e-12)


@pytest.mark.parametrize('arguments', [[], ['--rst']])
def test_command_prints_every_case(arguments, capsys, monkeypatch):
    cases = [c for c in truth.CASES if c.name in ('rank 1', '1 x 1000')]
    monkeypatch.setattr(truth, 'CASES', cases)
    assert truth.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-6:]] == 3 * ['rank'] + 3 * ['1']
    assert ('.. csv-table::' in lines) == bool(arguments)


# At the ends of a dtype

def test_norm_of_Y_where_sigma_overflows():
    W = np.random.RandomState(0).uniform(3e38, 3.4e38, (40, 30)).astype('f')
    Y, sigma = SF.spectral_normalize(W, np.ones(40, 'f'), return_sigma=True)
    assert np.isposinf(sigma.array)
    assert abs(np.linalg.norm(Y.array.astype('d'), 2) - 1) < 1e-5


def test_norm_of_Y_where_sigma_has_few_digits():
    W = np.random.RandomState(0).randint(1, 8, (40, 30)).astype('f')
    W *= np.array(2e-45, 'f')
    Y = SF.spectral_normalize(W, np.ones(40, 'f'), 4, eps=0.0).array
    assert abs(np.linalg.norm(Y.astype('d'), 2) - 1) < 1e-5


@pytest.mark.parametrize(('char', 'size'), [
    ('f', 1e-22), ('f', 1e19), ('d', 1e-161), ('d', 1e154)])
def test_sigma_where_squares_leave_the_range(char, size):
    """Where not all of the squares vanish, no norm is zero to show it."""
    W = (truth.hilbert(None) * size).astype(char)
    A, exponent = truth.unit(W)
    sigma = SF.spectral_norm(W, np.ones(20, char), 16).array
    error = math.ldexp(float(sigma), -exponent) / truth.true_norm(A) - 1
    assert abs(error) <= truth.slack(W.dtype)


# The formulas of the documentation

def bound_by_gap(s, c, k):
    """Bounds 1 - (sigma_k / sigma_1)^2, from the singular values, all above
    zero, and the coefficients of u_0, by the best j."""
    bounds = [1.0]
    for j in range(1, len(s)):
        tan2 = (c[j:] @ c[j:]) / (c[:j] @ c[:j])
        bounds.append(1 - (s[j - 1] / s[0]) ** 2
                      + tan2 * (s[j] / s[j - 1]) ** (4 * k - 2))
    # The last j has nothing below it: what is orthogonal to all columns of W
    # takes no part.
    return min([*bounds, 1 - (s[-1] / s[0]) ** 2])


def free_bound(cos, k):
    """Bounds sigma_k / sigma_1 from below, whatever the singular values."""
    return cos ** (1 / (2 * k))


def expected_bound(m, k):
    """Bounds the mean of 1 - sigma_k / sigma_1 over random starts."""
    return (math.log(m) + 1.28) / (4 * k)


def problems():
    """Random matrices with random spectra and starts, with their SVD."""
    rng = np.random.RandomState(3)
    for _ in range(60):
        m, n = rng.randint(1, 12, 2)
        r = min(m, n)
        s = np.sort(rng.choice([
            rng.uniform(0, 1, r), 1 - 10 ** rng.uniform(-6, -1, r),
            10 ** rng.uniform(-3, 0, r), rng.choice([1, 0.5], r),
        ][rng.randint(4)], r))[::-1]
        W = truth.spectrum(m, n, s)(rng)
        U, s, _ = np.linalg.svd(W, full_matrices=False)
        u = rng.randn(m)
        if rng.rand() < 0.3:  # nearly orthogonal to the first
            u -= U[:, 0] * (u @ U[:, 0]) * (1 - 1e-3)
        yield W, U, s, u


def sigma_of(W, u, k):
    return float(SF.spectral_norm(W, u, k).array)


@pytest.mark.parametrize('k', [1, 2, 5, 16, 100])
def test_bounds(k):
    ratios = []
    for W, U, s, u in problems():
        ratio = sigma_of(W, u, k) / s[0]
        ratios.append(ratio)
        c = u @ U
        assert ratio <= 1 + 1e-14
        assert 1 - ratio ** 2 <= bound_by_gap(s, c, k) + 1e-13
        cos = abs(c[0]) / np.linalg.norm(u)
        assert ratio >= free_bound(cos, k) - 1e-13
    if k < 16:
        assert min(ratios) < 0.9  # there was something to bound


def test_bound_by_the_gap_is_sharp():
    """It is met to first order where the second singular value is small."""
    s, c = np.array([1, 0.1]), np.array([1, 1e-3])
    error = 1 - sigma_of(np.diag(s), c, 1) ** 2
    assert 0.98 < error / bound_by_gap(s, c, 1) < 1


@pytest.mark.parametrize('m', [2, 8, 64, 512])
@pytest.mark.parametrize('k', [1, 2, 16, 101])
def test_expected_bound(m, k):
    """Over random starts, for spectra that are as bad as can be."""
    squares = np.random.RandomState(0).randn(4000, m) ** 2
    worst, unlikely = 0.0, 0
    for last in np.geomspace(0.02, 1, 30):
        # All the others equal: sigma has a closed form.
        low = (1 - last) ** (1 / (2 * k))
        first, rest = squares[:, 0], squares[:, 1:].sum(axis=1)
        ratio = np.sqrt((first + rest * low ** (4 * k))
                        / (first + rest * low ** (4 * k - 2)))
        worst = max(worst, (1 - ratio).mean())
        # With probability 1 - delta.
        delta = 0.05
        below = ratio < (delta / math.sqrt(m)) ** (1 / (2 * k))
        unlikely = max(unlikely, below.mean())
    assert 0.1 * expected_bound(m, k) < worst < expected_bound(m, k)
    assert unlikely < 0.05


def test_closed_form_is_what_is_computed():
    s = np.array([1, 0.9, 0.9])
    for k in (1, 3):
        u = np.random.RandomState(0).randn(3)
        expected = np.sqrt((u ** 2 @ s ** (4 * k))
                           / (u ** 2 @ s ** (4 * k - 2)))
        assert sigma_of(np.diag(s), u, k) == pytest.approx(expected)


@pytest.mark.parametrize('k', [1, 3])
def test_a_change_of_the_weight_costs_twice_its_norm(k):
    rng = np.random.RandomState(4)
    closest = 0.0
    for W, _, s, u in problems():
        sigma = float(SF.spectral_norm(W, u, 2, update_u=True).array)
        # The worst change takes from the direction that u has found.
        E = rng.randn(*W.shape) if rng.rand() < 0.5 else -np.outer(u, u @ W)
        E *= rng.uniform(0, 0.5) / np.linalg.norm(E, 2)
        change = np.linalg.norm(E, 2)
        new = sigma_of(W + E, u, k)
        assert new >= sigma - change - 1e-13
        true = np.linalg.norm(W + E, 2)
        lost = true - new
        assert lost <= s[0] - sigma + 2 * change + 1e-13
        closest = max(closest, lost / (s[0] - sigma + 2 * change))
    assert closest > 0.5


def test_nothing_is_bounded_where_u_is_orthogonal_to_the_first():
    Y = SF.spectral_normalize(np.diag([1000., 1.]), np.array([0., 1.])).array
    assert np.linalg.norm(Y, 2) == pytest.approx(1000)


def test_equal_leading_singular_values_are_as_one():
    """The same estimates as of the space they span, seen as one vector."""
    u = np.random.RandomState(0).randn(5)
    one = np.array([np.hypot(*u[:2]), *u[2:]])
    s = np.array([2, 1.5, 1, 0.5])
    for k in (1, 2, 7):
        assert sigma_of(np.diag([2, *s]), u, k) == pytest.approx(
            sigma_of(np.diag(s), one, k), rel=1e-14)
