"""Spectral normalization for Chainer as one differentiable function.

Importing it is light: it imports neither Chainer nor NumPy, and ensures that
Chainer is repaired when it is imported.  A public name is imported where it
is first used.
"""
import importlib
from typing import TYPE_CHECKING, Any, List

from sn_function import _compat, _guards
from sn_function._run import install
from sn_function._version import __version__
from sn_function.bake import bake

_guards.register()
_compat.install()

__all__ = [
    'ChainSpectralNormalization',
    'Interval',
    'SpectralNormalization',
    'Summary',
    'SummaryRow',
    '__version__',
    'bake',
    'cached',
    'certify',
    'chain',
    'conv_spectral_normalize',
    'distributed',
    'errors',
    'extensions',
    'functions',
    'install',
    'link_hooks',
    'normalized',
    'norms',
    'optimizer_hooks',
    'refresh',
    'snapshot',
    'spectral_norm',
    'spectral_normalize',
    'spectral_normalize_all',
    'summary',
]

if TYPE_CHECKING:
    from sn_function import (
        chain,
        distributed,
        errors,
        extensions,
        functions,
        link_hooks,
        optimizer_hooks,
        snapshot,
    )
    from sn_function._certificate.interval import Interval
    from sn_function._certify import certify
    from sn_function._normalized import normalized
    from sn_function._norms import norms
    from sn_function._refresh import refresh
    from sn_function._summary import Summary, SummaryRow, summary
    from sn_function.chain import ChainSpectralNormalization, cached
    from sn_function.functions import (
        conv_spectral_normalize,
        spectral_norm,
        spectral_normalize,
        spectral_normalize_all,
    )
    from sn_function.link_hooks import SpectralNormalization
else:
    # Names of modules, and of what is defined in them.
    _MODULES = (
        'chain', 'distributed', 'errors', 'extensions', 'functions',
        'link_hooks', 'optimizer_hooks', 'snapshot')
    _HOMES = {
        'ChainSpectralNormalization': 'chain',
        'Interval': '_certificate.interval',
        'SpectralNormalization': 'link_hooks',
        'Summary': '_summary',
        'SummaryRow': '_summary',
        'cached': 'chain',
        'certify': '_certify',
        'conv_spectral_normalize': 'functions',
        'normalized': '_normalized',
        'norms': '_norms',
        'refresh': '_refresh',
        'spectral_norm': 'functions',
        'spectral_normalize': 'functions',
        'spectral_normalize_all': 'functions',
        'summary': '_summary',
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES and name not in _HOMES:
            raise AttributeError(
                f'module {__name__!r} has no attribute {name!r}')
        _compat.import_chainer()
        module = importlib.import_module(
            f'{__name__}.{_HOMES.get(name, name)}')
        value = getattr(module, name) if name in _HOMES else module
        globals()[name] = value     # next time it is found at once
        return value

    def __dir__() -> List[str]:
        own = {name for name in globals() if name.startswith('__')}
        return sorted({*own, *__all__})
