"""How far sigma and Y are from the truth, over matrices that are hard.

``python -m tests.tools.truth`` measures each case and prints a table;
``--rst`` prints it as docs/accuracy.rst has it.  :mod:`tests.test_tools`
asserts the limits of the cases.  The truth is LAPACK's, in float64, of the
weight after its rounding to its dtype.
"""
from __future__ import annotations

import argparse
import functools
import math
import sys
from typing import Any, Callable, NamedTuple

import numpy as np

import sn_function  # isort: skip  # before chainer, which it repairs

from sn_function import functions as SF
from tests.reference import as_matrix

assert sn_function  # it is imported for what it does


class Case(NamedTuple):
    """A class of matrices.

    ``limits`` bounds the relative error of sigma for each of ``STARTS``, as
    far as it is one of convergence: rounding is allowed for by ``slack``.
    """

    name: str
    make: Callable[[np.random.RandomState], np.ndarray]
    dtypes: str
    limits: tuple[float, float, float, float]


class Row(NamedTuple):
    """The worst of a case in a dtype; a list has an item for each start."""

    case: Case
    dtype: np.dtype
    sigma: list[float]  # |1 - sigma / true norm|
    norm: list[float]  # |norm of Y - 1|
    rounding: float  # of Y against W / sigma, in units of eps of the dtype
    above: float  # sigma / true norm - 1, where that is positive


# Starts: from a random u to sigma and Y, by the public functions.

def _as_the_hook(W, u):
    SF.spectral_norm(W, u, 15, update_u=True)
    return 1, u


def _after_calls(W, u):
    for _ in range(100):
        SF.spectral_norm(W, u, update_u=True)
    return 1, u


def _at_once(W, u):
    return 100, u


