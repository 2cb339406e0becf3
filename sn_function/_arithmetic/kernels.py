"""Every CUDA kernel of the package, its formula above it; arrays only.

``T`` is the type of the weight, ``U`` that of ``u`` and ``A`` that of vectors
and products: float32 for float16 and float32, float64 for float64.  Norms and
what follows from them are float64.  A weight is the C-contiguous array
``(l, m, r)`` of :mod:`.matrix`, with ``n = l r``.  What a forward computes for
its backward, and what a backward computes on the way, stays on the device:

    forward   numbers       float64  scalars | s_norms K | t_norms K
              vectors       A        us (K+1, m) | vs (K, n)
    backward  coefficients  float64  scalars
              bars          A        tbars (K, m) | sbars (K, n)

Where a norm is so large or small that products may have left the range of
``A``, one block does all again with a weight in units of its largest entry.
"""
from __future__ import annotations

import pathlib
from typing import Any, Sequence

import numpy
from chainer.backends import cuda

from sn_function._arithmetic.interface import (
    GAMMA_LIMIT,
    GAMMA_TURN,
    SETTLED,
)
from sn_function._arithmetic.matrix import accumulator_dtype

# Weights of up to this many entries go through kernels of one block.
FUSED_SIZE = 1 << 16
# A power of two, for the products deal out their threads by halving.
BLOCK_SIZE = 512
# In one launch: an argument for each of them takes room.
MAX_WEIGHTS = 16
# For a pointer that a raw kernel does not use.
NULL = numpy.intp(0)

# The unit of the weight, 1 unless it is extreme; what u was divided by for
# u_0; whether u_0 is another vector than u; sigma; what W is divided by;
# whether that is sigma; Y = COEF W; whether all norms so far were ordinary.
NUMBERS = ('UNIT', 'U_NORM', 'RESTARTED', 'SIGMA', 'DIVISOR', 'ABOVE', 'COEF',
           'ORDINARY')
# gW = GY gY + GSIGMA G
COEFFICIENTS = ('GY', 'GSIGMA')

# float16 is in the first file up to CuPy 13, and in the second from 14 on.
_INCLUDES = """
#include <cupy/carray.cuh>
#if __has_include(<cupy/float16.cuh>)
#include <cupy/float16.cuh>
#endif
"""

_LAYOUT = f"""
#define SETTLED {SETTLED}
#define GAMMA_LIMIT {GAMMA_LIMIT}
#define GAMMA_TURN {GAMMA_TURN}
enum {{ {', '.join(NUMBERS)}, N_NUMBERS }};
enum {{ {', '.join(COEFFICIENTS)}, N_COEFFICIENTS }};
typedef long long Size;
"""

# G[i, j] = sum_k  tbar_k[i] v_k[j] + u_{k-1}[i] sbar_k[j],  tbar_K = u_K
#         = u_K[i] v_K[j]  with u and v held constant.
_GRADIENT_OF_SIGMA = """
template <typename A>
__device__ A gradient_of_sigma(
    const A* vectors, const A* bars, int K, Size m, Size n, int detach, int i,
    int j) {
  const A* u = vectors + i;
  const A* v = vectors + (K + 1) * m + j;
  A sum = u[K * m] * v[(K - 1) * n];
  if (detach) return sum;
  const A* tbar = bars + i;
  const A* sbar = bars + K * m + j;
#pragma unroll 2
  for (int k = 0; k < K; ++k) {
    sum += u[k * m] * sbar[k * n];
    if (k < K - 1) sum += tbar[k * m] * v[k * n];
  }
  return sum;
}
"""

# a / b, in 32 bits where that is enough: it takes a fraction of the time.
_QUOTIENT = """
__device__ long long quotient(long long a, unsigned b) {
  return a >> 32 ? a / b : static_cast<unsigned>(a) / b;
}
"""


class Elementwise:
    """A ``cupy.ElementwiseKernel``, compiled on first use on each device."""

    def __init__(self, name: str, in_params: str, out_params: str,
                 operation: str, preamble: str) -> None:
        self.name = name
        self.arguments = in_params, out_params, operation
        self.preamble = _LAYOUT + preamble

    def __call__(self, *args: Any) -> Any:
        return cuda.elementwise(
            *self.arguments, self.name, preamble=self.preamble)(*args)


