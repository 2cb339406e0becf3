"""Other stacks are imitated in fresh interpreters, where warnings are errors.

An interpreter that has imported Chainer cannot show what importing it does.
"""
import os
import pathlib
import subprocess
import sys
import textwrap
import warnings

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sn_function import _compat, _pkg_resources  # before Chainer

# isort: split
import chainer
import chainer.functions as F
from chainer.functions.array import as_strided, resize_images

ROOT = pathlib.Path(__file__).resolve().parent.parent

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
            import sn_function
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
            import chainer
            from chainer.distributions import Categorical
            from chainer.functions.array import (
                as_strided, pad_sequence, resize_images)
            from chainer.functions.connection import deconvolution_2d

            # Mended by whoever maintains this Chainer.
            def forward(self, xs):
                return xs
            def _set_cover_all(self, x, W):
                self.cover_all = False
            pad_sequence.PadSequence.forward = forward
            deconvolution = deconvolution_2d.Deconvolution2DFunction
            deconvolution._set_cover_all = _set_cover_all

            def state():
                return list(sys.meta_path), [
                    {name: value for name, value in vars(owner).items()
                     if name != '__warningregistry__'}
                    for owner in (
                        sys, numpy, distutils, system_info, pkg_resources,
                        as_strided, as_strided.AsStridedGrad, resize_images,
                        Categorical, pad_sequence.PadSequence, deconvolution)]

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
            assert _compat.applied[:4] == (
                'pkg_resources', 'as_strided', 'resize_images', 'categorical')
            import chainer.testing
            import chainer.functions as F
            x = chainer.Variable(numpy.zeros((1, 1, 2, 2), 'f'))
            assert F.resize_images(x, (3, 3)).shape == (1, 1, 3, 3)
        ''')

    def test_without_setuptools(self):
        run(HIDE, '''
            hide('setuptools', 'pkg_resources', 'numpy.distutils')
            from sn_function import _compat
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
            assert _compat.applied[0] == 'pkg_resources'
            from chainer import testing
        ''', paths=[tmp_path])

    @pytest.mark.parametrize('category', ['DeprecationWarning', 'UserWarning'])
    def test_pkg_resources_that_only_warns(self, tmp_path, category):
        # As that of setuptools 67 to 81 does; and the warning is not hidden
        # from those who import it by themselves.
        (tmp_path / 'pkg_resources.py').write_text(textwrap.dedent(f'''
            import warnings
            from sn_function._pkg_resources import (
                DistributionNotFound, ResolutionError, VersionConflict,
                WorkingSet, get_distribution, require)
            warnings.warn('pkg_resources is deprecated as an API.',
                          {category}, stacklevel=2)
        '''))
        run('''
            import sys
            from sn_function import _compat
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
            assert 'numpy.distutils.system_info' in _compat.applied
            # What Chainer does on macOS.
            with _compat._lent(_compat._lend_system_info()):
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
            assert {'numpy.sctypes', 'as_strided', 'categorical'} <= set(
                _compat.applied)
            import chainer
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
                import sn_function
            for warning in caught:
                print(warning.message)
        ''', paths=[tmp_path])
        assert 'CuPy (cupy) version 13.6.0 may not be compatible' in printed
        assert 'Failed to check' not in printed

    def test_without_chainer_says_how_to_install_it(self):
        printed = run(HIDE, '''
            hide('chainer')
            try:
                import sn_function
            except ImportError as error:
                print(error)
        ''')
        assert '--no-build-isolation chainer==7.8.1' in printed

    def test_error_inside_chainer_is_not_taken_for_its_absence(self):
        printed = run(HIDE, '''
            hide('six')
            try:
                import sn_function
            except ImportError as error:
                print(error)
        ''')
        assert printed == "No module named 'six'"

    def test_spawned_worker(self, tmp_path):
        (tmp_path / 'job.py').write_text(textwrap.dedent('''
            import sn_function
            import chainer

            def total(x):
                return float(chainer.functions.sum(x).array)
        '''))
        printed = run('''
            import multiprocessing
            import numpy
            import job
            with multiprocessing.get_context('spawn').Pool(1) as pool:
                print(pool.apply(job.total, [numpy.ones(3, 'f')]))
                pool.close()
                pool.join()
        ''', paths=[tmp_path])
        assert printed == '3.0'

    def test_module_forbidden_by_the_user_stays_so(self):
        run('''
            import sys
            sys.modules['pkg_resources'] = None
            from sn_function import _compat
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


class TestPkgResources:

    def test_require(self):
        found, = _pkg_resources.WorkingSet().require('numpy>=1.0,<100')
        assert found.version == numpy.__version__

    def test_missing(self):
        with pytest.raises(_pkg_resources.DistributionNotFound):
            _pkg_resources.require('no-such-thing>=1.0')

    def test_conflict(self):
        with pytest.raises(_pkg_resources.VersionConflict):
            _pkg_resources.require('numpy', 'numpy >= 100')

    def test_errors_are_resolution_errors(self):
        assert issubclass(
            _pkg_resources.DistributionNotFound,
            _pkg_resources.ResolutionError)
        assert issubclass(
            _pkg_resources.VersionConflict, _pkg_resources.ResolutionError)

    def test_not_a_requirement(self):
        with pytest.raises(ValueError, match='Not a requirement'):
            _pkg_resources.require('>=1.0')

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
        assert _pkg_resources._satisfies(version, specifier) is expected

    def test_specifier_that_needs_packaging(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'packaging.specifiers', None)
        with pytest.raises(ValueError, match='pip install packaging'):
            _pkg_resources._satisfies('1.4', '==1.*')


# What only warns is not broken.
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('repair', _compat._REPAIRS, ids=lambda r: r.name)
def test_nothing_stays_broken(repair):
    repair.attempt()
    assert not repair.is_needed()


def test_only_the_expected_error_calls_for_a_repair():
    def attempt():
        raise KeyError

    assert _compat._Repair('', attempt, KeyError, None).is_needed()
    assert not _compat._Repair('', attempt, ValueError, None).is_needed()


def test_warning_of_an_attempt_is_neither_shown_nor_an_error():
    def attempt():
        warnings.warn('', DeprecationWarning, stacklevel=1)
        raise KeyError

    assert _compat._Repair('', attempt, KeyError, None).is_needed()


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
