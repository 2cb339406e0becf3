"""Launches kernels, and has the semantic of ``cupy.RawKernel``."""

from __future__ import annotations

import array
import collections
import contextlib
import ctypes
import re
import struct

import numpy

from . import compiler

#: The number of launches of each kernel, by its name.
counts: collections.Counter = collections.Counter()
#: The most seconds (of processor time) that a launch may take.
time_limit = 60.0
#: The type of an array of the device; the others are refused.
array_type: type = numpy.ndarray

_SCHEDULES = {'ascending': 0, 'descending': 1, 'random': 2}
_schedule = ['random', 0, 0]  # name, seed, launches since


class KernelFault(RuntimeError):
    """A kernel did what a device punishes or leaves undefined."""


def set_schedule(name, seed=0):
    """Choose the order in which threads and blocks run from here on."""
    if name not in _SCHEDULES:
        raise ValueError('schedule must be one of {}, got {!r}'.format(
            ', '.join(sorted(_SCHEDULES)), name))
    _schedule[:] = [name, seed, 0]


@contextlib.contextmanager
def schedule(name, seed=0):
    """Choose the order in which threads and blocks run in a block."""
    saved = list(_schedule)
    set_schedule(name, seed)
    try:
        yield
    finally:
        _schedule[:] = saved


def set_array_type(cls):
    """Take instances of `cls`, which derives from ndarray, as arrays."""
    global array_type
    array_type = cls


def is_array(x):
    """Tell whether `x` is an array, and not a scalar."""
    return isinstance(x, array_type)


class Memory:
    """What a kernel sees of an array: its address, and what it may do."""

    __slots__ = ('address', 'high', 'is_single', 'low', 'may_write', 'name',
                 'phase', 'writable')

    def __init__(self, x, name, may_write):
        # Of the base class, whatever the class makes of these.
        x = numpy.ndarray.view(x, numpy.ndarray)
        self.name = name
        self.may_write = may_write
        self.is_single = x.dtype.char in 'ef'
        self.writable = x.flags.writeable
        low = high = self.address = x.__array_interface__['data'][0]
        if x.size:
            for n, step in zip(x.shape, x.strides):
                if step > 0:
                    high += (n - 1) * step
                else:
                    low += (n - 1) * step
            high += x.itemsize
        self.low, self.high = low, high
        # Memory of a device starts at multiples of 512 bytes.
        base = x
        while isinstance(base.base, numpy.ndarray):
            base = base.base
        if base is x:
            self.phase = 0
        else:
            start = base.__array_interface__['data'][0]
            self.phase = (low - start) % 512


class Pointer:
    """An address in the memory of an array, as ``cupy.cuda.MemoryPointer``."""

    __slots__ = ('array', 'offset')

    def __init__(self, array, offset=0):
        self.array = array
        self.offset = offset

    def __add__(self, offset):
        return Pointer(self.array, self.offset + offset)

    @property
    def ptr(self):
        """The address."""
        return self.array.__array_interface__['data'][0] + self.offset

    def memory(self, name, may_write):
        """Return what a kernel sees: all of the array."""
        memory = Memory(self.array, name, may_write)
        memory.address += self.offset
        if not memory.low <= memory.address < memory.high:
            raise ValueError(f'argument {name!r} is out of its array')
        return memory


_MESSAGE = ctypes.create_string_buffer(1024)
_MESSAGE_AT = ctypes.addressof(_MESSAGE)
_DETAIL = (ctypes.c_int64 * 4)()
_DETAIL_AT = ctypes.addressof(_DETAIL)


def _address(numbers):
    return numbers.buffer_info()[0]


def _merge(memories):
    """Return the ranges of memory, and to which each array belongs."""
    order = sorted(range(len(memories)), key=lambda k: memories[k].low)
    ranges, owner = [], [0] * len(memories)
    for k in order:
        m = memories[k]
        if ranges and m.low < ranges[-1][1]:
            last = ranges[-1]
            last[1] = max(last[1], m.high)
            last[3] &= m.writable
            last[4].append(k)
        else:
            ranges.append([m.low, m.high, m.phase, m.writable, [k]])
        owner[k] = len(ranges) - 1
    return ranges, owner


