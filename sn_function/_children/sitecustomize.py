"""Python runs this at its start where this directory is on PYTHONPATH.

It has `sn_function` imported before Chainer, from where this file is: so it is
the same one in all children, also where they could not find it.  Nothing else
is imported, as most children use neither.

A `sitecustomize` of the user, in whose place this one came, is run as well.
A Python 3 that `sn_function` does not support starts as it would without it.
"""
import os
import sys

TYPE_CHECKING = False       # to import typing would take a millisecond
if TYPE_CHECKING:
    from typing import Any


class ChainerFinder:
    """Imports sn_function when the program imports Chainer."""

    names = ('chainer', 'chainermn', 'onnx_chainer')

    def find_spec(
            self, fullname: str, path: 'Any' = None, target: 'Any' = None,
    ) -> 'Any':
        if fullname == 'sn_function':
            from importlib import util
            package = os.path.dirname(os.path.dirname(__file__))
            return util.spec_from_file_location(
                fullname, os.path.join(package, '__init__.py'),
                submodule_search_locations=[package])
        if fullname not in self.names:
            return None
        __import__('sn_function')   # it installs finders of its own
        import contextlib
        from importlib import util
        with contextlib.suppress(ValueError):   # another thread was first
            sys.meta_path.remove(self)
        return util.find_spec(fullname)     # those are asked now


def run_that_of_the_user() -> None:
    """Imports the sitecustomize that there is without this directory."""
    here = os.path.dirname(__file__)
    sys.path[:] = [path for path in sys.path if path != here]
    this = sys.modules.pop('sitecustomize')
    try:
        __import__('sitecustomize')
    except ImportError as error:
        if error.name != 'sitecustomize':
            raise
        sys.modules['sitecustomize'] = this


if __name__ == 'sitecustomize':
    if sys.version_info >= (3, 8):  # noqa: UP036, it may be a child's
        sys.meta_path.insert(0, ChainerFinder())
    run_that_of_the_user()
