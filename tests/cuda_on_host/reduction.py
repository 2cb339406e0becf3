"""The semantic of ``cupy.ReductionKernel``."""

from __future__ import annotations

import contextlib
import string

import numpy

from . import compiler
from .elementwise import (
    Parameters,
    View,
    _product,
    _seen,
    broadcast,
    decide_types,
    declare,
    indexer_type,
    outputs,
    pack,
    pack_indexer,
    preprocess,
    reduce_dims,
    scalars,
    signature,
    typedefs,
)
from .raw import launch

_block_size = [512]

# As CuPy has it: what a block does, in which order, is the point of it.
_CODE = string.Template('''${types}
${preamble}
#define REDUCE(a, b) (${reduce_expr})
#define POST_MAP(a) (${post_map_expr})
#define _REDUCE(_offset) if (_tid < _offset) { \\
  _type_reduce _a = _sdata[_tid], _b = _sdata[(_tid + _offset)]; \\
  _sdata[_tid] = REDUCE(_a, _b); \\
}

typedef ${reduce_type} _type_reduce;
extern "C" __global__ void ${name}(${params}) {
  __shared__ char _sdata_raw[${block_size} * sizeof(_type_reduce)];
  _type_reduce *_sdata = reinterpret_cast<_type_reduce*>(_sdata_raw);
  unsigned int _tid = threadIdx.x;

  IndexT _J_offset = _tid >> __popc(_block_stride - 1);
  ptrdiff_t _j_offset = (ptrdiff_t)_J_offset * _out_ind.size();
  IndexT _J_stride = ${block_size} >> __popc(_block_stride - 1);
  ptrdiff_t _j_stride = (ptrdiff_t)_J_stride * _out_ind.size();

  for (ptrdiff_t _i_base = (ptrdiff_t)blockIdx.x * _block_stride;
       _i_base < _out_ind.size();
       _i_base += (ptrdiff_t)gridDim.x * _block_stride) {
    _type_reduce _s = _type_reduce(${identity});
    ptrdiff_t _i = _i_base + (_tid & (_block_stride - 1));
    IndexT _J = _J_offset;
    for (ptrdiff_t _j = _i + _j_offset; _j < _in_ind.size();
         _j += _j_stride, _J += _J_stride) {
      _in_ind.set(_j);
      ${input_expr}
      _type_reduce _a = static_cast<_type_reduce>(${map_expr});
      _s = REDUCE(_s, _a);
    }
    _sdata[_tid] = _s;
    __syncthreads();
    for (unsigned int _block = ${block_size} / 2;
         _block >= _block_stride; _block >>= 1) {
      if (_tid < _block) {
        _REDUCE(_block);
      }
      __syncthreads();
    }
    if (_tid < _block_stride) {
      _s = _sdata[_tid];
    }
    if (_tid < _block_stride && _i < _out_ind.size()) {
      _out_ind.set(static_cast<ptrdiff_t>(_i));
      ${output_expr}
      POST_MAP(_s);
    }
  }
}
''')


def set_block_size(n):
    """Reduce with blocks of `n` threads (512 by CuPy's default)."""
    if n not in (32, 64, 128, 256, 512):
        raise ValueError('a block has 32, 64, 128, 256 or 512 threads')
    _block_size[0] = n


@contextlib.contextmanager
def block_size(n):
    """Reduce with blocks of `n` threads in a block."""
    saved = _block_size[0]
    set_block_size(n)
    try:
        yield
    finally:
        _block_size[0] = saved


def _axes(axis, ndim):
    if axis is None:
        return tuple(range(ndim)), ()
    axis = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    for k in axis:
        if not -ndim <= k < ndim:
            raise ValueError(
                f'axis {k} is out of bounds for array of dimension {ndim}')
    axis = tuple(sorted(k % ndim for k in axis))
    rest = tuple(k for k in range(ndim) if k not in axis)
    if len(axis) + len(rest) != ndim:
        raise ValueError("duplicate value in 'axis'")
    return axis, rest


def _contiguous_size(args, params, out_shape, ndim):
    best = 1
    for a, p in zip(args, params):
        if not isinstance(a, View) or p.raw:
            continue
        size = 1
        for j in range(min(ndim, len(out_shape))):
            if a.strides[ndim - j - 1] != size * a.itemsize:
                break
            size *= out_shape[len(out_shape) - j - 1]
        best = max(best, size)
    return best


