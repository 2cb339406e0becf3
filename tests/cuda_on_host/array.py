"""A stand-in for CuPy, whose arrays live on the host.

With :func:`installed` Chainer takes the paths of a GPU: ``forward_gpu``, its
kernels (which the other modules of this package execute) and ``xp`` being
CuPy.  What matters on a device and cannot be seen on the host is enforced as
CuPy 14 does, or recorded:

* a :class:`DeviceArray` is no ``numpy.ndarray``; it does not mix with one and
  does not become one by itself;
* results are arrays, also those of shape ``()``;
* ``empty`` gives garbage;
* :func:`no_synchronization` refuses to let the host wait for a value;
* :func:`counted` lists what would have been launched.

NumPy does the arithmetic, so what is not checked is CuPy itself.
"""
from __future__ import annotations

import contextlib
import functools
import importlib
import math
import sys
import types

import chainer
import numpy
from chainer.backends import cuda as chainer_cuda

from tests.cuda_on_host.raw import Pointer

# ---------------------------------------------------------------------------
# What is recorded, and what is forbidden
# ---------------------------------------------------------------------------
_records = []
_copy_records = []
_forbidden = 0


def _launched(*names):
    for record in _records:
        record.extend(names)


@contextlib.contextmanager
def _recording(records):
    record = []
    records.append(record)
    try:
        yield record
    finally:
        # By identity: two records may be equal.
        records[:] = [r for r in records if r is not record]


def counted():
    """Lists the names of the device's operations, in their order.

    One name for each kernel, product of cuBLAS ('gemv', 'gemm'), ufunc or
    other operation, fill and copy ('copy', 'astype', 'to_device',
    'to_host').  Products count as CuPy makes them: a dot product of vectors
    is a 'multiply' and a 'sum', operands that cuBLAS cannot read are copied
    first, and a broadcast batch needs arrays of pointers ('mat_ptrs').
    """
    return _recording(_records)


@contextlib.contextmanager
def no_synchronization():
    """Makes whatever the host would have to wait for an AssertionError.

    The value has a list ``copies``, of the shapes of all arrays that were
    copied from the host to the device meanwhile; those are allowed.
    """
    global _forbidden
    with _recording(_copy_records) as copies:
        _forbidden += 1
        try:
            yield types.SimpleNamespace(copies=copies)
        finally:
            _forbidden -= 1


def _synchronize(what):
    if _forbidden:
        raise AssertionError(f'host synchronization: {what}')


# ---------------------------------------------------------------------------
# Between the host's arrays and the device's
# ---------------------------------------------------------------------------
_SCALARS = (bool, int, float, complex, numpy.generic)
# Before NEP 50 the dtype of an array of shape () was weak, but not in CuPy.
_VALUE_BASED_PROMOTION = int(numpy.__version__.split('.')[0]) < 2


def _wrap(array):
    """Gives the device an array of the host, without a copy."""
    self = object.__new__(DeviceArray)
    self._host = array
    return self


def _wrapped(value):
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return _wrap(numpy.asarray(value))
    if isinstance(value, (tuple, list)):
        values = [_wrapped(x) for x in value]
        if hasattr(value, '_fields'):  # as numpy.linalg returns
            return type(value)(*values)
        return type(value)(values)
    return value


def _refuse_host(x):
    if isinstance(x, numpy.ndarray):
        raise TypeError(f'Unsupported type {type(x)}')


def _unwrapped(value):
    if isinstance(value, DeviceArray):
        return value._host
    _refuse_host(value)
    if type(value) in (tuple, list):
        return type(value)([_unwrapped(x) for x in value])
    return value


def _arrays_in(values):
    for x in values:
        if isinstance(x, numpy.ndarray):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from _arrays_in(x)


_NAMES = {'amax': 'max', 'amin': 'min', 'true_divide': 'divide',
          'abs': 'absolute', 'reshape': 'copy', 'ravel': 'copy',
          'flatten': 'copy', 'conj': 'conjugate'}
# CuPy has to know how large their results are, or returns them on the host.
_SYNCHRONIZING = {
    'nonzero', 'argwhere', 'flatnonzero', 'unique', 'extract', 'bincount',
    'compress', 'array2string', 'array_repr', 'array_str', 'save', 'savez'}


def _call(name, function, args, kwargs):
    """Calls a function of NumPy on what the arrays hold."""
    name = _NAMES.get(name, name)
    if name in _SYNCHRONIZING:
        _synchronize(name)
    out = kwargs.get('out')
    args = _unwrapped(args)
    kwargs = {key: _unwrapped(x) for key, x in kwargs.items()}
    with numpy.errstate(all='ignore'):  # a device does not warn
        result = function(*args, **kwargs)
    inputs = list(_arrays_in([*args, *kwargs.values()]))
    outputs = list(_arrays_in([result]))
    is_launch = (
        out is not None or result is None
        or isinstance(result, (numpy.generic, bool))
        or any(x.size and not any(numpy.may_share_memory(x, y)
                                  for y in inputs) for x in outputs))
    if is_launch:
        _launched(name)
    if out is not None:
        return out[0] if isinstance(out, tuple) and len(out) == 1 else out
    if isinstance(result, bool):  # allclose and others; CuPy: an array
        result = numpy.asarray(result)
    return _wrapped(result)


