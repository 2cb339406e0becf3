"""Other stacks are imitated in fresh interpreters, where warnings are errors.

An interpreter that has imported Chainer cannot show what importing it does.
"""
import ast
import functools
import importlib
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import textwrap
import types
import warnings

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import sn_function  # isort: skip  # before chainer, which it repairs

import chainer
import chainer.functions as F
from chainer.functions.array import as_strided, resize_images

from sn_function import _compat
from sn_function._compat import pkg_resources, repairs, trials
from tests.test_doctor import WITHOUT

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Makes top-level packages and their modules look as if not installed.
HIDE = '''
import sys

class Hidden:
    def __init__(self, *names):
        self.names = names
    def find_spec(self, name, path=None, target=None):
        if any(name == n or name.startswith(n + '.') for n in self.names):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

def hide(*names):
    sys.meta_path.insert(0, Hidden(*names))
'''

# What Chainer's own stack has and later ones lack.
OLD_STACK = '''
import sys, types, warnings
import numpy

def module(name, **contents):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)
    return sys.modules[name]

class NotFound(Exception):
    pass

def require(*names):
    raise NotFound

pkg_resources = module('pkg_resources', require=require, WorkingSet=None,
                       DistributionNotFound=NotFound, VersionConflict=NotFound,
                       ResolutionError=NotFound)
system_info = module('numpy.distutils.system_info', get_info=lambda _: {})
distutils = module('numpy.distutils', system_info=system_info)
numpy.distutils = distutils
sctypes = numpy.sctypes = {
    'int': [numpy.int8, numpy.int16, numpy.int32, numpy.int64],
    'float': [numpy.float16, numpy.float32, numpy.float64]}
numpy.float = float
tuple_or_list = numpy.meshgrid
numpy.meshgrid = lambda *args, **kwargs: list(tuple_or_list(*args, **kwargs))
'''


