"""Puts the hook of this package in the place of Chainer's.

Programs then get it from wherever they import Chainer's.  It is imported when
they do, as it needs Chainer itself; :mod:`.guards` knows it.

This module imports Chainer, so Chainer has to be imported before it.
"""
import functools
import os
import sys
import threading
import types
from typing import Any, Callable, List

import chainer
from chainer import link_hooks
from chainer.link_hooks import spectral_normalization

from sn_function._compat import guards

_NAME = 'SpectralNormalization'
_HOMES = link_hooks, spectral_normalization

# Chainer's own class, whatever is in its place.
ChainersHook: Any = spectral_normalization.SpectralNormalization

_lock = threading.Lock()
# To ask a module itself may import what it loads lazily.
_names_in: Any = vars(types.ModuleType)['__dict__'].__get__


def is_wanted() -> bool:
    """Whether this process was started with `--hook`, or by one that was."""
    return os.environ.get('SN_FUNCTION_HOOK') == '1'


def replace() -> List[str]:
    """Replaces Chainer's hook, unless that is done or it is too late.

    Returns:
        The modules that have imported it.  If there are any, nothing has been
        changed.

    """
    with _lock:
        modules = _users()
        if modules or _NAME not in vars(link_hooks):
            return modules
        chainer.Link.add_hook = _refusing_both(chainer.Link.add_hook)
        for module in _HOMES:
            names = [name for name in vars(module) if not name.startswith('_')]
            delattr(module, _NAME)
            vars(module).update(
                __all__=names,  # for import *
                __dir__=functools.partial(_list, module),
                __getattr__=functools.partial(_get, module.__name__))
        return []


def _get(module: str, name: str) -> Any:
    if name == _NAME:
        return guards.registered.hook()
    raise AttributeError(f'module {module!r} has no attribute {name!r}')


def _list(module: types.ModuleType) -> List[str]:
    return sorted({*vars(module), _NAME})


def _users() -> List[str]:
    """Names of the modules that have Chainer's class, or a subclass of it."""
    names = {each.__module__ for each in ChainersHook.__subclasses__()}
    for name, module in list(sys.modules.items()):
        if issubclass(type(module), types.ModuleType):
            found = dict(_names_in(module))
            if any(value is ChainersHook for value in found.values()):
                names.add(found.get('__name__', name))
    return sorted(name for name in names
                  if name.split('.')[0] not in ('chainer', 'sn_function'))


def _refusing_both(add_hook: Callable) -> Callable:
    @functools.wraps(add_hook)
    def checked(link: Any, hook: Any, name: Any = None) -> Any:
        guards.registered.check_hook(link, hook)
        return add_hook(link, hook, name)

    return checked