def _lift(x):
    return x.reshape(1) if isinstance(x, numpy.ndarray) and not x.ndim else x


def _call_ufunc(ufunc, args, kwargs):
    name = ufunc.__name__
    if name == 'matmul':
        return _matmul(*args, **kwargs)
    out = kwargs.pop('out', None)
    if isinstance(out, tuple):
        out, = out
    if ufunc.nin < len(args):
        *args, out = args
    for x in args:
        if not isinstance(x, (DeviceArray, *_SCALARS)):
            raise TypeError(f'Unsupported type {type(x)}')
    if not (out is None or isinstance(out, DeviceArray)):
        raise TypeError(f'Unsupported type {type(out)}')
    hosts = [_unwrapped(x) for x in args]
    kwargs = {key: _unwrapped(x) for key, x in kwargs.items()}
    target = None if out is None else out._host
    ndim = max([numpy.ndim(x) for x in hosts])
    if _VALUE_BASED_PROMOTION:
        hosts = [_lift(x) for x in hosts]
        target = _lift(target)
    if target is not None:
        kwargs['out'] = target
    with numpy.errstate(all='ignore'):
        result = ufunc(*hosts, **kwargs)
    first = result[0] if isinstance(result, tuple) else result
    if first.size:
        _launched(_NAMES.get(name, name))
    if out is not None:
        return out
    if not ndim:
        result = (tuple([numpy.reshape(x, ()) for x in result])
                  if isinstance(result, tuple) else numpy.reshape(result, ()))
    return _wrapped(result)


def _where(condition, x=None, y=None):
    if (x is None) != (y is None):
        raise ValueError("Must provide both 'x' and 'y' or neither.")
    if x is None:
        return _call('nonzero', numpy.nonzero, (condition,), {})
    condition = condition.astype('?', copy=False)
    hosts = _unwrapped((condition, x, y))
    ndim = max([numpy.ndim(z) for z in hosts])
    if _VALUE_BASED_PROMOTION:
        hosts = [_lift(z) for z in hosts]
    result = numpy.where(*hosts)
    if result.size:
        _launched('where')
    return _wrap(result if ndim else result.reshape(()))


def _copied_to_device(array):
    for record in _copy_records:
        record.append(array.shape)
    _launched('to_device')


def _from_host(array):
    """Copies an array of the host to the device."""
    array = numpy.array(array)
    _copied_to_device(array)
    return _wrap(array)


# ---------------------------------------------------------------------------
# Creation
# ---------------------------------------------------------------------------
def _spoil(array):
    kind = array.dtype.kind
    if kind in 'fc':
        array.fill(numpy.nan)
    elif kind in 'iu':
        array.fill(numpy.iinfo(array.dtype).max)
    else:
        array.fill(True)
    return array


def garbage(shape, dtype=float, order='C'):
    """An array of the host that holds what no result should depend on."""
    return _spoil(numpy.empty(shape, dtype, order))


def _empty(shape, dtype=float, order='C'):
    return _wrap(garbage(shape, dtype, order))


def _empty_like(prototype, dtype=None, order='K', subok=None, shape=None):
    _check_device(prototype)
    return _wrap(_spoil(numpy.empty_like(
        prototype._host, dtype, order, shape=shape)))


def _check_device(x):
    if not isinstance(x, DeviceArray):
        raise TypeError(f'Unsupported type {type(x)}')


def _filled(array, value):
    array.fill(value)
    return array


def _zeros(shape, dtype=float, order='C'):
    return _filled(_empty(shape, dtype, order), 0)


def _ones(shape, dtype=float, order='C'):
    return _filled(_empty(shape, dtype, order), 1)


def _full(shape, fill_value, dtype=None, order='C'):
    if dtype is None:
        dtype = (fill_value.dtype if isinstance(fill_value, DeviceArray)
                 else numpy.array(fill_value).dtype)
    return _filled(_empty(shape, dtype, order), fill_value)


def _zeros_like(a, *args, **kwargs):
    return _filled(_empty_like(a, *args, **kwargs), 0)


def _ones_like(a, *args, **kwargs):
    return _filled(_empty_like(a, *args, **kwargs), 1)


def _full_like(a, fill_value, *args, **kwargs):
    return _filled(_empty_like(a, *args, **kwargs), fill_value)


def _array(obj, dtype=None, copy=True, order='K', subok=False, ndmin=0,
           blocking=False):
    if isinstance(obj, DeviceArray):
        a = obj.astype(obj.dtype if dtype is None else dtype, order or 'K',
                       copy=bool(copy))
        if ndmin > a.ndim:
            a = a.reshape((1,) * (ndmin - a.ndim) + a.shape)
        return a
    if _holds_device_array(obj):
        host = numpy.array([_unwrapped(_array(x)) for x in obj], dtype)
        _launched('concatenate')
        return _wrap(host)
    return _from_host(numpy.array(obj, dtype, order=order, ndmin=ndmin))


