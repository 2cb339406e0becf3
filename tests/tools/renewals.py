"""How often a hook makes u anew, and what it costs to look.

``python -m tests.tools.renewals`` prints the first table of docs/accuracy.rst:
of all calls of some trainings, those before which u was made anew, and how far
the first iteration would turn the u that was given; the creation of u is no
call.  With ``--cost`` it prints the other: the time of a call that looks for a
vector of another weight, forward and backward in microseconds, beside one that
does not.  The digits are those of scikit-learn.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import runpy
import sys
import tempfile
import time
import warnings
from typing import Any, Callable, Iterator, Sequence
from unittest import mock

# Threads of BLAS wait for each other here; NumPy reads it when it is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from sn_function._arithmetic import host
from tests import reference
from tests.tools import defects
from tests.tools.benchmarks import cpu
from tests.tools.benchmarks.report import Budget, measure
from tests.tools.tables import show

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / 'examples'
HEADER = 'training', 'calls', 'anew', 'median', '99 %', 'most'
COST_HEADER = 'weight', 'mode', '`n_warmup=0`', '`n_warmup=15`', 'ratio'


class Count:
    """The calls in training mode while it is watching, weight by weight.

    Attributes:
        turns: How far each would turn its u.
        n_renewed: How many of these made u anew.

    """

    def __init__(self) -> None:
        self.turns: list[float] = []
        self.n_renewed = 0

    def add(self, W: Any, axis: int, u: Any, start: Any) -> None:
        self.turns.append(turn(W, axis, u))
        # A renewal turns u by 0.001 or more, and rounding far less.
        self.n_renewed += unit(start).dot(unit(u)) < 1 - 1e-5

    def row(self, name: str) -> tuple[str, ...]:
        numbers = np.percentile(self.turns, [50, 99, 100])
        return (name, f'{len(self.turns):,}', f'{self.n_renewed:,}',
                *(f'{x:.4f}' for x in numbers))


def unit(u: Any) -> Any:
    u = u.astype('d')
    return u / np.linalg.norm(u)


def turn(W: Any, axis: int, u: Any) -> float:
    """``1 - u_0 . u_1``, in float64; 0 where the weight is zero."""
    A, u = reference.as_matrix(W.astype('d'), axis), unit(u)
    s = A.T @ u
    t = A @ s
    norm = np.linalg.norm(t)
    return float(1 - u.dot(t) / norm) if norm > 0 else 0.


@contextlib.contextmanager
def watching() -> Iterator[Count]:
    count, normalize_all = Count(), host.normalize_all

    def watched(calls: Any) -> Any:
        given = [call.u.copy() for call in calls]
        results = normalize_all(calls)
        for call, u, (_, iterations) in zip(calls, given, results):
            is_creation = not call.output_names
            if call.update_u and not is_creation and (
                    np.isfinite(call.W).all() and np.isfinite(u).all()):
                count.add(call.W, call.settings.axis, u, iterations.start)
        return results

    with mock.patch.object(host, 'normalize_all', watched):
        yield count


# What is trained

def demo(K: int, n_iterations: int) -> None:
    """The example, without what it prints."""
    with tempfile.TemporaryDirectory() as out, mock.patch.object(
            sys, 'argv', [
                'demo', '--iteration', str(n_iterations), '-k', str(K),
                '--n-vectors', '1', '--out', out]), mock.patch.object(
            sys, 'path', [str(EXAMPLES), *sys.path]), \
            contextlib.redirect_stdout(io.StringIO()), \
            contextlib.suppress(SystemExit):
        runpy.run_path(
            str(EXAMPLES / 'train_sngan_digits.py'), run_name='__main__')


def digits(make_optimizer: Callable[[], Any], detach_uv: bool,
           n_steps: int) -> None:
    """Three layers that classify handwritten digits."""
    from sklearn.datasets import load_digits
    X, y = load_digits(return_X_y=True)
    X, y = (X / 8 - 1).astype('f'), y.astype('i')
    np.random.seed(0)
    first, second, last = (
        L.Linear(n, m).add_hook(
            sn_function.SpectralNormalization(detach_uv=detach_uv))
        for n, m in ((64, 256), (256, 256), (256, 10)))
    model = chainer.Sequential(first, F.relu, second, F.relu, last)
    optimizer = make_optimizer().setup(model)
    for _ in range(n_steps):
        i = np.random.randint(0, len(X), 64)
        optimizer.update(
            lambda: F.softmax_cross_entropy(3 * model(X[i]), y[i]))  # NOQA: B023


def of_defects() -> None:
    for case in defects.CASES:
        if case.run is not defects.float16_large_shape:
            defects.run(case.run, defects.ours)


def parity() -> None:
    """What is compared with Chainer's hook."""
    from tests import test_parity
    for make_link, shape in test_parity.LINKS.values():
        for _ in test_parity.train(
                make_link, shape, sn_function.SpectralNormalization(
                    detach_uv=True, n_warmup=0)):
            pass


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    'Adam, 0.0001': lambda: chainer.optimizers.Adam(1e-4),
    'Adam, 0.001': lambda: chainer.optimizers.Adam(1e-3),
    'Adam, 0.01': lambda: chainer.optimizers.Adam(1e-2),
    'SGD, 0.1': lambda: chainer.optimizers.SGD(.1),
}


