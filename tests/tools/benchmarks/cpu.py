"""The normalization of weights and of whole models, on the CPU.

``python -m tests.tools.benchmarks.cpu`` times it beside Chainer's hook, plain
compositions, and PyTorch and JAX where they are installed, and prints tables:
first with the threads that these take by default, as a user has them, then
with one.  ``--out DIR`` keeps them as ``cpu.csv``, ``cpu.md`` and ``cpu.png``.
``--draw DIR`` draws ``cpu.png`` from the ``cpu.csv`` there.

Contenders take turns in one process.  Peers have processes of their own: each
brings a pool of threads, and these pools would wait for one another.

What is timed is in :mod:`tests.tools.benchmarks.contenders` and
:mod:`tests.tools.benchmarks.models`, statistics and tables are in
:mod:`tests.tools.benchmarks.report`.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np

from tests.tools.benchmarks.contenders import (
    BUILT_IN,
    PEERS,
    Contender,
    case_of,
    makers,
    why_not,
)
from tests.tools.benchmarks.models import (
    LISTS,
    MODELS,
    NO_HOOK,
    STEPS,
    list_makers,
    model_makers,
    nbytes_of,
)
from tests.tools.benchmarks.picture import draw
from tests.tools.benchmarks.report import (
    DTYPES,
    Budget,
    markdown_table,
    measure,
    number,
    shape_of,
    text_of,
    text_table,
)

# Of the networks, and one that is square.
SHAPES = (
    '64x3x3x3', '128x64x4x4', '256x128x4x4', '512x256x3x3', '512x512x3x3',
    '1024x1024x3x3', '4096x4096')
# The shapes that all numbers of iterations and all dtypes are measured with.
THOROUGH = slice(0, 5, 2)
N_LAYERS = (1, 2, 4, 8, 16, 32)
SIDES = (64, 128, 256, 512, 1024, 2048, 4096)
LARGE = 16 << 20  # bytes of what takes fewer rounds
DEFAULT = 'default'  # number of threads
THREADS = ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS')
OURS = 'chainer'  # the package of what is no peer

# Kind, name, dtype and K of what is compared, then the numbers of each.
Group = Any


# Measuring

class Row(NamedTuple):
    """A measurement.  Times are of the step, in microseconds.

    Attributes:
        threads: Their number, or ``default``.
        kind: weight, list, model, step, layers (their number) or side (of a
            square).
        added: What the step takes more than one without a hook.
        ratio: What Chainer's hook adds over what this adds.
        copies: The median over that of a copy of the weight.
        peak: Bytes at most, above the level before the step.
        kept: Bytes from forward to backward, the normalized weight included.

    """

    threads: str
    kind: str
    name: str
    dtype: str
    K: int
    contender: str
    p20: float = math.nan
    median: float = math.nan
    p80: float = math.nan
    added: float = math.nan
    ratio: float = math.nan
    copies: float = math.nan
    peak: float = math.nan
    kept: float = math.nan
    note: str = ''


def time_on_host(
        step: Callable[[], Any], n: int) -> tuple[float, float]:
    """Seconds of one of ``n`` calls, without garbage collection."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(n):
            step()
        seconds = (time.perf_counter() - start) / n
    finally:
        if was_enabled:
            gc.enable()
    return seconds, seconds


def memory_of(contender: Contender) -> tuple[float, float]:
    """Bytes of a step: at most, and from forward to backward.

    Of the first step: later ones may use memory again.
    """
    if not contender.is_traced:
        return math.nan, math.nan
    # NumPy reports its arrays to tracemalloc, beside Python's objects.
    # It does not count what existed before it was started.
    contender.clear()
    tracemalloc.start()
    try:
        Y = contender.forward()
        kept, _ = tracemalloc.get_traced_memory()
        contender.backward(Y)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak, kept


def checked(make: Callable[[], Contender]) -> Contender:
    """Makes a contender and checks that its gradient is finite."""
    contender = make()
    gW = contender.step()
    for g in gW if isinstance(gW, list) else [gW]:
        if not np.isfinite(g).all():
            raise FloatingPointError('its gradient is not finite')
    return contender