def _holds_device_array(obj):
    return isinstance(obj, (list, tuple)) and any(
        isinstance(x, DeviceArray) or _holds_device_array(x) for x in obj)


def _asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    if isinstance(a, DeviceArray) and not copy:
        dtype = a.dtype if dtype is None else numpy.dtype(dtype)
        return a.astype(dtype, order or 'K', copy=False)
    return _array(a, dtype, order=order or 'K')


def _ascontiguousarray(a, dtype=None):
    return _asarray(a, dtype, 'C')


def _asfortranarray(a, dtype=None):
    return _asarray(a, dtype, 'F')


def _copyto(dst, src, casting='same_kind', where=None):
    _check_device(dst)
    if not isinstance(src, (DeviceArray, *_SCALARS)):
        raise TypeError(f'Unsupported type {type(src)}')
    numpy.copyto(dst._host, _unwrapped(src), casting,
                 True if where is None else _unwrapped(where))
    if dst.size:
        _launched('copy' if isinstance(src, DeviceArray) else 'fill')


# ---------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------
def _to_head(x, axes):
    return numpy.moveaxis(x, axes, range(len(axes)))


def _launch_product(a, b, k):
    """What CuPy launches for the sum over the first axes, of size ``k``."""
    if not a.size or not b.size:
        return _launched('fill')
    n, m = a.size // k, b.size // k
    if n == m == 1:
        return _launched('multiply', 'sum')
    dtype = numpy.promote_types(a.dtype, b.dtype)
    for x in (a, b):
        if x.dtype != dtype:
            _launched('astype')
            x = x.astype(dtype)
        matrix = x.reshape(k, -1)
        if not (numpy.may_share_memory(matrix, x)
                and (matrix.flags.c_contiguous
                     or matrix.flags.f_contiguous)):
            _launched('copy')
    return _launched('gemv' if 1 in (n, m) else 'gemm')


def _store(result, out):
    if out is None:
        return _wrap(numpy.asarray(result))
    _check_device(out)
    if out.dtype != result.dtype or not out.flags.c_contiguous:
        raise ValueError('Output array must be C-contiguous, and of the '
                         'dtype of the product')
    out._host[...] = result
    return out


def _gemv(transa, alpha, a, x, beta, y):
    """As ``cupy.cublas.gemv``: y = alpha op(a) x + beta y."""
    for array in (a, x, y):
        _check_device(array)
    if not (a.dtype == x.dtype == y.dtype and a.dtype.char in 'fd'):
        raise TypeError('invalid dtype')
    matrix = a._host.T if transa == 'T' else a._host
    assert (matrix.ndim, x.ndim, y.ndim) == (2, 1, 1)
    assert matrix.shape == (y.size, x.size)
    for array, size in ((x, x.size), (y, y.size)):
        assert size < 2 or array.strides == (array.itemsize,)
    if not (a.flags.c_contiguous or a.flags.f_contiguous):
        _launched('copy')
    with numpy.errstate(all='ignore'):
        result = alpha * numpy.dot(matrix, x._host)
        y._host[...] = result + beta * y._host if beta else result
    _launched('gemv')


def _dot(a, b, out=None):
    _check_device(a)
    _check_device(b)
    if not a.ndim or not b.ndim:
        return _call_ufunc(numpy.multiply, (a, b), {'out': out})
    x, y = a._host, b._host
    with numpy.errstate(all='ignore'):
        result = numpy.dot(x, y)
    _launch_product(_to_head(x, [x.ndim - 1]),
                    _to_head(y, [max(y.ndim - 2, 0)]), x.shape[-1])
    return _store(result, out)


def _tensordot(a, b, axes=2):
    _check_device(a)
    _check_device(b)
    x, y = a._host, b._host
    with numpy.errstate(all='ignore'):
        result = numpy.tensordot(x, y, axes)
    if isinstance(axes, int):
        axes = range(x.ndim - axes, x.ndim), range(axes)
    x_axes, y_axes = ([z] if isinstance(z, int) else list(z) for z in axes)
    k = math.prod([x.shape[i] for i in x_axes])
    _launch_product(_to_head(x, x_axes), _to_head(y, y_axes), k)
    return _wrap(numpy.asarray(result))