def run(*parts, paths=()):
    """Runs Python source in a fresh interpreter, returns what it prints."""
    code = '\n'.join(textwrap.dedent(part) for part in parts)
    path = os.pathsep.join([*map(str, paths), str(ROOT)])
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-c', code],
        capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': path})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestImport:

    def test_leaves_numpy_and_sys_modules_as_they_were(self):
        run('''
            import sys, types
            import numpy
            before = dict(vars(numpy))
            import sn_function, chainer
            after = vars(numpy)
            assert {n for n in before if after.get(n) is not before[n]} <= {
                '__warningregistry__'}
            for name in set(after) - set(before):   # submodules of its own
                assert after[name].__spec__.name == f'numpy.{name}', name
            for name, module in list(sys.modules.items()):
                if isinstance(module, types.ModuleType):
                    doc = vars(module).get('__doc__') or ''
                    assert not doc.startswith('A stand-in'), name
        ''')

    def test_does_nothing_where_nothing_is_missing(self):
        run(OLD_STACK, '''
            sys.modules['onnx'] = None      # see test_onnx_chainer.py
            sys.modules['mpi4py'] = None    # see test_chainermn.py
            sys.modules['google'] = None    # see test_caffe.py
            import chainer
            from chainer import reporter
            from chainer.dataset import convert
            from chainer.distributions import Categorical
            from chainer.functions.array import (
                as_strided, pad_sequence, resize_images)
            from chainer.functions.connection import deconvolution_2d
            from chainer.functions.loss import mean_squared_error as mse
            from chainer.functions.math import basic_math, fix, sparse_matmul
            from chainer.functions.normalization import (
                local_response_normalization as lrn)
            from chainer.optimizer_hooks import (
                gradient_clipping, gradient_lars)
            from chainer.iterators import multiprocess_iterator
            from chainer.serializers import hdf5, npz
            from chainer.training.extensions import (
                MicroAverage, micro_average)

            # Repaired by whoever maintains this Chainer.
            def _set_cover_all(self, x, W):
                self.cover_all = False
            def add(self, value):
                self._x, self._n = numpy.float64(value), 1
            def deserialize(self, key, value):
                return value
            micro_average.float = lambda value: value
            multiprocess_iterator.threading = types.SimpleNamespace(
                Thread=lambda: types.SimpleNamespace(
                    setDaemon=lambda value: None))
            multiprocess_iterator.multiprocessing = types.SimpleNamespace(
                Pool=type('Pool', (), {'map_async': lambda *args: None}))
            fix.fix = lambda x: x
            hdf5._available = False
            npz.NpzDeserializer.__call__ = deserialize
            chainer.Variable.debug_print = lambda self: 'device: CPU'
            deconvolution = deconvolution_2d.Deconvolution2DFunction
            deconvolution._set_cover_all = _set_cover_all
            pad_sequence.PadSequence.forward = lambda self, xs: xs
            convert._concat_arrays_with_padding = lambda xs, padding: xs
            basic_math._preprocess_const = lambda x, value: value
            lrn.LocalResponseNormalization.forward_cpu = lambda self, xs: xs
            reporter.Summary.add = add
            mse.MeanSquaredError.forward_cpu = lambda self, xs: (1,)
            gradient_clipping._sum_sqnorm_grads = lambda ps: (1, None)
            gradient_lars.GradientLARS.__call__ = lambda *args: None
            sparse_matmul._coo_matmul_cpu = lambda *args: None

            def state():
                return list(sys.meta_path), [
                    {name: value for name, value in vars(owner).items()
                     if name != '__warningregistry__'}
                    for owner in (
                        sys, numpy, distutils, system_info, pkg_resources,
                        as_strided, as_strided.AsStridedGrad, resize_images,
                        Categorical, pad_sequence.PadSequence, deconvolution,
                        convert, basic_math, lrn.LocalResponseNormalization,
                        reporter.Summary, MicroAverage, mse.MeanSquaredError,
                        gradient_clipping, gradient_lars.GradientLARS,
                        sparse_matmul, micro_average, npz.NpzDeserializer,
                        chainer.Variable, multiprocess_iterator, fix,
                        hdf5, hdf5.HDF5Deserializer)]

            before = state()
            from sn_function import _compat
            assert _compat.applied == (), _compat.applied
            assert state() == before
        ''')

    def test_gives_chainer_what_is_there(self):
        run(OLD_STACK, '''
            from sn_function import _compat
            from chainer import _environment_check
            assert _environment_check.pkg_resources is pkg_resources
            assert sys.modules['pkg_resources'] is pkg_resources
            assert sys.modules['numpy.distutils.system_info'] is system_info
            assert numpy.distutils is distutils
            assert numpy.sctypes is sctypes
            assert not {'pkg_resources', 'numpy.sctypes', 'as_strided',
                        'numpy.distutils.system_info', 'resize_images',
                        'categorical'} & set(_compat.applied)
        ''')

    def test_after_chainer_whose_shims_have_been_taken_back(self):
        run(OLD_STACK, '''
            import chainer
            sys.modules.pop('pkg_resources')
            del numpy.sctypes, numpy.float
            # NumPy 1.20 to 1.23 would give np.float again.
            vars(numpy).get('__deprecated_attrs__', {}).pop('float', None)
            numpy.meshgrid = lambda *args, **kwargs: tuple(
                tuple_or_list(*args, **kwargs))
        ''', HIDE, '''
            hide('pkg_resources')
            from sn_function import _compat
            assert _compat.applied[:3] == (
                'pkg_resources', 'as_strided', 'categorical')
            assert 'resize_images' in _compat.applied
            import chainer.testing
            import chainer.functions as F
            x = chainer.Variable(numpy.zeros((1, 1, 2, 2), 'f'))
            assert F.resize_images(x, (3, 3)).shape == (1, 1, 3, 3)
        ''')

    def test_without_setuptools(self):
        run(HIDE, '''
            hide('setuptools', 'pkg_resources', 'numpy.distutils')
            from sn_function import _compat
            import chainer
            assert _compat.applied[:2] == (
                'pkg_resources', 'numpy.distutils.system_info')
            from chainer import gradient_check, testing
            from chainer.testing import doctest_helper

            def skips(decorator):
                @decorator
                def case():
                    pass
                return getattr(case, '__unittest_skip__', False)

            assert not skips(testing.with_requires('numpy>=1.0'))
            assert skips(testing.with_requires('numpy>=100'))
            assert skips(testing.with_requires('numpy>=1.0', 'no-such-thing'))
            assert skips(testing.without_requires('numpy>=1.0'))
            assert not skips(testing.without_requires('no-such-thing'))
            assert doctest_helper.skipif_requires_satisfied('numpy>=1.0')

            try:
                import pkg_resources
            except ImportError:
                pass
            else:
                raise AssertionError('other packages see the stand-in')
        ''')

    def test_pkg_resources_that_fails_to_import(self, tmp_path):
        # As that of setuptools 65 does on Python 3.12.
        (tmp_path / 'pkg_resources.py').write_text(
            'import pkgutil; pkgutil.no_such_thing')
        run('''
            from sn_function import _compat
            from chainer import testing
            assert _compat.applied[0] == 'pkg_resources'
        ''', paths=[tmp_path])

    @pytest.mark.parametrize('category', ['DeprecationWarning', 'UserWarning'])
    def test_pkg_resources_that_only_warns(self, tmp_path, category):
        # As that of setuptools 67 to 81 does; and the warning is not hidden
        # from those who import it by themselves.
        (tmp_path / 'pkg_resources.py').write_text(textwrap.dedent(f'''
            import warnings
            from sn_function._compat.pkg_resources import (
                DistributionNotFound, ResolutionError, VersionConflict,
                WorkingSet, get_distribution, require)
            warnings.warn('pkg_resources is deprecated as an API.',
                          {category}, stacklevel=2)
        '''))
        run('''
            import sys
            from sn_function import _compat
            import chainer
            assert 'pkg_resources' not in _compat.applied
            assert sys.modules['pkg_resources'].__file__
            del sys.modules['pkg_resources']
            try:
                import pkg_resources
            except Warning:
                pass
            else:
                raise AssertionError('the warning is hidden')
        ''', paths=[tmp_path])

    # With NumPy 1.26 and setuptools 74 on Python 3.11 the package is there,
    # without this module.  On Python 3.12 both are missing.
    @pytest.mark.parametrize('package', [True, False])
    def test_numpy_distutils(self, package):
        run(HIDE, f'''
            import types
            import numpy
            if {package}:
                numpy.distutils = types.ModuleType('numpy.distutils')
                sys.modules['numpy.distutils'] = numpy.distutils
            else:
                hide('numpy.distutils')
            before = vars(numpy).get('distutils')
            from sn_function import _compat
            import chainer
            assert 'numpy.distutils.system_info' in _compat.applied
            # What Chainer does on macOS.
            from sn_function._compat import loans
            with loans.lent(loans._lend_system_info()):
                import numpy.distutils.system_info
                assert not numpy.distutils.system_info.get_info('blas_opt')
            assert vars(numpy).get('distutils') is before
            assert not hasattr(before, 'system_info')
            assert 'numpy.distutils.system_info' not in sys.modules
        ''')

    def test_numpy_like_version_2(self):
        run('''
            import numpy
            vars(numpy).pop('sctypes', None)
            meshgrid = numpy.meshgrid
            numpy.meshgrid = lambda *args, **kwargs: tuple(
                meshgrid(*args, **kwargs))
            from sn_function import _compat
            import chainer
            assert {'numpy.sctypes', 'as_strided', 'categorical'} <= set(
                _compat.applied)
            import chainer.functions as F
            x = chainer.Variable(numpy.zeros(3, numpy.float32))
            F.sum(F.as_strided(x, (2, 2), (1, 1))).backward()
            assert x.grad.tolist() == [1, 2, 1]
            p = numpy.array([[.5, .5], [.25, .75]])
            y = chainer.distributions.Categorical(p=p).log_prob(
                numpy.array([0, 1]))
            assert abs(numpy.exp(y.array) - [.5, .75]).max() < 1e-12
        ''')

    def test_chainer_still_warns_of_a_cupy_it_does_not_know(self, tmp_path):
        info = tmp_path / 'cupy-13.6.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(
            'Metadata-Version: 2.1\nName: cupy\nVersion: 13.6.0\n')
        printed = run(HIDE, '''
            hide('setuptools', 'pkg_resources')
            import warnings
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                import sn_function, chainer
            for warning in caught:
                print(warning.message)
        ''', paths=[tmp_path])
        assert 'CuPy (cupy) version 13.6.0 may not be compatible' in printed
        assert 'Failed to check' not in printed

    def test_without_chainer_says_how_to_install_it(self):
        printed = run(HIDE, '''
            hide('chainer')
            import sn_function
            for use in (
                    'sn_function.SpectralNormalization',
                    'from sn_function import functions',
                    'from sn_function import *'):
                try:
                    exec(use)
                except ImportError as error:
                    print(error)
        ''')
        assert printed.count('--no-build-isolation chainer==7.8.1') == 3

    def test_without_chainer_none_is_found(self, tmp_path):
        (tmp_path / 'sitecustomize.py').write_text(WITHOUT.format(
            names=['chainer']))
        run('''
            import importlib.util
            import sn_function
            assert importlib.util.find_spec('chainer') is None
            try:
                import chainer
            except ModuleNotFoundError as error:
                assert error.name == 'chainer'
        ''', paths=[tmp_path])

    def test_error_inside_chainer_is_not_taken_for_its_absence(self):
        printed = run(HIDE, '''
            hide('six')
            import sn_function
            try:
                sn_function.SpectralNormalization
            except ImportError as error:
                print(error)
        ''')
        assert printed == "No module named 'six'"

    def test_module_forbidden_by_the_user_stays_so(self):
        run('''
            import sys
            sys.modules['pkg_resources'] = None
            from sn_function import _compat
            import chainer
            assert _compat.applied[0] == 'pkg_resources'
            import chainer.testing
            assert sys.modules['pkg_resources'] is None
        ''')

    def test_reload_changes_nothing(self):
        run(HIDE, '''
            hide('setuptools', 'pkg_resources', 'numpy.distutils')
            import importlib, sys
            from sn_function import _compat
            from chainer.functions.array.pad_sequence import PadSequence
            from chainer.functions.connection import deconvolution_2d
            function = deconvolution_2d.Deconvolution2DFunction

            def state():
                return (_compat.applied, PadSequence.forward,
                        function._set_cover_all, list(sys.meta_path))

            before = state()
            assert before[0]
            importlib.reload(_compat)
            assert state() == before
        ''')