def _block_stride(in_size, out_size, contiguous, block):
    stride = max(min(contiguous, 32), block // max(1, in_size // out_size))
    return 1 << max(0, stride // 2).bit_length()


class ReductionKernel(Parameters):
    """The semantic of ``cupy.ReductionKernel``."""

    def __init__(self, in_params, out_params, map_expr, reduce_expr,
                 post_map_expr, identity, name='reduce_kernel',
                 reduce_type=None, reduce_dims=True, preamble='',
                 options=()):
        super().__init__(in_params, out_params, name)
        self.map_expr = map_expr
        self.reduce_expr = reduce_expr
        self.post_map_expr = post_map_expr
        self.identity = '' if identity is None else str(identity)
        self.reduce_type = (
            self.out_params[0].ctype if reduce_type is None else reduce_type)
        self.reduce_dims = reduce_dims
        self.preamble = preamble
        self.options = tuple(options)
        self._functions = {}

    def _code(self, args, in_shape, out_shape, pairs, block, index_type):
        def lines(args, params, index, const):
            return '\n      '.join(
                '{}{} {} = _raw_{}[{}.get()];'.format(
                    'const ' if p.const else '', p.ctype,
                    p.name if p.const else '&' + p.name, p.name, index)
                for a, p in zip(args, params)
                if isinstance(a, View) and not p.raw
                and (const or not p.const))

        params = declare(args, self.params)
        params += [indexer_type(in_shape) + ' _in_ind',
                   indexer_type(out_shape) + ' _out_ind',
                   'const int _block_stride']
        types = typedefs(pairs, [a.dtype for a in args])
        if 'float16' in self.reduce_type:
            types = '#include <cupy/float16.cuh>\n' + types
        return _CODE.substitute(
            types=types + f'typedef {index_type} IndexT;\n',
            preamble=self.preamble, reduce_expr=self.reduce_expr,
            post_map_expr=self.post_map_expr, reduce_type=self.reduce_type,
            name=self.name, params=', '.join(params), block_size=block,
            identity=self.identity, map_expr=self.map_expr,
            input_expr=lines(
                args[:self.nin], self.in_params, '_in_ind', True),
            output_expr=lines(
                args[self.nin:], self.out_params, '_out_ind', False))

    def __call__(self, *args, out=None, axis=None, keepdims=False,
                 stream=None):
        if len(args) not in (self.nin, self.nargs):
            raise TypeError('Wrong number of arguments for ' + self.name)
        out_args = list(args[self.nin:])
        if out is not None:
            if self.nout != 1:
                raise NotImplementedError('')
            if out_args:
                raise ValueError("cannot specify 'out' as both a positional "
                                 'and keyword argument')
            out_args = [out]
        in_args = preprocess(args[:self.nin])
        out_args = preprocess(out_args)
        for a in out_args:
            if not isinstance(a, View):
                raise TypeError('Output arguments must be cupy.ndarray')
        in_args, shape = broadcast(in_args, self.in_params)
        in_types, out_types, pairs = decide_types(
            self.in_params, self.out_params, in_args, out_args)
        axis, rest = _axes(axis, len(shape))
        if (len(in_args) == 1 and len(rest) <= 1
                and not in_args[0].contiguous):
            strides = in_args[0].strides
            axis = tuple(sorted(axis, key=lambda k: -abs(strides[k])))
        if keepdims:
            out_shape = tuple(
                1 if k in axis else n for k, n in enumerate(shape))
        else:
            out_shape = tuple(shape[k] for k in rest)
        out_args = outputs(
            out_args, out_types, out_shape, self.out_params, False)
        ret = out_args[0].array
        if 0 in out_shape:
            return ret
        if self.identity == '' and 0 in shape:
            raise ValueError(
                f'zero-size array to reduction operation {self.name} which '
                'has no identity')
        in_args = scalars(in_args, in_types)

        order = axis + rest
        in_shape = shape
        if order != tuple(range(len(shape))):
            if any(p.raw for p in self.in_params):
                raise NotImplementedError('Illegal conditions')
            in_args = [
                _seen(a, [a.shape[k] for k in order],
                      [a.strides[k] for k in order])
                if isinstance(a, View) else a for a in in_args]
            in_shape = tuple(shape[k] for k in order)
        out_args = list(out_args)
        if self.reduce_dims:
            in_shape = reduce_dims(in_args, self.in_params, in_shape)
            out_shape = reduce_dims(out_args, self.out_params, out_shape)

        in_size, out_size = _product(in_shape), _product(out_shape)
        block = _block_size[0]
        # A reduced input may have less axes than the output.
        contiguous = _contiguous_size(
            in_args, self.in_params, out_shape, len(in_shape))
        stride = _block_stride(in_size, out_size, contiguous, block)
        index_type = (
            'long long' if in_size // out_size > 0x7fffffff else 'int')
        all_args = in_args + out_args
        key = (compiler.variant(), signature(all_args), len(in_shape),
               len(out_shape), pairs, block, index_type)
        function = self._functions.get(key)
        if function is None:
            code = self._code(
                all_args, in_shape, out_shape, pairs, block, index_type)
            function = self._functions[key] = compiler.load(
                code, self.name, self.options)
        slots, memories = pack(all_args, self.params)
        slots += [pack_indexer(in_shape), pack_indexer(out_shape),
                  numpy.int32(stride).tobytes()]
        launch(function, (-(-out_size // stride),), (block,), slots,
               memories, limit=1 << 20)
        return ret


_made: dict = {}


def reduce(in_params, out_params, map_expr, reduce_expr, post_map_expr,
           identity, name, **kwargs):
    """Return the kernel; made once."""
    key = (in_params, out_params, map_expr, reduce_expr, post_map_expr,
           identity, name, tuple(sorted(kwargs.items())))
    kernel = _made.get(key)
    if kernel is None:
        kernel = _made[key] = ReductionKernel(
            in_params, out_params, map_expr, reduce_expr, post_map_expr,
            identity, name, **kwargs)
    return kernel