def _matmul(a, b, out=None):
    if isinstance(out, tuple):
        out, = out
    _check_device(a)
    _check_device(b)
    if not a.ndim or not b.ndim:
        raise ValueError("Scalar operands are not allowed, use '*' instead")
    ndim = max(a.ndim, b.ndim)
    if ndim <= 2:
        return _dot(a, b, out)
    x, y = a._host, b._host
    with numpy.errstate(all='ignore'):
        result = numpy.matmul(x, y)
    dtype = numpy.dtype('f') if result.dtype.char == 'e' else result.dtype
    batches = []
    for z in (x, y):
        if z.dtype != dtype:
            _launched('astype')
        elif not z.flags.c_contiguous:
            _launched('copy')
        batches.append((1,) * (ndim - max(z.ndim, 2)) + z.shape[:-2])
    if result.size:
        if batches[0] != batches[1]:
            _launched(*['mat_ptrs'] * 3 * (ndim - 2))
        _launched('gemm')
        if result.dtype != dtype:
            _launched('copy')
    return _store(result, out)


# ---------------------------------------------------------------------------
# The array
# ---------------------------------------------------------------------------
class _Flags:
    """As CuPy's: there is no ``writeable``."""

    def __init__(self, flags):
        self.c_contiguous = flags.c_contiguous
        self.f_contiguous = flags.f_contiguous
        self.owndata = flags.owndata
        self.fnc = flags.fnc
        self.forc = flags.forc

    def __getitem__(self, name):
        names = {'C_CONTIGUOUS': 'c_contiguous', 'OWNDATA': 'owndata',
                 'F_CONTIGUOUS': 'f_contiguous'}
        return getattr(self, names[name])


class MemoryPointer(Pointer):
    """See :class:`cupy.cuda.MemoryPointer`."""

    __slots__ = ()
    device = property(lambda self: Device(0))
    device_id = 0
    mem = property(lambda self: types.SimpleNamespace(device=Device(0)))

    def __add__(self, offset):
        return MemoryPointer(self.array, self.offset + offset)