def launch(function, grid, block, slots, memories, dynamic=0, limit=49152,
           label=None):
    """Run a kernel.

    `slots` has the bytes of each argument; an integer in their place is
    the number of an array among `memories`, the address of which starts
    the argument, and a tuple (number, bytes) has bytes after it.
    """
    label = label or function.name
    grid, block = tuple(grid), tuple(block)
    if len(grid) > 3 or len(block) > 3:
        raise ValueError('grid and block have up to three dimensions')
    grid = tuple(max(1, int(n)) for n in ((*grid, 1, 1))[:3])
    block = tuple(max(1, int(n)) for n in ((*block, 1, 1))[:3])
    if block[0] * block[1] * block[2] > 1024 or block[2] > 64:
        raise KernelFault(f'{label}: a block of {block} has too many threads')
    if grid[0] > 0x7fffffff or max(grid[1:]) > 65535:
        raise KernelFault(f'{label}: a grid of {grid} is too large')
    if dynamic < 0 or function.static_size + dynamic > limit:
        raise KernelFault(
            f'{label}: {function.static_size} bytes of static and {dynamic} '
            f'bytes of dynamic shared memory are more than {limit}')

    ranges, owner = _merge(memories)
    # Arguments are aligned to 16 bytes.
    blob, starts, pointers = bytearray(), [], []
    for slot in slots:
        starts.append(len(blob))
        if isinstance(slot, int):
            slot = (slot, b'')
        if isinstance(slot, tuple):
            k, slot = slot
            pointers.append((len(blob), owner[k],
                             memories[k].address - ranges[owner[k]][0]))
            blob += bytes(8)
        blob += slot
        blob += bytes(-len(blob) % 16)
    blob = (ctypes.c_char * (len(blob) + 16)).from_buffer(
        blob + bytes(16))
    start = ctypes.addressof(blob)
    start_up = -start % 16
    if start_up:
        ctypes.memmove(start + start_up, start, len(blob) - 16)
    start += start_up
    arguments = array.array('q', [start + at for at in starts] or [0])
    pointer_table = array.array(
        'q', [x for at, r, offset in pointers
              for x in (start + at, r, offset)] or [0])
    range_table = array.array(
        'q', [x for low, high, phase, writable, _ in ranges
              for x in (low, high - low, phase, writable)] or [0])
    constants = []
    for k, m in enumerate(memories):
        if m.may_write or m.low == m.high:
            continue
        r = ranges[owner[k]]
        if not any(memories[j].may_write and memories[j].low < m.high
                   and m.low < memories[j].high for j in r[4]):
            constants.append((k, owner[k], m.low - r[0], m.high - m.low))
    constant_table = array.array(
        'q', [x for c in constants for x in c[1:]] or [0])

    name, seed, n = _schedule
    _schedule[2] += 1
    request = array.array('q', [
        function.thunk, *grid, *block, dynamic,
        ctypes.addressof(function.statics), function.n_statics,
        _address(arguments), len(starts),
        _address(pointer_table), len(pointers),
        _address(range_table), len(ranges),
        _address(constant_table), len(constants),
        _SCHEDULES[name], (seed * 1000003 + n) & 0x7fffffffffffffff,
        int(1000 * time_limit), _MESSAGE_AT, len(_MESSAGE), _DETAIL_AT])
    counts[label] += 1
    # As CuPy compiles everything: what is subnormal in float32 is zero.
    compiler.runtime().coh_flush(int(any(m.is_single for m in memories)))
    verdict = compiler.runtime().coh_launch(_address(request))
    if verdict == 0:
        return
    if verdict == 1:
        def names(match):
            return ', '.join(
                repr(memories[k].name) for k in ranges[int(match.group(1))][4])

        text = _MESSAGE.value.decode(errors='replace')
        text = re.sub(r'\{(\d+)\}', names, text)
        raise KernelFault(f'{label}: {text}')
    if verdict == 6:
        raise MemoryError('no memory for the arguments of ' + label)
    if verdict == 4:
        name = memories[constants[_DETAIL[0]][0]].name
        raise KernelFault(
            f'{label}: argument {name!r} is constant, but has been changed')
    names = ', '.join(
        repr(memories[k].name) for k in ranges[_DETAIL[0]][4])
    if verdict == 5:
        raise KernelFault(
            f'{label}: argument {names} is read-only, but has been changed')
    raise KernelFault('{}: written {} of argument {}, {} bytes off'.format(
        label, 'before the start' if verdict == 2 else 'behind the end',
        names, _DETAIL[1]))


