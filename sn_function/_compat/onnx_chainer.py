"""Repairs `onnx_chainer`, Chainer's exporter, when it is imported.

It was written for onnx 1.6, and some of its converters are wrong or missing:
see :mod:`.onnx_converters`.  It is a package of its own, which needs onnx, so
nothing is done or imported before a program imports it.  As in
:mod:`.repairs`, what fails a trial run is repaired, and :data:`REPAIRS` says
what is wrong without each repair, and when it is needed.

One thing is no repair: with any onnx the exporter refuses models with hooks,
as it has no converter for spectral normalization.  See :mod:`.guards`.
"""
import collections
import functools
import importlib
import sys
import types
import warnings
from typing import Any, Callable, Container, Iterator, List

import numpy

from sn_function._compat import guards, loans, onnx_converters, trials
from sn_function._compat.trials import Repair, WrongResultError

# That of onnx 1.6.  Its opset, 11, is the last one that the exporter knows.
IR_VERSION = 6

# Names of the repairs that were made in this process.
applied: List[str] = []


def _module(name: str) -> Any:
    # onnx_chainer.export, as an attribute, is a function.
    return sys.modules[f'onnx_chainer.{name}']


def _richer(original: Any, **names: object) -> types.ModuleType:
    """What a module of the exporter then uses as one of onnx."""
    module = types.ModuleType(
        original.__name__, f'With other names, for {__name__}.')
    vars(module).update(
        names, __getattr__=functools.partial(getattr, original))
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
    context = _module('context')
    context.onnx = _richer(context.onnx, mapping=_mapping())


# The exporter writes the IR version of the installed onnx into its files,
# whatever is in them; a runtime that is older than that onnx refuses them.

def _try_ir_version() -> None:
    if _module('export').onnx.IR_VERSION > IR_VERSION:
        raise WrongResultError


def _repair_ir_version() -> None:
    export = _module('export')
    export.onnx = _richer(export.onnx, IR_VERSION=IR_VERSION)


# The exporter lists each parameter as an input, too, as the IR before version
# 4 required.  onnxruntime warns of each of them, and of those that no node
# uses; and what is an input may be overridden, so it is not optimized.

def _try_inputs() -> None:
    from chainer import links
    graph = _graph(links.Scale(0, (1,)), 1)
    if len(graph.input) > 1:
        raise WrongResultError


def _repair_inputs() -> None:
    export = _module('export')
    make_graph = export.helper.make_graph

    def _make_graph(
            nodes: Any, name: str, inputs: Any, outputs: Any,
            initializer: Any = (), **kwargs: Any) -> Any:
        used = {*_names_of_inputs(nodes), *(each.name for each in outputs)}
        # What is shared is listed twice, in both; what is a parameter and an
        # argument as well, once as an initializer.
        arguments = _count(inputs) - _count(initializer)
        return make_graph(
            nodes, name, _once(inputs, arguments), outputs,
            _once(initializer, used - arguments.keys()), **kwargs)

    export.helper = _richer(export.helper, make_graph=_make_graph)


def _count(described: Any) -> 'collections.Counter[str]':
    return collections.Counter(each.name for each in described)


def _once(described: Any, names: Container) -> List[Any]:
    """Those with one of the names, each once."""
    return list({each.name: each for each in described
                 if each.name in names}.values())


def _names_of_inputs(nodes: Any) -> Iterator[str]:
    """Yields what nodes take, and those of graphs in them, as in a loop."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _names_of_inputs(graph.node)


# The exporter gives each output its name where the graph computes it, and
# lists them in that order.

def _try_outputs() -> None:
    from chainer import functions
    graph = _graph(lambda x: (functions.relu(x), functions.sigmoid(x)), 1)
    if graph.output[0].name != 'ReLU_0':
        raise WrongResultError


def _repair_outputs() -> None:
    cls = _module('graph').Graph
    to_onnx_graph = cls.to_onnx_graph

    def _to_onnx_graph(self: Any) -> None:
        nodes = [each.node for each in self.network_outputs.values()]
        to_onnx_graph(self)
        names = {each.node: name
                 for name, each in self.network_outputs.items()}
        for node in nodes:
            self.network_outputs.move_to_end(names[node])

    cls.to_onnx_graph = _to_onnx_graph


# Converters.

def _graph(function: Callable, *shape: int) -> Any:
    """What the exporter makes of a function."""
    from chainer import Sequential
    return _module('export').export(
        Sequential(function), numpy.zeros(shape, 'f')).graph


def _try_unpooling() -> None:
    from chainer import functions
    _graph(lambda x: functions.unpooling_2d(x, 2, outsize=(2, 2)), 1, 1, 1, 1)


def _repair_unpooling() -> None:
    _module('mapping').converters['Unpooling2D'] = onnx_converters.unpooling_2d


def _try_mean_absolute_error() -> None:
    _module('mapping').converters['MeanAbsoluteError']


def _repair_mean_absolute_error() -> None:
    _module('mapping').converters['MeanAbsoluteError'] = (
        onnx_converters.mean_absolute_error)


def _try_dilations() -> None:
    from chainer import links
    nodes = _graph(
        links.Convolution1D(1, 1, 1, initialW=0), 1, 1, 1).node
    if not any(each.name == 'dilations' for each in nodes[0].attribute):
        raise WrongResultError


def _repair_dilations() -> None:
    converters = _module('mapping').converters
    for name in 'ConvolutionND', 'Deconvolution2DFunction', 'DeconvolutionND':
        converters[name] = onnx_converters.with_dilations(converters[name])


# Each goes with the support of Chainer 7.
REPAIRS = (
    Repair('onnx.mapping', 'onnx_chainer cannot be used, or warns',
           'with onnx 1.13 or newer',
           _try_mapping, AttributeError, _repair_mapping),
    Repair('onnx.IR_VERSION',
           'files of onnx_chainer are refused by an onnxruntime older than '
           'onnx', 'with onnx 1.7 or newer',
           _try_ir_version, WrongResultError, _repair_ir_version),
    Repair('graph_inputs',
           'onnx_chainer lists each parameter as an input, of which '
           'onnxruntime warns', 'with Chainer 7.8.1',
           _try_inputs, WrongResultError, _repair_inputs),
    Repair('graph_outputs',
           'onnx_chainer lists the outputs of a model in another order',
           'with Chainer 7.8.1',
           _try_outputs, WrongResultError, _repair_outputs),
    Repair('convert_Unpooling2D',
           'onnx_chainer exports F.unpooling_2d without outsize wrong, and '
           'refuses it with one', 'with Chainer 7.8.1',
           _try_unpooling, RuntimeError, _repair_unpooling),
    Repair('convert_MeanAbsoluteError',
           'onnx_chainer has no converter for F.mean_absolute_error',
           'with Chainer 7.8.1', _try_mean_absolute_error, KeyError,
           _repair_mean_absolute_error),
    Repair('dilations',
           'onnx_chainer exports convolutions of 1 or 3 dimensions, and '
           'deconvolutions, without their dilation', 'with Chainer 7.8.1',
           _try_dilations, WrongResultError, _repair_dilations),
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