class DeviceArray:
    """An array of the device; see :class:`cupy.ndarray`."""

    __slots__ = ('__weakref__', '_host')
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, shape, dtype=float, memptr=None, strides=None,
                 order='C'):
        if strides is not None:
            raise NotImplementedError
        if memptr is None:
            self._host = garbage(shape, dtype, order)
            return
        array, dtype = memptr.array, numpy.dtype(dtype)
        if not array.flags.c_contiguous:
            raise NotImplementedError
        n = math.prod(shape) * dtype.itemsize
        memory = array.reshape(-1).view(numpy.uint8)
        if memptr.offset + n > memory.size:
            raise ValueError('an array out of its memory')
        self._host = memory[memptr.offset:memptr.offset + n].view(
            dtype).reshape(shape)

    # What is known without the device.
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: _Flags(self._host.flags))
    device = property(lambda self: Device(0))
    T = property(lambda self: _wrap(self._host.T))
    real = property(lambda self: _wrap(self._host.real))
    imag = property(lambda self: _wrap(self._host.imag))

    @property
    def shape(self):
        return self._host.shape

    @shape.setter
    def shape(self, shape):
        view = self._host.reshape(shape)
        if self.size and not numpy.may_share_memory(view, self._host):
            raise AttributeError('Incompatible shape')
        self._host = view

    @property
    def base(self):
        return None if self._host.base is None else _wrap(self._host.base)

    @property
    def data(self):
        return MemoryPointer(self._host)

    def __len__(self):
        return len(self._host)

    # To the host.

    def get(self, stream=None, order='C', out=None, blocking=True):
        return self._get('get', order, out)

    def _get(self, what, order='C', out=None):
        _synchronize(what)
        _launched('to_host')
        if out is None:
            return self._host.copy(order)
        out[...] = self._host
        return out

    def item(self):
        return self._get('item').item()

    def tolist(self):
        return self._get('tolist').tolist()

    def tobytes(self, order='C'):
        return self._get('tobytes').tobytes(order)

    def __float__(self):
        return float(self._get('float').item())

    def __int__(self):
        return int(self._get('int').item())

    def __complex__(self):
        return complex(self._get('complex').item())

    def __bool__(self):
        if self.size > 1:
            raise ValueError('The truth value of an array with more than one '
                             'element is ambiguous.')
        return bool(self._get('bool').any())

    def __repr__(self):
        return repr(self._get('repr'))

    def __str__(self):
        return str(self._get('str'))

    def __format__(self, spec):
        return format(self._get('format'), spec)

    def __array__(self, dtype=None, copy=None):
        _synchronize('numpy.asarray')
        raise TypeError(
            'Implicit conversion to a NumPy array is not allowed. '
            'Please use `.get()` to construct a NumPy array explicitly.')

    def __reduce__(self):
        return _from_host, (self._get('pickle', 'A'),)

    # From the host.

    def set(self, arr, stream=None):
        if not isinstance(arr, numpy.ndarray):
            raise TypeError('Only numpy.ndarray can be set to cupy.ndarray')
        if arr.dtype != self.dtype:
            raise TypeError(f'{arr.dtype} array cannot be set to {self.dtype}')
        if arr.shape != self.shape:
            raise ValueError(f'Shape mismatch: {arr.shape}, {self.shape}')
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError('Cannot set to non-contiguous array')
        self._host[...] = arr
        _copied_to_device(arr)

    # On the device.

    def copy(self, order='C'):
        if self.size:
            _launched('copy')
        return _wrap(self._host.copy(order))

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def astype(self, dtype, order='K', casting=None, subok=None, copy=True):
        if casting is not None or subok is not None:
            raise TypeError('casting and subok are not supported yet')
        with numpy.errstate(all='ignore'):
            host = self._host.astype(dtype, order, copy=copy)
        if host is self._host:
            return self
        if host.size:
            _launched('astype' if host.dtype != self.dtype else 'copy')
        return _wrap(host)

    def fill(self, value):
        if isinstance(value, DeviceArray):
            value = value._host
        if numpy.shape(value):
            raise ValueError('non-scalar array cannot be used for fill')
        with numpy.errstate(all='ignore'):
            self._host.fill(value)
        if self.size:
            _launched('fill')

    def dot(self, b, out=None):
        return _dot(self, b, out)

    def reduced_view(self, dtype=None):
        return self.reshape(-1) if self._host.flags.c_contiguous else self

    def scatter_add(self, slices, value):
        numpy.add.at(self._host, self._index(slices), _unwrapped(value))
        _launched('scatter_add')

    @staticmethod
    def _index(index):
        """An index for NumPy that gives no scalar."""
        index = index if isinstance(index, tuple) else (index,)
        found = []
        for i in index:
            if isinstance(i, DeviceArray):
                i = i._host
            elif isinstance(i, (numpy.ndarray, list)) and numpy.ndim(i):
                i = _from_host(i)._host
            found.append(i)
        if not any(i is Ellipsis for i in found):
            found.append(Ellipsis)
        return tuple(found)

    def __getitem__(self, index):
        index = self._index(index)
        if any(getattr(i, 'dtype', None) == numpy.dtype('?')
               for i in index):
            _synchronize('a mask as an index')
        host = self._host[index]
        if host.size and not numpy.may_share_memory(host, self._host):
            _launched('take')
        return _wrap(host)

    def __setitem__(self, index, value):
        index = self._index(index)
        is_array = isinstance(value, DeviceArray)
        if not is_array and numpy.shape(value):
            raise ValueError(
                'non-scalar numpy.ndarray cannot be used for fill')
        with numpy.errstate(all='ignore'):
            self._host[index] = _unwrapped(value) if is_array else value
        if any(isinstance(i, (list, numpy.ndarray)) for i in index):
            return _launched('scatter_update')
        view = self._host[index]
        if is_array and view.strides == value.strides and (
                view.shape == value.shape
                and view.ctypes.data == value._host.ctypes.data):
            return None  # as after x[0] += 1
        if view.size:
            _launched('copy' if is_array else 'fill')
        return None

    def __iter__(self):
        if not self.ndim:
            raise TypeError('iteration over a 0-d array')
        return (self[i] for i in range(len(self)))

    # NumPy's protocols.

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        out = kwargs.get('out', ())
        for x in (*inputs, *out):
            if not isinstance(x, (DeviceArray, numpy.ndarray, *_SCALARS)):
                return NotImplemented
        if ufunc.__name__ in _COMPARISONS:
            inputs = [x.item() if isinstance(x, numpy.ndarray) and not x.ndim
                      else x for x in inputs]
        function = getattr(module, ufunc.__name__)
        if method != '__call__':
            function = getattr(function, method)
        return function(*inputs, **kwargs)

    def __array_function__(self, func, types, args, kwargs):
        if not all(issubclass(t, (DeviceArray, numpy.ndarray))
                   for t in types):
            return NotImplemented
        try:
            owner = functools.reduce(
                getattr, _submodules(func.__module__), module)
            function = getattr(owner, func.__name__)
        except AttributeError:
            return NotImplemented
        return function(*args, **kwargs)


def _submodules(name):
    # NumPy before 1.24 may name the private module.
    return [part for part in name.split('.') if part in ('linalg', 'fft')]


_COMPARISONS = {'less', 'less_equal', 'equal', 'not_equal', 'greater',
                'greater_equal'}
_OPERATORS = {
    'add': numpy.add, 'sub': numpy.subtract, 'mul': numpy.multiply,
    'truediv': numpy.true_divide, 'floordiv': numpy.floor_divide,
    'mod': numpy.remainder, 'divmod': numpy.divmod, 'pow': numpy.power,
    'matmul': numpy.matmul, 'and': numpy.bitwise_and,
    'or': numpy.bitwise_or, 'xor': numpy.bitwise_xor,
    'lshift': numpy.left_shift, 'rshift': numpy.right_shift}


def _defers(x):
    """Whether the operand on the right knows better, as a Variable does."""
    absent = object()
    ufunc = getattr(x, '__array_ufunc__', absent)
    if ufunc is absent:
        return getattr(x, '__array_priority__', 0) > 100
    return ufunc is None


