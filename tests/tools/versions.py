"""``make matrix``: the tests with every supported combination of versions.

CPython 3.8 to 3.13, each with the oldest NumPy that has a wheel for it and
the newest that pip finds, each of these with an old setuptools, the newest
and none.  Interpreters are searched on the PATH and in pyenv; the report names
those that are missing.  Each NumPy gets a new environment under
``.cache/matrix``, where the logs stay as well.

With the newest setuptools all tests are run but those of the CUDA kernels,
which ``make test-all`` runs.  Another setuptools changes only how Chainer is
imported: beside it, the tests of that are run, and those of the functions and
of the hook.

``--extremes`` runs the oldest cell and the newest one.  Of the slow tests it
takes those of the import and of the doctor, which versions decide; the others
are run with the versions of the day by ``make test-all``.

Results are kept, so that interpreters may be run one by one.  Once there is a
result of each cell, and all are green, their table goes into
docs/versions.rst.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from typing import NamedTuple

from tests.tools.tables import rst_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORK = ROOT / '.cache' / 'matrix'
RESULTS = WORK / 'results.json'
NEWEST = 'newest'
OLDEST_NUMPY = {'3.8': '1.17.3', '3.9': '1.19.3', '3.10': '1.21.3',
                '3.11': '1.23.2', '3.12': '1.26.0', '3.13': '2.1.0'}
# The last with a pkg_resources that does not warn.  It cannot be imported on
# Python 3.12 and newer, which is one more case.
OLD_SETUPTOOLS = '65.5.0'
SETUPTOOLS = (OLD_SETUPTOOLS, NEWEST, None)
WITHOUT_KERNELS = (
    '-m', 'not gpu',
    '--ignore', 'tests/cuda_on_host/test_cuda_on_host.py',
    '--ignore', 'tests/test_tools/test_mutants.py')
OF_EXTREMES = (*WITHOUT_KERNELS, '-k', 'not slow or compat or doctor')
OF_THE_IMPORT = ('-m', 'not gpu', *(
    f'tests/{name}.py' for name in (
        'compat/test_compat', 'test_doctor', 'test_docs', 'test_functions',
        'test_link_hooks', 'test_parity', 'test_upstream')))
# The first reads the table that is to be written, the second compares times,
# which mean nothing where cells run side by side.
NOT_HERE = ('--ignore', 'tests/test_tools/test_versions.py',
            '--ignore', 'tests/test_speed.py')
TIMEOUT = 1800  # seconds, for one command
PAGE = ROOT / 'docs' / 'versions.rst'
MARKS = ('.. make matrix\n', '.. end of make matrix\n')


class Cell(NamedTuple):
    python: str             # '3.8'
    numpy: str              # '1.17.3' or NEWEST
    setuptools: str | None  # '65.5.0' or NEWEST
    tests: tuple            # arguments of pytest

    @property
    def name(self):
        return (f'{self.python}-numpy-{self.numpy}'
                f'-setuptools-{self.setuptools or "none"}')


class Result(NamedTuple):
    cell: Cell
    versions: dict          # of python, numpy and setuptools, as found
    counts: dict            # of passed, failed and skipped tests
    reasons: list           # why tests were skipped
    error: str | None
    seconds: float

    def __str__(self):
        numbers = ', '.join(f'{n:,} {key}' for key, n in self.counts.items())
        name = (f'Python {self.versions.get("python", self.cell.python)}, '
                f'NumPy {self.versions.get("numpy", self.cell.numpy)}, '
                f'setuptools {self.versions.get("setuptools") or "none"}')
        return f'{name}: {self.error or numbers}  ({self.seconds:.0f} s)'


def find_python(version):
    """The path of an interpreter that works, or None."""
    candidates = [shutil.which(f'python{version}')]
    if shutil.which('pyenv'):
        root = subprocess.run(
            ['pyenv', 'root'], stdout=subprocess.PIPE, text=True).stdout
        candidates += sorted(map(str, pathlib.Path(root.strip()).glob(
            f'versions/{version}.*/bin/python')))[::-1]
    for path in filter(None, candidates):
        # pyenv has a shim on the PATH for each version, even where that is
        # not the current one; it fails then.
        probe = subprocess.run([path, '-c', 'import sys, venv'],
                               stderr=subprocess.DEVNULL)
        if probe.returncode == 0:
            return path
    return None


def cells_of(pythons, extremes):
    """The cells to run; the extremes are the oldest and the newest of all."""
    cells = [Cell(python, numpy, setuptools,
                  WITHOUT_KERNELS if setuptools == NEWEST else OF_THE_IMPORT)
             for python in pythons
             for numpy in (OLDEST_NUMPY[python], NEWEST)
             for setuptools in SETUPTOOLS]
    if extremes and cells:
        return [cell._replace(tests=OF_EXTREMES)
                for cell in (cells[0], cells[-1])]
    return cells


class CommandError(Exception):
    pass


def new_log(name):
    log = WORK / f'{name}.log'
    log.write_text('', encoding='utf-8')
    return log


def run(log, *command):
    """Runs a command from the root of the checkout, its output into `log`."""
    with open(log, 'a', encoding='utf-8') as file:
        print('$', *command, file=file, flush=True)
        try:
            status = subprocess.run(
                list(map(str, command)), cwd=ROOT, stdout=file,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                timeout=TIMEOUT).returncode
        except subprocess.TimeoutExpired:
            status = f'none after {TIMEOUT} s'
    if status != 0:
        raise CommandError(f'status {status}: see {log.relative_to(ROOT)}')


def build_wheels(python):
    """Chainer's wheel and ours serve every version of Python."""
    env = WORK / 'build'
    shutil.rmtree(env, ignore_errors=True)
    pip = (env / 'bin' / 'python', '-m', 'pip', '--quiet')
    log = new_log('build')
    run(log, python, '-m', 'venv', env)
    run(log, *pip, 'install', 'setuptools>=64,<81', 'wheel')
    for requirement in ('chainer==7.8.1', '.'):
        run(log, *pip, 'wheel', '--no-deps', '--no-build-isolation',
            '--wheel-dir', env, requirement)
    chainer, = env.glob('chainer-*.whl')
    ours, = env.glob('sn_function-*.whl')
    return [str(chainer), f'{ours}[examples,lint,test]']


