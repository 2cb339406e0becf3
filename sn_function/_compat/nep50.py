"""Repairs of Chainer where NumPy 2 computes in another type than NumPy 1.

Since NumPy 2 the type of a NumPy scalar counts as much as that of an array,
and a Python number takes the type of its partner (NEP 50).  So float32 arrays
become float64 by a `numpy.float64`, and what Chainer computed in float64, as
it met a Python number, stays in float16.

:mod:`.repairs` says what is wrong without each, and when it is needed.
"""
import functools
import types
from typing import Any, Callable, List

import chainer
import numpy
from chainer import reporter
from chainer.functions.loss import mean_squared_error
from chainer.functions.normalization import (
    batch_normalization,
    batch_renormalization,
    layer_normalization,
    local_response_normalization,
)
from chainer.optimizer_hooks import gradient_clipping, gradient_lars
from chainer.training.extensions import micro_average

from sn_function._compat.trials import WrongResultError

# These compute with a hyperparameter in the type in which the user gives it.
_HYPERPARAMETERS = (
    batch_normalization.FixedBatchNormalization,
    batch_renormalization.BatchRenormalizationFunction,
    layer_normalization.LayerNormalization,
    local_response_normalization.LocalResponseNormalization,
)


def try_numpy_scalars() -> None:
    x = numpy.zeros((1, 1), numpy.float32)
    node = local_response_normalization.LocalResponseNormalization(
        k=numpy.float64(2))
    if node.forward_cpu((x,))[0].dtype != x.dtype:
        raise WrongResultError


def repair_numpy_scalars() -> None:
    def number(value: Any) -> Any:
        return value.item() if isinstance(value, numpy.generic) else value

    def taking_python_numbers(original: Callable) -> Callable:
        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *map(number, args),
                     **{name: number(value)
                        for name, value in kwargs.items()})
        return init

    for node in _HYPERPARAMETERS:
        node.__init__ = taking_python_numbers(node.__init__)


def _wide(value: Any) -> Any:
    """A number of Python or NumPy in 64 bits; what is on a device stays."""
    if isinstance(value, (int, float, numpy.generic, numpy.ndarray)):
        value = numpy.asarray(value)
        return value.astype(numpy.result_type(value.dtype, numpy.int64))[()]
    return value


# Both sum the values of many iterations, starting at a Python 0.

def try_summary() -> None:
    summary = reporter.Summary()
    summary.add(numpy.float16(1))
    if summary.compute_mean().dtype != numpy.float64:
        raise WrongResultError


def repair_summary() -> None:
    add = reporter.Summary.add
    call = micro_average.MicroAverage.__call__

    @functools.wraps(add)
    def wide_add(self: Any, value: Any, weight: Any = 1) -> None:
        add(self, _wide(value), _wide(weight))

    @functools.wraps(call)
    def wide_call(self: Any, trainer: Any) -> None:
        self._numerator = _wide(self._numerator)
        self._denominator = _wide(self._denominator)
        call(self, trainer)

    reporter.Summary.add = wide_add
    micro_average.MicroAverage.__call__ = wide_call


# The sum is divided by the number of elements, and 65,520 is inf in float16.
# The sum in float32 is more exact than that of NumPy 1.

def try_mean_squared_error() -> None:
    x = numpy.full(65520, .1, numpy.float16)
    node = mean_squared_error.MeanSquaredError()
    if node.forward_cpu((x, numpy.zeros_like(x)))[0] == 0:
        raise WrongResultError


def repair_mean_squared_error() -> None:
    original = mean_squared_error.MeanSquaredError.forward_cpu

    @functools.wraps(original)
    def forward_cpu(self: Any, inputs: Any) -> Any:
        dtype = inputs[0].dtype
        if dtype == numpy.float16:
            inputs = tuple(x.astype(numpy.float32) for x in inputs)
        y, = original(self, inputs)
        return y.astype(dtype, copy=False),

    mean_squared_error.MeanSquaredError.forward_cpu = forward_cpu


def _float16_parameter(W: float, gW: float) -> chainer.Parameter:
    parameter = chainer.Parameter(numpy.full(2, W, numpy.float16))
    parameter.grad = numpy.full(2, gW, numpy.float16)
    return parameter


# One sum over all parameters is built from their float16 products.

def try_gradient_clipping() -> None:
    parameters = [_float16_parameter(0, 150) for _ in range(2)]
    if numpy.isinf(gradient_clipping._sum_sqnorm_grads(parameters)[0]):
        raise WrongResultError


def repair_gradient_clipping() -> None:
    def wide_sum(values: List[Any]) -> Any:
        return sum(map(_wide, values))

    vars(gradient_clipping)['sum'] = wide_sum


# eps = 1e-9 is 0 in float16, and 0 / 0 is NaN.

def try_gradient_lars() -> None:
    parameter = _float16_parameter(1, 0)
    gradient_lars.GradientLARS()(None, parameter)
    if numpy.isnan(parameter.grad).any():
        raise WrongResultError


def repair_gradient_lars() -> None:
    original = gradient_lars.GradientLARS.__call__

    @functools.wraps(original)
    def call(self: Any, rule: Any, param: Any) -> None:
        if not (isinstance(param.grad, numpy.ndarray)
                and param.grad.dtype == numpy.float16):
            return original(self, rule, param)
        wide = types.SimpleNamespace(
            data=param.data.astype(numpy.float32),
            grad=param.grad.astype(numpy.float32), device=param.device)
        original(self, rule, wide)
        param.grad[...] = wide.grad
        return None

    gradient_lars.GradientLARS.__call__ = call