def _with_eight(W, u):
    """As many calls as the warm ones, with up to 8 vectors."""
    b = min(8, len(u), W.size // len(u))
    others = np.random.RandomState(0).randn(b - 1, len(u)).astype(W.dtype)
    return _after_calls(W, np.concatenate([u[None], others]))


STARTS = {'start': _as_the_hook, 'warm': _after_calls, 'cold': _at_once,
          'eight': _with_eight}


# Matrices, in float64

def gaussian(*shape, size=1.0):
    return lambda rng: rng.randn(*shape) * size


def spectrum(m, n, s):
    """A random matrix that has these singular values."""
    def make(rng):
        U, V = (np.linalg.qr(rng.randn(x, len(s)))[0] for x in (m, n))
        return (U * s) @ V.T
    return make


def leading(*s):
    return spectrum(40, 30, [*s, *np.linspace(0.5, 0.01, 30 - len(s))])


def hilbert(rng):
    i = np.arange(20)
    return 1 / (i[:, None] + i + 1)


def huge(size):
    def make(rng):
        W = rng.randn(40, 30)
        W[rng.randint(40), rng.randint(30)] = size
        return W
    return make


def magnitudes(rng):
    return 10 ** rng.uniform(-30, 30, (40, 30)) * rng.choice([-1, 1], (40, 30))


def largest_halves(signs):
    return lambda rng: rng.uniform(6e4, 65504, (1024, 1024)) * rng.choice(
        signs, (1024, 1024))


def smallest_halves(rng):
    return rng.randint(-8, 9, (256, 256)) * 2.0 ** -24


def of_norm(norm):
    def make(rng):
        W = rng.randn(40, 30)
        return W / np.linalg.norm(W, 2) * norm
    return make


# What training with spectral normalization tends to: many singular values
# that are nearly 1.
TRAINED = [*np.linspace(1, 0.95, 64), *np.geomspace(0.95, 0.05, 64)]

# Limits of three kinds: one iteration is enough but for rounding; the next
# singular value is some percent below; there are many nearly as large.
EXACT = (0, 0, 0, 0)
SMALL, LARGE = (0.1, 1e-6, 1e-6, 1e-6), (0.1, 0.02, 0.02, 1e-3)

CASES = [
    Case('rank 1', spectrum(40, 30, [1.0]), 'efd', EXACT),
    Case('2 equal leading', leading(1, 1), 'efd', EXACT),
    Case('orthogonal', spectrum(40, 40, np.ones(40)), 'efd', EXACT),
    Case('gap 1e-6', leading(1, 1 - 1e-6), 'efd', (1e-6, 1e-6, 1e-6, 0)),
    Case('gap 1e-2', leading(1, 0.99), 'efd', (1e-2, 1e-2, 1e-2, 0)),
    Case('1e-30 to 1e30', magnitudes, 'fd', SMALL),
    Case('Hilbert', hilbert, 'efd', EXACT),
    Case('one entry 3e4', huge(3e4), 'e', EXACT),
    Case('one entry 1e30', huge(1e30), 'fd', EXACT),
    Case('1 x 1000', gaussian(1, 1000), 'efd', EXACT),
    Case('1000 x 1', gaussian(1000, 1), 'efd', EXACT),
    Case('all equal', lambda rng: np.full((40, 30), 0.3), 'efd', EXACT),
    Case('64 x 3 x 3 x 3', gaussian(64, 3, 3, 3), 'efd', SMALL),
    Case('512 x 512 x 3 x 3', gaussian(512, 512, 3, 3), 'fd', LARGE),
    Case('like trained', spectrum(128, 576, TRAINED), 'efd', LARGE),
    Case('near 65504', largest_halves([1]), 'e', EXACT),
    Case('near +-65504', largest_halves([1, -1]), 'e', LARGE),
    Case('near 6e-8', smallest_halves, 'e', LARGE),
    Case('norm 3.3e38', of_norm(3.3e38), 'f', SMALL),
    Case('around 1e-38', gaussian(40, 30, size=1e-38), 'f', SMALL),
    Case('subnormal', gaussian(40, 30, size=3e-39), 'f', SMALL),
    Case('around 1e300', gaussian(40, 30, size=1e300), 'd', SMALL),
    Case('around 1e-300', gaussian(40, 30, size=1e-300), 'd', SMALL),
    Case('subnormal', gaussian(40, 30, size=3e-309), 'd', SMALL),
]


# The truth

def unit(W):
    """Returns W as a float64 matrix with entries up to 1, and the exponent."""
    A = as_matrix(W, 0).astype(np.float64)
    exponent = math.frexp(abs(A).max())[1]
    return np.ldexp(A, -exponent), exponent


def true_norm(A):
    """The largest singular value of a float64 matrix."""
    if min(A.shape) > 128:
        # Six times as fast as the SVD, and right to 1e-13: the errors that
        # are found in matrices of this size are far above.
        return math.sqrt(np.linalg.eigvalsh(A @ A.T)[-1])
    v = np.linalg.svd(A, full_matrices=False)[2][0].astype(np.longdouble)
    # The SVD may be off by some 1e-15, the Rayleigh quotient of its vector
    # by the square of that, where a longdouble is longer than a double.
    t = A.astype(np.longdouble) @ v
    return float(np.sqrt(t @ t / (v @ v)))


def slack(dtype):
    """What rounding may add to the error of sigma."""
    return 16 * float(np.finfo('f' if dtype.char == 'e' else dtype).eps)


def spread(dtype):
    """How far the rounding of a matrix may part equal singular values."""
    return float(np.finfo(dtype).eps)


def rounding(Y, W, sigma):
    """The largest error of Y against W / sigma, in units of eps."""
    info = np.finfo(W.dtype)
    longer = np.longdouble if W.dtype.char == 'd' else np.float64
    exact = W.astype(longer) / longer(sigma)
    # Where Y is subnormal, its unit is that of the smallest normal number.
    error = abs(Y - exact) / np.maximum(abs(exact), info.tiny)
    return float(error.max() / info.eps)


@functools.lru_cache(maxsize=None)
def measure(case, char):
    """Returns the Row of a case in a dtype."""
    dtype = np.dtype(char)
    W = case.make(np.random.RandomState(0)).astype(dtype)
    A, exponent = unit(W)
    truth = true_norm(A)
    is_large = W.size > 1e5
    sigmas, norms, errors, above = [], [], [], 0.0
    for start in STARTS.values():
        below, off = [], []
        for seed in range(1, 4 if is_large else 9):
            # In the dtype of the weight, as the hook has it.
            u = np.random.RandomState(seed).randn(W.shape[0]).astype(dtype)
            k, u = start(W, u)
            # Without the floor: a small weight gets norm 1, too.
            Y, sigma = (x.array for x in SF.spectral_normalize(
                W, u, k, eps=0.0, return_sigma=True))
            below.append(1 - math.ldexp(float(sigma), -exponent) / truth)
            if is_large and below[-1] < max(below):
                continue  # to save time, where it is not the worst
            errors.append(rounding(Y, W, sigma))
            off.append(abs(
                true_norm(as_matrix(Y, 0).astype(np.float64)) - 1))
        sigmas.append(max(map(abs, below)))
        norms.append(max(off))
        above = max(above, -min(below))
    return Row(case, dtype, sigmas, norms, max(errors), above)


# The table

HEADER = ['case', 'bits', *STARTS, *STARTS, 'Y']


def shown(x):
    """A number, rounded up to one digit."""
    if x == 0:
        return '0'
    exponent = math.floor(math.log10(x))
    digit = math.ceil(x / 10.0 ** exponent)
    if digit == 10:
        digit, exponent = 1, exponent + 1
    return f'{digit}e{exponent:03d}'


def cells(row):
    return [row.case.name, str(8 * row.dtype.itemsize),
            *map(shown, [*row.sigma, *row.norm]),
            f'{math.ceil(10 * row.rounding) / 10:.1f}']


def table(rows, separator):
    lines = [HEADER, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [separator.join([
        line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines]


def main(argv: Any = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.truth', description=__doc__.split('\n')[0])
    parser.add_argument('--rst', action='store_true')
    args = parser.parse_args(argv)
    rows = [measure(case, char) for case in CASES for char in case.dtypes]
    if args.rst:
        print('.. csv-table::\n    :header-rows: 1\n')
        print('\n'.join('    ' + line for line in table(rows, ', ')))
    else:
        print(f'{"relative error of sigma":>52}{"norm of Y - 1":>28}')
        print('\n'.join(table(rows, '  ')))
    return 0


if __name__ == '__main__':
    sys.exit(main())