def make_environment(env, log, python, numpy, wheels):
    exactly = '' if numpy == NEWEST else f'=={numpy}'
    shutil.rmtree(env, ignore_errors=True)
    run(log, python, '-m', 'venv', env)
    # An old NumPy needs old releases of what is built on it: those that have
    # a wheel, and not the newest release, of which there may be only a source.
    run(log, env / 'bin' / 'python', '-m', 'pip', 'install', '--quiet',
        '--upgrade', '--prefer-binary', '--only-binary',
        'numpy,scipy,scikit-learn,matplotlib,contourpy,pillow,h5py',
        # Matplotlib 3.5, which an old NumPy needs, warns with a newer one.
        'pyparsing<3.3', f'numpy{exactly}', *wheels)


def set_setuptools(python, log, version):
    pip = (python, '-m', 'pip', '--quiet')
    if version is None:
        run(log, *pip, 'uninstall', '--yes', 'setuptools')
    elif version == NEWEST:
        run(log, *pip, 'install', '--upgrade', 'setuptools')
    else:
        run(log, *pip, 'install', f'setuptools=={version}')


def versions_of(python):
    code = '''
import importlib.metadata, platform
print('python', platform.python_version())
for name in ('numpy', 'setuptools'):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
'''
    lines = subprocess.run([python, '-c', code], stdout=subprocess.PIPE,
                           text=True, check=True).stdout.splitlines()
    return dict(line.split() for line in lines)


def read_junit(path):
    """Counts of tests by outcome, and the reasons of those skipped."""
    counts, reasons = {'passed': 0, 'failed': 0, 'skipped': 0}, set()
    for case in ET.parse(path).iter('testcase'):
        outcome = {child.tag: child for child in case}
        if 'failure' in outcome or 'error' in outcome:
            counts['failed'] += 1
        elif 'skipped' in outcome:
            counts['skipped'] += 1
            reasons.add(outcome['skipped'].get('message'))
        else:
            counts['passed'] += 1
    return counts, sorted(reasons)


def run_cell(cell, python):
    start = time.time()
    log = new_log(cell.name)
    report = log.with_suffix('.xml')
    report.unlink(missing_ok=True)
    counts, reasons, error, versions = {}, [], None, {}
    try:
        set_setuptools(python, log, cell.setuptools)
        versions = versions_of(python)
        run(log, python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
            *NOT_HERE, *cell.tests, '--junitxml', report)
    except CommandError as e:
        error = str(e)
    if report.exists():
        counts, reasons = read_junit(report)
        if error is not None:
            error = f'{counts["failed"]} failed, {error}'
    return Result(cell, versions, counts, reasons, error, time.time() - start)


