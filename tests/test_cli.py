"""The shell: what each command prints, and its exit code."""
import glob
import importlib.util
import json
import os
import pathlib
import pty
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

from click.shell_completion import ShellComplete
from click.testing import CliRunner

from sn_function import (
    SpectralNormalization,
    _commands,
    _terminal,
    cli,
    doctor,
    snapshot,
)
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


@pytest.fixture(autouse=True)
def no_columns(monkeypatch):
    """As in a pipe, however wide the terminal is that the tests run in."""
    monkeypatch.delenv('COLUMNS', raising=False)


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


def write_files():
    """The files of the examples, as the names say; of a trainer, too."""
    def weight(*shape):
        return np.random.normal(size=shape).astype('f')

    def save(path, prefix='', **arrays):
        with open(path, 'wb') as file:      # no .npz is added to the name
            np.savez(file, **{prefix + key.replace('__', '/'): array
                              for key, array in arrays.items()})

    os.mkdir('result')
    model = {'convs__0__W': weight(4, 2, 3, 3), 'convs__0__W_u': np.ones(4),
             'linear__W': weight(1, 4), 'linear__W_u': np.ones(1)}
    save('result/dis.npz', **model)
    for name in 'result/snapshot_iter_2000', 'snapshot_iter_9':
        save(name, 'updater/model:dis/', **model)
    save('gen.npz', deconvs__0__W=weight(4, 4, 3, 3), deconvs__0__W_u=np.ones(
        4))
    save('flow.npz', c__W=weight(4, 4, 3, 3), c__W_map=np.ones((4, 8, 8)))
    save('plain.npz', convs__0__W=weight(4, 2, 3, 3))
    save('broken.npz', **{**model, 'linear__W_u': np.zeros(1)})
    save('old.npz', **{**model, 'convs__1__W': weight(4, 4, 3, 3)})
    save('ResNetDiscriminator_450000.npz', l__W=weight(3, 4), l__u=np.ones(
        (1, 3)))
    torch = {'main.0.weight_orig': np.eye(3, 4), 'main.0.weight_u': np.ones(
        3), 'main.0.weight_v': np.ones(4)}
    # What a file is, is seen in its bytes, so these need no package.
    save('dis.safetensors', **torch)
    save('dis.pt', **torch)


def expand(args):
    """What the shell makes of the arguments."""
    return [each for arg in args for each in sorted(glob.glob(arg)) or [arg]]