# What OLD_STACK has is taken from it again, one by one.
MISSING = {
    'setuptools': '''
        sys.modules.pop('pkg_resources')
        hide('setuptools', 'pkg_resources')
    ''',
    'numpy.distutils': '''
        sys.modules.pop('numpy.distutils')
        sys.modules.pop('numpy.distutils.system_info')
        hide('numpy.distutils')
    ''',
    # A SciPy as old as NumPy 1 reads it, too.
    'numpy.sctypes': '''
        del numpy.sctypes
        hide('scipy')
    ''',
}

FAIL = '''
    def fail(name):
        import importlib
        try:
            importlib.import_module(name)
        except (AttributeError, ImportError):
            pass
        else:
            raise AssertionError
        assert name not in sys.modules
'''

# Has a function called in the middle of the import of Chainer, with what
# executes the module that is imported there.
IN_THE_MIDDLE = '''
    import functools, sys
    from importlib.machinery import PathFinder

    def in_the_middle(around):
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name != 'chainer.functions.array':
                    return None
                spec = PathFinder.find_spec(name, path)
                spec.loader.exec_module = functools.partial(
                    around, spec.loader.exec_module)
                return spec
        sys.meta_path.insert(0, Finder())
'''
TRAIN = '''
    def train():
        import chainer
        import chainer.functions as F
        import chainer.links as L
        from chainer.link_hooks import SpectralNormalization as builtin
        import sn_function
        link = L.Linear(3, 2).add_hook(sn_function.SpectralNormalization())
        assert isinstance(link, chainer.Link)
        assert isinstance(link, sys.modules['chainer.link'].Link)
        assert builtin is chainer.link_hooks.SpectralNormalization
        optimizer = chainer.optimizers.Adam().setup(link)
        W = link.W.array.copy()
        x = numpy.ones((4, 3), 'f')
        optimizer.update(lambda: F.sum(F.relu(link(x)) + link(x) ** 2))
        assert abs(link.W.array - W).max() > 0
'''


class TestAfterAFailedImport:
    """As in a notebook, whose user imports sn_function after the error."""

    @pytest.mark.parametrize('what', MISSING)
    def test_of_chainer(self, what):
        run(OLD_STACK, HIDE, FAIL, TRAIN, MISSING[what], '''
            fail('chainer')
            assert [name for name in sys.modules if name[:8] == 'chainer.']
            import sn_function
            from chainer.functions import relu
            import chainer
            assert chainer.functions.relu is relu
            train()
            assert sn_function._compat.applied[0] in (
                'pkg_resources', 'numpy.distutils.system_info',
                'numpy.sctypes')
        ''')

    def test_of_chainer_by_a_name_of_this_package(self):
        run(OLD_STACK, HIDE, FAIL, TRAIN, MISSING['numpy.sctypes'], '''
            fail('chainer')
            from sn_function import SpectralNormalization
            train()
        ''')

    def test_when_sn_function_came_first(self):
        run(HIDE, FAIL, TRAIN, '''
            import numpy
            import sn_function
            hide('chainer.training')
            fail('chainer')
            assert 'chainer.functions' in sys.modules
            sys.meta_path.pop(0)
            train()
        ''')

    def test_of_chainermn(self):
        run(OLD_STACK, HIDE, FAIL, TRAIN, MISSING['numpy.sctypes'], '''
            module('mpi4py.MPI', FLOAT=None)
            module('mpi4py', MPI=sys.modules['mpi4py.MPI'])
            fail('chainermn')
            import sn_function
            import chainermn
            assert chainermn.links.MultiNodeBatchNormalization
            train()
        ''')

    def test_of_onnx_chainer(self):
        pytest.importorskip('onnx')
        pytest.importorskip('onnx_chainer')
        run(OLD_STACK, HIDE, FAIL, TRAIN, MISSING['numpy.sctypes'], '''
            fail('onnx_chainer')
            import sn_function
            import onnx_chainer
            assert onnx_chainer.export
            train()
        ''')

    @pytest.mark.parametrize('fails', [True, False])
    def test_of_chainer_in_another_thread(self, fails):
        # It is in the middle of the import when this one begins.
        run(OLD_STACK, HIDE, TRAIN, IN_THE_MIDDLE,
            MISSING['numpy.sctypes'] if fails else '', '''
            import importlib, threading, time
            started = threading.Event()
            def around(execute, module):
                started.set()
                for _ in range(1000):
                    if 'sn_function.bake' not in sys.modules:
                        time.sleep(.01)
                time.sleep(.2)
                execute(module)
            in_the_middle(around)
            done = []
            def other():
                try:
                    importlib.import_module('chainer')
                except AttributeError as error:
                    done.append(error)
                else:
                    done.append(None)
            thread = threading.Thread(target=other)
            thread.start()
            assert started.wait(60)
            assert 'chainer' in sys.modules
            import sn_function
            import chainer
            train()
            thread.join()
            assert (done[0] is not None) == ''' f'{fails}')

    def test_a_good_chainer_is_left_alone(self):
        run('''
            import importlib, sys
            import sn_function, chainer

            def modules():
                return {name: module for name, module in sys.modules.items()
                        if name.split('.')[0] == 'chainer'}

            before = modules()
            importlib.reload(chainer)
            importlib.reload(sn_function)
            finder, = [each for each in sys.meta_path
                       if type(each).__name__ == '_ChainerFinder']
            importlib.util.module_from_spec(finder.find_spec('chainer', None))
            after = modules()
            assert before.items() <= after.items()
        ''')

    def test_a_good_chainer_is_left_alone_where_a_module_of_it_fails(self):
        run(HIDE, FAIL, '''
            import sn_function, chainer
            before = dict(sys.modules)
            hide('chainer.links.caffe.caffe_function')
            fail('chainer.nosuch')
            fail('chainer.links.caffe')
            # By someone who puts it back.
            del sys.modules['chainer']
            import importlib
            importlib.reload(sn_function)
            sys.modules['chainer'] = chainer
            import sn_function, chainer
            assert before.items() <= sys.modules.items()
        ''')

    def test_in_the_middle_of_an_import(self):
        # A module of another package may import both.
        run(OLD_STACK, TRAIN, IN_THE_MIDDLE, '''
            def around(execute, module):
                import sn_function
                execute(module)
            in_the_middle(around)
            import chainer
            from sn_function import _compat
            assert _compat.applied == ()
            train()
            assert 'deconvolution_2d' in _compat.applied
        ''')

    def test_what_others_put_there_stays(self):
        run('''
            import sys, types
            stand_in = types.ModuleType('chainer.stand_in')
            sys.modules['chainer.stand_in'] = stand_in
            sys.modules['chainer.links.caffe'] = None
            import sn_function, chainer
            assert sys.modules['chainer.stand_in'] is stand_in
            assert sys.modules['chainer.links.caffe'] is None
        ''')


