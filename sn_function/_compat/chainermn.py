"""Repairs ChainerMN, Chainer's package for MPI, when it is imported.

It needs mpi4py, so nothing is done or imported before a program imports it.
As in :mod:`.repairs`, what fails a trial run is repaired, and :data:`REPAIRS`
says what is wrong without each repair, and when it is needed.
"""
import collections
import functools
import os
import re
import sys
import types
from typing import Any, Callable, Dict, Iterator, List, Tuple

import chainer
import numpy

from sn_function._compat import guards, trials
from sn_function._compat.replacement import ChainersHook
from sn_function._compat.trials import Repair, WrongResultError

# Names of the repairs that were made in this process.
applied: List[str] = []


def _module(name: str) -> Any:
    return sys.modules[f'chainermn.{name}']


def _with_chainer(function: Callable, **names: Any) -> Callable:
    """A copy of a function of ChainerMN whose `chainer` has these names."""
    scope = {**function.__globals__,
             'chainer': types.SimpleNamespace(**names)}
    copy = types.FunctionType(
        function.__code__, scope, function.__name__,
        function.__defaults__, function.__closure__)
    return functools.update_wrapper(copy, function)


# A slave of the iterator uses an array of one element as a number.

class _OneElement:
    """A communicator that broadcasts 1, in an array."""

    def bcast(self, x: Any, root: int) -> Any:
        return numpy.ones(1, numpy.float32)


def _try_multi_node_iterator() -> None:
    _module('iterators.multi_node_iterator')._MultiNodeIteratorSlave(
        _OneElement(), 0)


def _repair_multi_node_iterator() -> None:
    def whole(x: Any) -> int:
        return int(x.item() if isinstance(x, numpy.ndarray) else x)

    vars(_module('iterators.multi_node_iterator'))['int'] = whole


# An average of unit vectors is no unit vector: of two opposite ones it is
# zero.  With three ranks rounding changes even vectors that are equal.

def _try_allreduce_persistent() -> None:
    link = chainer.Link()
    link.add_persistent('W_u', numpy.ones(1))
    # Adding it would draw random numbers.
    hook = ChainersHook()
    link._local_link_hooks = collections.OrderedDict({hook.name: hook})
    module = _module('extensions.allreduce_persistent')
    if list(module._namedpersistents(link)):
        raise WrongResultError


def _repair_allreduce_persistent() -> None:
    def namedpersistents(model: chainer.Link) -> Iterator[Tuple[str, Any]]:
        for path, link in model.namedlinks():
            vector_names = guards.registered.vector_names(link)
            for name in link._persistent:
                if name not in vector_names:
                    yield f'{path}/{name}', link.__dict__[name]

    _module('extensions.allreduce_persistent')._namedpersistents = (
        namedpersistents)


# What was sent in another dtype has to be copied, which NumPy 2, and CuPy
# after it, refuse where copy=False.

class _NoBuffer:
    """A buffer of the device that leaves an array as it is."""

    def to_device(self, *args: Any) -> None:
        pass


def _try_unpack_params() -> None:
    parameter = types.SimpleNamespace(data=numpy.zeros(1, numpy.float16))
    _module('communicators._memory_utility').unpack_params(
        [parameter], 'data', _NoBuffer(), numpy.float32, False)


def _repair_unpack_params() -> None:
    def array(x: Any, copy: bool, dtype: Any) -> Any:
        return x.astype(dtype)      # called where the dtype differs

    xp = types.SimpleNamespace(array=array)
    module = _module('communicators._memory_utility')
    module.unpack_params = _with_chainer(
        module.unpack_params,
        backend=types.SimpleNamespace(get_array_module=lambda _: xp))


# The kernels that gather gradients use `half`, which the header of CuPy
# included before CuPy 14.

_KERNELS = '_cupy_batched_pack_params', '_cupy_batched_unpack_params'


def _try_half() -> None:
    module = _module('communicators._memory_utility')
    cupy = module.cp
    if cupy is None or hasattr(getattr(module, _KERNELS[0]), '__wrapped__'):
        return
    header = os.path.join(os.path.dirname(cupy.__file__), '_core', 'include',
                          'cupy', 'carray.cuh')
    with open(header, encoding='utf-8') as f:
        if not re.search(r'#include .*(fp16|float16)', f.read()):
            raise WrongResultError


def _repair_half() -> None:
    def raw(code: str, name: str) -> Any:
        return chainer.backends.cuda.raw(
            '#include <cupy/float16.cuh>\n' + code, name)

    module = _module('communicators._memory_utility')
    for name in _KERNELS:
        setattr(module, name, _with_chainer(
            getattr(module, name), cuda=types.SimpleNamespace(raw=raw)))


# By the name of the module.  Each goes with the support of Chainer 7, or of
# what it is needed with.
BY_MODULE: Dict[str, Tuple[Repair, ...]] = {
    'chainermn': (
        Repair('allreduce_persistent',
               'AllreducePersistent of ChainerMN averages the vectors of '
               'spectral normalization', 'with Chainer 7.8.1',
               _try_allreduce_persistent, WrongResultError,
               _repair_allreduce_persistent),
        Repair('multi_node_iterator',
               'create_multi_node_iterator of ChainerMN fails on all ranks '
               'but one', 'with NumPy 2.4 or newer',
               _try_multi_node_iterator, TypeError,
               _repair_multi_node_iterator)),
    'chainermn.communicators._memory_utility': (
        Repair('unpack_params',
               'the GPU communicators of ChainerMN fail where gradients are '
               'sent in another dtype', 'with NumPy 2',
               _try_unpack_params, ValueError, _repair_unpack_params),
        Repair('batched_copy',
               'the kernels of the GPU communicators of ChainerMN are not '
               'compiled', 'with CuPy 14',
               _try_half, WrongResultError, _repair_half)),
}
REPAIRS = tuple(each for repairs in BY_MODULE.values() for each in repairs)


def repair(name: str) -> None:
    """Repairs a module of ChainerMN, which has been imported."""
    applied.extend(trials.repair(BY_MODULE[name]))