def run_environment(cells, python, wheels):
    """Runs the cells of one Python and one NumPy; yields their results."""
    first = cells[0]
    env = WORK / f'{first.python}-numpy-{first.numpy}'
    log = new_log(env.name)
    try:
        make_environment(env, log, python, first.numpy, wheels)
    except CommandError as error:
        for cell in cells:
            yield Result(cell, {}, {}, [], str(error), 0)
        return
    for cell in cells:
        yield run_cell(cell, env / 'bin' / 'python')
    shutil.rmtree(env)


def environments(cells):
    for _, group in itertools.groupby(cells, lambda c: (c.python, c.numpy)):
        yield list(group)


def load():
    """The results that are kept, by cell."""
    if not RESULTS.exists():
        return {}
    found = [Result(Cell(*cell[:3], tuple(cell[3])), *rest) for cell, *rest in
             json.loads(RESULTS.read_text(encoding='utf-8'))]
    return {result.cell: result for result in found}


def run_all(cells, pythons, jobs):
    """Runs the cells; their results are added to those that are kept."""
    wheels = build_wheels(pythons[cells[-1].python])
    kept, lock = load(), threading.Lock()

    def work(group):
        for result in run_environment(
                group, pythons[group[0].python], wheels):
            print(result, flush=True)
            with lock:
                kept[result.cell] = result
                RESULTS.write_text(
                    json.dumps(list(kept.values())), encoding='utf-8')

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, environments(cells)))
    return [kept[cell] for cell in cells]


def table(results):
    """As in the documentation: the number of tests passed, or FAILED."""
    def entry(result):
        if result.error is not None:
            return 'FAILED'
        text = f'{result.counts["passed"]:,}'
        if result.cell.setuptools == NEWEST:
            text += f' ({result.versions["setuptools"]})'
        return text

    rows = [('CPython', 'NumPy', f'setuptools {OLD_SETUPTOOLS}',
             'newest setuptools, more tests', 'no setuptools')]
    for group in environments([r.cell for r in results]):
        found = {r.cell.setuptools: r for r in results if r.cell in group}
        versions = next(iter(found.values())).versions
        rows.append((
            versions.get('python', group[0].python),
            versions.get('numpy', group[0].numpy),
            *(entry(found[s]) if s in found else '' for s in SETUPTOOLS)))
    return rst_of(rows)


def put_table(path, text):
    """Puts the table between the two marks."""
    old = path.read_text(encoding='utf-8')
    pattern = f'(?<={re.escape(MARKS[0])}).*(?={re.escape(MARKS[1])})'
    new, n = re.subn(pattern, lambda m: f'\n{text}\n', old, flags=re.S)
    if n != 1:
        raise ValueError(f'{path} has not one {MARKS[0]!r} and {MARKS[1]!r}.')
    path.write_text(new, encoding='utf-8')


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.versions',
        description=__doc__.split('\n')[0])
    parser.add_argument('--python', nargs='+', choices=OLDEST_NUMPY,
                        default=list(OLDEST_NUMPY), metavar='3.x')
    parser.add_argument('--extremes', action='store_true',
                        help='only the oldest versions of all, and the newest '
                        'without setuptools')
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    args = parser.parse_args(arguments)
    pythons = {version: find_python(version) for version in args.python}
    missing = [version for version, path in pythons.items() if path is None]
    if missing:
        print('Not found, on the PATH or in pyenv: CPython',
              ', '.join(missing), flush=True)
    cells = cells_of([v for v in pythons if v not in missing], args.extremes)
    if not cells:
        return 1
    WORK.mkdir(parents=True, exist_ok=True)
    results = run_all(cells, pythons, args.jobs)
    print('\n' + table(results))
    for reason in sorted({r for result in results for r in result.reasons}):
        print('skipped:', reason)
    n_failed = sum(result.error is not None for result in results)
    print(f'{len(results)} cells, {n_failed} failed, {len(missing)} '
          f'interpreters not found')
    complete = list(map(load().get, cells_of(OLDEST_NUMPY, False)))
    if all(result and result.error is None for result in complete):
        put_table(PAGE, table(complete))
        print('The table is in', PAGE.relative_to(ROOT))
    return int(n_failed > 0)


if __name__ == '__main__':
    sys.exit(main())
