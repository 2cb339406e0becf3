from sn_function import _compat as _compat  # before anything of Chainer
from sn_function._version import __version__ as __version__
