"""Programs by ``sn-function run`` and after ``install``, and their children.

What a program without Chainer does is compared with plain ``python``, which
such a run is to be like.  Programs with Chainer do not know this package.
"""
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import zipfile

import pytest

from sn_function import _compat, cli
from sn_function._children import sitecustomize

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHILDREN = ROOT / 'sn_function' / '_children'
RUN = ['-m', 'sn_function', 'run']


def hear_interrupts():
    # What a shell starts in the background ignores them, as do its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def python(*args, cwd, env=(), **kwargs):
    """Runs an interpreter that finds this package; its code and output."""
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, timeout=300,
        capture_output=True, text=True, preexec_fn=hear_interrupts,
        env={**os.environ, 'PYTHONPATH': str(ROOT), **dict(env)}, **kwargs)
    return done.returncode, done.stdout, done.stderr


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


# All that a program sees of the way that it was started.
SHOW = '''
import json, os, sys
print(json.dumps([
    sys.argv, sys.path, __name__, __spec__ and __spec__.name,
    globals().get('__file__'), os.getcwd(), sys.flags, sys.warnoptions,
    sys._xoptions, sys.stdout.write_through, sys.stdout.errors,
    sorted(set(sys.modules) - {'sitecustomize'})]))
'''


class TestLikePlainPython:

    @pytest.fixture
    def compare(self, tmp_path):
        def compare(*args, flags=(), **kwargs):
            expected = python(*flags, *args, cwd=tmp_path, **kwargs)
            actual = python(*flags, *RUN, *args, cwd=tmp_path, **kwargs)
            assert actual == expected
            return expected
        return compare

    @pytest.mark.parametrize('args', [
        ['show.py', '--hook', '-m'], ['./inner/../show.py'], ['-m', 'show'],
        ['-mshow', 'a'], ['inner'], ['inner.zip', '-h'], ['-', 'a b'],
        ['-c', SHOW, 'a']], ids=lambda args: args[0])
    def test_what_it_sees(self, compare, tmp_path, args):
        (tmp_path / 'inner').mkdir()
        write(tmp_path / 'show.py', SHOW)
        write(tmp_path / 'inner' / '__main__.py', SHOW)
        with zipfile.ZipFile(tmp_path / 'inner.zip', 'w') as file:
            file.writestr('__main__.py', SHOW)
        code, out, _ = compare(*args, input=SHOW)
        assert code == 0
        assert json.loads(out)[2] == '__main__'

    @pytest.mark.parametrize('flags', [
        ['-O'], ['-OO', '-B', '-s'], ['-u'], ['-W', 'error::UserWarning'],
        ['-X', 'dev'], ['-X', 'utf8', '-b'], ['-i'],
        ['-X', 'of_the_user=1', '-X', 'no_debug_ranges']], ids=' '.join)
    def test_options_of_the_interpreter(self, compare, tmp_path, flags):
        write(tmp_path / 'show.py', SHOW)
        assert compare('show.py', flags=flags, input='')[0] == 0

    @pytest.mark.parametrize(('code', 'source'), [
        (3, 'import sys; sys.exit(3)'),
        (1, 'import sys; sys.exit("no data")'),
        (7, 'import os; os._exit(7)'),
        (1, 'def f():\n    1 / 0\nprint(1)\nf()'),
        (1, 'no python'),
        (1, '\x89PNG\r\n'),
        (1, 'import nothing_like_it'),
        (5, 'import os, sys\nif not os.fork():\n    sys.exit(5)\n'
            'sys.exit(os.wait()[1] >> 8)'),
        (-2, 'import os, signal\nos.kill(os.getpid(), signal.SIGINT)'),
    ], ids=lambda x: str(x)[:24])
    def test_how_it_ends(self, compare, tmp_path, code, source):
        (tmp_path / 'script.py').write_bytes(source.encode('latin-1'))
        assert compare('script.py')[0] == code

    @pytest.mark.parametrize(('code', 'args'), [
        (2, ['none.py']), (1, ['.']), (1, ['-m', 'none']), (2, ['-m'])],
        ids=str)
    def test_what_there_is_not(self, compare, code, args):
        result = compare(*args)
        assert result[0] == code
        assert 'Traceback' not in result[2]

    @pytest.mark.parametrize('source', [
        'import sys\nprint("own", __file__)', '1 / 0',
        'import nothing_like_it'], ids=lambda x: x[:8])
    def test_sitecustomize_of_the_user(self, tmp_path, source):
        write(tmp_path / 'sitecustomize.py', source)
        # As the command does; its own interpreter runs that file, too.
        paths = [str(CHILDREN), str(tmp_path)]
        expected, actual = (
            python('-c', 'print(1)', cwd=tmp_path, env={
                'PYTHONPATH': os.pathsep.join(paths[i:])}) for i in (1, 0))
        assert actual == expected
        assert expected[1].startswith('own') or 'Error in' in expected[2]

    @pytest.mark.parametrize('args', [['script.py'], ['-m', 'script']])
    def test_interrupt(self, tmp_path, args):
        write(tmp_path / 'script.py', '''
            import time
            try:
                print('ready', flush=True)
                time.sleep(60)
            finally:
                print('done')
        ''')
        with subprocess.Popen(
                [sys.executable, *RUN, *args], cwd=tmp_path, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                preexec_fn=hear_interrupts,
                env={**os.environ, 'PYTHONPATH': str(ROOT)}) as process:
            assert process.stdout.readline() == 'ready\n'
            process.send_signal(signal.SIGINT)
            try:
                out, err = process.communicate(timeout=30)
            finally:
                process.kill()
        assert process.returncode == -2
        assert out == 'done\n'
        assert err.endswith('\nKeyboardInterrupt\n')
        assert 'sn_function' not in err