def measured(
        to_make: dict[str, Callable[[], Contender]], nbytes: int,
        n_rounds: int, seconds: float = 0.02) -> dict[str, dict[str, Any]]:
    """The numbers of each, or ``error``, and ``peak`` and ``kept``."""
    made, found = {}, {}
    for name, make in to_make.items():
        try:
            made[name] = checked(make)
        except Exception as error:
            found[name] = {'error': text_of(error)}
    gc.collect()
    is_large = nbytes > LARGE
    found.update(measure(
        {name: contender.step for name, contender in made.items()},
        time_on_host, Budget(math.inf),
        min(n_rounds, max(7, n_rounds // 4)) if is_large else n_rounds,
        seconds, 1 if is_large else 3))
    for name in list(made):
        del made[name]
        found[name]['peak'], found[name]['kept'] = memory_of(to_make[name]())
    return {name: found[name] for name in to_make}


def measurements(
        args: argparse.Namespace, package: str) -> Iterator[Group]:
    """What contenders of a package take."""
    def group(
            kind: str, name: str, dtype: str, K: int, to_make: Any,
            nbytes: int) -> Group:
        to_make = {contender: make for contender, make in to_make.items()
                   if contender == 'copy'
                   or PEERS.get(contender, OURS) == package}
        print(f'  {package}: {kind} {name} {dtype} {K}', file=sys.stderr)
        found = measured(to_make, nbytes, args.rounds)
        return kind, name, dtype, K, found

    def weight(
            kind: str, name: str, shape: Any, dtype: str, K: int) -> Group:
        return group(kind, name, dtype, K, makers(case_of(shape, dtype, K)),
                     math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize)

    for shape in args.shapes:
        is_thorough = package == OURS and shape in args.thorough
        for i, dtype in enumerate(args.dtypes):
            for j, K in enumerate(args.iterations):
                if i == j == 0 or (is_thorough and not (i and j)):
                    yield weight('weight', shape, shape_of(shape), dtype, K)
    for name in args.lists:
        yield group('list', name, 'float32', 1, list_makers(LISTS[name]),
                    nbytes_of(LISTS[name]))
    for name in args.models:
        yield group('model', name, 'float32', 1, model_makers(MODELS[name]),
                    nbytes_of(MODELS[name]))
    for name in args.steps:
        # One of the largest takes seconds.
        yield group('step', name, 'float32', 1, STEPS[name](),
                    nbytes_of(MODELS.get(name, ())))
    for n in args.layers:
        shapes = [(64, 64, 3, 3)] * n
        yield group('layers', str(n), 'float32', 1, model_makers(shapes),
                    nbytes_of(shapes))
    for side in args.sides:
        yield weight('side', str(side), (side, side), 'float32', 1)


# What is measured once for each of these, by all packages and by ours alone.
BY_ALL = 'shapes', 'lists'
BY_OURS = 'models', 'steps', 'layers', 'sides'


def parts(
        args: argparse.Namespace, peers: Sequence[str]
) -> Iterator[tuple[argparse.Namespace, str]]:
    """What processes measure, one after the other: peers right after ours."""
    nothing = dict(vars(args), **{name: [] for name in BY_ALL + BY_OURS})
    for kind in BY_ALL:
        for name in getattr(args, kind):
            for package in (OURS, *peers):
                yield argparse.Namespace(**{**nothing, kind: [name]}), package
    rest = {name: getattr(args, name) for name in BY_OURS}
    if any(rest.values()):
        yield argparse.Namespace(**{**nothing, **rest}), OURS


def in_a_process(
        args: argparse.Namespace, threads: str, package: str) -> list[Group]:
    """:func:`measurements` with that number of threads."""
    env = {name: value for name, value in os.environ.items()
           if name not in THREADS}
    if threads != DEFAULT:
        env.update(dict.fromkeys(THREADS, threads))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'groups.json'
        options = {name: value for name, value in vars(args).items()
                   if name != 'out'}
        subprocess.run(
            [sys.executable, '-m', 'tests.tools.benchmarks.cpu',
             '--of-package', package, str(path), threads, json.dumps(options)],
            env=env, check=True, cwd=pathlib.Path(__file__).parents[3])
        return json.loads(path.read_text())


def measure_package(
        package: str, path: str, threads: str, options: str) -> None:
    """What the process does."""
    if threads != DEFAULT and hasattr(os, 'sched_setaffinity'):
        # JAX takes as many threads as there are cores.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:int(threads)])
    args = argparse.Namespace(**json.loads(options))
    pathlib.Path(path).write_text(
        json.dumps(list(measurements(args, package))))


def merged(groups: Sequence[Group]) -> list[Group]:
    """Those of one weight, or list, by all packages, as one."""
    found: dict[Any, Any] = {}
    for *key, numbers in groups:
        of_key = found.setdefault(tuple(key), {})
        copy = numbers.get('copy', {})
        for contender, of_contender in numbers.items():
            # Processes differ in their speed: each has a copy of its own.
            of_key.setdefault(contender, dict(of_contender, copy=copy))
    return [(*key, numbers) for key, numbers in found.items()]


def rows_of(
        threads: str, kind: str, name: str, dtype: str, K: int,
        found: dict[str, dict[str, Any]]) -> list[Row]:
    def net(contender: str) -> float:
        """Without what the same round takes without a hook."""
        times = found.get(contender, {}).get('walls', [math.nan])
        nothing = found.get(NO_HOOK, {}).get('walls', [0.0] * len(times))
        return float(np.median([x - y for x, y in zip(times, nothing)]))

    rows = []
    for contender, numbers in found.items():
        row = Row(threads, kind, name, dtype, K, contender)
        if 'error' in numbers:
            rows.append(row._replace(note=numbers['error']))
            continue
        copy = numbers.get('copy', {}).get('wall', {}).get('median', math.nan)
        added = net(contender)
        rows.append(row._replace(
            **numbers['wall'], peak=numbers['peak'], kept=numbers['kept'],
            added=math.nan if contender == NO_HOOK else added,
            ratio=net(BUILT_IN) / added if added > 0 else math.nan,
            copies=numbers['wall']['median'] / copy))
    return rows


# Tables

WEIGHT_HEADER = (
    'contender', 'median us', '20 to 80 %', 'Chainer over it', 'copies',
    'peak MiB', 'peak / W', 'kept MiB', 'kept / W')
MODEL_HEADER = (
    'contender', 'step ms', '20 to 80 %', 'added by it', 'Chainer over it',
    'peak MiB', 'kept MiB')
LIST_HEADER = (
    'contender', 'median us', '20 to 80 %', 'us a weight', 'Chainer over it',
    'peak MiB', 'kept MiB')
GROWTH = {
    'layers': 'Models of layers of 64x64x3x3: us of a step',
    'side': 'Square weights: us of forward and backward'}


def spread(row: Row, unit: float = 1.0) -> str:
    if math.isnan(row.median):
        return 'n/a'
    return f'{number(row.p20 / unit)} to {number(row.p80 / unit)}'


def weight_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    nbytes = math.prod(shape_of(rows[0].name)) * np.dtype(
        DTYPES[rows[0].dtype]).itemsize
    return [(row.contender, number(row.median), spread(row),
             *map(number, (row.ratio, row.copies,
                           row.peak / 2 ** 20, row.peak / nbytes,
                           row.kept / 2 ** 20, row.kept / nbytes)))
            for row in rows]


def model_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [(row.contender, number(row.median / 1e3), spread(row, 1e3),
             number(row.added / 1e3),
             *map(number, (row.ratio, row.peak / 2 ** 20, row.kept / 2 ** 20)))
            for row in rows]


def list_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    n = len(LISTS[rows[0].name])
    return [(row.contender, number(row.median), spread(row),
             *map(number, (row.median / n, row.ratio, row.peak / 2 ** 20,
                           row.kept / 2 ** 20)))
            for row in rows]


def growth_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line for each contender, one column for each size."""
    return [(contender, *(number(row.median) for row in rows
                          if row.contender == contender))
            for contender in dict.fromkeys(row.contender for row in rows)]


def section(rows: Sequence[Row]) -> tuple[str, Any, Any]:
    """Title, header and cells of a table."""
    first = rows[0]
    if first.kind == 'weight':
        return (f'{first.name}, {first.dtype}, K = {first.K}', WEIGHT_HEADER,
                weight_cells(rows))
    if first.kind == 'model':
        shapes = MODELS[first.name]
        return (f'{first.name}: a step of {len(shapes)} weights, '
                f'{number(nbytes_of(shapes) / 2 ** 20)} MiB',
                MODEL_HEADER, model_cells(rows))
    if first.kind == 'step':
        return f'A training step: {first.name}', MODEL_HEADER, (
            model_cells(rows))
    if first.kind == 'list':
        return f'At once: {first.name}', LIST_HEADER, list_cells(rows)
    names = dict.fromkeys(row.name for row in rows)
    return GROWTH[first.kind], ('contender', *names), growth_cells(rows)


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each table."""
    def key(row: Row) -> tuple[Any, ...]:
        return (row.threads, row.kind) + (
            () if row.kind in GROWTH else (row.name, row.dtype, row.K))

    return [list(group) for _, group in itertools.groupby(rows, key)]


def missing(rows: Sequence[Row]) -> list[str]:
    """What could not be measured, and why; each reason once."""
    where: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            where.setdefault(f'{row.contender}: {row.note}', []).append(
                f'{row.name} {row.dtype}, K = {row.K}'
                if row.kind == 'weight' else
                f'{row.kind} {row.name}')
    lines = [f'{what} ({"; ".join(places)})'
             for what, places in where.items()]
    measured = {row.contender for row in rows}
    return lines + [f'{peer}: {why_not(peer)}' for peer in PEERS
                    if peer not in measured and why_not(peer) is not None]


LEGEND = (
    'Forward and backward of the normalization alone, float32 unless said '
    'otherwise, contenders in turn in one process (PyTorch and JAX right '
    'after it, in one of their own): medians and 20/80 percentiles. "exact" '
    'and "detached" are this package\'s hook, the latter with '
    '`detach_uv=True`, as all others but "composition", which is the same '
    'out of Chainer\'s functions; "identity" is a node that does nothing, '
    'with one for its gradient; "copy" copies the weight. "Chainer over it" '
    'is the time of Chainer\'s hook over that of the contender. "copies" is '
    'the time in copies by the same process. "peak" is what a step takes at '
    'most, "kept" what it keeps from forward to backward: both of a first '
    'step, with the normalized weight and with Python\'s objects, and also '
    'in weights; what PyTorch and JAX take is not seen. "At once" is '
    '`spectral_normalize_all`. A step of a model calls it three times '
    '(real, fake, the generator\'s) and backward once, with layers that cost '
    'nothing; "cached" is in `sn_function.cached(model)`, and "chain hook" '
    'is one `ChainSpectralNormalization` on the model. A training step has '
    'all that belongs to it: a network, real images and fake ones, '
    'backward, Adam, and the generator\'s pass, for 4 images (the demo: a '
    'generator, 32 images, K = 5); "added by it" is the median, over '
    'rounds, of what the step took more than one without a hook.')
TITLES = {DEFAULT: 'Threads as by default', '1': 'One thread'}


def title_of(threads: str) -> str:
    return TITLES.get(threads, f'{threads} threads')


def as_markdown(rows: Sequence[Row], command: str) -> str:
    blocks = ['# The normalization on a CPU', f'{machine()}. `{command}`',
              LEGEND]
    threads = None
    for group in groups(rows):
        if group[0].threads != threads:
            threads = group[0].threads
            blocks.append(f'## {title_of(threads)}')
        title, header, cells = section(group)
        blocks += [f'### {title}', markdown_table(header, cells)]
    lines = missing(rows)
    if lines:
        blocks += ['## Not measured', '\n'.join(f'* {x}' for x in lines)]
    return '\n\n'.join(blocks) + '\n'


def write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
    with path.open('w', encoding='utf-8', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow([
            {'peak': 'peak bytes', 'kept': 'retained bytes'}.get(name, name)
            for name in Row._fields])
        for row in rows:
            writer.writerow([
                '' if x != x else f'{x:.6g}' if isinstance(x, float) else x
                for x in row])


def read_csv(path: pathlib.Path) -> list[Row]:
    with path.open(encoding='utf-8', newline='') as file:
        _, *lines = csv.reader(file)
    return [
        Row(*line[:4], int(line[4]), line[5],
            *[float(x or 'nan') for x in line[6:-1]], line[-1])
        for line in lines]


# The run

def machine() -> str:
    """What the numbers were measured on, and with, in one line."""
    versions = {
        'Python': platform.python_version(), 'NumPy': np.__version__,
        'Chainer': chainer.__version__,
        'sn_function': sn_function.__version__}
    for name, package in (('PyTorch', 'torch'), ('JAX', 'jax')):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(package)
    return ', '.join([
        f'{platform.machine()}, {os.cpu_count()} CPUs',
        *map(' '.join, versions.items())])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='few of all')
    parser.add_argument(
        '--threads', nargs='+', default=[DEFAULT, '1'],
        help='numbers of threads, or "default"')
    parser.add_argument('--shapes', nargs='*', help='e.g. 64x3x3x3')
    parser.add_argument('--lists', nargs='*', choices=LISTS)
    parser.add_argument('--models', nargs='*', choices=MODELS)
    parser.add_argument('--steps', nargs='*', choices=STEPS)
    parser.add_argument('--layers', nargs='*', type=int, help='their numbers')
    parser.add_argument('--sides', nargs='*', type=int, help='of squares')
    parser.add_argument(
        '--iterations', nargs='+', type=int,
        help='the first for all shapes, the others for some')
    parser.add_argument(
        '--dtypes', nargs='+', choices=DTYPES, default=list(DTYPES),
        help='likewise')
    parser.add_argument('--rounds', type=int, help='number of times each')
    parser.add_argument('--out', type=pathlib.Path, help='folder of results')
    parser.add_argument(
        '--draw', type=pathlib.Path, metavar='OUT',
        help='measure nothing, draw the picture of a folder of results')
    args = parser.parse_args(argv)
    few: Any = slice(1 if args.quick else None)
    for name, value in {
            'shapes': list(SHAPES[:2] if args.quick else SHAPES),
            'lists': list(LISTS)[few], 'models': list(MODELS)[few],
            'steps': list(STEPS)[few],
            'layers': N_LAYERS[:3 if args.quick else None],
            'sides': SIDES[:2 if args.quick else None],
            'iterations': [1, 2] if args.quick else [1, 2, 5],
            'rounds': 3 if args.quick else 20}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.thorough = args.shapes[THOROUGH]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    options = sys.argv[1:] if argv is None else list(argv)
    if options[:1] == ['--of-package']:
        measure_package(*options[1:])
        return
    args = parse(argv)
    if args.draw is not None:
        draw(args.draw / 'cpu.png', read_csv(args.draw / 'cpu.csv'))
        return
    print(machine())
    peers = list(dict.fromkeys(
        package for peer, package in PEERS.items() if why_not(peer) is None))
    rows: list[Row] = []
    for threads in args.threads:
        print(f'\n{title_of(threads)}', flush=True)
        new = [row for group in merged([
            group for part, package in parts(args, peers)
            for group in in_a_process(part, threads, package)])
            for row in rows_of(threads, *group)]
        for group in groups(new):
            title, header, cells = section(group)
            print(f'\n== {title}\n{text_table(header, cells)}', flush=True)
        rows += new
    for line in missing(rows):
        print(f'* {line}')
    if args.out is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / 'cpu.csv', rows)
    (args.out / 'cpu.md').write_text(as_markdown(rows, ' '.join(
        ['python -m tests.tools.benchmarks.cpu', *options])), encoding='utf-8')
    try:
        draw(args.out / 'cpu.png', rows)
    except ImportError as error:
        print(f'cpu.png is not drawn: {text_of(error)}', file=sys.stderr)


if __name__ == '__main__':
    main()
