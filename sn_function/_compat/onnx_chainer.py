"""Mends `onnx_chainer`, Chainer's exporter, when it is imported.

Its own time is that of onnx 1.6.  It is a package of its own, which needs
onnx, so nothing is done or imported before a program imports it.  As in
:mod:`.repairs`, what fails a tiny trial run is mended, and
:data:`REPAIRS` says what is wrong and when that is needed.

One thing is no repair: with any onnx the exporter tells a user to bake a model
first, as it has no converter for spectral normalization.
"""
import functools
import importlib
import sys
import types
import warnings
from typing import Any, Callable, List

import numpy

from sn_function._compat import finder, loans
from sn_function._compat.nep50 import WrongResultError
from sn_function._compat.repairs import Repair

# That of onnx 1.6.  Its opset, 11, is the last one that the exporter knows.
IR_VERSION = 6

# Names of what was mended in this process.
applied: List[str] = []


def _module(name: str) -> Any:
    # onnx_chainer.export, as an attribute, is a function.
    return sys.modules[f'onnx_chainer.{name}']


def _richer(**names: object) -> types.ModuleType:
    """What a module of the exporter then takes for onnx."""
    import onnx
    module = types.ModuleType('onnx', f'With more names, for {__name__}.')
    vars(module).update(names, __getattr__=functools.partial(getattr, onnx))
    return module


# onnx.mapping announces its end from onnx 1.13 on, and is gone after 1.18.

def _mapping() -> types.ModuleType:
    """What the exporter reads of it."""
    from onnx import TensorProto, helper
    types_ = [numpy.dtype(c) for c in '?bBhHiIqQefdFD']
    fields = {TensorProto.FLOAT: 'float_data', TensorProto.BOOL: 'int32_data',
              TensorProto.INT32: 'int32_data', TensorProto.INT64: 'int64_data',
              TensorProto.DOUBLE: 'double_data'}
    return loans._stand_in(
        'onnx.mapping', STORAGE_TENSOR_TYPE_TO_FIELD=fields,
        NP_TYPE_TO_TENSOR_TYPE={
            each: helper.np_dtype_to_tensor_dtype(each) for each in types_})


def _lend_mapping() -> List[loans._Loan]:
    with warnings.catch_warnings():
        warnings.simplefilter('error', DeprecationWarning)
        try:
            mapping = importlib.import_module('onnx.mapping')
            mapping.NP_TYPE_TO_TENSOR_TYPE[numpy.dtype('f')]
        except (ImportError, DeprecationWarning):
            pass
        else:
            return []
    try:
        return [loans._Loan(sys.modules, 'onnx.mapping', _mapping())]
    except (ImportError, AttributeError):
        return []       # without onnx, or a broken one: the exporter tells


def _try_mapping() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error', DeprecationWarning)
        try:
            _module('context')._tensor_from_array_for_constant(
                numpy.zeros(1, 'f'), 'x')
        except DeprecationWarning:
            raise AttributeError from None


def _mend_mapping() -> None:
    _module('context').onnx = _richer(mapping=_mapping())


# The exporter calls its files as new as onnx is, whatever is in them; a
# runtime that is older than that onnx then refuses them.

def _try_ir_version() -> None:
    if _module('export').onnx.IR_VERSION > IR_VERSION:
        raise WrongResultError


def _mend_ir_version() -> None:
    _module('export').onnx = _richer(IR_VERSION=IR_VERSION)


# Each goes with the support of Chainer 7.
REPAIRS = (
    Repair('onnx.mapping', 'onnx_chainer cannot be used, or warns',
           'with onnx 1.13 or newer',
           _try_mapping, AttributeError, _mend_mapping),
    Repair('onnx.IR_VERSION',
           'files of onnx_chainer are refused by an onnxruntime older than '
           'onnx', 'with onnx 1.7 or newer',
           _try_ir_version, WrongResultError, _mend_ir_version),
)


def refusing_hooks(export: Callable) -> Callable:
    """Makes the exporter refuse a model whose weights are normalized."""
    @functools.wraps(export)
    def _export(model: Any, *args: Any, **kwargs: Any) -> Any:
        # Of modules that need Chainer, as the exporter does.
        from sn_function import errors
        from sn_function.bake import OURS, hooked_links
        paths = [path for path, _ in hooked_links(model, OURS)]
        if paths:
            raise errors.HookedExportError(paths)
        return export(model, *args, **kwargs)

    return _export


def _refuse(params: Any) -> None:
    """The converter of the node, as a link may hide from its model."""
    from sn_function import errors
    raise errors.HookedExportError([])


def mend() -> None:
    """Mends the exporter, which has been imported."""
    export = _module('export')
    if not export._available or hasattr(export._export, '__wrapped__'):
        return
    for each in REPAIRS:
        if each.is_needed():
            each.mend()
            applied.append(each.name)
    export._export = refusing_hooks(export._export)
    _module('mapping').converters['SpectralNormalize'] = _refuse


class _Finder(finder.Finder):
    """Mends the exporter when it is imported."""

    names = ('onnx_chainer',)

    def execute(
            self, run: Callable[[types.ModuleType], None],
            module: types.ModuleType) -> None:
        with loans._lent(_lend_mapping()):
            run(module)
        mend()


def install() -> None:
    """Sees to it that the exporter is mended, now or when it is imported."""
    if 'onnx_chainer.export' in sys.modules:
        mend()
    elif finder.is_there('onnx'):
        _Finder.install()