class TestArguments:

    @pytest.fixture
    def execute(self, monkeypatch):
        """Runs the command; the arguments of exec, instead of that."""
        def execute(*args):
            seen = []
            monkeypatch.setattr(sys, 'argv', ['sn-function', 'run', *args])
            monkeypatch.setattr(os, 'execve', lambda *a: seen.append(a) or 0)
            return (cli.main(), *seen)
        return execute

    @pytest.mark.parametrize(('args', 'message'), [
        ([], 'run what?'), (['--hook'], 'run what?'),
        (['--hooks', 'a.py'], 'no option --hooks'),
        (['-O', 'a.py'], 'python -O -m sn_function run')])
    def test_wrong(self, execute, capsys, args, message):
        assert execute(*args) == (2,)
        out, err = capsys.readouterr()
        assert out == ''
        assert err.startswith('Error: ')
        assert message in err

    @pytest.mark.parametrize('flag', ['-E', '-I', '-S'])
    def test_options_of_python_that_prevent_it(self, tmp_path, flag):
        # With all but -E and -I; those ignore PYTHONPATH.
        code = (f'import sys; sys.path.append({str(ROOT)!r}); '
                f'from sn_function import cli; sys.exit(cli.main())')
        code, out, err = python(
            flag, '-c', code, 'run', 'script.py', cwd=tmp_path)
        assert (code, out) == (2, '')
        assert err.startswith('Error: with -E, -I or -S Python leaves out')

    @pytest.mark.parametrize('flag', ['-h', '--help'])
    def test_help(self, execute, capsys, flag):
        assert execute(flag) == (0,)
        out = capsys.readouterr().out
        assert out.startswith('Usage: sn-function run ')
        assert all(len(line) < 80 for line in out.splitlines())

    def test_hook(self, execute, monkeypatch):
        monkeypatch.setenv('SN_FUNCTION_HOOK', '1')
        for args, expected in (['a.py'], '0'), (['--hook', 'a.py'], '1'):
            _, (path, command, environment) = execute(*args)
            assert path == command[0] == sys.executable
            assert command[-1] == 'a.py'
            assert environment['SN_FUNCTION_HOOK'] == expected

    def test_path(self, execute, monkeypatch):
        directory = str(CHILDREN)
        for before, after in (
                (None, [directory]), ('', [directory]),
                ('a', [directory, 'a']), (':a', [directory, '', 'a']),
                (f'a:{directory}:b', [directory, 'a', 'b'])):
            monkeypatch.delenv('PYTHONPATH', raising=False)
            if before is not None:
                monkeypatch.setenv(
                    'PYTHONPATH', before.replace(':', os.pathsep))
            environment = execute('a.py')[1][2]
            assert environment['PYTHONPATH'].split(os.pathsep) == after
            assert environment.items() >= {
                key: value for key, value in os.environ.items()
                if key not in ('PYTHONPATH', 'SN_FUNCTION_HOOK')}.items()

    def test_doctor(self, tmp_path):
        write(tmp_path / 'script.py', 'print("of the script")')
        code, out, err = python(
            *RUN, '--doctor', 'script.py', cwd=tmp_path)
        assert (code, out) == (0, 'of the script\n')
        assert ' works here on the CPU\n' in err
        assert '    deconvolution_2d ' in err


