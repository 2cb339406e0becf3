"""Doing something when a module is imported, without importing it."""
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any, Callable, Tuple


class Finder(importlib.abc.MetaPathFinder):
    """Base class of what has a part in the import of some modules.

    Attributes:
        names (tuple of str): Full names of the modules.

    """

    names: Tuple[str, ...] = ()

    def execute(
            self, run: Callable[[types.ModuleType], None],
            module: types.ModuleType) -> None:
        """Imports the module, which ``run(module)`` does, and does more."""
        raise NotImplementedError

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in self.names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module
            # This loader belongs to this one module.
            vars(spec.loader)['exec_module'] = (
                lambda module: self.execute(run, module))
        return spec

    @classmethod
    def install(cls) -> bool:
        """Returns whether it was not there yet."""
        # By name: after a reload of its module the class is another one.
        name = cls.__module__, cls.__name__
        if name in ((type(f).__module__, type(f).__name__)
                    for f in sys.meta_path):
            return False
        sys.meta_path.insert(0, cls())
        return True


def is_there(package: str) -> bool:
    """Whether it could be imported, as far as is seen without doing so."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:      # a module without a spec
        return True