class Reduction:
    """A ``cupy.ReductionKernel`` that adds up, compiled on first use.

    It adds in the type of its output, which must be given.
    """

    def __init__(self, name: str, in_params: str, out_params: str,
                 map_expr: str, post_map_expr: str) -> None:
        self.name = name
        self.arguments = (
            in_params, out_params, map_expr, 'a + b', post_map_expr, '0')

    def __call__(self, *args: Any, axis: Any, out: Any) -> Any:
        return cuda.reduce(*self.arguments, self.name)(
            *args, axis=axis, out=out)


class Raw:
    """A ``cupy.RawKernel``, run as one block, compiled on first use."""

    def __init__(self, name: str, code: str) -> None:
        self.name = name
        self.code = code
        self._sources: dict[Any, str] = {}  # by T and U

    def source(self, T: Any, U: Any) -> str:
        """Returns the source for a weight and a vector of these dtypes."""
        types = dict(zip('TUA', map(_c_name, (T, U, accumulator_dtype(T)))))
        return ''.join([
            _INCLUDES,
            *[f'typedef {c} {name};\n' for name, c in types.items()],
            _LAYOUT, _QUOTIENT, _GRADIENT_OF_SIGMA, _BLOCK,
            self.code])

    def __call__(self, T: Any, U: Any, *args: Any) -> None:
        key = T.char, U.char
        source = self._sources.get(key)
        if source is None:
            source = self._sources[key] = self.source(T, U)
        cuda.raw(source, self.name)((1,), (BLOCK_SIZE,), args)


class Fused(Raw):
    """A ``cupy.RawKernel`` in which each block has a weight of its own.

    What a block does is the function ``NAME_of`` of the code, called with the
    arguments of its weight and those that all have in common.  They all come
    as arguments of the kernel: nothing is copied to the device for them.
    """

    def __init__(self, name: str, own: str, common: str, code: str) -> None:
        super().__init__(name, code)
        self.own = [text.strip() for text in own.split(',')]
        self.common = [text.strip() for text in common.split(',')]

    def source(self, T: Any, U: Any, n: int = 1) -> str:
        """Returns the source for up to ``n`` weights of these dtypes."""
        own, common = ([text.rsplit(' ', 1) for text in texts]
                       for texts in (self.own, self.common))
        parameters = [f'{kind} {name}{k}' for k in range(n)
                      for kind, name in own] + self.common
        names = [name for _, name in own]
        cases = ''.join(
            f'    case {k}:'
            + ''.join(f' {name}0 = {name}{k};' for name in names)
            + ' break;\n' for k in range(1, n))
        arguments = ', '.join(
            [name + '0' for name in names] + [name for _, name in common])
        return super().source(T, U) + f"""
extern "C" __global__ void __launch_bounds__(512, 1) {self.name}(
    {', '.join(parameters)}) {{
  switch (blockIdx.x) {{
{cases}    default: break;
  }}
  {self.name}_of({arguments});
}}
"""

    def __call__(
            self, T: Any, U: Any, own: Sequence[tuple[Any, ...]],
            *common: Any) -> None:
        for start in range(0, len(own), MAX_WEIGHTS):
            chosen = list(own[start:start + MAX_WEIGHTS])
            n = 1 if len(chosen) == 1 else MAX_WEIGHTS
            # Unused slots get null arguments.
            missing = tuple(
                NULL if '*' in text else
                numpy.float64(0) if text.startswith('double') else
                numpy.int32(0) for text in self.own)
            slots = chosen + [missing] * (n - len(chosen))
            key = T.char, U.char, n
            source = self._sources.get(key)
            if source is None:
                source = self._sources[key] = self.source(T, U, n)
            cuda.raw(source, self.name)(
                (len(chosen),), (BLOCK_SIZE,),
                tuple([x for slot in slots for x in slot]) + common)


def _c_name(dtype: Any) -> str:
    return {'e': 'float16', 'f': 'float', 'd': 'double'}[dtype.char]


# Y = COEF W
scale_fwd = Elementwise(
    'sn_scale_fwd', 'T w, raw float64 numbers', 'T y', """
    y = static_cast<T>(static_cast<double>(w) * numbers[COEF]);
    """, '')

# gW = GY gY + GSIGMA G, of rank 2K or 1, in one pass.
correct_bwd = Elementwise(
    'sn_correct_bwd', 'T gy, raw float64 coefficients, raw A vectors, '
    'raw A bars, int32 m, int32 n, int32 r, int32 K, int32 detach', 'T gw', """
    const ptrdiff_t row = quotient(i, r), block = quotient(row, m);
    const A G = gradient_of_sigma<A>(
        &vectors[0], &bars[0], K, m, n, detach, row - block * m,
        block * r + (i - row * r));
    gw = static_cast<T>(
        static_cast<double>(gy) * coefficients[GY]
        + coefficients[GSIGMA] * static_cast<double>(G));
    """, _QUOTIENT + _GRADIENT_OF_SIGMA)