# A program whose exit code is 4 if Chainer is repaired where it is imported,
# and has its own hook there; 5 with ours.  It does not know this package.
PROGRAM = '''
import multiprocessing, subprocess, sys

class Job:
    def __call__(self):
        from chainer.link_hooks import SpectralNormalization as Hook
        applied = sys.modules['sn_function']._compat.applied
        sys.exit('deconvolution_2d' in applied and 4 + (
            Hook.__module__ == 'sn_function.link_hooks'))

class Data:
    def __len__(self):
        return 8
    def __getitem__(self, i):
        try:
            Job()()
        except SystemExit as e:
            return e.code

def iterate(method):
    import chainer
    multiprocessing.set_start_method(method)
    iterator = chainer.iterators.MultiprocessIterator(
        Data(), 4, shuffle=False, n_processes=2)
    a, b, c, d = iterator.next()
    iterator.finalize()
    return a if a == b == c == d else 0

def main(how, method=None):
    if how == 'job':
        Job()()
    if how == 'subprocess':
        return subprocess.call([sys.executable, __file__, 'job'])
    if how == 'iterator':
        return iterate(method)
    worker = multiprocessing.get_context(how).Process(target=Job())
    worker.start()
    worker.join()
    return worker.exitcode

if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
'''
slow = pytest.mark.slow
HOWS = pytest.mark.parametrize(('how', 'hook'), [
    ('spawn', True),
    *(pytest.param(*case, marks=slow) for case in (
        ('spawn', False), ('subprocess', True), ('subprocess', False),
        ('fork', True), ('forkserver', True), ('iterator fork', True),
        ('iterator spawn', True), ('iterator forkserver', True)))])


