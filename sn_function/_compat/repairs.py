"""What is repaired in Chainer once it is imported.

`REPAIRS` says of each repair what is wrong without it, and when it is needed;
:mod:`.trials` finds out whether it is.  An old stack stays as it is: only
Deconvolution2D and the pool of MultiprocessIterator are broken everywhere.

An import of Chainer ends with these repairs, and this module imports Chainer:
so Chainer has to be imported before it.
"""
import contextlib
import functools
import inspect
import threading
import types
import warnings
from typing import Any, Callable, Iterator, List, Tuple

import chainer
import numpy
from chainer import distributions
from chainer.dataset import convert
from chainer.functions.array import as_strided, pad_sequence, resize_images
from chainer.functions.connection import deconvolution_2d
from chainer.functions.math import basic_math, fix, sparse_matmul
from chainer.iterators import multiprocess_iterator
from chainer.serializers import hdf5, npz
from chainer.training.extensions import micro_average

from sn_function._compat import loans, nep50, pool
from sn_function._compat.trials import Repair, WrongResultError


def _reading(function: Callable, **names: object) -> Callable:
    """A copy of a function of Chainer that reads a richer NumPy.

    Its global `numpy` (or `np`) becomes a copy of the module that has
    `names` as well.  So neither NumPy nor the rest of the module changes,
    where `if xp is numpy` must stay true.
    """
    richer = types.ModuleType('numpy')
    vars(richer).update(vars(numpy), **names)
    scope = {name: richer if value is numpy else value
             for name, value in function.__globals__.items()}
    copy = types.FunctionType(
        function.__code__, scope, function.__name__,
        function.__defaults__, function.__closure__)
    return functools.update_wrapper(copy, function)


# Names that NumPy removed or changed

# chainer#8632: the class reads np.sctypes['float'], gone in NumPy 2.

def _try_as_strided() -> None:
    x = numpy.zeros(2)
    geometry = as_strided.TensorGeometry(x)
    as_strided.AsStridedGrad(geometry, (2,), (1,), 0).forward((x,))


def _repair_as_strided() -> None:
    grad = as_strided.AsStridedGrad
    grad.forward = _reading(grad.forward, sctypes=loans.SCTYPES)


# np.float was the builtin; NumPy 1.24 removed it.

def _try_resize_images() -> None:
    resize_images.compute_indices_and_weights(
        (1, 1), (1, 1), 'nearest', True, numpy)


def _repair_resize_images() -> None:
    function = resize_images.compute_indices_and_weights
    resize_images.compute_indices_and_weights = _reading(function, float=float)


# log_prob adds a list to what np.meshgrid returns, which is a tuple since
# NumPy 2.

def _try_categorical() -> None:
    distribution = distributions.Categorical(p=numpy.ones((1, 1)))
    distribution.log_prob(numpy.zeros(1))


def _repair_categorical() -> None:
    def meshgrid(*args: Any, **kwargs: Any) -> List[numpy.ndarray]:
        return list(numpy.meshgrid(*args, **kwargs))

    categorical = distributions.Categorical
    categorical.log_prob = _reading(categorical.log_prob, meshgrid=meshgrid)


# Python numbers that do not fit an integer type, which NumPy 2 refuses.  They
# wrap around, as they did before, and as astype still does.

def _wrapped(value: Any, dtype: numpy.dtype) -> Any:
    if dtype.kind in 'iu' and isinstance(value, (int, float)):
        return numpy.array(int(value)).astype(dtype)[()]
    return value


def _try_pad_sequence() -> None:
    pad_sequence.PadSequence(1, -1).forward((numpy.zeros(0, numpy.uint8),))


def _repair_pad_sequence() -> None:
    original = pad_sequence.PadSequence.forward

    @functools.wraps(original)
    def forward(self: Any, xs: Tuple[Any, ...]) -> Any:
        self.padding = _wrapped(self.padding, xs[0].dtype)
        return original(self, xs)

    pad_sequence.PadSequence.forward = forward


def _try_concat_examples() -> None:
    convert._concat_arrays_with_padding([numpy.zeros(1, numpy.uint8)], -1)


def _repair_concat_examples() -> None:
    # It also passes `out` by position, which NumPy 2.4 deprecates.
    def maximum(x: Any, y: Any, out: Any) -> Any:
        return numpy.maximum(x, y, out=out)

    original = _reading(convert._concat_arrays_with_padding, maximum=maximum)

    @functools.wraps(original)
    def concat(arrays: Any, padding: Any) -> Any:
        if isinstance(padding, int):    # numpy.full takes any float
            padding = _wrapped(padding, arrays[0].dtype)
        return original(arrays, padding)

    convert._concat_arrays_with_padding = concat


# The constant of x + c, x * c and so on; x - 1 is x + -1.

def _try_basic_math() -> None:
    basic_math._preprocess_const(numpy.zeros(1, numpy.uint8), -1)


