"""What a machine with a CUDA device can show, in ten minutes at most.

``python -m tests.tools.gpu`` runs the tests that need a device, tables of
kernel times, the benchmark, and compute-sanitizer, what tells the most first.
Each step is a process with a share of the time, and has written its results
when it ends; one that fails or hangs does not stop the others.  It needs
neither make nor pip nor a network: see ``docs/benchmarks/README.md``.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import pathlib
import platform
import re
import shlex
import signal
import sys
from typing import Any, Sequence

from tests.tools.gpu import bundle
from tests.tools.gpu.steps import Step, Summary, run_steps

ROOT = pathlib.Path(__file__).parents[3]
BUNDLE = ROOT / 'gpu-bundle'
# Of one folder; those of an earlier run go, and --only adds to them.
RESULTS = SUMMARY, LOG, KERNELS, MARKDOWN, JSON = (
    'summary.md', 'log.txt', 'kernels.md', 'benchmark.md', 'benchmark.json')
N_WORKERS = 14
# The function, the kernels and the hook.
FIRST = [f'tests/{name}' for name in (
    'test_gpu.py', 'arithmetic/test_kernels.py', 'arithmetic/test_device.py',
    'test_functions.py', 'test_link_hooks.py')]
# More threads of BLAS than needed wait for each other where others work, too.
ONE_THREAD = {'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1'}


def marked(pattern: str) -> list[str]:
    """The files of tests in which there is that.

    Only these are imported: others may need packages that are not here.
    """
    return [str(path.relative_to(ROOT))
            for path in sorted((ROOT / 'tests').rglob('test_*.py'))
            if re.search(pattern, path.read_text(encoding='utf-8'))]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(BUNDLE / 'site'), os.environ.get('PYTHONPATH', '')]
    cache = ROOT / '.cache'
    return {
        'CUPY_CACHE_DIR': str(cache / 'cupy'),
        'TRITON_CACHE_DIR': str(cache / 'triton'),
        'TORCHINDUCTOR_CACHE_DIR': str(cache / 'inductor'),
        **os.environ,
        'PYTHONPATH': os.pathsep.join(filter(None, paths)),
        'PYTHONUNBUFFERED': '1',
        # CuPy 14 has no cuDNN, and Chainer would warn of it.
        'CHAINER_CUDNN': '0',
        # Plugins that happen to be there are not asked for.
        'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'}


def make_steps(args: argparse.Namespace) -> list[Step]:
    """All steps, in their order; most end before their time is up."""
    python = [sys.executable, '-m']

    def tests(mark: str, files: Sequence[str]) -> Any:
        parallel = ['-p', 'xdist', '-n', str(args.workers)]
        return [
            *python, 'pytest', '-m', mark, '-q', '--tb=short', '-W', 'default',
            '-o', 'faulthandler_timeout=25', '--durations=5',
            '--continue-on-collection-errors',
            '-p', 'tests.tools.gpu.pytest_at_once',
            *(parallel if importlib.util.find_spec('xdist') else []),
            *shlex.split(args.pytest), *files]

    def benchmark(name: str, *parts: str) -> Any:
        return [
            *python, f'tests.tools.benchmarks.{name}', *parts,
            '--seconds', '{seconds}', '--command', args.command,
            '--out', str(args.out / JSON),
            '--markdown', str(args.out / MARKDOWN)]

    def sanitizer(tool: str) -> Any:
        return [*python, 'tests.tools.gpu.both_ways', tool]

    rest = [path for path in marked(r'mark\.gpu|inject_backend')
            if path not in FIRST]
    return [
        Step('device', 25, [*python, 'tests.tools.benchmarks.gpu', '--check'],
             is_needed=True),
        Step('tests', 90, tests('gpu', FIRST), ONE_THREAD),
        Step('kernels', 45, [*python, 'tests.tools.gpu.kernel_times',
                             str(args.out / KERNELS)]),
        Step('weights', 45, benchmark('gpu', 'goals')),
        Step('pytorch', 30, benchmark('gpu_torch', 'eager')),
        Step('models', 60, benchmark('gpu', 'models')),
        Step('cuda', 75, tests('cuda', marked(r'mark\.cuda')), ONE_THREAD),
        Step('memcheck', 30, sanitizer('memcheck'), ONE_THREAD),
        Step('racecheck', 30, sanitizer('racecheck'), ONE_THREAD),
        Step('rest', 90, tests('gpu', rest), ONE_THREAD),
        Step('sweep', 90, benchmark('gpu', 'sweep', 'float16', 'others')),
        Step('compile', 120, benchmark('gpu_torch', 'compile'))]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.gpu', description=__doc__.split('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--out', type=pathlib.Path, default=pathlib.Path('result-gpu'),
        help='all results go there')
    add('--seconds', type=float, default=580,
        help='for everything; what does not fit in is left out')
    add('--only', default='', metavar='STEP,STEP', help='these steps alone')
    add('--workers', type=int, default=min(N_WORKERS, os.cpu_count() or 1),
        help='processes that share the tests, where pytest-xdist is')
    add('--pytest', default='', metavar='ARGUMENTS',
        help='more arguments for pytest, in one string')
    args = parser.parse_args(argv)
    args.out = args.out.absolute()
    args.command = ' '.join(['python -m tests.tools.gpu', *map(
        shlex.quote, sys.argv[1:] if argv is None else argv)])
    args.steps = make_steps(args)
    if args.only:
        names = args.only.split(',')
        unknown = set(names) - {step.name for step in args.steps}
        if unknown:
            parser.error(f'argument --only: no step is called '
                         f'{", ".join(sorted(unknown))}; there are '
                         f'{", ".join(step.name for step in args.steps)}')
        args.steps = [step for step in args.steps if step.name in names]
    return args


def stop(*_: Any) -> None:
    # Not before the step's processes are killed.
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    names = bundle.unpack(BUNDLE)
    sys.path.append(str(BUNDLE / 'site'))
    importlib.invalidate_caches()
    args = parse_args(argv)
    for name in ('numpy', 'cupy', 'chainer'):
        if importlib.util.find_spec(name) is None:
            sys.exit(f'{name} is missing: see docs/benchmarks/README.md')
    args.out.mkdir(parents=True, exist_ok=True)
    for name in () if args.only else RESULTS:
        with contextlib.suppress(FileNotFoundError):
            (args.out / name).unlink()
    summary = Summary(
        args.out / SUMMARY,
        f'{args.command}, Python {platform.python_version()}, from the '
        f'bundle: {", ".join(names) or "nothing"}')
    signal.signal(signal.SIGTERM, stop)
    try:
        is_good = run_steps(
            args.steps, args.seconds, summary, args.out / LOG, cwd=ROOT,
            env=environment())
    except KeyboardInterrupt:
        summary.write('\nInterrupted.')
        return 130
    return 0 if is_good else 1


if __name__ == '__main__':
    sys.exit(main())