class TestHelp:

    def test_lists_the_commands(self):
        result = run('--help')
        assert result.exit_code == 0
        for command in COMMANDS:
            assert f'\n  {command} ' in result.output
        assert 'Exit codes:' in result.output

    @pytest.mark.parametrize('command', COMMANDS[:-2])
    def test_has_examples_that_work(
            self, command, tmp_path, monkeypatch):
        result = run(command, '--help')
        assert result.exit_code == 0
        examples = [shlex.split(line.split('|')[0])
                    for line in result.output.splitlines()
                    if line.strip().startswith('sn-function ')]
        assert len(examples) >= 2
        for i, (_, name, *args) in enumerate(examples):
            assert name == command
            # Each has the files as they were, but for its own output.
            (tmp_path / str(i)).mkdir()
            monkeypatch.chdir(tmp_path / str(i))
            write_files()
            if command != 'inspect' and '--overwrite' not in args and (
                    os.path.exists(args[1])):
                os.unlink(args[1])
            result = run(name, *expand(args))
            if args[1:2] == ['dis.pt'] and (
                    importlib.util.find_spec('torch') is None):
                assert 'dis.pt: a file of this kind needs the package ' in (
                    result.output)
            else:
                assert result.exit_code == 0, result.output

    def test_examples_in_the_documentation_parse(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        page = (ROOT / 'docs' / 'cli.rst').read_text(encoding='utf-8')
        examples = [
            line for line in re.findall(r'(?m)^ +\$ sn-function (.* .*)', page)
            if line.split()[0] in COMMANDS[:-2]]
        assert len(examples) > 10
        for example in examples:
            # There are no such files.
            result = run(*shlex.split(example.split('|')[0], comments=True))
            assert (result.exit_code, 'No such file' in result.output) == (
                1, True), (example, result.output)

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
            assert result.output.endswith(
                '1 of 2 vectors cannot be used (chainer). Make them anew:\n'
                '  sn-function repair broken.npz OUT\n')

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
        assert 'There are no vectors, and 0 of 1 norms are 1' in output

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

    def test_a_weight_that_is_lost_is_not_to_be_repaired(self, broken):
        with np.load(broken) as file:
            arrays = dict(file)
        arrays['l2/W'][...] = np.inf
        np.savez('lost.npz', **arrays)
        result = run('inspect', 'lost.npz')
        assert result.exit_code == 3
        assert '1 of 2 weights lost: NaN or Inf' in result.output
        assert 'Take an earlier snapshot.' in result.output
        assert '1 of 2 vectors cannot be used (chainer).' in result.output
        assert 'repair lost.npz' not in result.output
        assert run('repair', 'lost.npz', 'out.npz').exit_code == 1

    def test_a_weight_without_an_array(self, path):
        none = np.array(None)
        np.savez('empty.npz', **{'l/W': none, 'l/W_u': none})
        result = run('inspect', 'empty.npz')
        assert result.exit_code == 3
        assert '1 of 1 weights not initialized: call' in result.output
        assert 'repair' not in result.output

    def test_several_files(self, path, broken):
        result = run('inspect', path, broken)
        assert result.exit_code == 3
        alone = [run('inspect', name).output for name in (path, broken)]
        assert result.output == '\n'.join(alone)
        found = json.loads(run('inspect', path, broken, '--json').output)
        assert [each['path'] for each in found] == [path, broken]
        for each in found:
            assert each['weights'] == json.loads(
                run('inspect', each['path'], '--json').output)
        result = run('inspect', path, 'none.npz', path)
        assert result.exit_code == 1
        assert result.output == (
            alone[0] + run('inspect', 'none.npz').output)


class TestWidth:
    """No entry is folded or cut."""

    KEYS = ('updater/model:opt_dis/predictor/base/block3/c1/W',
            '/'.join(f'block{i}' for i in range(30)) + '[bold]/W')

    @pytest.fixture
    def long(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        np.savez('long.npz', **{key + end: array for key in self.KEYS
                                for end, array in (
                                    ('', 2 * np.eye(3)), ('_u', np.ones(3)))})
        return 'long.npz'

    @pytest.mark.parametrize('columns', ['', '20', '60', '80', '300', '0'])
    @pytest.mark.parametrize('args', [
        ['inspect'], ['bake', 'a.npz'], ['convert', 'a.npz', '--to', 'chainer',
                                         '--converge'],
        ['repair', 'a.npz', '--all']], ids=lambda args: args[0])
    def test_keys(self, long, monkeypatch, columns, args):
        monkeypatch.setenv('COLUMNS', columns)
        result = run(args[0], long, *args[1:])
        assert result.exit_code == 0
        lines = result.output.splitlines()
        for key in self.KEYS:
            row, = (line for line in lines if key in line)
            # Without a terminal, each weight has one line.
            assert ('2.00000' in row) == (columns in ('', '0', '300'))
        assert result.output.count('2.00000') >= 2
        if columns in ('60', '80'):
            assert max(len(line) for line in lines if 'block' not in line
                       ) <= int(columns)

    def test_table_where_there_is_room(self, path, monkeypatch):
        monkeypatch.setenv('COLUMNS', '80')
        assert re.search(r'(?m)^  l1/W +4 x 5 .* ok$',
                         run('inspect', path).output)

    def test_long_notes_are_folded(self, path, monkeypatch):
        np.savez('a.npz', W=np.ones((3, 2, 3, 3)), W_map=np.ones((2, 8, 8)))
        monkeypatch.setenv('COLUMNS', '60')
        lines = run('inspect', 'a.npz').output.splitlines()
        assert max(map(len, lines)) <= 60
        row, = (line for line in lines if line.startswith('  W '))
        assert row.endswith('its')

    @pytest.mark.parametrize('columns', [60, 200])
    @pytest.mark.parametrize('color', [True, False])
    def test_terminal(self, path, columns, color):
        import fcntl
        import struct
        import termios
        main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack(
            'HHHH', 24, columns, 0, 0))
        env = {**os.environ, 'TERM': 'xterm', 'PYTHONPATH': str(ROOT),
               **({} if color else {'NO_COLOR': '1'})}
        env.pop('COLUMNS', None)
        with subprocess.Popen(
                [sys.executable, '-m', 'sn_function', 'inspect', path],
                stdin=other, stdout=other, stderr=other, env=env) as process:
            os.close(other)
            output = b''
            try:
                while True:
                    output += os.read(main, 1 << 16)
            except OSError:     # its other end is closed
                pass
        os.close(main)
        assert process.returncode == 0
        assert (b'\x1b[32mok' in output) == color
        rows = [line for line in output.decode().splitlines()
                if 'l2/W' in line]
        assert len(rows) == 1
        assert ('3 x 2 x 3 x 3' in rows[0]) == (columns == 200)


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
        assert result.exit_code == 0
        assert result.output.endswith(
            "\n  sn-function repair plain.npz OUT --add '*'\n")
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
        assert '1 of 2 weights without a vector.' in result.output
        assert result.output.endswith(' partial.npz OUT --add l2/W\n')
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

    def test_norms_of_a_baked_snapshot(self, path):
        assert run('bake', path, 'baked.npz', '-k', '50').exit_code == 0
        result = run('inspect', 'baked.npz', '--json')
        assert result.exit_code == 0
        reports = json.loads(result.output)
        assert {each['status'] for each in reports} == {'no vector'}
        assert [each['sigma'] for each in reports] == pytest.approx(
            [1, 1], rel=1e-3)
        result = run('inspect', 'baked.npz')
        assert result.exit_code == 0
        assert result.output.endswith(
            'There are no vectors. All norms are 1 to within 1%, as bake '
            'leaves them.\n')
        assert 'estimate' not in result.output      # there is none

    def test_norm_of_a_baked_deconvolution(self, path):
        W = np.random.normal(size=(6, 3, 2, 2))
        norm = np.linalg.norm(W.transpose(1, 0, 2, 3).reshape(3, -1), 2)
        np.savez('a.npz', W=W / norm)
        assert 'Deconvolutions need --axis' in run('inspect', 'a.npz').output
        assert 'All norms are 1' in run(
            'inspect', 'a.npz', '--axis', '*=1').output

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
            doctor, 'main', lambda args: seen.append(args) or 1)
        assert run('doctor').exit_code == 1
        assert run('doctor', '--json').exit_code == 1
        assert seen == [[], ['--json']]

    def test_memory(self, path, monkeypatch):
        def fail(*args, **kwargs):
            raise MemoryError
        monkeypatch.setattr(snapshot, 'bake', fail)
        result = run('bake', path, 'out.npz')
        assert result.exit_code == 1
        assert 'not enough memory' in result.output


