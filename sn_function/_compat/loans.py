"""What Chainer misses while it is imported, and is lent.

Everything is taken back afterwards: `numpy` and `sys.modules` are left as they
were found.  Nothing is decided by version numbers: what can be imported or
read is not lent.
"""
import contextlib
import importlib
import importlib.util
import sys
import types
import warnings
from typing import Any, ContextManager, Dict, Iterator, List, NamedTuple

import numpy

from sn_function._compat import finder, pkg_resources

# As NumPy 1 had it, in what Chainer reads of it.
SCTYPES = {
    'int': [numpy.int8, numpy.int16, numpy.int32, numpy.int64],
    'float': [numpy.float16, numpy.float32, numpy.float64, numpy.longdouble],
}

# What is wrong without it, and when it is needed.  Each goes with the support
# of Chainer 7, or of what is named.
REASONS = {
    'pkg_resources': (
        'import chainer fails',
        'without pkg_resources, as setuptools 82 is'),
    'numpy.distutils.system_info': (
        'import chainer fails',
        'without numpy.distutils: Python 3.12, setuptools 74'),
    'numpy.sctypes': (
        'import chainer fails (chainer#8632)', 'with NumPy 2'),
}


def _works(name: str) -> bool:
    """Whether module `name`, which Chainer imports too, can be imported.

    Only an attempt tells: NumPy 1.26 on Python 3.11 has a `numpy.distutils`
    that setuptools 74 and newer break, and a setuptools older than Python
    has a `pkg_resources` that fails with an AttributeError.
    """
    with warnings.catch_warnings():
        # Both modules warn that they are deprecated.  That is no concern of
        # the user, so these imports are silent even where warnings are
        # errors.  Other warnings and other imports are left alone.
        warnings.simplefilter('ignore', DeprecationWarning)
        warnings.filterwarnings(
            'ignore', 'pkg_resources is deprecated', UserWarning)
        try:
            importlib.import_module(name)
        except Exception:
            return False
    return True


class Loan(NamedTuple):
    """An entry of `sys.modules` or of a module's namespace, to be lent."""

    namespace: Dict[str, Any]
    name: str
    value: object


@contextlib.contextmanager
def lent(loans: List[Loan]) -> Iterator[None]:
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


def stand_in(name: str, **contents: object) -> types.ModuleType:
    module = types.ModuleType(name, f'A stand-in, for Chainer: {__name__}.')
    vars(module).update(contents)
    return module


def _lend_pkg_resources() -> List[Loan]:
    # Imported by chainer/_environment_check.py and two modules of
    # chainer.testing.  setuptools 82 removed it; a fresh environment of
    # Python 3.12 has no setuptools at all.
    # Delete with the support of Chainer 7.
    if _works('pkg_resources'):
        return []
    return [Loan(sys.modules, 'pkg_resources', pkg_resources)]


class _TestingFinder(finder.Finder):
    """Lends pkg_resources to the modules of chainer.testing that import it.

    `import chainer` does not import them, and importing them at once would
    also import pytest.  A stand-in left in `sys.modules` for them would be
    found by every `try: import pkg_resources` of other packages.
    """

    names = ('chainer.testing.helper', 'chainer.testing.doctest_helper')

    def lending(self) -> ContextManager[None]:
        return lent(_lend_pkg_resources())


def _lend_system_info() -> List[Loan]:
    # Imported by chainer/_environment_check.py, which asks it on macOS alone
    # whether NumPy was linked with Accelerate.  Python 3.12 has no
    # numpy.distutils; on older ones setuptools 74 broke it.  The stand-in
    # knows of no library, so Chainer does not warn.
    # Delete with the support of Chainer 7.
    name = 'numpy.distutils.system_info'
    if _works(name):
        return []
    system_info = stand_in(name, get_info=lambda *args, **kwargs: {})
    loans = [Loan(sys.modules, name, system_info)]
    distutils = sys.modules.get('numpy.distutils')
    if distutils is None:
        distutils = stand_in('numpy.distutils', system_info=system_info)
        loans.append(Loan(vars(numpy), 'distutils', distutils))
    else:
        loans.append(Loan(vars(distutils), 'system_info', system_info))
    return loans


def _lend_sctypes() -> List[Loan]:
    # chainer#8632: functions/array/as_strided.py reads np.sctypes['int'] when
    # imported.  NumPy 2 has no np.sctypes.
    # Delete with the support of Chainer 7, or of NumPy 2.
    if hasattr(numpy, 'sctypes'):
        return []
    return [Loan(vars(numpy), 'sctypes', SCTYPES)]


# By the names of `REASONS`.
LENDERS = (
    ('pkg_resources', _lend_pkg_resources),
    ('numpy.distutils.system_info', _lend_system_info),
    ('numpy.sctypes', _lend_sctypes),
)


@contextlib.contextmanager
def lent_to_chainer() -> Iterator[List[str]]:
    """Lends what Chainer misses while it is imported, and yields the names."""
    found = [(name, lend()) for name, lend in LENDERS]
    loans = [loan for _, each in found for loan in each]
    with lent(loans), _without_advice_on_cudnn():
        yield [name for name, each in found if each]


def lend_to_testing() -> List[str]:
    """Ensures that chainer.testing can be imported; returns what it misses."""
    if not _lend_pkg_resources():
        return []
    _TestingFinder.install()
    return ['pkg_resources']


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
        return False  # a broken CuPy: Chainer reports it
