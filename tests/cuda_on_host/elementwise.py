"""The semantic of ``cupy.ElementwiseKernel``, and what reductions share."""

from __future__ import annotations

import functools
import keyword
import re
import struct
import sys

import numpy

from . import compiler
from .raw import Memory, is_array, launch

_TYPES = {
    'float64': 'double', 'float32': 'float', 'float16': 'float16',
    'int64': 'long long', 'int32': 'int', 'int16': 'short',
    'int8': 'signed char', 'uint64': 'unsigned long long',
    'uint32': 'unsigned int', 'uint16': 'unsigned short',
    'uint8': 'unsigned char', 'bool': 'bool',
}
# What CuPy puts before the sources that it generates.
_HEADERS = (
    '#include <cupy/carray.cuh>\n#include <cupy/atomics.cuh>\n'
    '#include <cupy/math_constants.h>\n')


def empty(shape, dtype):
    """Make an array for an output, with poison in it."""
    x = numpy.empty(shape, dtype)
    if x.dtype != bool:
        x[...] = numpy.frombuffer(b'\xff' * x.itemsize, x.dtype)[0]
    return x


def set_empty(function):
    """Have outputs made by `function(shape, dtype)`."""
    sys.modules[__package__].empty = function


def allocate(shape, dtype):
    """Make an output by the hook ``empty`` of the package."""
    return sys.modules[__package__].empty(tuple(shape), numpy.dtype(dtype))


def typename(dtype):
    """Return the name of the type in C++."""
    try:
        return _TYPES[numpy.dtype(dtype).name]
    except KeyError:
        raise TypeError(f'Unsupported dtype {dtype}') from None


def check_name(name):
    """Raise if a kernel cannot have the name."""
    if not re.match(r'[a-zA-Z_][a-zA-Z_0-9]*$', name):
        raise ValueError(f'Invalid kernel name: "{name}"')


class Parameter:
    """A parameter, as the declaration has it."""

    def __init__(self, text, const):
        words = text.split()
        if len(words) < 2:
            raise ValueError('Syntax error: ' + text)
        kind, self.name = words[-2:]
        self.raw = False
        self.const = const
        self.dtype = None
        if len(kind) == 1:
            self.ctype = kind
        else:
            self.dtype = numpy.dtype(kind)
            self.ctype = typename(self.dtype)
        for word in words[:-2]:
            if word == 'raw':
                self.raw = True
            elif word == '_non_const':
                self.const = False
            else:
                raise ValueError(f'Unknown keyword "{word}"')
        assert not keyword.iskeyword(kind)


@functools.lru_cache(maxsize=None)
def parse(text, const):
    """Return the parameters of a declaration."""
    if not text:
        return ()
    return tuple(Parameter(t, const) for t in text.strip().split(','))


class View:
    """An array, and the shape and strides under which a kernel sees it."""

    __slots__ = ('array', 'contiguous', 'dtype', 'itemsize', 'shape',
                 'strides')

    def __init__(self, x):
        self.array = x
        x = numpy.ndarray.view(x, numpy.ndarray)
        self.dtype = x.dtype
        self.itemsize = x.itemsize
        if not x.dtype.isnative:
            raise TypeError('an array must be of native byte order')
        self.set(x.shape, x.strides)

    def set(self, shape, strides):
        """See it in another way."""
        self.shape, self.strides = tuple(shape), tuple(strides)
        step, good = self.itemsize, True
        for n, s in zip(reversed(self.shape), reversed(self.strides)):
            if n == 0:
                good = True
                break
            if n != 1:
                good = good and s == step
                step *= n
        self.contiguous = good

    def copy(self):
        """Return another view of the same."""
        return _seen(self, self.shape, self.strides)

    @property
    def ctype(self):
        """The type of the parameter."""
        short = _product(self.shape) * self.itemsize <= 1 << 31
        return (f'CArray<{typename(self.dtype)}, {len(self.shape)}, '
                f'{self.contiguous:d}, {short:d}>')

    def pack(self):
        """Return what follows its address in a CArray."""
        n = len(self.shape)
        return struct.pack(f'{1 + 2 * n}q', _product(self.shape),
                           *self.shape, *self.strides)


def _seen(view, shape, strides):
    new = View.__new__(View)
    new.array, new.dtype, new.itemsize = (
        view.array, view.dtype, view.itemsize)
    new.set(shape, strides)
    return new


def _product(shape):
    n = 1
    for k in shape:
        n *= k
    return n


def pack_indexer(shape):
    """Return a CIndexer."""
    n = len(shape)
    return struct.pack(f'{1 + 2 * n}q', _product(shape), *shape,
                       *([0] * n))


def indexer_type(shape):
    """Return the type of a CIndexer."""
    return f'CIndexer<{len(shape)}, {_product(shape) <= 1 << 31:d}>'


def preprocess(args):
    """Return views of arrays; scalars as they are."""
    out = []
    for x in args:
        if is_array(x):
            out.append(View(x))
        elif (isinstance(x, (bool, int, float, numpy.bool_, numpy.number))
              and not isinstance(x, numpy.complexfloating)):
            out.append(x)
        else:
            raise TypeError(f'Unsupported type {type(x)}')
    return out