class TestCompletion:

    @pytest.mark.parametrize(('args', 'incomplete', 'expected'), [
        ([], '', ['bake', 'convert', 'doctor', 'inspect', 'repair', 'run']),
        (['convert', 'a', 'b', '--to'], 'torch', [
            'torch', 'torch-parametrized']),
        (['run'], '--', ['--hook', '--doctor']),
        (['doctor'], '--j', ['--json']),
        (['inspect', 'trainer.npz', '--model'], '', ['dis', 'gen']),
        (['bake', 'trainer.npz', 'out.npz'], '--model=g', ['gen']),
        (['inspect', 'no.npz', '--model'], '', []),
        (['inspect', '--model'], '', []),
    ], ids=str)
    def test_names(self, tmp_path, monkeypatch, args, incomplete, expected):
        monkeypatch.chdir(tmp_path)
        np.savez('trainer.npz', **{
            f'updater/model:{name}/l/W': np.eye(2) for name in ('gen', 'dis')})
        assert [each.value for each in self.complete(args, incomplete)
                ] == expected

    @pytest.mark.parametrize('args', [
        ['inspect'], ['inspect', 'a'], ['bake'], ['bake', 'a'], ['convert'],
        ['convert', 'a'], ['repair'], ['repair', 'a'], ['run'],
        ['run', '--hook'], ['run', 'a.py']], ids=' '.join)
    def test_files(self, args):
        item, = self.complete(args, 'x')
        assert (item.type, item.value) == ('file', 'x')

    @staticmethod
    def complete(args, incomplete):
        return ShellComplete(
            _commands.cli, {}, 'sn-function', '_SN_FUNCTION_COMPLETE',
        ).get_completions(list(args), incomplete)

    def test_does_not_wait_for_chainer(self):
        code = ('import sys; sys.argv = ["sn-function"]\n'
                'from sn_function import cli\ntry:\n    cli.main()\nfinally:'
                '\n    assert "chainer" not in sys.modules')
        done = subprocess.run(
            [sys.executable, '-c', code], cwd=ROOT, capture_output=True,
            text=True, env={
                **os.environ, '_SN_FUNCTION_COMPLETE': 'bash_complete',
                'COMP_WORDS': 'sn-function in', 'COMP_CWORD': '1'})
        assert done.stdout == 'plain,inspect\n', done.stderr


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
        assert 'pip install click rich' in done.stderr
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
        assert done.stdout.isascii()

    def test_without_standard_error(self, path):
        done = subprocess.run(
            [sys.executable, '-m', 'sn_function', 'inspect', path],
            stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2),
            env={**os.environ, 'PYTHONPATH': str(ROOT)})
        assert done.returncode == 0
        assert b'All 2 vectors' in done.stdout

    @pytest.mark.parametrize('name', ['out.npz', 'out.h5'])
    def test_interrupted(self, path, name):
        # While it writes, which HDF5 does from C.
        if name == 'out.h5':
            pytest.importorskip('h5py')
        code = textwrap.dedent('''
            import os, signal, sys
            from sn_function import cli
            from sn_function._snapshots import writers
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for writer in writers.NpzWriter, writers._Forgiving:
                def write(*args, write=writer.write):
                    os.kill(os.getpid(), signal.SIGINT)
                    return write(*args)
                writer.write = write
            sys.argv[0] = 'sn-function'
            sys.exit(cli.main())
        ''')
        done = run_python('', '-c', code, 'convert', path, name, '--to',
                          'chainer', '--converge')
        assert done.returncode == 130
        assert done.stderr.split() == ['Interrupted']
        assert done.stdout == ''
        assert os.listdir() == [path]

    @pytest.mark.parametrize('where', ['import chainer', 'doctor'])
    def test_interrupted_before(self, tmp_path, where):
        interrupt = 'import os, signal; os.kill(os.getpid(), signal.SIGINT)'
        if where == 'doctor':
            interrupt += '\nraise SystemError'
        code = ('import signal, sys; from sn_function import cli, doctor; '
                'signal.signal(signal.SIGINT, signal.default_int_handler); '
                'doctor.examine = lambda: exec(open("chainer.py").read()); '
                'sys.argv[0] = "sn-function"; sys.exit(cli.main())')
        write_modules(tmp_path, chainer=interrupt)
        args = ['doctor'] if where == 'doctor' else ['inspect', 'a.npz']
        done = run_python(tmp_path, '-c', code, *args, cwd=tmp_path)
        assert done.returncode == 130
        assert done.stderr.split() == ['Interrupted']

    @pytest.mark.parametrize('args', [
        ['inspect', 'in.npz'], ['inspect', 'in.npz', '--json'], ['--help'],
        ['run', '--help'], ['doctor', '--help']], ids=' '.join)
    def test_output_that_nobody_reads(self, path, args):
        for open_output, message in (
                (self.closed_pipe, ''),
                (lambda: os.open('/dev/full', os.O_WRONLY),
                 'Error: standard output: No space left on device\n')):
            if message and not os.path.exists('/dev/full'):
                continue
            output = open_output()
            done = subprocess.run(
                [sys.executable, '-m', 'sn_function', *args], text=True,
                stdout=output, stderr=subprocess.PIPE,
                # Else argparse passes over it.
                env={**os.environ, 'PYTHONPATH': str(ROOT),
                     'PYTHONUNBUFFERED': ''})
            os.close(output)
            assert (done.returncode, done.stderr) == (1, message)

    @staticmethod
    def closed_pipe():
        reading, writing = os.pipe()
        os.close(reading)
        return writing

    @pytest.mark.parametrize(('option', 'code'), [('--help', 0), ('--x', 2)])
    def test_doctor_knows_its_name(self, option, code):
        done = run_python('', '-m', 'sn_function', 'doctor', option)
        assert done.returncode == code
        assert (done.stdout + done.stderr).startswith(
            'usage: python -m sn_function doctor [-h] [--json]')

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
