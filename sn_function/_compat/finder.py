"""A part in the import of other modules, without importing them."""
import contextlib
import importlib
import importlib.util
import itertools
import sys
import types
from typing import Any, ContextManager, Tuple


class Finder:
    """Base class of finders that repair some modules when they are imported.

    The finders after it in `sys.meta_path` find the module.  All is done under
    the lock of its import, so no thread sees it without its repairs.

    Attributes:
        names (tuple of str): Full names of the modules.

    """

    names: Tuple[str, ...] = ()

    def lending(self) -> ContextManager[Any]:
        """The context in which a module is executed."""
        return contextlib.nullcontext()

    def repair(self, name: str) -> None:
        """Repairs a module that has been executed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in self.names:
            return None
        later = itertools.dropwhile(
            lambda each: each is not self, sys.meta_path)
        for finder in itertools.islice(later, 1, None):
            find = getattr(finder, 'find_spec', None)
            spec = find and find(fullname, path, target)
            if spec is not None:
                # A finder in between may have asked this one again.
                if not isinstance(spec.loader, (_Loader, type(None))):
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    @classmethod
    def install(cls) -> None:
        """Ensures that the modules are repaired, now or when imported."""
        finder = cls()
        imported = [name for name in cls.names
                    if sys.modules.get(name) is not None]
        # By name: after a reload of its module the class is another one.
        names = [(type(f).__module__, type(f).__name__) for f in sys.meta_path]
        if (cls.__module__, cls.__name__) not in names:
            sys.meta_path.insert(0, finder)
            for name in cls.names:
                _drop_leftovers(name)
        repaired = 0
        for name in imported:
            # Another thread may be at it.  Where that fails, this one imports
            # it again, by the finder.
            module = importlib.import_module(name)
            # It may be what imports this package, by something in between.
            spec = getattr(module, '__spec__', None)
            if not getattr(spec, '_initializing', False):
                finder.repair(name)
                repaired += 1
        if finder in sys.meta_path and repaired == len(cls.names):
            sys.meta_path.remove(finder)


class _Loader:
    """Executes a module by its own loader, with the part of a finder."""

    def __init__(self, loader: Any, finder: Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: Any) -> Any:
        # A reload does not come here.
        _drop_leftovers(spec.name)
        if self._is_old():
            return None
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        # The module keeps the loader that it would have without this one.
        vars(module)['__spec__'].loader = self._loader
        vars(module)['__loader__'] = self._loader
        with self._finder.lending():
            if self._is_old():
                self._loader.load_module(module.__name__)
            else:
                self._loader.exec_module(module)
        self._finder.repair(module.__name__)

    def _is_old(self) -> bool:
        # As that of zipimport is before Python 3.10.
        return not hasattr(self._loader, 'exec_module')

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _drop_leftovers(package: str) -> None:
    """Forgets the submodules that a failed import of a package left behind.

    They refer to the package of that import, which never became complete.
    """
    # None forbids a module, and a stand-in of others has no spec.
    leftovers = [(name, module) for name, module in list(sys.modules.items())
                 if name.startswith(package + '.')
                 and getattr(module, '__spec__', None) is not None]
    # Asked afterwards: another thread may begin to import it.
    if package not in sys.modules:
        for name, module in leftovers:
            if sys.modules.get(name) is module:
                sys.modules.pop(name, None)


def is_there(package: str) -> bool:
    """Whether a package seems importable, found out without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:      # a module without a spec
        return True