def _define_operators():
    def operator(ufunc):
        def method(self, other):
            if isinstance(other, (DeviceArray, *_SCALARS)):
                return _call_ufunc(ufunc, (self, other), {})
            return NotImplemented if _defers(other) else ufunc(self, other)
        return method

    def reflected(ufunc):
        def method(self, other):
            return ufunc(other, self)
        return method

    def in_place(ufunc):
        def method(self, other):
            return _call_ufunc(ufunc, (self, other), {'out': self})
        return method

    def unary(ufunc):
        return lambda self: _call_ufunc(ufunc, (self,), {})

    for name, ufunc in _OPERATORS.items():
        setattr(DeviceArray, f'__{name}__', operator(ufunc))
        setattr(DeviceArray, f'__r{name}__', reflected(ufunc))
        if name not in ('divmod', 'matmul'):
            setattr(DeviceArray, f'__i{name}__', in_place(ufunc))
    for name, ufunc in (
            ('lt', numpy.less), ('le', numpy.less_equal),
            ('eq', numpy.equal), ('ne', numpy.not_equal),
            ('gt', numpy.greater), ('ge', numpy.greater_equal)):
        setattr(DeviceArray, f'__{name}__', operator(ufunc))
    for name, ufunc in (
            ('neg', numpy.negative), ('pos', numpy.positive),
            ('abs', numpy.absolute), ('invert', numpy.invert)):
        setattr(DeviceArray, f'__{name}__', unary(ufunc))
    DeviceArray.conj = DeviceArray.conjugate = unary(numpy.conjugate)


def _define_methods():
    def method(name):
        function = getattr(numpy.ndarray, name)

        @functools.wraps(function)
        def call(self, *args, **kwargs):
            return _call(name, function, (self, *args), kwargs)
        return call

    for name in (
            'all', 'any', 'argmax', 'argmin', 'argpartition', 'argsort',
            'choose', 'clip', 'compress', 'cumprod', 'cumsum', 'diagonal',
            'flatten', 'max', 'mean', 'min', 'nonzero', 'partition', 'prod',
            'put', 'ravel', 'repeat', 'reshape', 'round', 'sort', 'squeeze',
            'std', 'sum', 'swapaxes', 'take', 'trace', 'transpose', 'var',
            'view'):
        setattr(DeviceArray, name, method(name))


_define_operators()
_define_methods()


# ---------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------
_EXECUTORS = {'elementwise': 'elementwise', 'reduce': 'reduction',
              'raw': 'raw'}


@functools.lru_cache(maxsize=None)
def _compiled(kind, args, kwargs):
    executor = importlib.import_module(
        f'tests.cuda_on_host.{_EXECUTORS[kind]}')
    return getattr(executor, kind)(*args, **dict(kwargs))