# y = W x, or W^T x: which, the axes say.  For what BLAS has no product for.
product = Reduction(
    'sn_product', 'T w, X x', 'A y',
    'static_cast<A>(w) * static_cast<A>(x)', 'y = a')

# d_i = <gY_i, W_i>, for each index i of the first axis.
dot_bwd = Reduction(
    'sn_dot_bwd', 'T gy, T w', 'float64 d',
    'static_cast<double>(gy) * static_cast<double>(w)', 'd = a')

# What one block does.
_BLOCK = (pathlib.Path(__file__).parent / 'block.cuh').read_text(
    encoding='utf-8')

# Iteration k of K, 0 <= k < K, from its products s = W^T u_k in vs[k] and
# W s in us[k+1]: v = s / |s|, u_{k+1} = W s / |W s|, sigma = |W s| / |s|.
# The last one settles all numbers, and u.
settle_fwd = Raw('sn_settle_fwd', """
extern "C" __global__ void __launch_bounds__(512, 1) sn_settle_fwd(
    const T* w, U* u, double* numbers, A* vectors, A* sigma_out, A* gamma,
    A* initial_gamma, int l, int m, int r, int k, int K, double factor,
    double eps, double at_zero, int update, int n_warmup, double limit) {
  __shared__ double shared[512];
  const Weight W = {w, l, m, r};
  double* norms = numbers + N_NUMBERS;
  A* us = vectors;
  A* v = us + static_cast<Size>(K + 1) * m + k * W.n();
  bool ordinary = k == 0 || numbers[ORDINARY] != 0;
  if (k == 0)
    for (int i = threadIdx.x; i < m; i += blockDim.x)
      us[i] = static_cast<A>(u[i]);
  const double s = normalize(v, W.n(), shared);
  const double t = normalize(us + static_cast<Size>(k + 1) * m, m, shared);
  double sigma = t / s;
  // t is s sigma, and its square must have all digits, too.
  ordinary = ordinary && is_ordinary(s) && is_ordinary(sigma)
             && t > (sizeof(A) == 4 ? 1e-30 : 1e-140);
  if (threadIdx.x == 0) {
    norms[k] = s;
    norms[K + k] = sigma;
    numbers[ORDINARY] = ordinary;
    start(numbers);
  }
  if (k + 1 < K) return;
  if (!ordinary) {
    sigma = rescue(W, u, numbers, vectors, K, n_warmup, limit, shared);
  } else if (n_warmup > 0
             && turn(sigma, numbers, vectors, m, K, shared) > limit) {
    move_on(vectors, m, K);
    sigma = iterate_anew(W, 1, numbers, vectors, K, n_warmup - K, SETTLED, 0,
                         shared);
  }
  finish(W, sigma, u, numbers, vectors, sigma_out, gamma, initial_gamma, K,
         factor, eps, at_zero, update, shared);
}
""")

# sum_i d_i, then c and ggamma (with first).  Then, of a product y of x:
# sbar = (W^T x - v (v . W^T x)) / |s|, with e = v;  tbar = W x / |t|;  or
# gu = c W x / |u|.  An extreme weight makes y again, in its units.
project_bwd = Raw('sn_project_bwd', """
extern "C" __global__ void __launch_bounds__(512, 1) sn_project_bwd(
    const T* w, const double* numbers, double* coefficients, int l, int m,
    int r, int first, const double* dots, int n_dots, const A* gsigma,
    A* ggamma, double factor, const A* x, A* y, const A* e, int norm, U* gu) {
  __shared__ double shared[512];
  const Weight plain = {w, l, m, r};
  if (first) {
    double dot = 0;
    for (int j = threadIdx.x; j < n_dots; j += blockDim.x) dot += dots[j];
    dot = block_sum(dot, shared);
    if (threadIdx.x == 0)
      settle_gradients(numbers, coefficients, dot, n_dots > 0, gsigma, ggamma,
                       factor);
  }
  if (!y) return;
  const double unit = numbers[UNIT];
  if (unit != 1) {
    const InUnits W(plain, unit);
    if (e)
      transposed_product(W, x, y, shared);
    else
      product(W, x, y, shared);
  }
  if (gu) {
    for (int i = threadIdx.x; i < m; i += blockDim.x)
      gu[i] = static_cast<U>(
          gradient_of_u(numbers, coefficients, y[i]));
  } else {
    project(y, e, e ? plain.n() : m, numbers[N_NUMBERS + norm] / unit, shared);
  }
}
""")