def _repair_basic_math() -> None:
    original = basic_math._preprocess_const

    @functools.wraps(original)
    def preprocess(x: Any, value: Any) -> Any:
        return original(x, _wrapped(value, x.dtype))

    basic_math._preprocess_const = preprocess


# Other faults

# SciPy before 1.15 converts float16 to float32; newer ones refuse it.

def _try_sparse_matmul() -> None:
    if sparse_matmul._scipy_available:
        x, i = numpy.ones(1, numpy.float16), numpy.zeros(1, int)
        sparse_matmul._coo_matmul_cpu(x, i, i, (1, 1), x[None], x.dtype)


def _repair_sparse_matmul() -> None:
    original = sparse_matmul._coo_matmul_cpu

    @functools.wraps(original)
    def matmul(A_data: Any, A_row: Any, A_col: Any, A_shape: Any,
               B: Any, dtype: Any) -> Any:
        if A_data.dtype == numpy.float16:   # SciPy computed in float32
            A_data = A_data.astype(numpy.float32)
        if B.dtype == numpy.float16:
            B = B.astype(numpy.float32)
        return original(A_data, A_row, A_col, A_shape, B, dtype)

    sparse_matmul._coo_matmul_cpu = matmul


# chainer#8624, fixed on Chainer's master: where the input needs no gradient,
# backward passes Variables for their shapes.

def _try_deconvolution_2d() -> None:
    x = numpy.zeros((1, 1, 1, 1), numpy.float32)
    W = chainer.Variable(x)
    with chainer.using_config('enable_backprop', True):
        chainer.grad([chainer.functions.deconvolution_2d(x, W)], [W])


def _repair_deconvolution_2d() -> None:
    function = deconvolution_2d.Deconvolution2DFunction
    original = function._set_cover_all

    @functools.wraps(original)
    def _set_cover_all(self: Any, x: Any, W: Any) -> None:
        original(self, getattr(x, 'shape', x), getattr(W, 'shape', W))

    function._set_cover_all = _set_cover_all


# NumPy 2.4 makes a number of arrays without dimensions only.

def _number(value: Any) -> float:
    """`float` of a number, or of an array that has one element."""
    return float(value.item() if hasattr(value, 'item') else value)


def _try_micro_average() -> None:
    vars(micro_average).get('float', float)(numpy.zeros(1))


def _repair_micro_average() -> None:
    vars(micro_average)['float'] = _number


def _read_by(asarray: Callable, deserializer: Any, *kinds: type) -> None:
    """Makes a deserializer read what becomes one of `kinds` by `asarray`."""
    original = deserializer.__call__
    special = _reading(inspect.unwrap(original), asarray=asarray)

    @functools.wraps(original)
    def call(self: Any, key: str, value: Any) -> Any:
        return (special if type(value) in kinds else original)(
            self, key, value)

    deserializer.__call__ = call


def _try_load_npz() -> None:
    npz.NpzDeserializer({'x': numpy.zeros(1)})('x', 0.)


def _repair_load_npz() -> None:
    def asarray(dataset: Any) -> numpy.ndarray:
        array = numpy.asarray(dataset)
        return array.reshape(()) if array.size == 1 else array

    for deserializer in (npz.NpzDeserializer, hdf5.HDF5Deserializer):
        _read_by(asarray, deserializer, int, float, complex)


# h5py 3 reads strings as bytes, of which str() makes "b'...'".

def _try_hdf5_strings() -> None:
    if hdf5._available:
        with hdf5.h5py.File(
                'trial', 'w', driver='core', backing_store=False) as file:
            file['x'] = 'x'
            if hdf5.HDF5Deserializer(file)('x', '') != 'x':
                raise WrongResultError


def _repair_hdf5_strings() -> None:
    def asarray(dataset: Any) -> str:
        return dataset.asstr()[()]

    _read_by(asarray, hdf5.HDF5Deserializer, str)


# What is deprecated: it only warns, until it is gone.

_GOING = (DeprecationWarning, AttributeError)


@contextlib.contextmanager
def _raising_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter('error', DeprecationWarning)
        yield


# Thread.setDaemon, since Python 3.10.

def _try_multiprocess_iterator() -> None:
    with _raising_deprecations():
        multiprocess_iterator.threading.Thread().setDaemon(True)


def _repair_multiprocess_iterator() -> None:
    class Thread(threading.Thread):
        def setDaemon(self, daemonic: bool) -> None:
            self.daemon = daemonic

    richer = types.ModuleType('threading')
    vars(richer).update(vars(threading), Thread=Thread)
    multiprocess_iterator.threading = richer


# np.fix, since NumPy 2.5; np.trunc is the same.

def _try_fix() -> None:
    with _raising_deprecations():
        fix.fix(numpy.zeros(1))


