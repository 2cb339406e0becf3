"""The shell: what each command prints, and its exit code."""
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

pytest.importorskip('click')
pytest.importorskip('rich')

from click.testing import CliRunner

from sn_function import SpectralNormalization, _commands, _terminal, cli
from tests.test_doctor import WITHOUT, run_python
from tests.test_doctor import write as write_modules

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMANDS = ['inspect', 'bake', 'convert', 'repair', 'run', 'doctor']


def run(*args):
    """Runs a command in this process."""
    result = CliRunner().invoke(_commands.cli, list(map(str, args)))
    if result.exception is not None and not isinstance(
            result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chain = chainer.Chain(
        l1=L.Linear(5, 4).add_hook(SpectralNormalization()),
        l2=L.Convolution2D(2, 3, 3).add_hook(SpectralNormalization()))
    serializers.save_npz('in.npz', chain)
    return 'in.npz'


@pytest.fixture
def broken(path):
    with np.load(path) as file:
        arrays = dict(file)
    arrays['l1/W_u'][...] = np.nan
    np.savez_compressed('broken.npz', **arrays)
    return 'broken.npz'


class TestHelp:

    def test_lists_the_commands(self):
        result = run('--help')
        assert result.exit_code == 0
        for command in COMMANDS:
            assert f'\n  {command} ' in result.output
        assert 'Exit codes:' in result.output

    @pytest.mark.parametrize('command', COMMANDS[:-2])
    def test_has_examples_that_parse(
            self, command, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = run(command, '--help')
        assert result.exit_code == 0
        examples = [shlex.split(line.split('|')[0])
                    for line in result.output.splitlines()
                    if line.strip().startswith('sn-function ')]
        assert len(examples) >= 2
        for example in examples:
            assert example[1] == command
            result = run(*example[1:])
            assert result.exit_code == 1  # there is no such file
            assert 'No such file' in result.output

    @pytest.mark.parametrize('args', [
        [], ['--version'], *([name, '--help'] for name in COMMANDS)],
        ids=' '.join)
    def test_width(self, args, capsys, monkeypatch):
        monkeypatch.setenv('COLUMNS', '200')
        with pytest.raises(SystemExit):
            _commands.cli.main(args, prog_name='sn-function')
        output = ''.join(capsys.readouterr())
        assert all(len(line) < 80 for line in output.splitlines())

    @pytest.mark.parametrize('args', [
        ['cure'], ['inspect'], ['bake', 'a'], ['convert', 'a', 'b'],
        ['convert', 'a', 'b', '--to', 'keras'], ['bake', 'a', 'b', '-k', '0'],
        ['inspect', 'a', '--axis', 'W'], ['inspect', 'a', '--axis', '=1'],
        ['inspect', 'a', '--axis', 'W=-1'],
        ['convert', 'a', 'b', '--to', 'torch', '--rename', 'l1'],
        ['bake', 'a', 'b', '--rename', 'l=m', '--rename', 'l=n'],
        ['repair', 'a', 'b', '--rename', 'l=m'],
        ['repair', 'a', 'b', '--fill'], ['bake', 'a', 'b', '--fill'],
        ['convert', 'a', 'b', '--to', 'biggan'],
        ['inspect', 'a', '--stride', 'W=a'], ['inspect', 'a', '--stride', ''],
        ['inspect', 'a', '--pad', '=1'], ['inspect', 'a', '--dilate', '1,'],
        ['inspect', 'a', '--stride', 'depthwise'],
        ['inspect', 'a', '--certify', '--rtol', '0'],
        ['inspect', 'a', '--certify', '--time-limit', '-1'],
    ], ids=' '.join)
    def test_wrong_arguments(self, args):
        assert run(*args).exit_code == 2


class TestInspect:

    def test_table(self, path):
        result = run('inspect', path)
        assert result.exit_code == 0
        for text in ('l1/W', 'l2/W', '4 x 5', '3 x 2 x 3 x 3', 'sigma',
                     'estimate', 'condition', ' ok', 'in.npz',
                     'All 2 vectors can be used (chainer).'):
            assert text in result.output
        assert '\x1b' not in result.output

    def test_json(self, path):
        result = run('inspect', path, '--json')
        reports = {each['key']: each for each in json.loads(result.output)}
        with np.load(path) as file:
            sigma = np.linalg.norm(file['l1/W'].astype('d'), 2)
        assert reports['l1/W']['sigma'] == pytest.approx(sigma)
        assert reports['l1/W']['shape'] == [4, 5]
        assert reports['l1/W']['healthy'] is True
        assert set(reports) == {'l1/W', 'l2/W'}

    def test_json_has_no_infinity(self, path):
        np.savez('a.npz', W=np.zeros((2, 2)), W_u=np.ones(2))
        report, = json.loads(
            run('inspect', 'a.npz', '--json').output,
            parse_constant=lambda name: pytest.fail(name))
        assert report['condition'] == 'inf'

    @pytest.mark.parametrize('option', [[], ['--json']])
    def test_exit_code_where_a_vector_is_not_healthy(self, broken, option):
        result = run('inspect', broken, *option)
        assert result.exit_code == 3
        assert 'NaN' in result.output
        if not option:
            assert '1 of 2 not healthy' in result.output

    def test_certify(self, path):
        plain = run('inspect', path).output
        assert 'certified' not in plain
        result = run('inspect', path, '--certify', '--rtol', '1e-2',
                     '--time-limit', '5')
        assert result.exit_code == 0
        row = next(line for line in result.output.splitlines()
                   if 'l2/W' in line)
        (lo, hi), normalized = (
            tuple(map(float, text.split(' - ')))
            for text in re.findall(r'[\d.]+ - [\d.]+', row))
        reports = {each['key']: each for each in json.loads(run(
            'inspect', path, '--certify', '--rtol', '1e-2', '--json').output)}
        certified = reports['l2/W']['certified']
        assert lo <= certified[0] <= certified[1] <= hi
        assert lo == pytest.approx(certified[0], rel=1e-5)
        assert hi / lo < 1.0101
        assert normalized[1] == pytest.approx(
            reports['l2/W']['normalized'][1], rel=1e-5)

    def test_certify_with_what_a_snapshot_does_not_hold(self, tmp_path):
        link = L.Convolution2D(2, 3, 3, 2, nobias=True)
        np.savez(tmp_path / 'a.npz', **{'l/W': link.W.array})

        def upper_end(*options):
            report, = json.loads(run(
                'inspect', tmp_path / 'a.npz', '--certify', '--json', *options,
            ).output)
            assert report['status'] == 'no vector'
            return report['certified'][1]

        strided = upper_end('--stride', 'l/*=2')
        assert strided < upper_end() / 1.05
        assert strided == upper_end('--stride', '2,2', '--pad', '1')
        assert strided < upper_end('--stride', '1', '--stride', 'l/W=2')
        assert upper_end('--groups', 'depthwise') < upper_end() / 1.05
        output = run('inspect', tmp_path / 'a.npz', '--certify').output
        assert 'There are no vectors.' in output

    def test_vector_of_a_map(self, tmp_path):
        file = tmp_path / 'a.npz'
        np.savez(file, W=np.ones((3, 2, 3, 3)), W_map=np.ones((2, 8, 8)))
        result = run('inspect', file)
        assert result.exit_code == 0
        for text in ' map;', '2 x 8 x 8', '--stride', '--pad':
            assert text in ' '.join(result.output.split())
        output = run('bake', file, tmp_path / 'b.npz').output
        assert 'sn_function.bake(model)' in output
        options = '--stride', '1', '--pad', '*=1'
        assert 'ok; map of 2 x 8 x 8' in run('inspect', file, *options).output
        assert run('bake', file, tmp_path / 'b.npz', *options).exit_code == 0

    def test_long_names_are_folded(self, tmp_path):
        key = '/'.join(f'block{i}' for i in range(30)) + '[bold]/W'
        np.savez(tmp_path / 'a.npz', **{key: np.eye(3), f'{key}_u':
                                        np.ones(3)})
        output = run('inspect', tmp_path / 'a.npz').output
        rows = output.split('vector')[1].splitlines()
        folded = ''.join(line[:line.find('   ', 2)].strip() if '   ' in
                         line[2:] else line.strip() for line in rows)
        assert key in folded
        table = output.split('All 1')[0]
        assert max(map(len, table.splitlines())) <= 100


class TestOthers:

    def test_bake(self, path):
        result = run('bake', path, 'out.npz', '-k', '50')
        assert result.exit_code == 0
        assert 'baked' in result.output
        assert 'out.npz' in result.output
        with np.load('out.npz') as file:
            assert sorted(file) == ['l1/W', 'l1/b', 'l2/W', 'l2/b']
            assert np.linalg.norm(file['l1/W'], 2) == pytest.approx(
                1, abs=1e-5)

    @pytest.mark.parametrize(('options', 'norm'), [
        (['--factor', '2'], 2), (['--eps', '1e9'], 0), (['--cap', '.1'], .1),
        (['--cap', '1e9'], None)], ids=str)
    def test_settings(self, path, options, norm):
        assert run('bake', path, 'out.npz', '-k', '50', *options
                   ).exit_code == 0
        with np.load('out.npz') as file, np.load(path) as before:
            if norm is None:
                norm = np.linalg.norm(before['l1/W'], 2)
            assert np.linalg.norm(file['l1/W'], 2) == pytest.approx(
                norm, abs=1e-5)

    def test_vector_of_another_weight(self, path):
        with np.load(path) as file:
            arrays = dict(file)
        W = arrays['l1/W'] = np.diag([1, 1, 1, 9]).astype('f') @ np.eye(4, 5)
        u = arrays['l1/W_u'] = np.array([1, 0, 0, .01], 'f')
        np.savez('in.npz', **arrays)
        result = run('inspect', path)
        assert result.exit_code == 0
        assert 'stale' in result.output
        for options, sigma in (
                ([], 9), (['--n-warmup', '0'], np.linalg.norm(
                    W @ W.T @ u) / np.linalg.norm(W.T @ u))):
            assert run('bake', path, 'out.npz', '--overwrite', *options
                       ).exit_code == 0
            with np.load('out.npz') as file:
                np.testing.assert_allclose(
                    file['l1/W'], W / sigma, rtol=1e-4)
        assert run('bake', path, 'b.npz', '--n-warmup', '-1').exit_code == 2

    def test_convert_there_and_back(self, path):
        result = run('convert', path, 'a.safetensors', '--to', 'torch')
        assert result.exit_code == 0
        assert 'l1.weight_orig' in result.output
        result = run('convert', 'a.safetensors', 'b.npz', '--to', 'chainer',
                     '--json')
        outcome = json.loads(result.output)
        assert outcome['path'] == 'b.npz'
        assert {each['key'] for each in outcome['weights']} == {
            'l1/W', 'l2/W'}
        assert all(each['difference'] < 1e-6 for each in outcome['weights'])

    def test_convert_tells_of_unknown_entries(self, tmp_path):
        np.savez(tmp_path / 'a.npz', **{
            'W': np.eye(2), 'W_u': np.ones(2), 'x/alpha': np.ones(3)})
        result = run('convert', tmp_path / 'a.npz', tmp_path / 'b.npz',
                     '--to', 'torch')
        assert 'names may differ there: x/alpha' in result.output

    def test_repair(self, broken):
        assert run('bake', broken, 'out.npz').exit_code == 1
        assert not os.path.exists('out.npz')
        result = run('repair', broken, broken)
        assert result.exit_code == 1
        assert 'it is the input itself' in result.output
        result = run('repair', broken, broken, '--overwrite')
        assert result.exit_code == 0
        assert 'its vector was NaN' in result.output
        assert run('inspect', broken).exit_code == 0

    def test_rename(self, path):
        assert run('convert', path, 'torch.npz', '--to', 'torch',
                   '--rename', 'l1=main.0').exit_code == 0
        with np.load('torch.npz') as file:
            assert {'main.0.weight_orig', 'l2.bias'} < set(file)
        result = run('convert', 'torch.npz', 'back.npz', '--to', 'chainer',
                     '--rename', 'main/0=l1', '--rename', 'l2=c.3')
        assert result.exit_code == 0
        with np.load('back.npz') as file:
            assert {'l1/W', 'l1/W_u', 'l1/b', 'c/3/W', 'c/3/W_u',
                    'c/3/b'} == set(file)
        assert run('bake', path, 'baked.npz', '--rename', 'l1=a'
                   ).exit_code == 0
        with np.load('baked.npz') as file:
            assert {'a/W', 'a/b', 'l2/W', 'l2/b'} == set(file)
        result = run('bake', path, 'no.npz', '--rename', 'l3=a')
        assert result.exit_code == 1
        assert "'l3' cannot be renamed" in result.output
        assert not os.path.exists('no.npz')

    def test_vectors_for_a_snapshot_without_them(self, path):
        plain = chainer.Chain(l1=L.Linear(5, 4), l2=L.Linear(4, 3))
        serializers.save_npz('plain.npz', plain)
        result = run('inspect', 'plain.npz')
        assert result.exit_code == 3
        assert '--add PATTERN' in result.output
        result = run('repair', 'plain.npz', 'out.npz', '--add', 'l1/W',
                     '--add', 'l2*')
        assert result.exit_code == 0
        assert result.output.count('it had no vector') == 2
        hook = SpectralNormalization()
        hooked = chainer.Chain(l1=L.Linear(5, 4).add_hook(hook),
                               l2=L.Linear(4, 3).add_hook(hook))
        serializers.load_npz('out.npz', hooked)
        with chainer.using_config('train', False):
            for link in hooked.children():
                Y = hook.normalize_weight(link).array.astype('d')
                assert np.linalg.norm(Y, 2) == pytest.approx(1, abs=1e-6)
        result = run('repair', 'plain.npz', 'b.npz', '--add', 'conv*')
        assert result.exit_code == 1
        assert "'conv*'" in result.output
        assert not os.path.exists('b.npz')

    def test_weights_that_lack_a_vector(self, path):
        with np.load(path) as file:
            arrays = dict(file)
        del arrays['l2/W_u']
        np.savez('partial.npz', **arrays)
        result = run('inspect', 'partial.npz')
        assert result.exit_code == 0
        assert '1 of 2 weights have no vector.' in result.output
        before = sorted(os.listdir('.'))
        result = run('convert', 'partial.npz', 'out.npz', '--to', 'torch')
        assert result.exit_code == 1
        assert len(result.output.splitlines()) == 1
        assert "1 of its 2 weights have a vector, and 'l2/W' none" in (
            result.output)
        assert sorted(os.listdir('.')) == before
        result = run('convert', 'partial.npz', 'out.npz', '--to', 'chainer',
                     '--fill')
        assert result.exit_code == 0
        assert 'it had no vector' in result.output
        with np.load('out.npz') as file:
            assert {'l1/W_u', 'l2/W_u'} < set(file)
        result = run('convert', 'partial.npz', 'out.npz', '--to', 'chainer',
                     '--no-fill', '--overwrite')
        assert result.exit_code == 0
        with np.load('out.npz') as file:
            assert set(file) == set(arrays)
        result = run('bake', 'partial.npz', 'out.npz', '--overwrite')
        row = next(line for line in result.output.splitlines()
                   if 'l2/W' in line)
        assert 'kept' in row
        assert 'it has no vector' in row

    def test_exit_code_without_any_vector(self, path):
        assert run('bake', path, 'baked.npz').exit_code == 0
        result = run('inspect', 'baked.npz', '--json')
        assert result.exit_code == 3
        assert {each['status'] for each in json.loads(result.output)} == {
            'no vector'}
        assert run('inspect', 'baked.npz', '--certify', '--time-limit', '1'
                   ).exit_code == 0

    def test_layout_that_is_only_read(self, tmp_path):
        np.savez(tmp_path / 'a.npz', **{
            'l.weight_orig': np.eye(3), 'l.weight': np.eye(3),
            'l.weight_u': np.ones(3)})
        result = run('inspect', tmp_path / 'a.npz')
        assert result.exit_code == 0
        assert '(torch-0.4)' in result.output
        assert 'not used' in result.output

    def test_errors_are_one_message(self, path):
        result = run('inspect', 'no.npz')
        assert result.exit_code == 1
        assert result.output.startswith('Error: no.npz: ')
        assert len(result.output.splitlines()) == 1

    def test_run(self, monkeypatch):
        seen = []
        monkeypatch.setattr(
            _commands._run, 'main', lambda args: seen.append(args) or 7)
        args = ['--hook', 'script.py', '--help', '-x', '--', '--hook']
        assert run('run', *args).exit_code == 7
        assert seen == [args]

    def test_doctor(self, monkeypatch):
        seen = []
        monkeypatch.setattr(
            _commands.doctor, 'main', lambda args: seen.append(args) or 1)
        assert run('doctor').exit_code == 1
        assert run('doctor', '--json').exit_code == 1
        assert seen == [['doctor'], ['doctor', '--json']]

    def test_memory(self, path, monkeypatch):
        def fail(*args, **kwargs):
            raise MemoryError
        monkeypatch.setattr(_commands.snapshot, 'bake', fail)
        result = run('bake', path, 'out.npz')
        assert result.exit_code == 1
        assert 'not enough memory' in result.output


class TestProgress:

    @pytest.mark.parametrize(('is_terminal', 'seconds', 'shown'), [
        (True, 2, True), (True, 0, False), (False, 2, False)])
    def test_only_where_it_takes_long(
            self, capsys, monkeypatch, is_terminal, seconds, shown):
        times = {'now': 0.}

        def clock():
            times['now'] += seconds
            return times['now']

        monkeypatch.setattr(_terminal.time, 'monotonic', clock)
        monkeypatch.setattr(sys.stderr, 'isatty', lambda: is_terminal,
                            raising=False)
        monkeypatch.setenv('FORCE_COLOR', '1')
        monkeypatch.setenv('TERM', 'xterm')
        assert list(_terminal.progress('Baking')('abc')) == list('abc')
        assert ('Baking' in capsys.readouterr().err) == shown


class TestProcess:
    """In an interpreter of its own."""

    def test_module(self, path):
        done = run_python('', '-m', 'sn_function', 'inspect', path)
        assert done.returncode == 0, done.stderr
        assert 'All 2 vectors' in done.stdout
        done = run_python('', '-m', 'sn_function', 'bake', path)
        assert done.returncode == 2
        assert 'Usage: python -m sn_function bake' in done.stderr
        assert 'Traceback' not in done.stderr

    def test_console_script(self, path):
        code = ('import sys; sys.argv[0] = "/bin/sn-function"; '
                'from sn_function.cli import main; sys.exit(main())')
        done = run_python('', '-c', code, 'inspect', 'no.npz')
        assert done.returncode == 1
        # CuPy, which Chainer imports, warns where a part of CUDA is missing.
        assert done.stderr.splitlines()[-1].startswith('Error: no.npz')
        assert 'Traceback' not in done.stderr
        done = run_python('', '-c', code, 'cure')
        assert 'Usage: sn-function' in done.stderr

    @pytest.mark.parametrize('package', [
        'click', pytest.param('rich', marks=pytest.mark.slow)])
    def test_without_what_it_needs(self, tmp_path, package):
        write_modules(tmp_path, sitecustomize=WITHOUT.format(
            names=[package]))
        done = run_python(tmp_path, '-m', 'sn_function', 'inspect', 'a.npz')
        assert done.returncode == 1
        assert 'pip install "sn_function[cli]"' in done.stderr
        assert 'Traceback' not in done.stderr
        done = run_python(tmp_path, '-m', 'sn_function', 'doctor', '--json')
        assert done.returncode == 0
        json.loads(done.stdout)

    def test_any_encoding(self, tmp_path):
        path = tmp_path / 'a.npz'
        np.savez(path, **{'\u0436/W': np.eye(2), '\u0436/W_u': np.ones(2)})
        done = subprocess.run(
            [sys.executable, '-m', 'sn_function', 'inspect', str(path)],
            capture_output=True, cwd=ROOT,
            env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
        assert done.returncode == 0, done.stderr
        assert b'\\u0436/W' in done.stdout

    def test_killed_while_writing(self, tmp_path):
        # The output is the old one, or the new one, and never a part.
        path = tmp_path / 'a.npz'
        np.savez(path, **{
            f'{i}/W{end}': np.random.normal(size=shape).astype('f')
            for i in range(40)
            for end, shape in (('', (256, 256)), ('_u', (256,)))})
        before = path.read_bytes()
        code = textwrap.dedent('''
            import os, sys
            from sn_function import snapshot
            from sn_function._snapshots import writers
            write, count = writers.NpzWriter.write, [0]
            def fail(self, key, array):
                count[0] += 1
                if count[0] == 20:
                    os._exit(9)
                write(self, key, array)
            writers.NpzWriter.write = fail
            snapshot.bake(sys.argv[1], sys.argv[1], overwrite=True)
        ''')
        assert run_python('', '-c', code, str(path)).returncode == 9
        assert path.read_bytes() == before


def test_other_import_errors_are_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sn_function._commands', None)
    monkeypatch.delattr('sn_function._commands')
    with pytest.raises(ImportError, match='sn_function'):
        cli.main()
