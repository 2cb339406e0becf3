"""Repairs `onnx_chainer`, Chainer's exporter, when it is imported.

It was written for onnx 1.6.  It is a package of its own, which needs onnx, so
nothing is done or imported before a program imports it.  As in
:mod:`.repairs`, what fails a trial run is repaired, and :data:`REPAIRS` says
what is wrong without each repair, and when it is needed.

One thing is no repair: with any onnx the exporter refuses models with hooks,
as it has no converter for spectral normalization.  See :mod:`.guards`.
"""
import functools
import importlib
import sys
import types
import warnings
from typing import Any, Callable, List

import numpy

from sn_function._compat import guards, loans, trials
from sn_function._compat.trials import Repair, WrongResultError

# That of onnx 1.6.  Its opset, 11, is the last one that the exporter knows.
IR_VERSION = 6

# Names of the repairs that were made in this process.
applied: List[str] = []


def _module(name: str) -> Any:
    # onnx_chainer.export, as an attribute, is a function.
    return sys.modules[f'onnx_chainer.{name}']


def _richer(**names: object) -> types.ModuleType:
    """What a module of the exporter then uses as onnx."""
    import onnx
    module = types.ModuleType('onnx', f'With more names, for {__name__}.')
    vars(module).update(names, __getattr__=functools.partial(getattr, onnx))
    return module


# onnx.mapping is deprecated since onnx 1.13, and removed after 1.18.

def _mapping() -> types.ModuleType:
    """What the exporter reads of it."""
    from onnx import TensorProto, helper
    types_ = [numpy.dtype(c) for c in '?bBhHiIqQefdFD']
    fields = {TensorProto.FLOAT: 'float_data', TensorProto.BOOL: 'int32_data',
              TensorProto.INT32: 'int32_data', TensorProto.INT64: 'int64_data',
              TensorProto.DOUBLE: 'double_data'}
    return loans.stand_in(
        'onnx.mapping', STORAGE_TENSOR_TYPE_TO_FIELD=fields,
        NP_TYPE_TO_TENSOR_TYPE={
            each: helper.np_dtype_to_tensor_dtype(each) for each in types_})


def lend_mapping() -> List[loans.Loan]:
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
        return [loans.Loan(sys.modules, 'onnx.mapping', _mapping())]
    except (ImportError, AttributeError):
        return []   # without onnx, or a broken one: the exporter reports it


def _try_mapping() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error', DeprecationWarning)
        try:
            _module('context')._tensor_from_array_for_constant(
                numpy.zeros(1, 'f'), 'x')
        except DeprecationWarning:
            raise AttributeError from None


def _repair_mapping() -> None:
    _module('context').onnx = _richer(mapping=_mapping())


# The exporter writes the IR version of the installed onnx into its files,
# whatever is in them; a runtime that is older than that onnx refuses them.

def _try_ir_version() -> None:
    if _module('export').onnx.IR_VERSION > IR_VERSION:
        raise WrongResultError


def _repair_ir_version() -> None:
    _module('export').onnx = _richer(IR_VERSION=IR_VERSION)


# Each goes with the support of Chainer 7.
REPAIRS = (
    Repair('onnx.mapping', 'onnx_chainer cannot be used, or warns',
           'with onnx 1.13 or newer',
           _try_mapping, AttributeError, _repair_mapping),
    Repair('onnx.IR_VERSION',
           'files of onnx_chainer are refused by an onnxruntime older than '
           'onnx', 'with onnx 1.7 or newer',
           _try_ir_version, WrongResultError, _repair_ir_version),
)


def refusing_hooks(export: Callable) -> Callable:
    """Makes the exporter refuse a model whose weights are normalized."""
    @functools.wraps(export)
    def _export(model: Any, *args: Any, **kwargs: Any) -> Any:
        guards.registered.check_export(model)
        return export(model, *args, **kwargs)

    return _export


def _refuse(params: Any) -> None:
    """The converter of the node: it is called where no hook was found."""
    guards.registered.refuse_node()


def repair() -> None:
    """Repairs the exporter, which has been imported."""
    export = _module('export')
    if not export._available or hasattr(export._export, '__wrapped__'):
        return
    applied.extend(trials.repair(REPAIRS))
    export._export = refusing_hooks(export._export)
    _module('mapping').converters['SpectralNormalize'] = _refuse
