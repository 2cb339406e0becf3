"""The run for a device: its steps end in time, and tell what they have."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

import pytest

from tests.tools.gpu import __main__ as run
from tests.tools.gpu import bundle, steps
from tests.tools.gpu.steps import NOT_HERE, Step, Summary, run_steps

pytestmark = pytest.mark.skipif(
    os.name != 'posix', reason='groups of processes are of POSIX')

# It and its child ignore all that can be ignored.  The child says who it is.
STUBBORN = '''
import os, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, 'child'])
else:
    print(os.getpid(), flush=True)
time.sleep(600)
'''


def python(code):
    return [sys.executable, '-c', textwrap.dedent(code)]


def is_alive(pid):
    """Also false of one that nobody has waited for yet."""
    found = subprocess.run(
        ['ps', '-o', 'stat=', '-p', str(pid)], stdout=subprocess.PIPE)
    state = found.stdout.decode().strip()
    return bool(state) and not state.startswith('Z')


def ends(pid):
    for _ in range(100):
        if not is_alive(pid):
            return True
        time.sleep(0.05)
    return False


class TestProcess:

    def run(self, command, seconds, path, grace=0.3):
        with path.open('w') as out:
            begin = time.monotonic()
            status = steps.run_process(command, seconds, out, grace)
        return status, time.monotonic() - begin, path.read_text()

    def test_status_and_output(self, tmp_path):
        status, _, text = self.run(python('''
            import sys
            print('said')
            sys.exit('why')'''), 60, tmp_path / 'x')
        assert (status, text) == (1, 'said\nwhy\n')

    def test_one_that_ignores_signals_is_killed_with_its_child(
            self, tmp_path):
        script = tmp_path / 'stubborn.py'
        script.write_text(STUBBORN)
        status, seconds, text = self.run(
            [sys.executable, str(script)], 2, tmp_path / 'x')
        assert status is None
        assert seconds < 10
        assert ends(int(text))

    def test_one_that_is_interrupted_can_say_what_it_has(self, tmp_path):
        status, seconds, text = self.run(python('''
            import time
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                print('so far')'''), 2, tmp_path / 'x', 5)
        assert (status, text) == (None, 'so far\n')
        assert seconds < 10

    def test_a_child_does_not_outlive_one_that_ends(self, tmp_path):
        status, _, text = self.run(python('''
            import subprocess, sys
            code = 'import time; time.sleep(600)'
            print(subprocess.Popen([sys.executable, '-c', code]).pid)'''),
            60, tmp_path / 'x')
        assert status == 0
        assert ends(int(text))


@pytest.fixture
def summary(tmp_path):
    return Summary(tmp_path / 'summary.md', 'A run')


def rows(summary):
    return [[cell.strip() for cell in line.split('|')[1:-1]]
            for line in summary.path.read_text().splitlines()[4:]]


class TestSteps:

    def test_outcomes_in_their_order(self, summary, tmp_path):
        log = tmp_path / 'log'
        assert not run_steps([
            Step('good', 60, python('print("a | b")')),
            Step('bad', 60, python('raise SystemExit(3)')),
            Step('absent', 60, python(f'''
                print('no tool')
                raise SystemExit({NOT_HERE})''')),
            Step('killed', 60, python('''
                import os, signal
                os.kill(os.getpid(), signal.SIGSEGV)''')),
            Step('last', 60, python('print("here")'))], 600, summary, log)
        assert [(row[0], row[1], row[3]) for row in rows(summary)] == [
            ('good', 'done', 'a / b'), ('bad', 'failed (3)', ''),
            ('absent', 'not possible here', 'no tool'),
            ('killed', f'failed ({-signal.SIGSEGV})', ''),
            ('last', 'done', 'here')]
        text = log.read_text()
        places = [text.index(f'===== {name}, 60 s at most: ')
                  for name in ('good', 'bad', 'absent', 'killed', 'last')]
        assert places == sorted(places)

    def test_what_cannot_be_done_is_no_failure(self, summary, tmp_path):
        assert run_steps(
            [Step('x', 60, python(f'raise SystemExit({NOT_HERE})'))], 600,
            summary, tmp_path / 'log')

    def test_results_are_written_as_they_come(self, summary, tmp_path):
        """The second step sees the line of the first."""
        path = str(summary.path)
        assert run_steps([
            Step('first', 60, python('print("done it")')),
            Step('second', 60, python(f'''
                import sys
                sys.exit('| first | done |' not in open({path!r}).read())
                '''))], 600, summary, tmp_path / 'log')

    def test_one_that_hangs_does_not_stop_the_others(
            self, summary, tmp_path, monkeypatch):
        monkeypatch.setattr(steps, 'LEAST', 0)
        assert not run_steps([
            Step('hangs', 1, python('import time; time.sleep(600)')),
            Step('next', 60, python('print("here")'))], 600, summary,
            tmp_path / 'log')
        assert [row[1] for row in rows(summary)] == ['out of time', 'done']

    def test_what_does_not_fit_in_is_left_out(
            self, summary, tmp_path, monkeypatch):
        now = [0.0]

        def fake(command, seconds, out, **_):
            asked.append((command[0], command[1], seconds))
            now[0] += 100
            return 0

        asked = []
        monkeypatch.setattr(steps, 'run_process', fake)
        assert not run_steps(
            [Step(name, 120, [name, '{seconds}']) for name in 'abcd'], 250,
            summary, tmp_path / 'log', lambda: now[0])
        # The third has what is left, less what its death may take.
        assert asked == [('a', '108', 120), ('b', '108', 120), ('c', '28', 40)]
        assert rows(summary)[3] == ['d', 'left out', '0.0', 'the time was up']

    def test_nothing_is_run_without_what_is_needed(self, summary, tmp_path):
        assert not run_steps([
            Step('device', 60, python(f'raise SystemExit({NOT_HERE})'),
                 is_needed=True),
            Step('next', 60, python('print("here")'))], 600, summary,
            tmp_path / 'log')
        assert rows(summary)[1] == [
            'next', 'left out', '0.0', 'there is no device']

    def test_but_it_is_if_only_the_check_is_broken(self, summary, tmp_path):
        run_steps([
            Step('device', 60, python('raise SystemExit(1)'), is_needed=True),
            Step('next', 60, python('print("here")'))], 600, summary,
            tmp_path / 'log')
        assert rows(summary)[1][1] == 'done'

    def test_environment(self, summary, tmp_path):
        assert run_steps([Step('x', 60, python('''
            import os, sys
            sys.exit(os.environ.get('A') != '1' or os.environ['B'] != '3')
            '''), {'B': '3'})], 600, summary, tmp_path / 'log',
            env={**os.environ, 'A': '1', 'B': '2'})


def write_wheel(folder, name):
    with zipfile.ZipFile(folder / f'{name}-1.0-py3-none-any.whl', 'w') as f:
        f.writestr(f'{name}.py', '')
        f.writestr(f'{name}-1.0.dist-info/METADATA',
                   f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')


def test_only_what_is_not_installed_is_unpacked(tmp_path):
    for name in ('not_here', 'numpy', 'pytest'):
        write_wheel(tmp_path, name)
    left = tmp_path / 'site' / 'of_an_earlier_run.py'
    left.parent.mkdir()
    left.write_text('')
    assert bundle.unpack(tmp_path) == ['not_here']
    assert sorted(path.name for path in (tmp_path / 'site').iterdir()) == [
        'not_here-1.0.dist-info', 'not_here.py']
    assert bundle.unpack(tmp_path / 'nowhere') == []


@pytest.mark.parametrize('parallel', [[], ['-p', 'xdist', '-n', '1']])
def test_what_fails_is_shown_at_once(tmp_path, parallel):
    """The run is killed in its second test."""
    if parallel:
        pytest.importorskip('xdist')
    path = tmp_path / 'test_it.py'
    path.write_text(textwrap.dedent('''
        import os, time

        def test_bad():
            assert 1 == 2

        def test_hangs():
            time.sleep(600)'''))
    log = tmp_path / 'log'
    with log.open('w') as out:
        process = subprocess.Popen(
            [sys.executable, '-m', 'pytest', '-q', '--tb=short',
             '-p', 'tests.tools.gpu.pytest_at_once', *parallel,
             '--rootdir', str(tmp_path), str(path)],
            stdout=out, cwd=tmp_path, start_new_session=True, env={
                **run.environment(), 'PYTEST_ADDOPTS': ''})
        for _ in range(300):
            if 'assert 1 == 2' in log.read_text():
                break
            time.sleep(0.1)
        steps.send_to_group(process, signal.SIGKILL)
        process.wait()
    assert '----- test_it.py::test_bad' in log.read_text()


def test_the_script_is_run_by_the_sanitizer(tmp_path):
    """Which is not here: this one says what it was called with."""
    command = [sys.executable, '-m', 'tests.tools.gpu.both_ways', 'memcheck']
    path = tmp_path / 'compute-sanitizer'
    for is_there in (False, True):
        if is_there:
            path.write_text('#!/bin/sh\necho "$@"\nexit 9\n')
            path.chmod(0o755)
        found = subprocess.run(
            command, cwd=run.ROOT, stdout=subprocess.PIPE,
            env={**os.environ, 'PATH': str(tmp_path)})
        text = found.stdout.decode()
        if is_there:
            assert found.returncode == 9
            assert text.startswith('--tool memcheck --error-exitcode 9 ')
            assert text.endswith('-m tests.tools.gpu.both_ways\n')
        else:
            assert found.returncode == NOT_HERE
            assert text == 'compute-sanitizer is not installed\n'


class TestRun:

    def test_the_plan(self, tmp_path):
        args = run.parse_args(['--out', str(tmp_path), '--pytest=-p "a b"'])
        assert [step.name for step in args.steps] == [
            'device', 'tests', 'kernels', 'weights', 'pytorch', 'models',
            'cuda', 'memcheck', 'racecheck', 'rest', 'sweep', 'compile']
        # The last two get what the others leave.
        assert sum(step.seconds for step in args.steps[:-2]) <= args.seconds
        assert args.seconds <= 600
        commands = {step.name: step.command for step in args.steps}
        first, rest = ({part for part in commands[name]
                        if part.startswith('tests/')}
                       for name in ('tests', 'rest'))
        assert not first & rest
        assert {'tests/test_gpu.py', 'tests/test_functions.py'} <= first
        assert 'tests/test_bake.py' in rest
        assert all((run.ROOT / path).exists() for path in first | rest)
        assert 'a b' in commands['cuda']
        assert len(run.RESULTS) <= 8

    def test_some_steps_alone(self, capsys):
        args = run.parse_args(['--only', 'sweep,tests'])
        assert [step.name for step in args.steps] == ['tests', 'sweep']
        with pytest.raises(SystemExit):
            run.parse_args(['--only', 'tests,none'])
        assert 'no step is called none' in capsys.readouterr().err

    def test_tests_are_shared_only_where_xdist_is(self, monkeypatch):
        find = run.importlib.util.find_spec
        for is_there in (True, False):
            monkeypatch.setattr(
                run.importlib.util, 'find_spec',
                lambda name, is_there=is_there: (
                    is_there if name == 'xdist' else find(name)))
            args = run.parse_args(['--workers', '8', '--only', 'tests'])
            assert ('-n' in args.steps[0].command) == is_there

    def test_environment(self, monkeypatch):
        monkeypatch.setenv('PYTHONPATH', 'mine')
        monkeypatch.setenv('CUPY_CACHE_DIR', 'cache')
        env = run.environment()
        assert env['PYTHONPATH'].split(os.pathsep) == [
            str(run.ROOT), str(run.BUNDLE / 'site'), 'mine']
        assert env['CUPY_CACHE_DIR'] == 'cache'
        assert env['CHAINER_CUDNN'] == '0'

    @pytest.fixture
    def prepared(self, monkeypatch, tmp_path):
        """The steps are not the real ones, and nothing is missing."""
        monkeypatch.setattr(run, 'BUNDLE', tmp_path / 'bundle')
        monkeypatch.setattr(run.importlib.util, 'find_spec', lambda _: True)
        monkeypatch.setattr(run.sys, 'path', list(sys.path))
        monkeypatch.setattr(run, 'make_steps', lambda args: [
            Step('one', 60, python('print(1)')),
            Step('two', 60, python('print(2)'))])
        handler = signal.getsignal(signal.SIGTERM)
        yield tmp_path / 'out'
        signal.signal(signal.SIGTERM, handler)

    def test_a_whole_run(self, prepared, capsys):
        prepared.mkdir()
        (prepared / run.JSON).write_text('of an earlier run')
        (prepared / 'mine').write_text('')
        assert run.main(['--out', str(prepared)]) == 0
        assert sorted(path.name for path in prepared.iterdir()) == [
            'log.txt', 'mine', 'summary.md']
        assert '| two | done |' in capsys.readouterr().out
        # Some steps again: what there is stays.
        assert run.main(['--out', str(prepared), '--only', 'two']) == 0
        text = (prepared / run.SUMMARY).read_text()
        assert (text.count('| one |'), text.count('| two |')) == (1, 2)

    def test_what_is_missing_is_said_at_once(self, prepared, monkeypatch):
        monkeypatch.setattr(
            run.importlib.util, 'find_spec', lambda name: (
                None if name == 'chainer' else True))
        with pytest.raises(SystemExit, match=r'chainer is missing: see docs'):
            run.main(['--out', str(prepared)])
        assert not prepared.exists()

    def test_one_that_is_ended_ends_its_step(self, tmp_path):
        """As by the limit of who started it; the summary is there."""
        script = tmp_path / 'stubborn.py'
        script.write_text(STUBBORN)
        code = f'''
            import pathlib, sys
            from tests.tools.gpu import __main__ as run
            from tests.tools.gpu.steps import Step
            run.BUNDLE = pathlib.Path({str(tmp_path)!r}, 'bundle')
            run.importlib.util.find_spec = lambda _: True
            run.make_steps = lambda args: [
                Step('one', 500, [sys.executable, {str(script)!r}])]
            sys.exit(run.main(['--out', {str(tmp_path / 'out')!r}]))'''
        process = subprocess.Popen(python(code), cwd=run.ROOT)
        log = tmp_path / 'out' / run.LOG
        lines = []
        for _ in range(200):
            lines = log.read_text().splitlines() if log.exists() else []
            if lines and lines[-1].isdigit():
                break
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == 130
        assert ends(int(lines[-1]))
        assert (tmp_path / 'out' / run.SUMMARY).read_text().endswith(
            'Interrupted.\n')
