"""Makes Chainer 7.8.1, the last release (2022), import and work today.

The only file of the package that knows of NumPy, Chainer or Python versions
(:mod:`sn_function._pkg_resources` is what it lends).
`sn_function/__init__.py` imports it before anything of Chainer.  It looks at
what is there instead of comparing version numbers, and replaces only what it
finds missing or broken, in two ways:

* What Chainer misses while it is imported is lent to it and taken back
  afterwards: `numpy` and `sys.modules` are left as they were found.
* A function of Chainer that fails a tiny trial run is mended in Chainer.

`applied` names what was done.  On the stacks of Chainer's own time that is
the bug of Deconvolution2D alone, which every stack has.

Import `sn_function` before `chainer`.  The other order works as well where
Chainer can be imported by itself.  A worker process started by `spawn` or
`forkserver` imports Chainer anew, so the module that defines what is sent to
the worker has to import `sn_function` before `chainer`, too.
"""
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple, Type

import numpy

from sn_function import _pkg_resources

_INSTALL_CHAINER = '''\
sn_function needs Chainer, which is not installed. Install it with
    pip install "setuptools<81" wheel
    pip install --no-build-isolation chainer==7.8.1'''


def _works(name: str) -> bool:
    """Whether module `name`, which Chainer imports too, can be imported.

    Only an attempt tells: NumPy 1.26 on Python 3.11 has a `numpy.distutils`
    that setuptools 74 and newer break, and a setuptools older than Python
    has a `pkg_resources` that fails with an AttributeError.
    """
    with warnings.catch_warnings():
        # Both modules announce their own end.  That is Chainer's concern and
        # settled here, so these imports are silent even where warnings are
        # errors.  No other warning is touched, nor any other import.
        warnings.simplefilter('ignore', DeprecationWarning)
        warnings.filterwarnings(
            'ignore', 'pkg_resources is deprecated', UserWarning)
        try:
            importlib.import_module(name)
        except Exception:
            return False
    return True


def _replace(owner: Any, name: str, function: Callable) -> None:
    setattr(owner, name, function)


class _Loan(NamedTuple):
    """An entry of `sys.modules` or of a module's namespace, to be lent."""

    namespace: Dict[str, Any]
    name: str
    value: object


@contextlib.contextmanager
def _lent(loans: List[_Loan]) -> Iterator[None]:
    absent = object()
    found = [loan.namespace.get(loan.name, absent) for loan in loans]
    for loan in loans:
        loan.namespace[loan.name] = loan.value
    try:
        yield
    finally:
        for loan, value in zip(loans, found):
            del loan.namespace[loan.name]
            if value is not absent:     # None in sys.modules forbids a module
                loan.namespace[loan.name] = value


def _stand_in(name: str, **contents: object) -> types.ModuleType:
    module = types.ModuleType(name, f'A stand-in, for Chainer: {__name__}.')
    vars(module).update(contents)
    return module


def _lend_pkg_resources() -> List[_Loan]:
    # Imported by chainer/_environment_check.py and two modules of
    # chainer.testing.  setuptools 82 removed it; a fresh environment of
    # Python 3.12 has no setuptools at all.
    # Delete with the support of Chainer 7.
    if _works('pkg_resources'):
        return []
    return [_Loan(sys.modules, 'pkg_resources', _pkg_resources)]


class _TestingFinder(importlib.abc.MetaPathFinder):
    """Lends pkg_resources to the modules of chainer.testing that import it.

    `import chainer` does not import them, and importing them with it would
    take pytest along.  A stand-in left in `sys.modules` for them would be
    found by every `try: import pkg_resources` of other packages.
    """

    users = ('chainer.testing.helper', 'chainer.testing.doctest_helper')

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in self.users:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                with _lent(_lend_pkg_resources()):
                    run(module)

            # This loader belongs to this one module.
            _replace(spec.loader, 'exec_module', exec_module)
        return spec

    @classmethod
    def install(cls) -> bool:
        # By name: after a reload of this module the class is another one.
        if cls.__name__ in (type(f).__name__ for f in sys.meta_path):
            return False
        sys.meta_path.insert(0, cls())
        return True


