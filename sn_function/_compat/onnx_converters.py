"""Converters of `onnx_chainer` that are missing, or wrong.

The exporter calls a converter with a node of Chainer's graph, `params.func`,
and gets nodes of ONNX.  :mod:`.onnx_chainer` registers those of this module
where a trial run shows that they are needed.
"""
from typing import Any, Callable, List, Tuple

import numpy

Converter = Callable[[Any], Tuple[Any, ...]]


def unpooling_2d(params: Any) -> Tuple[Any, ...]:
    """Nearest upsampling: y[i, j] = x[i // kh, j // kw].

    `outsize` cuts off what is beyond it, in Chainer as here.
    """
    from onnx_chainer import onnx_helper
    from onnx_chainer.functions.array import get_slice_node
    func = params.func
    ksize = func.kh, func.kw
    full = [k * n for k, n in zip(ksize, func.inputs[0].shape[2:])]
    outsize = [func.outh, func.outw]
    _check_unpooling(func, full)
    graph = onnx_helper.GraphBuilder()
    y = _upsampled(graph, params, [1., 1., *map(float, ksize)])
    if outsize != full:
        get_slice_node(graph, params.opset_version, params.context, [y],
                       [2, 3], [0, 0], outsize, [1, 1])
    return graph.nodes(params.output_names)


def _check_unpooling(func: Any, full: List[int]) -> None:
    ksize, stride = (func.kh, func.kw), (func.sy, func.sx)
    pad, outsize = (func.ph, func.pw), (func.outh, func.outw)
    if stride != ksize:
        reason = 'its stride is not its ksize, so windows overlap or have gaps'
    elif pad != (0, 0):
        reason = 'it has a pad'
    elif any(out > n for out, n in zip(outsize, full)):
        reason = (f'its outsize is larger than {tuple(full)}, ksize times the '
                  'image, so the last rows or columns are zero')
    else:
        return
    raise RuntimeError(
        f'F.unpooling_2d with ksize={ksize}, stride={stride}, pad={pad}, '
        f'outsize={outsize} is not exported: {reason}. What is exported is '
        'nearest upsampling: a stride that is ksize, no pad, and an outsize '
        'of at most ksize times the image.')


def _upsampled(graph: Any, params: Any, scales: List[float]) -> str:
    """The name of the input, each pixel of it repeated `scales` times."""
    if params.opset_version < 9:
        return graph.op('Upsample', params.input_names, scales=scales)
    inputs = [*params.input_names, params.context.add_const(
        numpy.array(scales, 'f'), 'scales')]
    if params.opset_version < 11:
        op = 'Upsample' if params.opset_version == 9 else 'Resize'
        return graph.op(op, inputs)
    # The whole image.  Opset 11 ignores it here, but not every runtime takes
    # an empty one.
    inputs.insert(1, params.context.add_const(
        numpy.repeat([0, 1], 4).astype('f'), 'roi'))
    return graph.op('Resize', inputs, mode='nearest', nearest_mode='floor',
                    coordinate_transformation_mode='asymmetric')


def mean_absolute_error(params: Any) -> Tuple[Any, ...]:
    """The mean of |x_0 - x_1| over all entries."""
    from onnx_chainer import onnx_helper
    graph = onnx_helper.GraphBuilder()
    difference = graph.op('Sub', params.input_names)
    graph.op('ReduceMean', [graph.op('Abs', [difference])], keepdims=0)
    return graph.nodes(params.output_names)


def with_dilations(convert: Converter) -> Converter:
    """Makes a converter of convolutions write the dilation of the kernel."""
    def _convert(params: Any) -> Tuple[Any, ...]:
        import onnx
        func = params.func
        dilate = func.dilate if hasattr(func, 'dilate') else (func.dy, func.dx)
        node, = convert(params)
        node.attribute.append(
            onnx.helper.make_attribute('dilations', dilate))
        return node,

    return _convert
