"""Spectral normalization for Chainer as one differentiable function."""
from sn_function import _compat as _compat  # before anything of Chainer
from sn_function import (
    chain,
    errors,
    extensions,
    functions,
    link_hooks,
    optimizer_hooks,
)
from sn_function._summary import summary
from sn_function._version import __version__
from sn_function.bake import bake
from sn_function.chain import ChainSpectralNormalization, cached
from sn_function.functions import (
    spectral_norm,
    spectral_normalize,
    spectral_normalize_all,
)
from sn_function.link_hooks import SpectralNormalization

__all__ = [
    'ChainSpectralNormalization',
    'SpectralNormalization',
    '__version__',
    'bake',
    'cached',
    'chain',
    'errors',
    'extensions',
    'functions',
    'link_hooks',
    'optimizer_hooks',
    'spectral_norm',
    'spectral_normalize',
    'spectral_normalize_all',
    'summary',
]