def _lend_system_info() -> List[_Loan]:
    # Imported by chainer/_environment_check.py, which asks it on macOS alone
    # whether NumPy was linked with Accelerate.  Python 3.12 has no
    # numpy.distutils; on older ones setuptools 74 broke it.  The stand-in
    # knows of no library, so Chainer does not warn.
    # Delete with the support of Chainer 7.
    name = 'numpy.distutils.system_info'
    if _works(name):
        return []
    system_info = _stand_in(name, get_info=lambda *args, **kwargs: {})
    loans = [_Loan(sys.modules, name, system_info)]
    distutils = sys.modules.get('numpy.distutils')
    if distutils is None:
        distutils = _stand_in('numpy.distutils', system_info=system_info)
        loans.append(_Loan(vars(numpy), 'distutils', distutils))
    else:
        loans.append(_Loan(vars(distutils), 'system_info', system_info))
    return loans


_SCTYPES = {
    'int': [numpy.int8, numpy.int16, numpy.int32, numpy.int64],
    'float': [numpy.float16, numpy.float32, numpy.float64, numpy.longdouble],
}


def _lend_sctypes() -> List[_Loan]:
    # chainer#8632: functions/array/as_strided.py reads np.sctypes['int'] when
    # imported.  NumPy 2 has no np.sctypes.
    # Delete with the support of Chainer 7, or of NumPy 2.
    if hasattr(numpy, 'sctypes'):
        return []
    return [_Loan(vars(numpy), 'sctypes', _SCTYPES)]


def _import_chainer() -> List[str]:
    """Imports Chainer and returns the names of what had to be lent."""
    loans = _lend_pkg_resources()
    names = ['pkg_resources'] if loans and _TestingFinder.install() else []
    if 'chainer' not in sys.modules:
        for name, lend in (('numpy.distutils.system_info', _lend_system_info),
                           ('numpy.sctypes', _lend_sctypes)):
            more = lend()
            loans += more
            names += [name] if more else []
    with _lent(loans), _without_advice_on_cudnn():
        try:
            importlib.import_module('chainer')
        except ModuleNotFoundError as error:
            if error.name != 'chainer':
                raise
            raise ImportError(_INSTALL_CHAINER, name='chainer') from None
    return names


@contextlib.contextmanager
def _without_advice_on_cudnn() -> Iterator[None]:
    """Chainer advises to reinstall CuPy for cuDNN, once, when imported.

    CuPy 14 has no cuDNN module, so this does not help; and where warnings are
    errors Chainer cannot be imported, as functions/activation/relu.py makes
    a kernel.  With another CuPy the advice is given.
    Delete with the support of Chainer 7.
    """
    with warnings.catch_warnings():
        if _cupy_has_no_cudnn():
            warnings.filterwarnings(
                'ignore', 'cuDNN is not enabled', UserWarning)
        yield


def _cupy_has_no_cudnn() -> bool:
    try:
        return (importlib.util.find_spec('cupy') is not None
                and importlib.util.find_spec('cupy.cudnn') is None)
    except Exception:
        return False  # a broken CuPy: Chainer tells


def _reading(function: Callable, **names: object) -> Callable:
    """A copy of a function of Chainer that reads a richer NumPy.

    Its global `numpy` (or `np`) becomes a copy of the module that has
    `names` as well.  So neither NumPy nor the rest of the module changes,
    where `if xp is numpy` must stay true.
    """
    richer = types.ModuleType('numpy')
    vars(richer).update(vars(numpy), **names)
    scope = {name: richer if value is numpy else value
             for name, value in function.__globals__.items()}
    copy = types.FunctionType(
        function.__code__, scope, function.__name__,
        function.__defaults__, function.__closure__)
    return functools.update_wrapper(copy, function)


# Each repair of Chainer is two functions.  `_try_...` runs the code that may
# be broken, `_mend_...` repairs it where that raised the expected error.

def _try_as_strided() -> None:
    from chainer.functions.array import as_strided as module
    x = numpy.zeros(2)
    geometry = module.TensorGeometry(x)
    module.AsStridedGrad(geometry, (2,), (1,), 0).forward((x,))


def _mend_as_strided() -> None:
    # chainer#8632, at run time: the backward of F.as_strided reads
    # np.sctypes['float'].  Delete with _lend_sctypes.
    from chainer.functions.array.as_strided import AsStridedGrad
    _replace(AsStridedGrad, 'forward',
             _reading(AsStridedGrad.forward, sctypes=_SCTYPES))


def _try_resize_images() -> None:
    from chainer.functions.array import resize_images as module
    module.compute_indices_and_weights((1, 1), (1, 1), 'nearest', True, numpy)