class TestChildren:

    def test_finder_waits_for_all_that_is_repaired(self):
        names = {name.split('.')[0]
                 for each in _compat.finder.Finder.__subclasses__()
                 if each.__module__ == _compat.__name__
                 for name in each.names}
        assert names == set(sitecustomize.ChainerFinder.names)

    @HOWS
    def test_of_run(self, tmp_path, how, hook):
        write(tmp_path / 'program.py', PROGRAM)
        code, _, err = python(
            *RUN, *['--hook'] * hook, 'program.py', *how.split(),
            cwd=tmp_path)
        assert code == 4 + hook, err

    @HOWS
    def test_of_install(self, tmp_path, how, hook):
        # A worker does not run what is below `if __name__`.
        write(tmp_path / 'program.py', PROGRAM.replace(
            "__main__':\n", f"__main__':\n    import sn_function\n"
                            f"    sn_function.install({hook})\n"))
        code, _, err = python('program.py', *how.split(), cwd=tmp_path)
        assert code == 4 + hook, err

    @slow
    def test_without_either(self, tmp_path):
        write(tmp_path / 'program.py', PROGRAM)
        assert python('program.py', 'subprocess', cwd=tmp_path)[0] == 1

    def test_of_threads(self, tmp_path):
        write(tmp_path / 'program.py', '''
            import threading
            # Not chainer.links: that may take the locks of Python's import in
            # another order than chainer does, and then one import gives up.
            modules = 'chainer', 'chainermn', 'sn_function'
            threads = [threading.Thread(target=__import__, args=[name])
                       for name in modules * 3]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
            import sys
            assert 'deconvolution_2d' in sys.modules[
                'sn_function']._compat.applied
        ''')
        assert python(*RUN, 'program.py', cwd=tmp_path) == (0, '', '')

    def test_that_do_not_find_this_package_get_this_one(self, tmp_path):
        write(tmp_path / 'program.py', f'''
            import sys
            sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}
                           and 'site-packages' not in path]
            sys.meta_path[:] = [each for each in sys.meta_path if not
                                getattr(each, '__module__', '').startswith(
                                    '__editable__')]
            import sn_function
            print(sn_function.__file__)
        ''')
        code, out, err = python(*RUN, 'program.py', cwd=tmp_path)
        assert (code, err) == (0, '')
        assert out == str(ROOT / 'sn_function' / '__init__.py') + '\n'

    def test_program_that_imports_sn_function_first(self, tmp_path):
        write(tmp_path / 'program.py', '''
            import sn_function
            from sn_function import _compat
            repair = _compat._ChainerFinder.repair
            def counted(*args):
                print(args[1])
                repair(*args)
            _compat._ChainerFinder.repair = counted
            import chainer
            assert 'deconvolution_2d' in _compat.applied
        ''')
        assert python(*RUN, 'program.py', cwd=tmp_path) == (
            0, 'chainer\n', '')