class TestLazyImport:

    def test_imports_neither_numpy_nor_chainer(self):
        run('''
            import sys
            import sn_function
            import sn_function.bake, sn_function.cli, sn_function.doctor
            assert not {'numpy', 'chainer', 'cupy', 'click', 'onnx',
                        'mpi4py'} & set(sys.modules)
            assert sn_function._compat.applied == ()
            assert set(sn_function.__all__) <= set(dir(sn_function))
        ''')

    def test_every_public_name_is_found(self):
        for name in sn_function.__all__:
            code = f'''
                import sn_function
                assert sn_function.{name} is not None
                from sn_function import {name} as found
                assert found is sn_function.{name}
            '''
            exec(textwrap.dedent(code), {})
        names = {}
        exec('from sn_function import *', names)
        assert set(sn_function.__all__) <= set(names)

    def test_chainer_has_its_link_hooks(self):
        run("""
            import sn_function
            import chainer
            assert chainer.link_hooks.SpectralNormalization
        """)

    def test_unknown_name(self):
        with pytest.raises(AttributeError, match="no attribute 'unknown'"):
            _ = sn_function.unknown
        with pytest.raises(ImportError, match='unknown'):
            exec('from sn_function import unknown')
        assert not hasattr(sn_function, '__wrapped__')

    def test_type_checkers_see_what_is_found(self):
        source = pathlib.Path(sn_function.__file__).read_text()
        block, = [node for node in ast.parse(source).body
                  if isinstance(node, ast.If)]
        seen = {}
        for node in block.body:
            for alias in node.names:
                seen[alias.name] = node.module
        for name, home in seen.items():
            if home == 'sn_function':
                value = importlib.import_module(f'{home}.{name}')
            else:
                value = getattr(importlib.import_module(home), name)
            assert getattr(sn_function, name) is value
        assert set(seen) == set(sn_function.__all__) - {
            '__version__', 'bake', 'install'}

    @pytest.mark.parametrize('use', [
        'import chainer', 'sn_function.summary',
        *[pytest.param(text, marks=pytest.mark.slow) for text in (
            'import chainer.functions as F', 'from chainer import links',
            'import sn_function.functions',
            'from sn_function.link_hooks import SpectralNormalization',
            '_compat.explain("summary")')]])
    def test_chainer_is_repaired_whoever_imports_it(self, use):
        names = run(f'''
            import sn_function
            from sn_function import _compat
            {use}
            print(*_compat.applied)
        ''').split()
        assert names == list(_compat.applied)

    def test_chainer_looks_as_if_imported_without_it(self):
        run('''
            import importlib, inspect
            import sn_function, chainer
            assert type(chainer.__loader__).__name__ == 'SourceFileLoader'
            assert chainer.__spec__.loader is chainer.__loader__
            assert 'import' in inspect.getsource(chainer)
            applied = sn_function._compat.applied
            assert applied
            importlib.reload(chainer)
            assert sn_function._compat.applied == applied
        ''')

    def test_chainer_in_an_archive(self, tmp_path):
        folder = pathlib.Path(chainer.__file__).parent
        shutil.make_archive(
            str(tmp_path / 'a'), 'zip', folder.parent, folder.name)
        run('''
            import sn_function
            import chainer
            assert 'a.zip' in chainer.__file__
            assert 'deconvolution_2d' in sn_function._compat.applied
        ''', paths=[tmp_path / 'a.zip'])

    def test_chainer_that_another_finder_finds(self):
        # As that of a package which is installed as editable, or is frozen.
        run('''
            import sys
            from importlib import machinery, util

            class Finder:
                def find_spec(self, name, path=None, target=None):
                    if name == 'chainer':
                        return util.spec_from_file_location(name, origin)

            origin = machinery.PathFinder.find_spec('chainer').origin
            find_spec = machinery.PathFinder.find_spec
            machinery.PathFinder.find_spec = classmethod(
                lambda cls, name, path=None, target=None:
                None if name == 'chainer' else find_spec(name, path, target))
            sys.meta_path.append(Finder())
            import sn_function
            import chainer
            assert 'deconvolution_2d' in sn_function._compat.applied
        ''')

    def test_many_threads(self):
        names = run('''
            import threading
            import sn_function
            errors = []
            barrier = threading.Barrier(16)

            def use(i):
                try:
                    barrier.wait()
                    if i % 2:
                        import chainer.functions
                        import numpy
                        x = chainer.Variable(numpy.zeros(2, 'f'))
                        chainer.functions.as_strided(x, (2,), (1,))
                    else:
                        getattr(sn_function, sn_function.__all__[i - 2])
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=use, args=[i])
                       for i in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors, errors
            print(*sn_function._compat.applied)
        ''').split()
        assert names == list(_compat.applied)

    def test_model_is_unpickled(self, tmp_path):
        link = chainer.links.Linear(2, 2).add_hook(
            sn_function.SpectralNormalization())
        (tmp_path / 'model').write_bytes(pickle.dumps(link))
        run(f'''
            import pickle
            import sn_function
            with open({str(tmp_path / 'model')!r}, 'rb') as f:
                link = pickle.load(f)
            hook, = link.local_link_hooks.values()
            assert type(hook) is sn_function.SpectralNormalization
        ''')