def _mend_resize_images() -> None:
    # F.resize_images reads np.float, the builtin, gone in NumPy 1.24.
    # Delete with the support of Chainer 7, or of NumPy 1.24 and newer.
    from chainer.functions.array import resize_images as module
    _replace(module, 'compute_indices_and_weights',
             _reading(module.compute_indices_and_weights, float=float))


def _try_categorical() -> None:
    from chainer.distributions import Categorical
    Categorical(p=numpy.ones((1, 1))).log_prob(numpy.zeros(1))


def _mend_categorical() -> None:
    # Categorical.log_prob adds a list to what np.meshgrid returns: a list,
    # since NumPy 2 a tuple.
    # Delete with the support of Chainer 7, or of NumPy 2.
    from chainer.distributions import Categorical

    def meshgrid(*args: Any, **kwargs: Any) -> List[numpy.ndarray]:
        return list(numpy.meshgrid(*args, **kwargs))

    _replace(Categorical, 'log_prob',
             _reading(Categorical.log_prob, meshgrid=meshgrid))


def _try_pad_sequence() -> None:
    from chainer.functions.array.pad_sequence import PadSequence
    PadSequence(1, -1).forward((numpy.zeros(0, numpy.uint8),))


def _mend_pad_sequence() -> None:
    # F.pad_sequence stores its padding, often -1, in an array of the inputs'
    # dtype.  NumPy 2 refuses a Python int that does not fit, for example in
    # an unsigned array; before it wrapped around, as astype still does.
    # Delete with the support of Chainer 7, or of NumPy 2.
    from chainer.functions.array.pad_sequence import PadSequence
    original = PadSequence.forward

    @functools.wraps(original)
    def forward(self: Any, xs: Tuple[Any, ...]) -> Any:
        dtype = xs[0].dtype
        if dtype.kind in 'iu' and isinstance(self.padding, int):
            self.padding = numpy.array(self.padding).astype(dtype)[()]
        return original(self, xs)

    _replace(PadSequence, 'forward', forward)


def _try_deconvolution_2d() -> None:
    import chainer
    x = numpy.zeros((1, 1, 1, 1), numpy.float32)
    W = chainer.Variable(x)
    with chainer.using_config('enable_backprop', True):
        chainer.grad([chainer.functions.deconvolution_2d(x, W)], [W])


def _mend_deconvolution_2d() -> None:
    # chainer#8624: where the input needs no gradient, as in a first layer,
    # Deconvolution2D's backward passes Variables for their shapes.
    # Fixed on Chainer's master.  Delete with the support of Chainer 7.8.1.
    from chainer.functions.connection.deconvolution_2d import (
        Deconvolution2DFunction as Function,
    )
    original = Function._set_cover_all

    @functools.wraps(original)
    def _set_cover_all(self: Any, x: Any, W: Any) -> None:
        original(self, getattr(x, 'shape', x), getattr(W, 'shape', W))

    _replace(Function, '_set_cover_all', _set_cover_all)


class _Repair(NamedTuple):
    name: str
    attempt: Callable[[], None]
    error: Type[Exception]
    mend: Callable[[], None]

    def is_needed(self) -> bool:
        with warnings.catch_warnings():
            # What only warns is not broken.
            warnings.simplefilter('ignore')
            try:
                self.attempt()
            except Exception as error:
                # Another error is not what `mend` can repair.
                return isinstance(error, self.error)
        return False


_REPAIRS = (
    _Repair('as_strided',
            _try_as_strided, AttributeError, _mend_as_strided),
    _Repair('resize_images',
            _try_resize_images, AttributeError, _mend_resize_images),
    _Repair('categorical',
            _try_categorical, TypeError, _mend_categorical),
    _Repair('pad_sequence',
            _try_pad_sequence, OverflowError, _mend_pad_sequence),
    _Repair('deconvolution_2d',
            _try_deconvolution_2d, ValueError, _mend_deconvolution_2d),
)


def _repair() -> Tuple[str, ...]:
    names = _import_chainer()
    for repair in _REPAIRS:
        if repair.is_needed():
            repair.mend()
            names.append(repair.name)
    return tuple(names)


# Names of the repairs made in this process.  A reload finds nothing left to
# do, and keeps the record.
applied: Tuple[str, ...] = globals().get('applied', ()) + _repair()
