"""Makes Chainer 7.8.1, the last release (2022), import and work today.

`sn_function/__init__.py` calls :func:`install`, which imports nothing of
Chainer or NumPy: the work is done when the program imports Chainer.  It looks
at what is there instead of comparing version numbers, and replaces only what
it finds missing or broken, in two ways:

* :mod:`.loans`: what Chainer misses while it is imported is lent to it and
  taken back afterwards (one of them is :mod:`.pkg_resources`).
* :mod:`.repairs`: a function of Chainer that fails a trial run is repaired.

:mod:`.onnx_chainer` does both for `onnx_chainer`, :mod:`.chainermn` the latter
for ChainerMN, and :mod:`.caffe` for `chainer.links.caffe`, when a program
imports them.  What the first two must know of the hooks of this package is
registered with :mod:`.guards`.

This is the ground of the package: it imports nothing above it.  No other wing
knows of NumPy, Chainer or Python versions.

:mod:`.replacement` puts the hook of this package in the place of Chainer's,
on request.

`applied` names what was done.  On the stacks of Chainer's own time that is
the repair of Deconvolution2D and of MultiprocessIterator's pool, which every
stack needs.

Import `sn_function` before `chainer`.  The other order works as well where
Chainer can be imported by itself; and after an `import chainer` that failed,
as what it left in `sys.modules` is dropped.  A worker process started by
`spawn` or `forkserver` imports Chainer anew, but the script that started it
first: so that script has to import `sn_function` before `chainer`, at its top
level, or :func:`sn_function.install` is called before the worker starts.
"""
import contextlib
import importlib
import sys
from typing import ContextManager, Iterable, Iterator, List, Tuple

from sn_function._compat import finder

# Names of what was lent or repaired in this process.  It is empty until
# Chainer is imported, and a reload keeps it.
applied: Tuple[str, ...] = globals().get('applied', ())

_INSTALL_CHAINER = '''\
sn_function needs Chainer, which is not installed. Install it with
    pip install "setuptools<81" wheel
    pip install --no-build-isolation chainer==7.8.1'''


class _ChainerFinder(finder.Finder):
    """Lends Chainer what it misses while it is imported, and repairs it."""

    names = ('chainer',)

    @contextlib.contextmanager
    def lending(self) -> Iterator[None]:
        from sn_function._compat import loans  # it needs NumPy
        with loans.lent_to_chainer() as names:
            yield
        _record(names)

    def repair(self, name: str) -> None:
        # They need Chainer, which has been imported.
        from sn_function._compat import loans, repairs, replacement, trials
        _record(loans.lend_to_testing())
        _record(trials.repair(repairs.REPAIRS))
        # An attribute of chainer from now on.  Programs that import only
        # `sn_function` and `chainer` use it.
        importlib.import_module('chainer.link_hooks')
        if replacement.is_wanted():
            replacement.replace()


class _CaffeFinder(finder.Finder):
    """Repairs the messages of chainer.links.caffe."""

    names = ('chainer.links.caffe.protobuf3.caffe_pb2',)

    def lending(self) -> ContextManager[None]:
        from sn_function._compat import caffe
        return caffe.reading_the_description()

    def repair(self, name: str) -> None:
        from sn_function._compat import caffe
        caffe.repair()


class _ExporterFinder(finder.Finder):
    """The same for onnx_chainer."""

    names = ('onnx_chainer',)

    def lending(self) -> ContextManager[None]:
        from sn_function._compat import loans, onnx_chainer
        return loans.lent(onnx_chainer.lend_mapping())

    def repair(self, name: str) -> None:
        from sn_function._compat import onnx_chainer
        onnx_chainer.repair()


class _ChainerMNFinder(finder.Finder):
    """Repairs ChainerMN."""

    names = ('chainermn', 'chainermn.communicators._memory_utility')

    def repair(self, name: str) -> None:
        from sn_function._compat import chainermn
        chainermn.repair(name)


def _record(names: Iterable[str]) -> None:
    global applied
    applied += tuple(name for name in names if name not in applied)


def install() -> None:
    """Ensures that all is repaired, now or when it is imported."""
    _ChainerFinder.install()
    if finder.is_there('google'):   # protobuf
        _CaffeFinder.install()
    if finder.is_there('onnx'):
        _ExporterFinder.install()
    # Without mpi4py ChainerMN has no communicators.
    if finder.is_there('mpi4py'):
        _ChainerMNFinder.install()


def replace_hook() -> List[str]:
    """Puts the hook of this package in the place of an imported Chainer's.

    In one that is imported later, `_ChainerFinder` does.

    Returns:
        The modules that have imported Chainer's.  If there are any, nothing
        has been changed.

    """
    if sys.modules.get('chainer') is None:
        return []
    import_chainer()    # another thread may be at it
    from sn_function._compat import replacement
    return replacement.replace()


def import_chainer() -> None:
    """Imports Chainer.  Where there is none, the error says how to install it.
    """
    try:
        importlib.import_module('chainer')
    except ModuleNotFoundError as error:
        if error.name != 'chainer':
            raise
        raise ImportError(_INSTALL_CHAINER, name='chainer') from None
    if not applied:     # this package was imported in the middle of Chainer
        install()


def explain(name: str) -> Tuple[str, str]:
    """What is wrong without `name` of `applied`, and when it is needed.

    It also knows the names of `applied` of :mod:`.caffe`,
    :mod:`.onnx_chainer` and :mod:`.chainermn`.
    """
    import_chainer()
    from sn_function._compat import (
        caffe,
        chainermn,
        loans,
        onnx_chainer,
        repairs,
    )
    reasons = {each.name: (each.fault, each.needed) for each in (
        *repairs.REPAIRS, *caffe.REPAIRS, *onnx_chainer.REPAIRS,
        *chainermn.REPAIRS)}
    return {**loans.REASONS, **reasons}[name]
