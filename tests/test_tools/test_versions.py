"""What ``make matrix`` does between the commands that it runs."""
import csv
import os
import re
import stat
import subprocess
import sys

import pytest

from tests.tools import versions
from tests.tools.versions import NEWEST, Cell, Result

ROOT = versions.ROOT


def result(cell, error=None, **found):
    return Result(cell, {'python': cell.python + '.1', 'numpy': '1.20.0',
                         'setuptools': '80.0', **found},
                  {'passed': 1234, 'failed': 0, 'skipped': 5},
                  [], error, 1.0)


def rows_of(table):
    """The cells of a table as it is in the documentation."""
    head, text = table.strip().split('\n\n')
    assert head == '.. csv-table::\n    :header-rows: 1'
    return list(csv.reader(text.splitlines(), skipinitialspace=True))


def test_table_of_the_documentation():
    """It has every cell, and all are green."""
    text = versions.PAGE.read_text(encoding='utf-8')
    text = text.split(versions.MARKS[0])[1].split(versions.MARKS[1])[0]
    rows = rows_of(text)[1:]
    assert len(rows) == 2 * len(versions.OLDEST_NUMPY)
    for row, expected in zip(rows[::2], versions.OLDEST_NUMPY.items()):
        assert (row[0].rsplit('.', 1)[0], row[1]) == expected
    for row in rows:
        for entry in row[2:]:
            assert re.fullmatch(r'\d,\d{3}( \([\d.]+\))?', entry)


def test_setup_names_the_same_versions():
    text = (ROOT / 'setup.py').read_text(encoding='utf-8')
    assert re.findall(r'Python :: (3\.\d+)', text) == list(
        versions.OLDEST_NUMPY)
    oldest = next(iter(versions.OLDEST_NUMPY.values()))
    assert oldest.startswith(re.search(r'numpy>=([\d.]+)', text)[1])
    workflow = ROOT / '.github' / 'workflows' / 'test.yml'
    pythons = re.search(r'python: \[(.*)\]', workflow.read_text('utf-8'))[1]
    assert re.findall(r"'(3\.\d+)'", pythons) == list(versions.OLDEST_NUMPY)


def test_cells():
    cells = versions.cells_of(versions.OLDEST_NUMPY, False)
    assert len(set(cells)) == len(cells) == 6 * 2 * 3
    assert versions.cells_of(versions.OLDEST_NUMPY, True) == [
        Cell('3.8', '1.17.3', '65.5.0', versions.OF_EXTREMES),
        Cell('3.13', NEWEST, None, versions.OF_EXTREMES)]
    assert versions.cells_of([], True) == []
    for group in versions.environments(cells):
        assert len(group) == 3
        assert len({cell[:2] for cell in group}) == 1
    for path in versions.OF_THE_IMPORT[2:]:
        assert (ROOT / path).exists()


def test_table():
    cells = versions.cells_of(['3.8'], False)
    results = [result(cell) for cell in cells]
    results[1] = result(cells[1], 'status 1: see the log')
    assert rows_of(versions.table(results))[1:] == [
        ['3.8.1', '1.20.0', '1,234', 'FAILED', '1,234'],
        ['3.8.1', '1.20.0', '1,234', '1,234 (80.0)', '1,234']]


def test_table_of_the_extremes():
    cells = versions.cells_of(['3.8', '3.13'], True)
    assert rows_of(versions.table(list(map(result, cells))))[1:] == [
        ['3.8.1', '1.20.0', '1,234', '', ''],
        ['3.13.1', '1.20.0', '', '', '1,234']]


def test_results_are_kept(monkeypatch, tmp_path):
    """A run of one interpreter is added to those of others."""
    monkeypatch.setattr(versions, 'WORK', tmp_path)
    monkeypatch.setattr(versions, 'RESULTS', tmp_path / 'results.json')
    monkeypatch.setattr(versions, 'build_wheels', lambda python: [])
    monkeypatch.setattr(versions, 'run_environment',
                        lambda cells, python, wheels: map(result, cells))
    assert versions.load() == {}
    for python in ('3.9', '3.8', '3.9'):
        cells = versions.cells_of([python], False)
        results = versions.run_all(cells, {python: 'python'}, 2)
        assert results == list(map(result, cells))
    cells = versions.cells_of(['3.8', '3.9'], False)
    assert versions.load() == {cell: result(cell) for cell in cells}