class _Kernel:
    """A kernel whose source is executed on the host."""

    def __init__(self, kind, name, args, kwargs):
        self.name = name
        self._source = kind, args, tuple(sorted(kwargs.items()))

    def _run(self, args, kwargs):
        kernel = _compiled(*self._source)  # as CuPy: when first called
        _launched(self.name)
        with numpy.errstate(all='ignore'):
            return kernel(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        for key in ('stream', 'block_size'):
            kwargs.pop(key, None)
        for x in (*args, *kwargs.values()):
            _refuse_host(x)
        given = {id(x._host): x for x in (*args, *kwargs.values())
                 if isinstance(x, DeviceArray)}
        result = self._run(
            _unwrapped(args), {k: _unwrapped(x) for k, x in kwargs.items()})

        def output(x):
            return given[id(x)] if id(x) in given else _wrapped(x)

        if isinstance(result, (tuple, list)):
            return tuple([output(x) for x in result])
        return output(result)


def _elementwise_kernel(in_params, out_params, operation, name='kernel',
                        **kwargs):
    return _Kernel('elementwise', name,
                   (in_params, out_params, operation, name), kwargs)


def _reduction_kernel(in_params, out_params, map_expr, reduce_expr,
                      post_map_expr, identity, name='reduce_kernel',
                      **kwargs):
    return _Kernel('reduce', name, (
        in_params, out_params, map_expr, reduce_expr, post_map_expr,
        identity, name), kwargs)


class _RawKernel(_Kernel):

    def __init__(self, code, name, options=(), **kwargs):
        super().__init__('raw', name, (code, name, tuple(options)), {})

    def __call__(self, grid, block, args=(), *, shared_mem=0, stream=None):
        for x in args:
            _refuse_host(x)
        kwargs = {'shared_mem': shared_mem} if shared_mem else {}
        self._run((grid, block, _unwrapped(tuple(args))), kwargs)


class _RawModule:

    def __init__(self, code, options=(), **kwargs):
        self._code, self._options = code, options

    def get_function(self, name):
        return _RawKernel(self._code, name, self._options)


# ---------------------------------------------------------------------------
# The modules
# ---------------------------------------------------------------------------
class Device:
    """See :class:`cupy.cuda.Device`; there is the device 0."""

    compute_capability = '90'

    def __init__(self, device=None):
        self.id = 0 if device is None else int(device)

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return hash(self.id)

    def __repr__(self):
        return f'<CUDA Device {self.id}>'

    def use(self):
        if self.id:
            raise CUDARuntimeError('cudaErrorInvalidDevice')

    def __enter__(self):
        self.use()
        return self

    def __exit__(self, *args):
        pass

    def synchronize(self):
        _synchronize('Device.synchronize')


class CUDARuntimeError(RuntimeError):
    pass


class Stream:
    """See :class:`cupy.cuda.Stream`."""

    ptr = 0

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def use(self):
        return self

    def synchronize(self):
        _synchronize('Stream.synchronize')

    def record(self, event=None):
        return Event() if event is None else event

    def wait_event(self, event):
        pass


Stream.null = Stream()


class Event:
    """See :class:`cupy.cuda.Event`."""

    done = True

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def synchronize(self):
        _synchronize('Event.synchronize')


class _MemoryPool:

    def used_bytes(self):
        return 0

    total_bytes = free_bytes = n_free_blocks = used_bytes

    def free_all_blocks(self, stream=None):
        pass


class _Ufunc:
    """A ufunc of NumPy, on the device."""

    def __init__(self, ufunc):
        self.__name__ = ufunc.__name__
        self.nin, self.nout = ufunc.nin, ufunc.nout
        self._ufunc = ufunc

    def __call__(self, *args, **kwargs):
        return _call_ufunc(self._ufunc, args, kwargs)

    def __getattr__(self, name):
        method = getattr(self._ufunc, name)
        if not callable(method):
            return method
        return lambda *args, **kwargs: _call(
            f'{self.__name__}.{name}', method, args, kwargs)


# What NumPy has and CuPy has not.
_NOT_IN_CUPY = {
    'asmatrix', 'block', 'bmat', 'einsum_path', 'frompyfunc', 'fromregex',
    'geomspace', 'histogram_bin_edges', 'insert', 'isnat', 'matrix_norm',
    'matvec', 'multi_dot', 'nanpercentile', 'nanquantile', 'nested_iters',
    'polyder', 'polydiv', 'polyint', 'spacing', 'svdvals', 'unstack',
    'vecdot', 'vecmat', 'vector_norm'}


class _Module(types.ModuleType):
    """A module of CuPy, with what its counterpart in NumPy has."""

    def __init__(self, name, counterpart, **contents):
        super().__init__(name)
        self._counterpart = counterpart
        vars(self).update(contents)

    def __getattr__(self, name):
        if (name.startswith('_') or self._counterpart is None
                or name in _NOT_IN_CUPY):
            raise AttributeError(f'{self.__name__} has no {name}')
        value = getattr(self._counterpart, name)
        if isinstance(value, numpy.ufunc):
            return _Ufunc(value)
        if isinstance(value, types.ModuleType):
            raise AttributeError(f'{self.__name__} has no {name}')
        if isinstance(value, type) or not callable(value):
            return value
        return functools.partial(_call_named, name, value)


def _call_named(name, function, *args, **kwargs):
    if name in ('split', 'array_split'):  # the indices are the host's
        args = [x.tolist() if isinstance(x, numpy.ndarray) else x
                for x in args]
    return _call(name, function, args, kwargs)


class _Random(types.ModuleType):
    """``cupy.random``, with a generator of its own."""

    def __init__(self):
        super().__init__('cupy.random')
        self._state = RandomState(0)

    def seed(self, seed=None):
        self._state = RandomState(seed)

    def reset_states(self):
        self._state = RandomState(0)

    def get_random_state(self):
        return self._state

    def set_random_state(self, state):
        self._state = state

    def default_rng(self, seed=None):
        return RandomState(seed)

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self._state, name)


class RandomState:
    """See :class:`cupy.random.RandomState`."""

    def __init__(self, seed=None, method=None):
        self._state = numpy.random.RandomState(seed)

    def seed(self, seed=None):
        self._state.seed(seed)

    def __getattr__(self, name):
        if name.startswith('_'):
            raise AttributeError(name)
        draw = getattr(self._state, name)

        def function(*args, dtype=None, **kwargs):
            if dtype is not None and name == 'randint':
                kwargs['dtype'] = dtype
            result = _call(name, draw, args, kwargs)
            if result is None or dtype is None:  # shuffle returns None
                return result
            return _asarray(_wrapped(numpy.asarray(
                _unwrapped(result)).astype(dtype)))
        return function


def _get_array_module(*args):
    return module if any(isinstance(x, DeviceArray) for x in args) else numpy


def _asnumpy(a, stream=None, order='C', out=None, *, blocking=True):
    if isinstance(a, DeviceArray):
        return a._get('asnumpy', order, out)
    return numpy.asarray(a, order=order)


def _fuse(*args, **kwargs):
    if len(args) == 1 and not kwargs and callable(args[0]):
        return args[0]
    return lambda function: function


def _memoize(for_each_device=False):
    return lambda function: function


def _scatter_add(a, slices, value):
    a.scatter_add(slices, value)


