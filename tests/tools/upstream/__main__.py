from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Sequence

from tests.tools import upstream, versions
from tests.tools.upstream.expected import EXPECTED

ROOT = pathlib.Path(__file__).resolve().parents[3]
LOGS = ROOT / '.cache' / 'upstream'
# Those that Chainer's CI leaves out where there is no GPU.
MARKS = 'not gpu and not cudnn and not ideep and not slow'
SUITE = 'tests/chainer_tests'


class UpstreamError(Exception):
    """The tests cannot be run; the message is one sentence."""


def version_of(checkout: pathlib.Path) -> str:
    path = checkout / 'chainer' / '_version.py'
    found = path.is_file() and re.search(
        r"^__version__ = '(.*)'", path.read_text('utf-8'), re.MULTILINE)
    if not found or not (checkout / SUITE).is_dir():
        raise UpstreamError(
            f'{checkout} is not a checkout of Chainer, with '
            f'chainer/_version.py and {SUITE}/: name one, as in '
            f'make upstream CHAINER=DIR.')
    return found[1]


def check_version(checkout: pathlib.Path, python: str) -> None:
    code = 'import importlib.metadata as m; print(m.version("chainer"))'
    done = subprocess.run([python, '-c', code], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True)
    here, there = done.stdout.strip() or 'none', version_of(checkout)
    if here != there:
        raise UpstreamError(
            f'{checkout} has the tests of Chainer {there}, and installed for '
            f'{python} is {here}: check out v7.8.1.')


def files_of(checkout: pathlib.Path, only: Sequence[str]) -> list[str]:
    files = [str(path.relative_to(checkout)) for path in sorted(
        (checkout / SUITE).rglob('test_*.py'))]
    return [file for file in files
            if not only or any(part in file for part in only)]


def run_files(checkout: pathlib.Path, python: str, files: Sequence[str],
              work: pathlib.Path, log: pathlib.Path) -> dict:
    """Runs the tests of some files; `work` is an empty directory."""
    # Not in the checkout, whose chainer would be imported there.
    out = work / 'out.json'
    environment = {
        **os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': '0',
        'PYTHONDONTWRITEBYTECODE': '1',
        'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1',
        'SN_UPSTREAM_ROOT': str(checkout), 'SN_UPSTREAM_OUT': str(out)}
    command = [
        python, '-m', 'pytest', '-q', '--tb=short', '-m', MARKS,
        '--continue-on-collection-errors',
        '-p', 'tests.tools.upstream.plugin', '-p', 'no:cacheprovider',
        # pytest of Chainer's time did not look for what these look for.
        '-p', 'no:unraisableexception', '-p', 'no:threadexception',
        '-c', os.devnull, '--rootdir', str(checkout),
        *(str(checkout / file) for file in files)]
    with open(log, 'w', encoding='utf-8') as file:
        status = subprocess.run(
            command, cwd=work, env=environment, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT).returncode
    # Tests passed, or failed, or there was none in these files.
    if status not in (0, 1, 5) or not out.exists():
        raise UpstreamError(f'pytest ended with status {status}: see {log}.')
    found: dict = json.loads(out.read_text('utf-8'))
    return found


def run(checkout: pathlib.Path, python: str, only: Sequence[str],
        jobs: int) -> dict:
    """Runs the tests in several processes, and returns what they found."""
    files = files_of(checkout, only)
    if not files:
        raise UpstreamError(
            f'No file of {SUITE} has {" or ".join(map(repr, only))} in its '
            f'path.')
    jobs = min(jobs, len(files))
    LOGS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work, \
            concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        def run_part(i: int) -> dict:
            directory = pathlib.Path(work) / str(i)
            directory.mkdir()
            return run_files(checkout, python, files[i::jobs], directory,
                             LOGS / f'{i}.log')

        parts = list(pool.map(run_part, range(jobs)))
    return {'versions': parts[0]['versions'], 'outcomes': {
        test: outcome for part in parts
        for test, outcome in part['outcomes'].items()}}


def show(found: dict, verdict: upstream.Verdict) -> None:
    print(', '.join(f'{name} {version}'
                    for name, version in found['versions'].items()))
    n_expected = sum(n for _, n in verdict.expected)
    print(f'{verdict.counts["passed"]:,} passed, '
          f'{n_expected:,} failed as expected, '
          f'{verdict.counts["skipped"]:,} skipped, '
          f'{verdict.n_unexpected:,} unexpected')
    for rule, n in sorted(verdict.expected, key=lambda each: each[0].whose):
        print(f'  {n:4}  {rule.whose}: {rule.reason}')
    for test, (_, error) in verdict.unexpected.items():
        print(f'unexpected: {test}\n    {error.splitlines()[0][:200]}')
    for rule, test in verdict.passed:
        print(f'passed, though expected to fail ({rule.reason}): {test}')
    for rule in verdict.unused:
        print(f'expected, but no test failed so: {rule.reason}')


def interpreter_of(stack: str) -> str:
    """That of an environment which is made anew, as in ``make matrix``."""
    number, _, numpy = stack.partition('/')
    python = versions.find_python(number)
    if python is None or not numpy:
        raise UpstreamError(
            f'{stack!r} is not CPython/NumPy, as in 3.8/1.17.3 and '
            f'3.13/newest, or there is no such interpreter.')
    versions.WORK.mkdir(parents=True, exist_ok=True)
    name = f'upstream-{number}-numpy-{numpy}'
    environment = versions.WORK / name
    versions.make_environment(
        environment, versions.new_log(name), python, numpy,
        versions.build_wheels(python))
    return str(environment / 'bin' / 'python')


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.upstream',
        description=upstream.__doc__.split('\n')[0])
    parser.add_argument('checkout', type=pathlib.Path, metavar='DIR')
    parser.add_argument('--stack', nargs='+', default=[], metavar='3.x/1.x',
                        help='CPython and NumPy, or newest')
    parser.add_argument('--only', nargs='+', default=[], metavar='TEXT',
                        help='files with one of these in their path')
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    args = parser.parse_args(arguments)
    checkout = args.checkout.resolve()
    good = True
    try:
        version_of(checkout)
        for stack in args.stack or [None]:
            python = sys.executable if stack is None else interpreter_of(stack)
            check_version(checkout, python)
            found = run(checkout, python, args.only, args.jobs)
            verdict = upstream.compare(
                found['outcomes'], found['versions'], EXPECTED,
                complete=not args.only)
            show(found, verdict)
            good = good and verdict.n_unexpected == 0
    except (UpstreamError, versions.CommandError) as error:
        print(error)
        return 1
    return int(not good)


if __name__ == '__main__':
    sys.exit(main())