def test_put_table(tmp_path):
    path = tmp_path / 'versions.rst'
    path.write_text('a\n\n{}old\n{}\nb\n'.format(*versions.MARKS))
    for _ in range(2):
        versions.put_table(path, 'a, \\1\n')
        assert path.read_text() == 'a\n\n{}\na, \\1\n\n{}\nb\n'.format(
            *versions.MARKS)


def test_put_table_without_marks(tmp_path):
    path = tmp_path / 'versions.rst'
    path.write_text('a')
    with pytest.raises(ValueError, match='make matrix'):
        versions.put_table(path, 'table')
    assert path.read_text() == 'a'


def test_read_junit(tmp_path):
    path = tmp_path / 'tests.xml'
    (tmp_path / 'test_some.py').write_text('''
import pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_errors(broken): pass
def test_skips(): pytest.skip('for a reason')
@pytest.mark.skip(reason='for another')
def test_is_skipped(): pass
''')
    subprocess.run([sys.executable, '-m', 'pytest', '-q', '--junitxml', path,
                    tmp_path], stdout=subprocess.DEVNULL)
    counts, reasons = versions.read_junit(path)
    assert counts == {'passed': 1, 'failed': 2, 'skipped': 2}
    assert reasons == ['for a reason', 'for another']


class TestRun:

    @pytest.fixture
    def log(self, monkeypatch, tmp_path):
        monkeypatch.setattr(versions, 'ROOT', tmp_path)
        return tmp_path / 'a.log'

    def test_output(self, log):
        versions.run(log, sys.executable, '-c', 'print(1 + 1)')
        assert log.read_text().splitlines()[1:] == ['2']

    def test_failure(self, log):
        with pytest.raises(versions.CommandError, match=r'status 3.*a\.log'):
            versions.run(log, sys.executable, '-c', 'exit(3)')

    def test_a_command_that_does_not_end(self, log, monkeypatch):
        monkeypatch.setattr(versions, 'TIMEOUT', 0.1)
        with pytest.raises(versions.CommandError, match=r'none after 0\.1 s'):
            versions.run(
                log, sys.executable, '-c', 'import time; time.sleep(60)')


@pytest.mark.skipif(os.name != 'posix', reason='shell scripts')
class TestFindPython:

    def script(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\n{text}\n')
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        return str(path)

    def test_on_the_path(self, monkeypatch, tmp_path):
        path = self.script(tmp_path / 'python3.8', 'exit 0')
        monkeypatch.setenv('PATH', str(tmp_path))
        assert versions.find_python('3.8') == path
        assert versions.find_python('3.9') is None

    def test_in_pyenv_behind_a_shim(self, monkeypatch, tmp_path):
        self.script(tmp_path / 'python3.8', 'exit 127')
        self.script(tmp_path / 'pyenv', f'echo {tmp_path}')
        path = self.script(tmp_path / 'versions/3.8.9/bin/python', 'exit 0')
        monkeypatch.setenv('PATH', str(tmp_path))
        assert versions.find_python('3.8') == path

    def test_what_is_missing_is_named(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(versions, 'WORK', tmp_path / 'untouched')
        monkeypatch.setenv('PATH', str(tmp_path))
        assert versions.main(['--python', '3.8', '3.9']) == 1
        assert 'CPython 3.8, 3.9' in capsys.readouterr().out
        assert not (tmp_path / 'untouched').exists()


def test_a_failed_environment_fails_its_cells(monkeypatch, tmp_path):
    def fail(*args):
        raise versions.CommandError('status 1: see the log')

    monkeypatch.setattr(versions, 'WORK', tmp_path)
    monkeypatch.setattr(versions, 'make_environment', fail)
    cells = versions.cells_of(['3.8'], False)[:3]
    results = list(versions.run_environment(cells, 'python', []))
    assert [r.cell for r in results] == cells
    assert all(r.error == 'status 1: see the log' for r in results)
    assert versions.table(results).count('FAILED') == 3