def broadcast(args, params, use_size=False):
    """Return the arguments broadcast together, and their shape."""
    views = [a for a, p in zip(args, params)
             if isinstance(a, View) and not p.raw]
    if use_size and views:
        raise ValueError("Specified 'size' can be used only if all of the "
                         "ndarray are 'raw'.")
    if not use_size and not views:
        raise ValueError('Loop size is undecided.')
    ndim = max((len(v.shape) for v in views), default=0)
    shape = [1] * ndim
    for v in views:
        for k, n in enumerate(v.shape, ndim - len(v.shape)):
            if n != 1:
                if shape[k] not in (1, n):
                    raise ValueError(
                        'operands could not be broadcast together with '
                        'shapes {}'.format(
                            ', '.join(str(v.shape) for v in views)))
                shape[k] = n
    shape = tuple(shape)
    out = []
    for a, p in zip(args, params):
        if isinstance(a, View) and not p.raw and a.shape != shape:
            pad = ndim - len(a.shape)
            strides = [0] * pad + [
                0 if n == 1 and shape[k] != 1 else s
                for k, (n, s) in enumerate(zip(a.shape, a.strides), pad)]
            a = _seen(a, shape, strides)
        out.append(a)
    return out, shape


def decide_types(in_params, out_params, in_args, out_args):
    """Return the types of all parameters, and the map of placeholders."""
    types = {}
    pairs = [*zip(out_params, out_args), *zip(in_params, in_args)]
    for p, a in pairs:
        if not isinstance(a, View):
            continue
        known = types.get(p.ctype) if p.dtype is None else p.dtype
        if known is None:
            types[p.ctype] = a.dtype
        elif known != a.dtype:
            raise TypeError(f'Type is mismatched. {p.name} {a.dtype} {known}')
    try:
        found = [types[p.ctype] if p.dtype is None else p.dtype
                 for p in (*in_params, *out_params)]
    except KeyError as e:
        raise TypeError(f'the type {e} is undecided') from None
    n = len(in_params)
    return found[:n], found[n:], tuple(sorted(types.items()))


def reduce_dims(args, params, shape):
    """Merge the axes that can be, in place; return the new shape."""
    if len(shape) <= 1 or not args:
        return shape
    if len(args) == 1:
        a = args[0]
        if params[0].raw or not isinstance(a, View):
            return shape
        args[0] = a = _reduced(a)
        return a.shape
    places = [i for i, (a, p) in enumerate(zip(args, params))
              if isinstance(a, View) and not p.raw]
    if not places:
        return shape
    strided = [args[i] for i in places if not args[i].contiguous]
    ndim = len(shape)
    if not strided:
        new = (_product(shape),)
        for i in places:
            args[i] = _seen(args[i], new, (args[i].itemsize,))
        return new
    if ndim == 2:
        return shape
    axes, merged, last = [], list(shape), -1
    for ax in range(ndim):
        if merged[ax] == 1:
            continue
        if last < 0:
            last = ax
            continue
        if any(a.strides[ax] * merged[ax] != a.strides[last]
               for a in strided):
            axes.append(last)
        else:
            merged[ax] *= merged[last]
        last = ax
    if last >= 0:
        axes.append(last)
    if len(axes) == ndim:
        return shape
    for i in places:
        args[i] = _seen(args[i], [merged[ax] for ax in axes],
                        [args[i].strides[ax] for ax in axes])
    return tuple(merged[ax] for ax in axes)


def _reduced(a):
    if 0 in a.shape:
        return _seen(a, (0,), (a.itemsize,))
    shape, strides = [], []
    for n, s in zip(a.shape, a.strides):
        if n == 1:
            continue
        if shape and s * n == strides[-1]:
            shape[-1] *= n
            strides[-1] = s
        else:
            shape.append(n)
            strides.append(s)
    if len(shape) == len(a.shape):
        return a
    return _seen(a, shape, strides)


def outputs(out_args, out_types, shape, out_params, size_given):
    """Return the outputs: those given, checked, or new ones."""
    if not out_args:
        if not size_given and any(p.raw for p in out_params):
            raise ValueError('Output array size is Undecided')
        return [View(allocate(shape, t)) for t in out_types]
    for a, p in zip(out_args, out_params):
        if not isinstance(a, View):
            raise TypeError('Output arguments type must be cupy.ndarray')
        if not p.raw and a.shape != tuple(shape):
            raise ValueError('Out shape is mismatched')
    return out_args


def declare(args, params):
    """Return the parameters of the function, and of the types it needs."""
    words = []
    for a, p in zip(args, params):
        array = isinstance(a, View)
        words.append('{}{} {}{}'.format(
            'const ' if p.const else '',
            a.ctype if array else typename(a.dtype),
            '_raw_' if array and not p.raw else '', p.name))
    return words