def _repair_fix() -> None:
    def get_array_module(*arrays: Any) -> Any:
        xp = chainer.backend.get_array_module(*arrays)
        return types.SimpleNamespace(fix=xp.trunc)

    fix.backend = types.SimpleNamespace(get_array_module=get_array_module)


# A NumPy array has a `device` since NumPy 2, which is not Chainer's 'CPU'.

def _try_debug_print() -> None:
    if 'device: CPU' not in chainer.Variable(numpy.zeros(1)).debug_print():
        raise WrongResultError


def _repair_debug_print() -> None:
    original = chainer.Variable.debug_print

    @functools.wraps(original)
    def debug_print(self: Any) -> str:
        return original(self).replace('\n- device: cpu\n',
                                      '\n- device: CPU\n')

    chainer.Variable.debug_print = debug_print


# Each goes with the support of Chainer 7, or of what it is needed with.
REPAIRS = (
    Repair('as_strided',
           'the backward of F.as_strided fails (chainer#8632)',
           'with NumPy 2',
           _try_as_strided, AttributeError, _repair_as_strided),
    Repair('categorical',
           'log_prob of Categorical fails', 'with NumPy 2',
           _try_categorical, TypeError, _repair_categorical),
    Repair('pad_sequence',
           'F.pad_sequence fails with -1 in unsigned arrays', 'with NumPy 2',
           _try_pad_sequence, OverflowError, _repair_pad_sequence),
    Repair('basic_math',
           'x - 1 of an unsigned Variable fails', 'with NumPy 2',
           _try_basic_math, OverflowError, _repair_basic_math),
    Repair('numpy_scalars',
           'an eps, alpha or decay that is a numpy.float64 makes what four '
           'normalizations compute float64, or fails', 'with NumPy 2',
           nep50.try_numpy_scalars,
           WrongResultError, nep50.repair_numpy_scalars),
    Repair('summary',
           'a report of many float16 losses has a wrong mean',
           'with NumPy 2', nep50.try_summary,
           WrongResultError, nep50.repair_summary),
    Repair('mean_squared_error',
           'of more than 65,519 float16 numbers it is 0 or NaN',
           'with NumPy 2', nep50.try_mean_squared_error,
           WrongResultError, nep50.repair_mean_squared_error),
    Repair('gradient_clipping',
           'GradientClipping makes large float16 gradients 0',
           'with NumPy 2', nep50.try_gradient_clipping,
           WrongResultError, nep50.repair_gradient_clipping),
    Repair('gradient_lars',
           'GradientLARS makes float16 gradients of 0 NaN',
           'with NumPy 2', nep50.try_gradient_lars,
           WrongResultError, nep50.repair_gradient_lars),
    Repair('debug_print',
           'Variable.debug_print says cpu in place of CPU', 'with NumPy 2',
           _try_debug_print, WrongResultError, _repair_debug_print),
    Repair('concat_examples',
           'concat_examples fails with -1 in unsigned arrays',
           'with NumPy 2.1 or newer',
           _try_concat_examples, OverflowError, _repair_concat_examples),
    Repair('micro_average',
           'MicroAverage of arrays of shape (1,) fails',
           'with NumPy 2.4 or newer',
           _try_micro_average, TypeError, _repair_micro_average),
    Repair('load_npz',
           'an array of shape (1,) cannot be loaded into a number',
           'with NumPy 2.4 or newer',
           _try_load_npz, TypeError, _repair_load_npz),
    Repair('multiprocess_iterator',
           'MultiprocessIterator warns that setDaemon is deprecated',
           'with Python 3.10 or newer', _try_multiprocess_iterator,
           _GOING, _repair_multiprocess_iterator),
    Repair('fix',
           'F.fix and the backward of F.fmod warn that np.fix is deprecated',
           'with NumPy 2.5 or newer', _try_fix, _GOING, _repair_fix),
    Repair('hdf5_strings',
           'load_hdf5 makes "b\'x\'" of the string "x"',
           'with h5py 3 or newer', _try_hdf5_strings,
           WrongResultError, _repair_hdf5_strings),
    Repair('resize_images',
           'F.resize_images fails', 'with NumPy 1.24 or newer',
           _try_resize_images, AttributeError, _repair_resize_images),
    Repair('sparse_matmul',
           'F.sparse_matmul of float16 fails',
           'with SciPy 1.15 or newer',
           _try_sparse_matmul, ValueError, _repair_sparse_matmul),
    Repair('pool',
           'MultiprocessIterator with maxtasksperchild may wait forever',
           'with any Python',
           pool.try_pool, ZeroDivisionError, pool.repair_pool),
    Repair('deconvolution_2d',
           'its backward fails where the input needs no gradient, as in a '
           'first layer (chainer#8624)', 'with Chainer 7.8.1',
           _try_deconvolution_2d, ValueError, _repair_deconvolution_2d),
)