def _check_array(x, parameter):
    dtype = x.dtype
    if not dtype.isnative:
        raise TypeError('an array must be of native byte order')
    if parameter.code in 'vx':
        return
    if (dtype.kind, dtype.itemsize) != (parameter.code, parameter.size):
        raise TypeError(f'an array of {dtype} is given for {parameter}')


def _scalar(x):
    if isinstance(x, numpy.generic):
        return x.dtype, x.tobytes()
    if isinstance(x, bool):
        return numpy.dtype(bool), struct.pack('?', x)
    if isinstance(x, int):
        if x >= 1 << 63:
            return numpy.dtype('uint64'), struct.pack('Q', x)
        return numpy.dtype('int64'), struct.pack('q', x)
    if isinstance(x, float):
        return numpy.dtype('float64'), struct.pack('d', x)
    raise TypeError(f'{type(x)} is no argument of a kernel')


def _check_scalar(dtype, data, parameter):
    if parameter.pointer:
        if dtype.kind in 'iu' and dtype.itemsize == 8 and not any(data):
            return
        raise TypeError(f'a scalar of {dtype} is given for {parameter}')
    kind = {'u': 'i'}.get(dtype.kind, dtype.kind)
    code = {'u': 'i'}.get(parameter.code, parameter.code)
    if (kind, dtype.itemsize) != (code, parameter.size):
        raise TypeError(f'a scalar of {dtype} is given for {parameter}')


class RawKernel:
    """The semantic of ``cupy.RawKernel``, with its arguments checked."""

    def __init__(self, code, name, options=(), backend='nvrtc',
                 translate_cucomplex=False, jitify=False,
                 enable_cooperative_groups=False):
        if enable_cooperative_groups or translate_cucomplex or jitify:
            raise NotImplementedError(
                'no cooperative groups, no complex numbers, no jitify')
        if isinstance(options, list):
            options = tuple(options)
        self.code = code
        self.name = name
        self.options = options
        self.backend = backend
        self.max_dynamic_shared_size_bytes = None
        match = re.search(
            r'__launch_bounds__\s*\(\s*(\d+)[^;{}]*?\b' + re.escape(name)
            + r'\s*\(', code)
        self._max_threads = int(match.group(1)) if match else None
        self._functions = {}

    @property
    def kernel(self):
        """The compiled function."""
        key = compiler.variant()
        if key not in self._functions:
            self._functions[key] = compiler.load(
                self.code, self.name, self.options)
        return self._functions[key]

    def compile(self, log_stream=None):
        """Compile it now."""
        assert self.kernel

    def __call__(self, grid, block, args, *, shared_mem=0, stream=None,
                 enable_cooperative_groups=False):
        function = self.kernel
        parameters = function.parameters
        if len(args) != len(parameters):
            raise TypeError(f'{self.name} takes {len(parameters)} arguments, '
                            f'{len(args)} given')
        threads = 1
        for n in block:
            threads *= max(1, n)
        if self._max_threads and threads > self._max_threads:
            raise KernelFault(
                f'{self.name}: {threads} threads are more than its launch '
                f'bounds of {self._max_threads}')
        slots, memories = [], []
        for x, p in zip(args, parameters):
            try:
                if isinstance(x, array_type):
                    if not p.pointer:
                        raise TypeError(f'an array is given for {p}')
                    _check_array(x, p)
                    slots.append(len(memories))
                    memories.append(Memory(x, p.name, not p.const))
                elif isinstance(x, Pointer):
                    if not p.pointer:
                        raise TypeError(f'a pointer is given for {p}')
                    slots.append(len(memories))
                    memories.append(x.memory(p.name, not p.const))
                else:
                    dtype, data = _scalar(x)
                    _check_scalar(dtype, data, p)
                    slots.append(data)
            except TypeError as e:
                raise TypeError(
                    f'{self.name}: argument {p.name!r}: {e}') from None
        limit = 49152
        if self.max_dynamic_shared_size_bytes is not None:
            limit = max(limit, function.static_size
                        + min(self.max_dynamic_shared_size_bytes, 232448))
        launch(function, grid, block, slots, memories, shared_mem, limit)


_made: dict = {}


def raw(code, name, options=(), **kwargs):
    """Return the kernel `name` of the source; made once."""
    key = (code, name, tuple(options), tuple(sorted(kwargs.items())))
    kernel = _made.get(key)
    if kernel is None:
        kernel = _made[key] = RawKernel(code, name, options, **kwargs)
    return kernel
