"""Spectral normalization for Chainer as one differentiable function."""
from sn_function import _compat as _compat  # before anything of Chainer
from sn_function import errors, functions, link_hooks
from sn_function._version import __version__
from sn_function.functions import spectral_norm, spectral_normalize
from sn_function.link_hooks import SpectralNormalization

__all__ = [
    'SpectralNormalization',
    '__version__',
    'errors',
    'functions',
    'link_hooks',
    'spectral_norm',
    'spectral_normalize',
]