# A module that knows of Chainer alone, and scripts that send it to a worker.
JOB = '''
import chainer

def total(x):
    assert float(chainer.functions.sum(x).array) == 3
'''
SCRIPT = '''
import sn_function      # again in the worker, and there before chainer
import multiprocessing, sys
import numpy

if __name__ == '__main__':
    import job
    context = multiprocessing.get_context(sys.argv[1])
    worker = context.Process(target=job.total, args=[numpy.ones(3, 'f')])
    worker.start()
    worker.join()
    sys.exit(worker.exitcode)
'''
LATE = SCRIPT.replace('import sn_function ', '').replace(
    'import job', 'import sn_function, job')
PRELOAD = LATE.replace(
    'worker.start', """multiprocessing.set_forkserver_preload({})
    worker.start""")
ITERATOR = '''
import sn_function
import multiprocessing, sys
import chainer

if __name__ == '__main__':
    multiprocessing.set_start_method(sys.argv[1])
    iterator = chainer.iterators.MultiprocessIterator(
        list(range(8)), 4, shuffle=False, n_processes=2)
    assert iterator.next() == [0, 1, 2, 3]
    iterator.finalize()
'''


@pytest.mark.skipif(sys.platform == 'win32', reason='there is no forkserver')
class TestWorkers:

    def run(self, path, script, method):
        (path / 'job.py').write_text(JOB)
        (path / 'script.py').write_text(script)
        return subprocess.run(
            [sys.executable, 'script.py', method], cwd=path, timeout=120,
            capture_output=True, text=True,
            env={**os.environ, 'PYTHONPATH': str(ROOT)})

    @pytest.mark.parametrize('method', [
        'spawn', pytest.param('forkserver', marks=pytest.mark.slow)])
    @pytest.mark.parametrize(
        'script', [SCRIPT, ITERATOR], ids=['job', 'iterator'])
    def test_script_that_imports_sn_function_at_its_top(
            self, tmp_path, script, method):
        done = self.run(tmp_path, script, method)
        assert done.returncode == 0, done.stderr

    @pytest.mark.slow
    @pytest.mark.parametrize('more', [[], ['chainer']], ids=str)
    def test_forkserver_that_preloads_sn_function(self, tmp_path, more):
        script = PRELOAD.format(['sn_function', *more])
        done = self.run(tmp_path, script, 'forkserver')
        assert done.returncode == 0, done.stderr

    def test_without_either_the_worker_cannot_import_chainer(self, tmp_path):
        done = self.run(tmp_path, LATE, 'spawn')
        lent = {'pkg_resources', 'numpy.distutils.system_info',
                'numpy.sctypes'} & set(_compat.applied)
        assert bool(done.returncode) == bool(lent), done.stderr
        if lent:
            assert 'import chainer' in done.stderr


class TestPkgResources:

    def test_require(self):
        found, = pkg_resources.WorkingSet().require('numpy>=1.0,<100')
        assert found.version == numpy.__version__

    def test_missing(self):
        with pytest.raises(pkg_resources.DistributionNotFound):
            pkg_resources.require('no-such-thing>=1.0')

    def test_conflict(self):
        with pytest.raises(pkg_resources.VersionConflict):
            pkg_resources.require('numpy', 'numpy >= 100')

    def test_errors_are_resolution_errors(self):
        assert issubclass(
            pkg_resources.DistributionNotFound,
            pkg_resources.ResolutionError)
        assert issubclass(
            pkg_resources.VersionConflict, pkg_resources.ResolutionError)

    def test_not_a_requirement(self):
        with pytest.raises(ValueError, match='Not a requirement'):
            pkg_resources.require('>=1.0')

    @pytest.mark.parametrize('packaging', [True, False])
    @pytest.mark.parametrize(('version', 'specifier', 'expected'), [
        ('13.6.0', '>=7.7.0,<8.0.0', False),
        ('7.8', '>=7.7.0,<8.0.0', True),
        ('7.10.0', '>=7.9', True),
        ('10', '<2', False),
        ('2.0', '==2', True),
        ('2.0.1', '==2', False),
        ('2.0.1', '!=2', True),
        ('2.0.0.post3', '>=2.0.0, <2.1', True),
        ('1.9', ' <= 1.9', True),
        ('1.9', '>1.9', False),
        ('2.1.0rc1', '>=2.0', True),
        ('3.1.0', '', True),
    ])
    def test_specifier(
            self, monkeypatch, packaging, version, specifier, expected):
        if packaging:
            pytest.importorskip('packaging')
        else:
            monkeypatch.setitem(sys.modules, 'packaging.specifiers', None)
        assert pkg_resources._satisfies(version, specifier) is expected

    def test_specifier_that_needs_packaging(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'packaging.specifiers', None)
        with pytest.raises(ValueError, match='pip install packaging'):
            pkg_resources._satisfies('1.4', '==1.*')


# What only warns is not broken.
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('repair', repairs.REPAIRS, ids=lambda r: r.name)
def test_nothing_stays_broken(repair):
    repair.attempt()
    assert not repair.is_needed()


def test_every_name_is_explained():
    assert len(set(_compat.applied)) == len(_compat.applied)
    for name in [*_compat.applied, *(each.name for each in repairs.REPAIRS)]:
        fault, needed = _compat.explain(name)
        assert len(fault) > 15
        assert needed.startswith(('with ', 'without '))


def test_what_numpy_2_needs_is_repaired_there_and_nowhere_else():
    names = {each.name for each in repairs.REPAIRS
             if each.needed == 'with NumPy 2'}
    assert len(names) == 10
    is_2 = int(numpy.__version__.split('.')[0]) >= 2
    assert names & set(_compat.applied) == (names if is_2 else set())


def test_only_the_expected_error_calls_for_a_repair():
    def attempt():
        raise KeyError

    assert trials.Repair('', '', '', attempt, KeyError, None).is_needed()
    other = trials.Repair('', '', '', attempt, ValueError, None)
    assert not other.is_needed()


def test_warning_of_an_attempt_is_neither_shown_nor_an_error():
    def attempt():
        warnings.warn('', DeprecationWarning, stacklevel=1)
        raise KeyError

    assert trials.Repair('', '', '', attempt, KeyError, None).is_needed()


class TestAsStrided:

    @pytest.mark.parametrize('dtype', ['e', 'f', 'd'])
    def test_backward(self, dtype):
        x = chainer.Variable(numpy.arange(6).astype(dtype))
        y = F.as_strided(x, (4, 3), (1, 1))
        assert_array_equal(y.array[1], [1, 2, 3])
        F.sum(y).backward()
        assert_array_equal(x.grad, [1, 2, 3, 3, 2, 1])
        assert x.grad.dtype == dtype

    def test_backward_of_integers_is_refused(self):
        x = numpy.zeros(2, numpy.int32)
        geometry = as_strided.TensorGeometry(x)
        with pytest.raises(TypeError, match='Only float'):
            as_strided.AsStridedGrad(geometry, (2,), (1,), 0).forward((x,))


