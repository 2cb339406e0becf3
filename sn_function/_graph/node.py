"""A node of Chainer's graph with less overhead, for NumPy and CuPy arrays.

Chainer spends most of the time that a small weight takes, around the
arithmetic.  :meth:`Node.apply` leaves out the steps that plain arrays do not
need, and hands everything else to Chainer.  It relies on Chainer 7.8.1, which
is the last release.
"""
from __future__ import annotations

import weakref
from typing import Any

import chainer
import numpy
from chainer import function_node
from chainer.backends import cuda

from sn_function._arithmetic import device, host
from sn_function._arithmetic.interface import Arithmetic, Arrays


def config(*names: str) -> list[Any]:
    """Values of :data:`chainer.config`, which itself takes 1 us for each."""
    of_thread = chainer.config._local.__dict__
    of_all = chainer.global_config
    return [of_thread[name] if name in of_thread else getattr(of_all, name)
            for name in names]


def variable(array: Any, requires_grad: bool = True) -> chainer.Variable:
    """A Variable of an array of NumPy or CuPy."""
    return chainer.Variable._init_unchecked(
        array, requires_grad=requires_grad, is_chainerx_array=False)


class Node(function_node.FunctionNode):
    """Base class of nodes whose inputs were checked before; they are retained.
    """

    def forward_cpu(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self.retain_inputs(tuple(range(len(inputs))))
        return self.compute(host, inputs)

    def forward_gpu(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self.retain_inputs(tuple(range(len(inputs))))
        return self.compute(device, inputs)

    def compute(
            self, arithmetic: Arithmetic, inputs: Arrays) -> Arrays:
        """Returns the outputs, by the arithmetic of NumPy or of CuPy."""
        raise NotImplementedError

    def apply(self, inputs: Any) -> tuple[chainer.Variable, ...]:
        debug, schedule_func, enable_backprop, lazy_grad_sum = config(
            'debug', 'schedule_func', 'enable_backprop', 'lazy_grad_sum')
        is_plain = not (
            debug or schedule_func is not None or self._local_function_hooks
            or chainer.get_function_hooks())
        variables, nodes, arrays = [], [], []
        for x in inputs:
            if not isinstance(x, chainer.Variable):
                x = chainer.as_variable(x)
            variables.append(x)
            nodes.append(x.node)
            arrays.append(x.array)
            is_plain = is_plain and x.layout is None
        outputs = self._compute_plain(tuple(arrays)) if is_plain else None
        if outputs is None:
            return super().apply(inputs)
        requires_grad = any([x.requires_grad for x in nodes])
        results = tuple([variable(y, requires_grad) for y in outputs])
        self._input_layouts = (None,) * len(arrays)
        self._output_layouts = (None,) * len(outputs)
        self._output_count = len(outputs)
        if enable_backprop:
            self.rank = max([x.rank for x in nodes])
            for y in results:
                y.creator_node = self
            self.inputs = tuple(nodes)
            self.outputs = tuple([weakref.ref(y.node) for y in results])
            self.retain_inputs(tuple(range(len(arrays))))
            for x in variables:
                x.retain_data()
            self.lazy_grad_sum = lazy_grad_sum
        return results

    def _compute_plain(self, arrays: Arrays) -> Arrays | None:
        """Returns the outputs, or ``None`` for arrays that are not plain.

        These are NumPy's, or CuPy's on one device, which need not be the
        current one.
        """
        kinds = set(map(type, arrays))
        if kinds == {numpy.ndarray}:
            return self.compute(host, arrays)
        first, *others = arrays
        if kinds == {cuda.ndarray} and all([
                x.device == first.device for x in others]):
            with first.device:
                return self.compute(device, arrays)
        return None