# The whole forward: K iterations, u, and Y unless it is not wanted.
_FORWARD_OF_EACH = """
    const T* w, U* u, double* numbers, A* vectors, A* sigma_out, A* gamma,
    A* initial_gamma, T* y, int l, int m, int r, double factor"""
_FORWARD_OF_ALL = ('int K, double eps, double at_zero, int update, '
                   'int n_warmup, double limit')
fused_fwd = Fused('sn_fused_fwd', _FORWARD_OF_EACH, _FORWARD_OF_ALL, f"""
__device__ void sn_fused_fwd_of({_FORWARD_OF_EACH}, {_FORWARD_OF_ALL}) {{
""" + """  __shared__ double shared[512];
  const Weight W = {w, l, m, r};
  bool ordinary = true;
  for (int i = threadIdx.x; i < m; i += blockDim.x)
    vectors[i] = static_cast<A>(u[i]);
  if (threadIdx.x == 0) start(numbers);
  double sigma = iterate_anew(
      W, 1, numbers, vectors, K, n_warmup, limit, &ordinary, shared);
  if (!ordinary)
    sigma = rescue(W, u, numbers, vectors, K, n_warmup, limit, shared);
  finish(W, sigma, u, numbers, vectors, sigma_out, gamma, initial_gamma, K,
         factor, eps, at_zero, update, shared);
  if (!y) return;
  __syncthreads();
  const double coef = numbers[COEF];
  for (Size i = threadIdx.x; i < W.size(); i += blockDim.x)
    y[i] = static_cast<T>(static_cast<double>(w[i]) * coef);
}
""")

# The whole backward: the adjoint of K iterations, and those of gW and gu
# that are wanted; gY and gsigma may be missing.
_BACKWARD_OF_EACH = """
    const T* w, const T* gy, const A* gsigma, const double* numbers,
    const A* vectors, double* coefficients, A* bars, T* gw, U* gu, A* ggamma,
    int l, int m_, int r, double factor"""
_BACKWARD_OF_ALL = 'int K, int detach'
fused_bwd = Fused('sn_fused_bwd', _BACKWARD_OF_EACH, _BACKWARD_OF_ALL, f"""
__device__ void sn_fused_bwd_of({_BACKWARD_OF_EACH}, {_BACKWARD_OF_ALL}) {{
""" + """  __shared__ double shared[512];
  const Weight W = {w, l, m_, r};
  const Size m = m_, n = W.n();
  double dot = 0;
  if (gy) {
    for (Size i = threadIdx.x; i < W.size(); i += blockDim.x)
      dot += static_cast<double>(gy[i]) * static_cast<double>(w[i]);
    dot = block_sum(dot, shared);
  }
  if (threadIdx.x == 0)
    settle_gradients(
        numbers, coefficients, dot, gy, gsigma, ggamma, factor);
  if (!detach && (gw || gu)) {
    if (numbers[UNIT] == 1)
      go_back(W, numbers, vectors, bars, K, gu, shared);
    else
      go_back(InUnits(W, numbers[UNIT]), numbers, vectors, bars, K, gu,
              shared);
  }
  __syncthreads();
  const double a = coefficients[GY], c = coefficients[GSIGMA];
  if (gw) {
    const int lane = threadIdx.x % 32;
    // A warp takes a row of r entries, or, where that is short, any 32.
    const int width = r >= 32 ? r : 32;
    const Size rows = (W.size() + width - 1) / width;
    for (Size row = threadIdx.x / 32; row < rows; row += blockDim.x / 32)
      for (int b = lane; b < width; b += 32) {
        const Size e = row * width + b;
        if (e >= W.size()) break;
        const Size index = r >= 32 ? row : quotient(e, r);
        const Size block = quotient(index, m);
        const int i = index - block * m, j = block * r + (e - index * r);
        const double g = gy ? static_cast<double>(gy[e]) * a : 0;
        gw[e] = static_cast<T>(g + c * gradient_of_sigma<A>(
            vectors, bars, K, m, n, detach, i, j));
      }
  }
  if (gu)
    for (int i = threadIdx.x; i < m; i += blockDim.x)
      gu[i] = static_cast<U>(gradient_of_u(
          numbers, coefficients, bars[(K - 1) * m + i]));
}
""")

ALL = (scale_fwd, correct_bwd, product, dot_bwd, settle_fwd, project_bwd,
       fused_fwd, fused_bwd)