# NumPy 1.20 to 1.23 warn of np.float, and Chainer is not repaired there.
@pytest.mark.filterwarnings('ignore:`np.float`:DeprecationWarning')
class TestResizeImages:

    x = numpy.array([[[[0, 1], [2, 3]]]], numpy.float32)

    @pytest.mark.parametrize(('mode', 'align_corners', 'first_row'), [
        ('bilinear', True, [0, 1 / 3, 2 / 3, 1]),
        ('bilinear', False, [0, .25, .75, 1]),
        ('nearest', False, [0, 0, 1, 1]),
    ])
    def test_forward_backward(self, mode, align_corners, first_row):
        x = chainer.Variable(self.x)
        y = F.resize_images(
            x, (4, 4), mode=mode, align_corners=align_corners)
        assert_allclose(y.array[0, 0, 0], first_row, rtol=1e-6)
        F.sum(y).backward()
        assert_allclose(x.grad, numpy.full_like(self.x, 4), rtol=1e-6)

    def test_module_keeps_the_real_numpy(self):
        assert resize_images.numpy is numpy


class TestCategorical:

    @pytest.mark.parametrize('shape', [(), (2,), (2, 3)])
    def test_log_prob(self, shape):
        rng = numpy.random.RandomState(0)
        p = rng.dirichlet(numpy.ones(4), shape).astype(numpy.float32)
        x = rng.randint(4, size=shape)
        expected = numpy.take_along_axis(
            numpy.log(p), numpy.asarray(x)[..., None], -1)[..., 0]
        for given in numpy.asarray(x), chainer.Variable(numpy.asarray(x)):
            actual = chainer.distributions.Categorical(p=p).log_prob(given)
            assert_allclose(actual.array, expected, rtol=1e-6)


class TestPadSequence:

    # NumPy 1.24 to 1.26 only warn, and Chainer is not repaired there.
    @pytest.mark.filterwarnings(
        'ignore:NumPy will stop allowing conversion:DeprecationWarning')
    def test_minus_one_wraps_around_in_unsigned_arrays(self):
        xs = [numpy.ones(1, numpy.uint8), numpy.ones(2, numpy.uint8)]
        y = F.pad_sequence(xs, length=3, padding=-1)
        assert y.dtype == numpy.uint8
        assert_array_equal(y.array, [[1, 255, 255], [1, 1, 255]])

    @pytest.mark.parametrize('dtype', ['i', 'e', 'f', 'd'])
    def test_other_dtypes(self, dtype):
        xs = [numpy.ones(1, dtype), numpy.ones(2, dtype)]
        y = F.pad_sequence(xs, padding=-1)
        assert y.dtype == dtype
        assert_array_equal(y.array, [[1, -1], [1, 1]])

    def test_padding_without_meaning_is_still_refused(self):
        xs = [numpy.ones(1, numpy.int32), numpy.ones(2, numpy.int32)]
        with pytest.raises(ValueError, match='NaN'):
            F.pad_sequence(xs, padding=float('nan'))


    @pytest.mark.filterwarnings(
        'ignore:NumPy will stop allowing conversion:DeprecationWarning')
    def test_whole_float_wraps_around_too(self):
        y = F.pad_sequence([numpy.ones(1, numpy.uint8)], 2, padding=-1.)
        assert y.array.tolist() == [[1, 255]]


class TestConcatExamples:

    @pytest.mark.filterwarnings(
        'ignore:NumPy will stop allowing conversion:DeprecationWarning')
    @pytest.mark.parametrize(('dtype', 'padding', 'expected'), [
        ('B', -1, 255), ('B', 300, 44), ('H', -1, 65535), ('b', 300, 44),
        ('I', -1, 2 ** 32 - 1), ('Q', -1, 2 ** 64 - 1), ('h', 2 ** 33, 0),
        ('B', 7, 7), ('i', -1, -1), ('i', -1., -1), ('B', True, 1),
        ('f', -1, -1), ('e', .5, .5), ('?', 1, True),
    ])
    def test_padding(self, dtype, padding, expected):
        xs = [numpy.ones(1, dtype), numpy.ones(2, dtype)]
        y = chainer.dataset.concat_examples(xs, padding=padding)
        assert y.dtype == dtype
        assert y.tolist() == [[1, expected], [1, 1]]

    @pytest.mark.filterwarnings(
        'ignore:NumPy will stop allowing conversion:DeprecationWarning')
    def test_padding_of_each_part(self):
        batch = [(numpy.ones(1, 'B'), 2), (numpy.ones(2, 'B'), 3)]
        x, t = chainer.dataset.concat_examples(batch, padding=(-1, None))
        assert x.tolist() == [[1, 255], [1, 1]]
        assert t.tolist() == [2, 3]

    def test_arrays_of_one_shape_are_not_padded(self):
        xs = [numpy.zeros(2, 'B')] * 2
        assert chainer.dataset.concat_examples(xs).shape == (2, 2)


# NumPy 1.24 to 1.26 only warn, and Chainer is not repaired there.
@pytest.mark.filterwarnings(
    'ignore:NumPy will stop allowing conversion:DeprecationWarning')
class TestBasicMath:

    @pytest.mark.parametrize(('operation', 'expected'), [
        (lambda x: x - 1, [0, 1, 255]),
        (lambda x: x + -1, [0, 1, 255]),
        (lambda x: 1 - x, [0, 255, 1]),
        (lambda x: x + 300, [45, 46, 44]),
        (lambda x: x * -1, [255, 254, 0]),
        (lambda x: x * 300.7, [44, 88, 0]),
        (lambda x: x + 2, [3, 4, 2]),
    ])
    def test_unsigned_wraps_around(self, operation, expected):
        x = chainer.Variable(numpy.array([1, 2, 0], numpy.uint8))
        y = operation(x)
        assert y.dtype == numpy.uint8
        assert y.array.tolist() == expected

    @pytest.mark.parametrize('dtype', ['e', 'f', 'd'])
    def test_floats_keep_their_type(self, dtype):
        x = chainer.Variable(numpy.ones(2, dtype))
        y = 2 * x - 300 + numpy.float64(.5)
        assert y.dtype == dtype
        assert y.array.tolist() == [-297.5] * 2