def typedefs(pairs, dtypes):
    """Return the typedefs, and the header that they need."""
    text = ''.join(f'typedef {typename(t)} {name};\n'
                   for name, t in pairs)
    if any(t == numpy.float16 for t in dtypes):
        text = '#include "cupy/float16.cuh"\n' + text
    return _HEADERS + text


def scalars(args, types):
    """Cast the scalars to the types of their parameters."""
    return [a if isinstance(a, View) else numpy.asarray(a).astype(t)[()]
            for a, t in zip(args, types)]


def pack(args, params):
    """Return the arguments of a launch, and the memory behind them."""
    slots, memories = [], []
    for a, p in zip(args, params):
        if isinstance(a, View):
            slots.append((len(memories), a.pack()))
            memories.append(Memory(a.array, p.name, not p.const))
        else:
            slots.append(a.tobytes())
    return slots, memories


def signature(args):
    """Return what of the arguments decides the source."""
    return tuple([a.ctype if isinstance(a, View) else a.dtype.char
                  for a in args])


class Parameters:
    """What kernels have that are written as expressions: name, parameters."""

    def __init__(self, in_params, out_params, name):
        check_name(name)
        self.in_params = parse(in_params, True)
        self.out_params = parse(out_params, False)
        self.params = self.in_params + self.out_params
        self.nin = len(self.in_params)
        self.nout = len(self.out_params)
        self.nargs = self.nin + self.nout
        self.name = name


class ElementwiseKernel(Parameters):
    """The semantic of ``cupy.ElementwiseKernel``."""

    def __init__(self, in_params, out_params, operation, name='kernel',
                 reduce_dims=True, preamble='', no_return=False,
                 return_tuple=False, loop_prep='', after_loop='',
                 options=()):
        super().__init__(in_params, out_params, name)
        self.operation = operation
        self.reduce_dims = reduce_dims
        self.preamble = preamble
        self.no_return = no_return
        self.return_tuple = return_tuple
        self.loop_prep = loop_prep
        self.after_loop = after_loop
        self.options = tuple(options)
        if any(p.name == 'i' for p in self.params):
            raise ValueError("Can not use 'i' as a parameter name")
        self._functions = {}

    def _code(self, args, shape, pairs):
        lines = [
            '{}{} &{} = _raw_{}[_ind.get()];'.format(
                'const ' if p.const else '', p.ctype, p.name, p.name)
            for a, p in zip(args, self.params)
            if isinstance(a, View) and not p.raw]
        return '''{types}
{preamble}
extern "C" __global__ void {name}({params}) {{
  {loop_prep};
  CUPY_FOR(i, _ind.size()) {{
    _ind.set(i);
    {lines}
    {operation};
  }}
  {after_loop};
}}
'''.format(
            types=typedefs(pairs, [a.dtype for a in args]),
            preamble=self.preamble, name=self.name,
            params=', '.join([*declare(args, self.params),
                              indexer_type(shape) + ' _ind']),
            loop_prep=self.loop_prep, lines='\n    '.join(lines),
            operation=self.operation, after_loop=self.after_loop)

    def __call__(self, *args, size=None, stream=None, block_size=128):
        if block_size <= 0:
            raise ValueError('block_size must be greater than zero')
        if len(args) not in (self.nin, self.nargs):
            raise TypeError(
                f'Wrong number of arguments for {self.name!r}. It must be '
                f'either {self.nin} or {self.nargs} (with outputs), but '
                f'given {len(args)}.')
        views = preprocess(args)
        out_args = views[self.nin:]
        for a in out_args:
            if not isinstance(a, View):
                raise TypeError('Output arguments must be cupy.ndarray')
        use_size = size is not None and size != -1
        in_args, shape = broadcast(views, self.params, use_size)
        in_args = in_args[:self.nin]
        in_types, out_types, pairs = decide_types(
            self.in_params, self.out_params, in_args, out_args)
        if use_size:
            shape = (int(size),)
        out_args = outputs(
            out_args, out_types, shape, self.out_params, use_size)
        if self.no_return:
            ret = None
        elif self.nout == 1 and not self.return_tuple:
            ret = out_args[0].array
        else:
            ret = tuple([a.array for a in out_args])
        if 0 in shape:
            return ret

        all_args = scalars(in_args, in_types) + out_args
        if self.reduce_dims:
            shape = reduce_dims(all_args, self.params, shape)
        key = (compiler.variant(), signature(all_args), len(shape), pairs)
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = compiler.load(
                self._code(all_args, shape, pairs), self.name, self.options)
        slots, memories = pack(all_args, self.params)
        slots.append(pack_indexer(shape))
        n = _product(shape)
        launch(function, (-(-n // block_size),), (min(n, block_size),),
               slots, memories)
        return ret


_made: dict = {}


def elementwise(in_params, out_params, operation, name, **kwargs):
    """Return the kernel; made once."""
    key = (in_params, out_params, operation, name,
           tuple(sorted(kwargs.items())))
    kernel = _made.get(key)
    if kernel is None:
        kernel = _made[key] = ElementwiseKernel(
            in_params, out_params, operation, name, **kwargs)
    return kernel