class TestHook:

    def test_is_in_the_place_of_chainers(self, tmp_path):
        write(tmp_path / 'program.py', '''
            import chainer
            import chainer.links as L
            import numpy as np
            from chainer import link_hooks
            from chainer.link_hooks import *
            from chainer.link_hooks.spectral_normalization import (
                l2normalize, SpectralNormalization as Hook)
            from chainer.link_hooks import SpectralNormalization as Other

            import sn_function
            from sn_function import errors, extensions
            assert (sn_function.SpectralNormalization is Hook is Other
                    is SpectralNormalization
                    is link_hooks.SpectralNormalization
                    is chainer.link_hooks.spectral_normalization
                    .SpectralNormalization)
            assert TimerHook is link_hooks.TimerHook
            assert {'SpectralNormalization', 'TimerHook', '__name__'} <= set(
                dir(link_hooks))
            for module in link_hooks, link_hooks.spectral_normalization:
                try:
                    module.none
                except AttributeError as error:
                    assert str(error) == (
                        f"module {module.__name__!r} has no attribute 'none'")

            class Mine(Hook):
                pass

            layer = L.Linear(
                4, 3, initialW=np.diag([3, 2, 1, 0])[:3]).add_hook(Mine())
            hook, = layer.local_link_hooks.values()
            assert isinstance(hook, link_hooks.SpectralNormalization)
            layer(np.ones((1, 4), 'f'))
            sigma = np.linalg.svd(sn_function.bake(layer).W.array)[1][0]
            assert abs(sigma - 1) < 1e-3

            for name in None, 'another':
                try:
                    layer.add_hook(sn_function.SpectralNormalization(
                        name=name))
                except errors.BothHooksError as error:
                    print(error)
            assert list(layer.local_link_hooks.values()) == [hook]
            layer.add_hook(TimerHook())
        ''')
        code, out, err = python(*RUN, '--hook', 'program.py', cwd=tmp_path)
        assert (code, err) == (0, '')
        assert out.count('Linear already has a hook that normalizes') == 2
        assert 'run it without --hook' in out

    def test_pickles(self, tmp_path):
        write(tmp_path / 'program.py', '''
            import pickle, sys
            import chainer.links as L
            from chainer.link_hooks import SpectralNormalization
            if sys.argv[1] == 'save':
                layer = L.Linear(4, 3).add_hook(SpectralNormalization())
                with open('model', 'wb') as file:
                    pickle.dump(layer, file)
            else:
                with open('model', 'rb') as file:
                    hook, = pickle.load(file).local_link_hooks.values()
                print(type(hook).__module__)
        ''')
        for saving, loading, expected in (
                ([], ['--hook'], None), (['--hook'], [], 'sn_function'),
                (['--hook'], ['--hook'], 'sn_function')):
            assert python(*RUN, *saving, 'program.py', 'save',
                          cwd=tmp_path) == (0, '', '')
            code, out, err = python(
                *RUN, *loading, 'program.py', 'load', cwd=tmp_path)
            if expected is None:
                assert code == 1
                assert 'errors.PickledHookError: ' in err
            else:
                assert (code, err) == (0, '')
                assert out.startswith(expected)

    def test_installed_after_chainer(self, tmp_path):
        write(tmp_path / 'program.py', '''
            import sn_function, chainer, threading
            thread = threading.Thread(target=sn_function.install, args=[True])
            thread.start()
            thread.join()
            from chainer.link_hooks import SpectralNormalization
            assert SpectralNormalization is sn_function.SpectralNormalization
            sn_function.install(True)
            sn_function.install()
            import os
            assert os.environ['SN_FUNCTION_HOOK'] == '1'
            assert os.environ['PYTHONPATH'].count('_children') == 1
        ''')
        assert python('program.py', cwd=tmp_path) == (0, '', '')

    def test_installed_by_many_threads(self, tmp_path):
        write(tmp_path / 'program.py', '''
            import sn_function, chainer, threading, time
            from sn_function._compat import replacement
            refusing = replacement._refusing_both
            def slowly(add_hook):
                time.sleep(0.1)
                return refusing(add_hook)
            replacement._refusing_both = slowly
            add_hook, errors = chainer.Link.add_hook, []
            def install():
                try:
                    sn_function.install(hook=True)
                except BaseException as error:
                    errors.append(error)
            threads = [threading.Thread(target=install) for _ in range(4)]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
            assert errors == []
            assert chainer.Link.add_hook.__wrapped__ is add_hook
        ''')
        assert python('program.py', cwd=tmp_path) == (0, '', '')

    def test_installed_where_modules_load_lazily(self, tmp_path):
        write(tmp_path / 'program.py', '''
            import sn_function, chainer, sys, types
            class Lazy(types.ModuleType):
                def __getattribute__(self, name):
                    raise ImportError(name)
            class Other:
                __getattribute__ = Lazy.__getattribute__
            sys.modules.update(lazy=Lazy('lazy'), other=Other(), none=None)
            sn_function.install(hook=True)
            from chainer.link_hooks import SpectralNormalization
            assert SpectralNormalization is sn_function.SpectralNormalization
        ''')
        assert python('program.py', cwd=tmp_path) == (0, '', '')

    def test_installed_too_late(self, tmp_path):
        write(tmp_path / 'own.py', '''
            from chainer import link_hooks
            class Mine(link_hooks.SpectralNormalization):
                pass
        ''')
        write(tmp_path / 'program.py', '''
            import os
            import sn_function, chainer
            import own
            from chainer.link_hooks import SpectralNormalization as Hook
            from sn_function import errors
            before = dict(os.environ)
            try:
                sn_function.install(hook=True)
            except errors.HookInUseError as error:
                print(error)
            assert os.environ == before
            assert Hook is chainer.link_hooks.SpectralNormalization
        ''')
        code, out, err = python('program.py', cwd=tmp_path)
        assert (code, err) == (0, '')
        assert 'has been imported by __main__, own, which' in out