@pytest.mark.parametrize('dtype', ['e', 'f'])
class TestNumpyScalars:

    def check(self, f, dtype, *shapes):
        rng = numpy.random.RandomState(0)
        xs = [chainer.Variable(rng.uniform(.5, 1, shape).astype(dtype))
              for shape in shapes]
        results = []
        for number in numpy.float64, float:
            y = f(number, *xs)
            gs = chainer.grad([y], xs)
            results.append([y, *gs])
        for actual, expected in zip(*results):
            assert actual.dtype == dtype
            assert_array_equal(actual.array, expected.array)

    def test_layer_normalization(self, dtype):
        self.check(lambda number, *xs: F.layer_normalization(
            *xs, eps=number(1e-3)), dtype, (3, 4), 4, 4)

    def test_local_response_normalization(self, dtype):
        self.check(lambda number, x: F.local_response_normalization(
            x, k=number(2), alpha=number(.1), beta=number(.5)),
            dtype, (2, 3, 1))

    def test_fixed_batch_normalization(self, dtype):
        self.check(lambda number, *xs: F.fixed_batch_normalization(
            *xs, eps=number(1e-3)), dtype, (3, 4), 4, 4, 4, 4)

    def test_batch_renormalization(self, dtype):
        def f(number, *xs):
            mean, var = numpy.zeros(4, dtype), numpy.ones(4, dtype)
            y = F.batch_renormalization(
                *xs, rmax=number(2), dmax=number(1), eps=number(1e-3),
                decay=number(.5), running_mean=mean, running_var=var)
            assert mean.dtype == var.dtype == dtype
            return y
        self.check(f, dtype, (3, 4), 4, 4)


class TestSummary:

    @pytest.mark.parametrize('dtype', ['e', 'f', 'd'])
    @pytest.mark.parametrize('kind', [numpy.array, lambda x: x[()]],
                             ids=['array', 'scalar'])
    def test_many_values(self, dtype, kind):
        summary = chainer.reporter.Summary()
        values = numpy.array([1.5, 30] * 2500, dtype)
        for value in values:
            summary.add(kind(value))
        mean, deviation = summary.make_statistics()
        assert_allclose(mean, 15.75, rtol=1e-12)
        assert_allclose(deviation, 14.25, rtol=1e-12)

    def test_weights(self):
        summary = chainer.reporter.Summary()
        for _ in range(3000):
            summary.add(numpy.float16(2), weight=numpy.float16(1))
            summary.add(numpy.float16(6), weight=3)
        assert_allclose(summary.compute_mean(), 5, rtol=1e-12)

    def test_dictionary_survives_a_snapshot(self, tmp_path):
        summary = chainer.reporter.DictSummary()
        for i in range(4):
            summary.add({'x': numpy.float16(i), 'n': (numpy.int32(i), 2)})
        chainer.serializers.save_npz(str(tmp_path / 's'), summary)
        loaded = chainer.reporter.DictSummary()
        chainer.serializers.load_npz(str(tmp_path / 's'), loaded)
        loaded.add({'x': numpy.float16(4), 'n': numpy.int32(4)})
        assert loaded.compute_mean() == pytest.approx({'x': 2, 'n': 16 / 9})

    @pytest.mark.parametrize('dtype', ['e', 'B', 'i'])
    def test_micro_average(self, dtype, tmp_path):
        trainer = types.SimpleNamespace(
            observation={'right': numpy.array(3, dtype), 'all': 4})
        is_over = []
        make = functools.partial(
            chainer.training.extensions.MicroAverage,
            'right', 'all', 'share', trigger=lambda trainer: is_over)
        extension = make()
        for _ in range(3000):
            extension(trainer)
        if dtype != 'e':    # load_npz takes no float for the initial 0
            chainer.serializers.save_npz(str(tmp_path / 's'), extension)
            extension = make()
            chainer.serializers.load_npz(str(tmp_path / 's'), extension)
        is_over.append(True)
        reporter = chainer.reporter.Reporter()
        with reporter:
            extension(trainer)
        assert reporter.observation == {'share': .75}


@pytest.mark.parametrize('dtype', ['e', 'f', 'd'])
def test_fix(dtype):
    x = numpy.array([-2.5, -.5, 0, .5, 2.5], dtype)
    y = F.fix(chainer.Variable(x)).array
    assert y.dtype == x.dtype
    assert_array_equal(y, [-2, 0, 0, 0, 2])
    divisor = chainer.Variable(numpy.full(5, 2, dtype))
    gd, = chainer.grad([F.fmod(x, divisor)], [divisor])
    assert_array_equal(gd.array, [1, 0, 0, 0, -1])


def test_pool_that_has_no_process_for_a_moment(monkeypatch):
    made = chainer.iterators.multiprocess_iterator.multiprocessing.Pool
    with made(processes=1) as pool:
        processes = pool._pool
        monkeypatch.setattr(pool, '_pool', [])
        result = pool.map_async(abs, iter([-1, 2, -3]))
        monkeypatch.setattr(pool, '_pool', processes)
        assert result.get(60) == [1, 2, 3]
        assert pool.map(abs, []) == []
        assert pool.map_async(abs, [-4, 5], 1).get(60) == [4, 5]


def test_multiprocess_iterator():
    iterator = chainer.iterators.MultiprocessIterator(
        list(range(6)), 3, n_processes=1, repeat=False, shuffle=False)
    assert list(iterator) == [[0, 1, 2], [3, 4, 5]]
    assert iterator._prefetch_loop._thread is None or (
        iterator._prefetch_loop._thread.daemon)
    iterator.finalize()


def test_strings_in_hdf5(tmp_path):
    h5py = pytest.importorskip('h5py')
    with h5py.File(str(tmp_path / 'x'), 'w') as file:
        file['name'] = 'a name'
        deserializer = chainer.serializers.HDF5Deserializer(file)
        assert deserializer('name', '') == 'a name'


def test_debug_print():
    x = chainer.Variable(numpy.zeros((2, 3), numpy.float32), name='x')
    assert x.debug_print().splitlines()[:2] == [
        '<variable x>', '- device: CPU']
    assert '- device: None\n' in chainer.Variable().debug_print()


# NumPy 1.25 to 2.3 only warn.
@pytest.mark.filterwarnings('ignore:Conversion of an array:DeprecationWarning')
class TestArraysOfOneElement:

    def test_micro_average(self):
        trainer = types.SimpleNamespace(
            observation={'right': numpy.array([3]), 'all': numpy.array([4])})
        extension = chainer.training.extensions.MicroAverage(
            'right', 'all', 'share', trigger=lambda trainer: True)
        reporter = chainer.reporter.Reporter()
        with reporter:
            extension(trainer)
        assert reporter.observation == {'share': .75}

    @pytest.mark.parametrize('fmt', ['npz', 'hdf5'])
    def test_load(self, tmp_path, fmt):
        if fmt == 'hdf5':
            pytest.importorskip('h5py')
        numbers = {'i': numpy.array([3]), 'f': numpy.array([[2.5]], 'f'),
                   'x': numpy.array([5.]), 'none': numpy.array([6.])}
        types_ = {'i': 0, 'f': 0., 'x': numpy.zeros(1), 'none': None}

        class Thing:
            def serialize(self, serializer):
                for name, value in vars(self).items():
                    setattr(self, name, serializer(name, value))

        saved, loaded = Thing(), Thing()
        vars(saved).update(numbers)
        vars(loaded).update(types_)
        path = str(tmp_path / 'snapshot')
        getattr(chainer.serializers, f'save_{fmt}')(path, saved)
        getattr(chainer.serializers, f'load_{fmt}')(path, loaded)
        assert (loaded.i, loaded.f) == (3, 2.5)
        assert (type(loaded.i), type(loaded.f)) == (int, float)
        assert loaded.x.shape == loaded.none.shape == (1,)

    def test_load_of_two_elements_is_still_refused(self):
        deserializer = chainer.serializers.NpzDeserializer(
            {'x': numpy.zeros(2)})
        with pytest.raises(TypeError):
            deserializer('x', 0.)