def _rsqrt(x, dtype=None):
    return _call(
        'rsqrt', lambda x: numpy.reciprocal(numpy.sqrt(x, dtype=dtype)),
        (x,), {})


def _numpy_random(name):
    def call(*args):
        # chainer.testing is imported by tests only.
        from chainer.testing import random
        module.random.reset_states()
        return getattr(random, name)(*args)
    return call


def _make_cuda():
    def check_synchronize():
        _synchronize('deviceSynchronize')

    runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError, deviceSynchronize=check_synchronize,
        driverGetVersion=lambda: 12000, getDevice=lambda: 0,
        getDeviceCount=lambda: 1, runtimeGetVersion=lambda: 12000)
    nvtx = types.SimpleNamespace(
        RangePush=lambda *args: None, RangePop=lambda: None)
    return _Module(
        'cupy.cuda', None, Device=Device, Event=Event,
        MemoryPool=_MemoryPool, Stream=Stream, cublas=object(), nvtx=nvtx,
        get_current_stream=lambda: Stream.null,
        get_elapsed_time=lambda start, end: 0.0, get_device_id=lambda: 0,
        is_available=lambda: True, nvtx_enabled=False, runtime=runtime)


def _make_module():
    random = _Random()
    random.RandomState = RandomState
    testing = _Module(
        'cupy.testing', None, random=types.SimpleNamespace(
            do_setup=_numpy_random('_numpy_do_setup'),
            do_teardown=_numpy_random('_numpy_do_teardown')))
    pool = _MemoryPool()
    return _Module(
        'cupy', numpy, __version__='14.0.0', __path__=[], cuda=_make_cuda(),
        cublas=types.SimpleNamespace(gemv=_gemv),
        fft=_Module('cupy.fft', numpy.fft),
        linalg=_Module('cupy.linalg', numpy.linalg),
        random=random, testing=testing, ndarray=DeviceArray,
        ElementwiseKernel=_elementwise_kernel, RawKernel=_RawKernel,
        RawModule=_RawModule, ReductionKernel=_reduction_kernel,
        array=_array, asanyarray=_asarray, asarray=_asarray,
        ascontiguousarray=_ascontiguousarray, asfortranarray=_asfortranarray,
        asnumpy=_asnumpy, clear_memo=lambda: None, copyto=_copyto, dot=_dot,
        empty=_empty, empty_like=_empty_like, full=_full,
        full_like=_full_like, fuse=_fuse,
        get_array_module=_get_array_module,
        get_default_memory_pool=lambda: pool,
        get_default_pinned_memory_pool=lambda: pool,
        is_available=lambda: True, matmul=_matmul, memoize=_memoize,
        ones=_ones, ones_like=_ones_like, tensordot=_tensordot, where=_where,
        zeros=_zeros, zeros_like=_zeros_like)


module = _make_module()
_cupyx = _Module(
    'cupyx', None, rsqrt=_rsqrt, scatter_add=_scatter_add,
    get_runtime_info=lambda: 'CuPy on the host')


# ---------------------------------------------------------------------------
# In the place of CuPy
# ---------------------------------------------------------------------------
_ABSENT = object()


def _unmemoized(function):
    return getattr(function, '__wrapped__', function)


def _replacements():
    relu = sys.modules['chainer.functions.activation.relu']
    cuda = chainer_cuda
    names = {
        'available': True, 'cuda': module.cuda, 'cudnn_enabled': False,
        'cublas': module.cuda.cublas, 'cupy': module, 'cupyx': _cupyx,
        'libcudnn': object(), 'memory_pool': module.get_default_memory_pool(),
        'ndarray': DeviceArray, 'Device': Device, 'Event': Event,
        'Stream': Stream,
        'pinned_memory_pool': module.get_default_pinned_memory_pool(),
        'elementwise': _unmemoized(cuda.elementwise),
        'reduce': _unmemoized(cuda.reduce), 'raw': _unmemoized(cuda.raw),
        '_cudnn_disabled_by_user': True, '_cudnn_version': -1,
        '_cupy_major': 14,
    }
    replacements = [(cuda, name, value) for name, value in names.items()]
    return [
        *replacements,
        (cuda.GpuDevice, 'xp', module),
        (cuda.GpuDevice, 'supported_array_types', (DeviceArray,)),
        (chainer, '_array_types', None),  # made anew when asked for
        (chainer, '_cpu_array_types', None),
        # Defined when Chainer is imported where CuPy is.
        (relu, '_relu_grad2_kernel', _elementwise_kernel(
            'T y, T gy', 'T gx', 'gx = y > 0 ? gy : (T)0', 'relu_bwd')),
    ]


@contextlib.contextmanager
def installed():
    """Has Chainer take this module for CuPy, with one device."""
    if chainer_cuda.cupy is module:
        yield module
        return
    replacements = _replacements()
    found = [vars(owner).get(name, _ABSENT)
             for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    module.random.reset_states()
    try:
        yield module
    finally:
        for (owner, name, _), value in zip(replacements, found):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
