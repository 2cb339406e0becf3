"""How much the norm of Y exceeds 1 while weights move, by the method.

``python -m tests.tools.estimates`` with one of three words prints a table of
docs/accuracy.rst, of the true norm of Y in %, above 1: the maximum / the
median over all seeds.

trajectories
    The example is trained as it is by default, and after each iteration each
    method is called once with each weight of its discriminator.
drift
    Gaussian weights, ``cos(r t) A + sin(r t) B`` in call t: the relative size
    of a step is r, and its direction turns slowly.
demo
    The example is trained with each setting, and what it trains with is
    measured.  Each training that is done is a line of the file ``demo.jsonl``
    in ``--out``, and is not repeated.

The first calls or iterations do not count: u starts at random.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any, Callable, Iterator, NamedTuple, Sequence
from unittest import mock

# Threads of BLAS wait for each other here; NumPy reads it when it is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np

from sn_function import functions as SF
from tests import reference
from tests.tools.benchmarks import cpu
from tests.tools.tables import show

assert sn_function  # it is imported for what it does
EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / 'examples'
EVERY = 5  # calls or iterations between two true norms, which take long


# Methods

class Method(NamedTuple):
    """A way to follow the norm of a weight.

    Attributes:
        name: Its name.
        passes: How often a call reads the weight.
        n_vectors: Number of vectors, at most that of rows or columns.
        call: Gets a matrix and the array of vectors, shape ``(b, m)``, or
            ``(m,)`` for one.  It returns sigma, and moves the vectors on.

    """

    name: str
    passes: int
    n_vectors: int
    call: Callable[[Any, Any], float]


def package(K: int) -> Callable[[Any, Any], float]:
    def call(W: Any, u: Any) -> float:
        return float(SF.spectral_norm(W, u, K, update_u=True).array)
    return call


def power(K: int) -> Method:
    return Method(f'power, K = {K}', 2 * K, 1, package(K))


def vectors(b: int, K: int = 1) -> Method:
    name = f'{b} vectors' + (f', K = {K}' if K > 1 else '')
    return Method(name, 2 * K, b, package(K))


def golub_kahan(n_steps: int) -> Method:
    """The largest norm that a Krylov space of u gives, orthogonalized."""
    def call(W: Any, u: Any) -> float:
        V = np.empty((n_steps, W.shape[1]), W.dtype)
        T = np.empty((n_steps, len(W)), W.dtype)
        t = u
        for k in range(n_steps):
            v = t @ W
            for _ in range(2):
                v -= (V[:k] @ v) @ V[:k]
            V[k] = v / np.linalg.norm(v)
            T[k] = t = W @ V[k]
        _, s, us = np.linalg.svd(T, full_matrices=False)
        u[...] = us[0]
        return float(s[0])
    return Method(f'Golub-Kahan, {n_steps} steps', 2 * n_steps, 1, call)


ON_TRAJECTORIES = [
    power(1), power(5), golub_kahan(3), vectors(8), vectors(16), vectors(8, 2)]
ON_DRIFT = [power(1), power(5), vectors(4), vectors(8), vectors(16)]


class Replay:
    """What methods make of a weight that moves.

    Attributes:
        excess: Of each method, the true norm of Y above 1, in %, at each call.

    """

    def __init__(self, methods: Sequence[Method], seed: int) -> None:
        self.methods = methods
        self.random = np.random.RandomState(seed)
        self.us: list[Any] = []
        self.excess: list[list[float]] = [[] for _ in methods]

    def add(self, W: Any, counts: bool = True) -> None:
        """Calls each method once with a matrix."""
        if not self.us:
            self.us = [self.draw(W, method.n_vectors)
                       for method in self.methods]
        sigmas = [method.call(W, u)
                  for method, u in zip(self.methods, self.us)]
        if counts:
            norm = true_norm(W)
            for excess, sigma in zip(self.excess, sigmas):
                excess.append(100 * (norm / sigma - 1))

    def draw(self, W: Any, n_vectors: int) -> Any:
        b = min(n_vectors, *W.shape)
        u = self.random.normal(size=(b, len(W))).astype(W.dtype)
        return u[0] if b == 1 else u


def true_norm(W: Any) -> float:
    """By the smaller Gram matrix in float64: faster than an SVD."""
    A = W.astype(np.float64)
    G = A @ A.T if len(A) <= A.shape[1] else A.T @ A
    return float(np.sqrt(np.linalg.eigvalsh(G)[-1]))


def cell(excess: Any) -> str:
    """The maximum and the median; rounding may leave less than 0."""
    return f'{max(0, np.max(excess)):.2f} / {max(0, np.median(excess)):.3f}'


# The example

def example() -> Any:
    with mock.patch.object(sys, 'path', [str(EXAMPLES), *sys.path]):
        return importlib.import_module('train_sngan_digits')


def layers(model: chainer.Link) -> dict[str, chainer.Link]:
    """Its weights that are not exact in any case, as one row is."""
    return {
        path[1:]: link for path, link in model.namedlinks()
        if hasattr(link, 'W') and min(matrix(link.W.array).shape) > 1}


def matrix(W: Any) -> Any:
    return reference.as_matrix(W, 0)


def train(
        settings: dict[str, Any], seed: int, n_iterations: int,
        step: Callable[[Callable[[], None], chainer.Link], None],
) -> dict[str, float]:
    """Trains the example.

    Args:
        settings: Options of the example, those of the hook.
        seed: Of the example.
        n_iterations: Number of its iterations.
        step: Is called for each of them with what does it and with the
            discriminator.

    Returns:
        The scores of its generator.

    """
    program = example()
    update = program.SNGANUpdater.update_core

    options = [f'--{name.replace("_", "-")}={value}'
               for name, value in settings.items()]

    def update_core(updater: Any) -> None:
        step(lambda: update(updater), updater.get_optimizer('dis').target)

    with tempfile.TemporaryDirectory() as out, mock.patch.object(
            program.SNGANUpdater, 'update_core', update_core), \
            contextlib.redirect_stdout(io.StringIO()):
        program.main([
            '--iteration', str(n_iterations), '--seed', str(seed),
            '--snapshot-interval', str(n_iterations), '--out', out, *options])
        scores = json.loads(
            (pathlib.Path(out) / 'scores.json').read_text(encoding='utf-8'))
    result: dict[str, float] = scores['images']['trained generator']
    return result


# Trajectories

def trajectory(
        seed: int, n_iterations: int, n_first: int,
        methods: Sequence[Method]) -> dict[str, Replay]:
    """What the methods make of each layer of one training."""
    replays: dict[str, Replay] = {}
    n_done = 0

    def step(update: Callable[[], None], dis: chainer.Link) -> None:
        nonlocal n_done
        update()
        n_done += 1
        for name, link in layers(dis).items():
            replay = replays.setdefault(name, Replay(methods, seed))
            replay.add(matrix(link.W.array), n_done > n_first)

    train(DEMO['power, K = 5'], seed, n_iterations, step)
    return replays


def trajectories(args: argparse.Namespace) -> list[tuple[str, ...]]:
    done = [trajectory(
        seed, args.iterations, args.first, ON_TRAJECTORIES)
        for seed in args.seeds]
    return [('method', 'passes', *done[0]), *(
        (method.name, str(method.passes), *(
            cell([replays[name].excess[i] for replays in done])
            for name in done[0]))
        for i, method in enumerate(ON_TRAJECTORIES))]


# Drift

SHAPES = (64, 16), (10, 512), (128, 1024), (256, 256), (256, 2304)
RATES = 1e-4, 1e-3, 1e-2


def drifting(
        shape: tuple[int, int], rate: float, seed: int) -> Iterator[Any]:
    random = np.random.RandomState(seed)
    A, B = random.normal(size=(2, *shape))
    for t in itertools.count():
        yield (np.cos(rate * t) * A + np.sin(rate * t) * B).astype('f')


def drift(args: argparse.Namespace) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ('weight', 'rate', *(method.name for method in ON_DRIFT))]
    for shape in SHAPES:
        for rate in RATES:
            replays = [Replay(ON_DRIFT, seed) for seed in args.seeds]
            for seed, replay in zip(args.seeds, replays):
                for i, W in zip(range(args.iterations), drifting(
                        shape, rate, seed)):
                    replay.add(W, i >= args.first and i % EVERY == 0)
            rows.append((f'{shape[0]}x{shape[1]}', f'{rate:g}', *(
                cell(excesses)
                for excesses in zip(*(each.excess for each in replays)))))
    return rows


# The demo

DEMO = {
    'power, K = 1': {'n_vectors': 1, 'n_power_iteration': 1},
    'power, K = 5': {'n_vectors': 1, 'n_power_iteration': 5},
    '8 vectors': {'n_vectors': 8},
    '16 vectors': {'n_vectors': 16},
}


class Watch(chainer.LinkHook):
    """Keeps the excess of the norm of the weight that a link computes with.

    It is for a link that has the hook already, which is called before it.
    """

    name = 'Watch'

    def __init__(self) -> None:
        self.excess: list[float] = []
        self.is_on = False

    def forward_preprocess(self, args: Any) -> None:
        if self.is_on:
            Y = matrix(args.link.W.array)
            self.excess.append(100 * (true_norm(Y) - 1))


def watched(
        settings: dict[str, Any], seed: int, n_iterations: int, n_first: int,
) -> dict[str, Any]:
    """The norms, the scores and the time of a step of one training."""
    watches: dict[str, Watch] = {}
    seconds: list[float] = []
    n_done = 0

    def step(update: Callable[[], None], dis: chainer.Link) -> None:
        nonlocal n_done
        if not watches:
            for name, link in layers(dis).items():
                watches[name] = Watch()
                link.add_hook(watches[name])
        n_done += 1
        is_on = n_done > n_first and n_done % EVERY == 0
        for watch in watches.values():
            watch.is_on = is_on
        start = time.thread_time()
        update()
        if not is_on:
            seconds.append(time.thread_time() - start)
        for watch in watches.values():
            watch.is_on = False

    scores = train(settings, seed, n_iterations, step)
    return {
        'excess': {name: watch.excess for name, watch in watches.items()},
        'distance': scores['frechet_distance'],
        'accuracy': scores['accuracy'],
        'milliseconds': 1e3 * float(np.median(seconds))}


def demo(args: argparse.Namespace) -> list[tuple[str, ...]]:
    path = pathlib.Path(args.out) / 'demo.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    done: dict[tuple[Any, ...], dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding='utf-8').splitlines():
            result = json.loads(line)
            done[tuple(result['run'])] = result
    for seed in args.seeds:
        for name, settings in DEMO.items():
            run = name, seed, args.iterations, args.first
            if run not in done:
                done[run] = watched(settings, *run[1:])
                with path.open('a', encoding='utf-8') as f:
                    f.write(json.dumps({'run': run, **done[run]}) + '\n')
    return demo_rows({
        name: [done[name, seed, args.iterations, args.first]
               for seed in args.seeds] for name in DEMO})


def demo_rows(
        runs: dict[str, list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    names = list(next(iter(runs.values()))[0]['excess'])
    rows: list[tuple[str, ...]] = [(
        'setting', *names, 'distance', 'in their class', 'ms a step')]
    for setting, results in runs.items():
        distance, accuracy, ms = (
            np.array([each[key] for each in results])
            for key in ('distance', 'accuracy', 'milliseconds'))
        rows.append((
            setting,
            *(cell([each['excess'][name] for each in results])
              for name in names),
            f'{distance.mean():.2f} ({distance.min():.2f} to '
            f'{distance.max():.2f})',
            f'{accuracy.mean():.1%}', f'{np.median(ms):.1f}'))
    return rows


# The program

TABLES: dict[str, tuple[
    Callable[[argparse.Namespace], list[tuple[str, ...]]], int, int]] = {
        # Function, iterations or calls, and how many of them do not count.
        'trajectories': (trajectories, 800, 50),
        'drift': (drift, 400, 100),
        'demo': (demo, 800, 50),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.estimates',
        description=__doc__.split('\n')[0])
    parser.add_argument('table', choices=TABLES)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--iterations', type=int)
    parser.add_argument('--first', type=int, help='how many do not count')
    parser.add_argument('--out', default='result/estimates',
                        help='where the demo keeps what is done')
    parser.add_argument('--rst', action='store_true', help='as in the docs')
    args = parser.parse_args(argv)
    function, iterations, first = TABLES[args.table]
    if args.iterations is None:
        args.iterations = iterations
    if args.first is None:
        args.first = first
    print(cpu.machine(), '\n')
    show(function(args), args.rst)


if __name__ == '__main__':
    main()