class TestMeanSquaredError:

    @pytest.mark.parametrize('size', [4, 65519, 65520, 200000])
    def test_float16(self, size):
        x = numpy.full(size, .25, numpy.float16)
        x[::2] = .5
        y = F.mean_squared_error(x, numpy.zeros_like(x))
        assert y.dtype == numpy.float16
        expected = numpy.mean(x.astype(float) ** 2)
        assert_allclose(y.array, expected, rtol=1e-2)

    @pytest.mark.parametrize('dtype', ['f', 'd'])
    def test_others(self, dtype):
        x = numpy.array([1, 3], dtype)
        y = F.mean_squared_error(x, numpy.zeros_like(x))
        assert y.dtype == dtype
        assert y.array == 5

    def test_backward(self):
        x = chainer.Variable(numpy.array([1, 3], numpy.float16))
        F.mean_squared_error(x, numpy.zeros(2, numpy.float16)).backward()
        assert x.grad.dtype == numpy.float16
        assert x.grad.tolist() == [1, 3]


class TestGradientHooks:

    def link(self, dtype, *gradients):
        with chainer.using_config('dtype', numpy.dtype(dtype)):
            chain = chainer.ChainList(
                *(chainer.links.Bias(0, (4,)) for _ in gradients))
        for parameter, gradient in zip(chain.params(), gradients):
            parameter.array[...] = 1
            parameter.grad = numpy.full(4, gradient, dtype)
        return chain

    def update(self, chain, hook):
        optimizer = chainer.optimizers.SGD(0).setup(chain)
        optimizer.add_hook(hook)
        optimizer.update()
        return numpy.array([p.grad for p in chain.params()])

    @pytest.mark.parametrize('dtype', ['e', 'f'])
    def test_clipping_of_large_gradients(self, dtype):
        # Each product fits in float16, their sum does not.
        chain = self.link(dtype, 100, 100, 100)
        gradients = self.update(
            chain, chainer.optimizer_hooks.GradientClipping(1.))
        assert gradients.dtype == dtype
        assert_allclose(gradients, 12 ** -.5, rtol=2e-3)

    @pytest.mark.parametrize('dtype', ['e', 'f'])
    @pytest.mark.parametrize('gradient', [0, 100])
    def test_lars(self, dtype, gradient):
        gradients = self.update(
            self.link(dtype, gradient), chainer.optimizer_hooks.GradientLARS())
        assert gradients.dtype == dtype
        assert_allclose(gradients, min(gradient, 1), rtol=2e-3)


class TestSparseMatmul:

    @pytest.mark.parametrize('dtype', ['e', 'f', 'd'])
    @pytest.mark.parametrize('batch', [(), (2,)])
    def test_forward_backward(self, dtype, batch):
        pytest.importorskip('scipy', reason='Chainer computes with SciPy')
        rng = numpy.random.RandomState(0)
        A = rng.randint(3, size=(*batch, 4, 3)).astype(dtype)
        B = rng.randint(3, size=(*batch, 3, 2)).astype(dtype)
        a = chainer.utils.to_coo(A, requires_grad=True)
        b = chainer.Variable(B)
        y = F.sparse_matmul(a, b)
        assert y.dtype == dtype
        assert_array_equal(y.array, A @ B)
        F.sum(y).backward()
        assert b.grad.dtype == a.data.grad.dtype == dtype
        ones = numpy.ones_like(y.array)
        assert_array_equal(b.grad, numpy.swapaxes(A, -1, -2) @ ones)


class TestDeconvolution2D:

    @pytest.mark.parametrize('groups', [1, 2])
    @pytest.mark.parametrize('kwargs', [
        {}, {'stride': 2, 'pad': 1}, {'dilate': 2},
        {'stride': 2, 'pad': 1, 'outsize': (8, 8)},     # cover_all
        {'stride': (1, 2), 'pad': (0, 1)},
    ], ids=str)
    def test_same_gradient_whether_or_not_the_input_needs_one(
            self, groups, kwargs):
        rng = numpy.random.RandomState(0)
        x = rng.normal(size=(2, 4, 5, 5))
        W = chainer.Variable(rng.normal(size=(4, 4 // groups, 3, 3)))
        b = chainer.Variable(rng.normal(size=4))

        def gradients(x):
            y = F.deconvolution_2d(x, W, b, groups=groups, **kwargs)
            gy = numpy.random.RandomState(1).normal(size=y.shape)
            gW, gb = chainer.grad([F.sum(y * gy)], [W, b],
                                  enable_double_backprop=True)
            return gW, gb, y, gy

        gW, gb, y, gy = gradients(x)
        # Here x comes first, and _set_cover_all is given shapes.
        needs = chainer.Variable(x)
        y = F.deconvolution_2d(needs, W, b, groups=groups, **kwargs)
        _, gW0, gb0 = chainer.grad([F.sum(y * gy)], [needs, W, b])
        assert_allclose(gW.array, gW0.array, rtol=1e-10)
        assert_allclose(gb.array, gb0.array, rtol=1e-10)
        # Finite differences of one entry: the loss is linear in W.
        moved = W.array.copy()
        moved[1, 0, 2, 1] += 1
        y1 = F.deconvolution_2d(x, moved, b, groups=groups, **kwargs)
        assert_allclose(gW.array[1, 0, 2, 1], ((y1 - y).array * gy).sum(),
                        rtol=1e-9)

    def test_trains_as_a_first_layer(self):
        rng = numpy.random.RandomState(0)
        link = chainer.links.Deconvolution2D(
            2, 1, 3, initialW=rng.normal(size=(2, 1, 3, 3)))
        optimizer = chainer.optimizers.SGD(.01).setup(link)
        x = rng.normal(size=(4, 2, 5, 5)).astype(numpy.float32)
        losses = []
        for _ in range(5):
            loss = F.mean(link(x) ** 2)
            losses.append(float(loss.array))
            link.cleargrads()
            loss.backward()
            optimizer.update()
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]