def trainings(n_steps: int) -> dict[str, Callable[[], None]]:
    """What is trained, by name."""
    found: dict[str, Callable[[], None]] = {}
    for K in 1, 5:
        found[f'the example, K = {K}'] = (
            lambda K=K: demo(K, n_steps * 2 // 5))
    for name, make in OPTIMIZERS.items():
        for detach_uv in False, True:
            found[name + (', detached' if detach_uv else '')] = (
                lambda m=make, d=detach_uv: (
                    digits(m, d, n_steps)))
    found['`make defects`'] = of_defects
    found['parity, `n_warmup=0`'] = parity
    return found


def counted(run: Callable[[], None]) -> Count:
    with warnings.catch_warnings(), watching() as count:
        warnings.simplefilter('ignore')
        run()
    return count


# What it costs

SHAPES = (16, 16), (128, 64, 4, 4), (512, 512, 3, 3)


def step_of(
        shape: tuple[int, ...], n_warmup: int, train: bool,
) -> Callable[[], None]:
    """Normalization and its gradient, from a vector of the weight."""
    np.random.seed(0)
    link = (L.Linear(shape[1], shape[0]) if len(shape) == 2 else
            L.Convolution2D(shape[1], shape[0], shape[2]))
    hook = sn_function.SpectralNormalization(n_warmup=n_warmup)
    link.add_hook(hook)
    sn_function.refresh(link)
    gY = np.random.normal(size=shape).astype('f')

    def step() -> None:
        with chainer.using_config('train', train):
            Y = hook.normalize_weight(link)
        Y.grad = gY
        link.W.cleargrad()
        Y.backward()

    return step


def seconds_of_thread(
        step: Callable[[], None], n: int) -> tuple[float, float]:
    """The time of the processor for a call, which others do not lengthen."""
    start = time.thread_time()
    for _ in range(n):
        step()
    return (time.thread_time() - start) / n, 0.


def cost(
        shape: tuple[int, ...], train: bool, n_rounds: int, seconds: float,
) -> tuple[str, ...]:
    """The median times, taken in turn, and the median of their ratios."""
    times = measure(
        {str(n): step_of(shape, n, train) for n in (0, 15)},
        seconds_of_thread, Budget(600), n_rounds, seconds=seconds)
    without, with_rule = (np.array(times[n]['walls']) for n in ('0', '15'))
    return ('x'.join(map(str, shape)), 'training' if train else 'test',
            f'{np.median(without):,.1f}', f'{np.median(with_rule):,.1f}',
            f'{np.median(with_rule / without):.3f}')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.renewals',
        description=__doc__.split('\n')[0])
    parser.add_argument('--cost', action='store_true')
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--rounds', type=int, default=100)
    parser.add_argument('--only', default='', help='part of a name')
    parser.add_argument('--rst', action='store_true', help='as in the docs')
    args = parser.parse_args(argv)
    print(cpu.machine(), '\n')
    if args.cost:
        show([COST_HEADER, *(
            cost(shape, train, args.rounds, .01)
            for shape in SHAPES for train in (True, False))], args.rst)
    else:
        show([HEADER, *(
            counted(run).row(name)
            for name, run in trainings(args.steps).items()
            if args.only in name)], args.rst)


if __name__ == '__main__':
    main()
