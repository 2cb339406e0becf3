"""Every CUDA kernel of the package, its formula above it; arrays only.

``T`` is the type of the weight, ``U`` that of ``u`` and ``A`` that of all
sums: float32 for float16 and float32, float64 for float64.  A weight is the
C-contiguous array ``(l, m, r)`` of :mod:`.matrix`, with
``n = l r``.  What a forward settles is one array of ``A``, the *state*; what
a backward does is another, the *adjoint*.  Both stay on the device:

    state    scalars | s_norms K | t_norms K | us (K+1, m) | vs (K, n) | x m
    adjoint  scalars | tbars (K, m) | sbars (K, n) | x max(m, n)

A weight is used in units of a power of two, *scale*, which is 1 unless
squares could leave the range.  As the inverse of scale need not be in the
range, it is used as two factors, W1 and W2.  The ``x`` are vectors that have
got the first factor and wait for a product with the weight.
"""
from __future__ import annotations

from typing import Any, Sequence

import numpy
from chainer.backends import cuda

from sn_function._arithmetic.matrix import accumulator_dtype

# Weights of up to this many entries go through kernels of one block.
FUSED_SIZE = 1 << 16
# A power of two, for the products deal out their threads by halving.
BLOCK_SIZE = 512
# In one launch: an argument for each of them takes room.
MAX_WEIGHTS = 16
# For a pointer that a raw kernel is to go without.
NULL = numpy.intp(0)

# 1 / scale; the same for u_0; whether u_0 is another than given; Y = (W Y1 Y2)
# COEF; max(sigma, eps), in units of scale where that is sigma; whether it is;
# whether all norms have been far from the ends of the range.
STATE = ('W1', 'W2', 'U1', 'U2', 'RESTARTED', 'COEF', 'Y1', 'Y2', 'DIVISOR',
         'ABOVE', 'ORDINARY')
# gW = (gY GY1 GY2) GY + GSIGMA G
ADJOINT = ('GY', 'GY1', 'GY2', 'GSIGMA')

# float16 is in the first file up to CuPy 13, and in the second from 14 on.
_INCLUDES = """
#include <cupy/carray.cuh>
#if __has_include(<cupy/float16.cuh>)
#include <cupy/float16.cuh>
#endif
"""

_LAYOUT = f"""
enum {{ {', '.join(STATE)}, N_STATE }};
enum {{ {', '.join(ADJOINT)}, N_ADJOINT }};
typedef long long Size;
"""

# G[i, j] = sum_k  tbar_k[i] v_k[j] + u_{k-1}[i] sbar_k[j],  tbar_K = u_K
#         = u_K[i] v_K[j]  with u and v held constant.
_GRADIENT_OF_SIGMA = """
template <typename A>
__device__ A gradient_of_sigma(
    const A* state, const A* adjoint, int K, Size m, Size n, int detach,
    int i, int j) {
  const A* u = state + N_STATE + 2 * K + i;
  const A* v = state + N_STATE + 2 * K + (K + 1) * m + j;
  A sum = u[K * m] * v[(K - 1) * n];
  if (detach) return sum;
  const A* tbar = adjoint + N_ADJOINT + i;
  const A* sbar = adjoint + N_ADJOINT + K * m + j;
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

# gu = c ubar / u_scale in units of W, or 0 where u_0 was not u.
_GRADIENT_OF_U = """
template <typename A>
__device__ A gradient_of_u(const A* state, A ubar, A c) {
  if (state[RESTARTED] != 0) return 0;
  return ubar * c * (state[U1] / state[W1]) * (state[U2] / state[W2]);
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
            _LAYOUT, _QUOTIENT, _GRADIENT_OF_SIGMA, _GRADIENT_OF_U, _BLOCK,
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
            # Whoever has no block is not asked for.
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


# Y = (W Y1 Y2) COEF
scale_fwd = Elementwise(
    'sn_scale_fwd', 'T w, raw A state', 'T y', """
    y = static_cast<T>(
        static_cast<A>(w) * state[Y1] * state[Y2] * state[COEF]);
    """, '')

# gW = (gY GY1 GY2) GY + GSIGMA G, of rank 2K or 1, in one pass.
correct_bwd = Elementwise(
    'sn_correct_bwd', 'T gy, raw A state, raw A adjoint, int32 m, int32 n, '
    'int32 r, int32 K, int32 detach', 'T gw', """
    const ptrdiff_t row = quotient(i, r), block = quotient(row, m);
    const A G = gradient_of_sigma<A>(
        &state[0], &adjoint[0], K, m, n, detach, row - block * m,
        block * r + (i - row * r));
    gw = static_cast<T>(
        static_cast<A>(gy) * adjoint[GY1] * adjoint[GY2] * adjoint[GY]
        + adjoint[GSIGMA] * G);
    """, _QUOTIENT + _GRADIENT_OF_SIGMA)

# gu = c ubar / u_scale; ubar is a product that waits for W2.
vector_bwd = Elementwise(
    'sn_vector_bwd', 'A ubar, raw A state, raw A adjoint', 'U gu', """
    gu = static_cast<U>(gradient_of_u<A>(
        &state[0], ubar * state[W2], adjoint[GSIGMA]));
    """, _GRADIENT_OF_U)

# y = W x, or W^T x: which, the axes say.  For what BLAS has no product for.
product = Reduction(
    'sn_product', 'T w, X x', 'A y',
    'static_cast<A>(w) * static_cast<A>(x)', 'y = a')

# d_i = <gY_i, W_i> / scale, for each index i of the first axis.
dot_bwd = Reduction(
    'sn_dot_bwd', 'T gy, T w, A w1, A w2', 'A d',
    'static_cast<A>(gy) * (static_cast<A>(w) * w1 * w2)', 'd = a')

# What one block does.  All threads call these functions together, and each
# gets what they return; shared has room for one double a thread.  Products
# begin and end with a barrier, so what they read may have just been written.
_BLOCK = """
// An (l, m, r) array in units of scale.
struct Weight {
  const T* w;
  int l, m, r;
  A w1, w2;
  __device__ Size n() const { return static_cast<Size>(l) * r; }
  __device__ Size size() const { return n() * m; }
  __device__ A operator[](Size i) const {
    return static_cast<A>(w[i]) * w1 * w2;
  }
};

__device__ double infinity() {
  return __longlong_as_double(0x7ff0000000000000LL);
}

// u_0 = u u1 u2, unless restarted.
struct Start { A u1, u2; bool restarted; };

// The sum of x over the block, always in the same order.
__device__ double block_sum(double x, double* shared) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  __syncthreads();  // what was there may still be being read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) x += shared[w];
  return x;
}

// max |x|, or infinity where an x is not finite.
template <typename X>
__device__ double largest(const X* x, Size n, double* shared) {
  double y = 0;
  for (Size j = threadIdx.x; j < n; j += blockDim.x) {
    const A a = fabs(static_cast<A>(x[j]));
    y = isfinite(a) ? fmax(y, static_cast<double>(a)) : infinity();
    if (isinf(y)) break;
  }
  for (int d = 16; d > 0; d /= 2)
    y = fmax(y, __shfl_xor_sync(0xffffffffu, y, d));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = y;
  __syncthreads();
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w)
    y = fmax(y, shared[w]);
  return y;
}

// y[o] = sum_q W[base(o) + q stride] x[q],  base(o) = o / r * block + o % r.
// Neighbouring threads take neighbouring o; the sum is split among groups.
__device__ void strided_product(
    const Weight& W, const A* x, A* y, int n_out, int r, Size block, int n_in,
    int stride, double* shared) {
  A* part = reinterpret_cast<A*>(shared);
  int width = blockDim.x;
  while (width > 32 && width / 2 >= n_out) width /= 2;
  const int groups = blockDim.x / width;
  const int lane = threadIdx.x % width, group = threadIdx.x / width;
  __syncthreads();
  for (int start = 0; start < n_out; start += width) {
    const int o = start + lane;
    A sum = 0;
    if (o < n_out) {
      const Size base = o / r * block + o % r;
#pragma unroll 4
      for (int q = group; q < n_in; q += groups)
        sum += W[base + static_cast<Size>(q) * stride] * x[q];
    }
    part[threadIdx.x] = sum;
    __syncthreads();
    if (group == 0 && o < n_out) {
      for (int g = 1; g < groups; ++g) sum += part[g * width + lane];
      y[o] = sum;
    }
    __syncthreads();
  }
}

// y[o] = sum_{a, b} W[o stride + a block + b] x[a r + b],  a < l and b < r.
// Neighbouring threads take neighbouring b, and a warp an o.
__device__ void contiguous_product(
    const Weight& W, const A* x, A* y, int n_out, int stride, int l, int r,
    Size block) {
  const int lane = threadIdx.x % 32;
  __syncthreads();
  for (int o = threadIdx.x / 32; o < n_out; o += blockDim.x / 32) {
    const Size base = static_cast<Size>(o) * stride;
    A sum = 0;
    if (r >= 32) {
      for (int a = 0; a < l; ++a)
#pragma unroll 8
        for (int b = lane; b < r; b += 32)
          sum += W[base + a * block + b] * x[a * r + b];
    } else {
      for (int q = lane; q < l * r; q += 32)
        sum += W[base + q / r * block + q % r] * x[q];
    }
    for (int d = 16; d > 0; d /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (lane == 0) y[o] = sum;
  }
  __syncthreads();
}

// y = W^T x
__device__ void transposed_product(
    const Weight& W, const A* x, A* y, double* shared) {
  if (W.r == 1)
    contiguous_product(W, x, y, W.l, W.m, 1, W.m, 0);
  else
    strided_product(W, x, y, W.l * W.r, W.r,
                    static_cast<Size>(W.m) * W.r, W.m, W.r, shared);
}

// y = W x
__device__ void product(
    const Weight& W, const A* x, A* y, double* shared) {
  if (W.r == 1)
    strided_product(W, x, y, W.m, W.m, 0, W.l, W.m, shared);
  else
    contiguous_product(W, x, y, W.m, W.r, W.l, W.r,
                       static_cast<Size>(W.m) * W.r);
}

// x <- x / |x|, unless that is zero.  Returns |x|.
__device__ double normalize(A* x, int n, double* shared) {
  double sum = 0;
  for (int j = threadIdx.x; j < n; j += blockDim.x)
    sum += static_cast<double>(x[j]) * x[j];
  const double norm = sqrt(block_sum(sum, shared));
  const A divisor = norm == 0 ? 1 : norm;
  for (int j = threadIdx.x; j < n; j += blockDim.x) x[j] /= divisor;
  return norm;
}

// Outside of this range the squares of A may have lost digits.
__device__ bool is_ordinary(double norm) {
  const double limit = sizeof(A) == 4 ? 1e25 : 1e140;
  return norm > 1 / limit && norm < limit;
}

// s_k = W^T u_{k-1}, v_k = s_k / |s_k|, t_k = W v_k, u_k = t_k / |t_k|, for
// k = 1..K.  Returns |t_K|.
__device__ double iterate(
    const Weight& W, A* state, int K, bool* ordinary, double* shared) {
  const Size m = W.m, n = W.n();
  A* norms = state + N_STATE;
  A* u = norms + 2 * K;
  A* v = u + (K + 1) * m;
  double t = 0;
  for (int k = 0; k < K; ++k, u += m, v += n) {
    transposed_product(W, u, v, shared);
    const double s = normalize(v, n, shared);
    product(W, v, u + m, shared);
    t = normalize(u + m, m, shared);
    if (threadIdx.x == 0) {
      norms[k] = s == 0 ? 1 : s;
      norms[K + k] = t == 0 ? 1 : t;
    }
    *ordinary = *ordinary && is_ordinary(s) && is_ordinary(t);
  }
  return t;
}

// us[0] <- e_i, with i the row of largest norm, never orthogonal to itself.
__device__ void start_from_largest_row(
    const Weight& W, A* state, int K, double* shared) {
  double most = -1;
  int row = 0;
  for (int i = 0; i < W.m; ++i) {
    double sum = 0;
    for (int j = threadIdx.x; j < W.n(); j += blockDim.x) {
      const Size block = static_cast<Size>(j / W.r) * W.m + i;
      const double w = W[block * W.r + j % W.r];
      sum += w * w;
    }
    sum = block_sum(sum, shared);
    if (sum > most) { most = sum; row = i; }
  }
  for (int i = threadIdx.x; i < W.m; i += blockDim.x)
    state[N_STATE + 2 * K + i] = i == row;
}

// 1 / 2^(floor(log2(largest))), as the product of two factors.
__device__ void inverse_of_scale(double largest, A* first, A* second) {
  int e = 1;
  if (largest > 0) frexp(largest, &e);
  const int half = (e - 1) / 2;
  *first = ldexp(1.0, -half);
  *second = ldexp(1.0, half - (e - 1));
}

// iterate() for a W or a u of extreme size, for a u that is zero or not
// finite, and for one that W^T makes zero.
__device__ double rescue(
    Weight& W, const U* u, A* state, int K, Start& start, double* shared) {
  const double w_largest = largest(W.w, W.size(), shared);
  const double u_largest = largest(u, W.m, shared);
  A* us = state + N_STATE + 2 * K;
  if (isinf(w_largest)) {
    const double nan = infinity() - infinity();
    const Size end = static_cast<Size>(K + 1) * W.m + K * W.n();
    for (Size j = -2 * K + static_cast<Size>(threadIdx.x); j < end;
         j += blockDim.x)
      if (j < 0 || j >= W.m) us[j] = nan;  // u_0 stays: it may be good
    return nan;
  }
  inverse_of_scale(w_largest, &W.w1, &W.w2);
  start.restarted = !(u_largest > 0 && u_largest < infinity());
  if (start.restarted) {
    start_from_largest_row(W, state, K, shared);
  } else {
    inverse_of_scale(u_largest, &start.u1, &start.u2);
    for (int i = threadIdx.x; i < W.m; i += blockDim.x)
      us[i] = static_cast<A>(u[i]) * start.u1 * start.u2;
  }
  bool ordinary = true;  // nobody asks here
  double sigma = iterate(W, state, K, &ordinary, shared);
  if (sigma == 0 && w_largest > 0 && !start.restarted) {
    start.restarted = true;
    start_from_largest_row(W, state, K, shared);
    sigma = iterate(W, state, K, &ordinary, shared);
  }
  return sigma;
}

// The scalars of the state, x = u_K W1, and u <- u_K where that is good.
__device__ void finish(
    const Weight& W, const Start& start, double sigma, U* u, A* state,
    A* sigma_out, const A* gamma, int K, double factor, double eps,
    int update) {
  const Size m = W.m;
  const A* last = state + N_STATE + 2 * K + K * m;
  A* x = state + N_STATE + 2 * K + (K + 1) * m + K * W.n();
  const bool is_good = sigma > 0 && isfinite(sigma);
  for (int i = threadIdx.x; i < W.m; i += blockDim.x) {
    x[i] = last[i] * W.w1;
    if (update && is_good) u[i] = static_cast<U>(last[i]);
  }
  if (threadIdx.x != 0) return;
  const double in_full = sigma / W.w1 / W.w2;
  if (sigma_out) *sigma_out = in_full;
  const bool above = !(in_full < eps || sigma == 0);
  // With eps 0, a sigma of 0 means that W is 0.
  const double divisor = above ? sigma : eps > 0 ? eps : 1;
  state[W1] = W.w1;
  state[W2] = W.w2;
  state[U1] = start.u1;
  state[U2] = start.u2;
  state[RESTARTED] = start.restarted;
  state[COEF] = (gamma ? static_cast<double>(*gamma) : 1) * factor / divisor;
  state[Y1] = above ? W.w1 : A(1);
  state[Y2] = above ? W.w2 : A(1);
  state[DIVISOR] = divisor;
  state[ABOVE] = above;
}

// c = gsigma - above coef <gY, W> / sigma, and ggamma = f <gY, W> / sigma, of
// dot = <gY, W / scale>.  By one thread.
__device__ void settle_gradients(
    const A* state, A* adjoint, double dot, bool has_gy, const A* gsigma,
    A* ggamma, double factor) {
  double c = gsigma ? static_cast<double>(*gsigma) : 0;
  if (state[ABOVE] == 0) dot = dot / state[W1] / state[W2];
  dot /= state[DIVISOR];
  if (has_gy && state[ABOVE] != 0)
    c -= dot * state[COEF] * state[Y1] * state[Y2];
  adjoint[GY] = has_gy ? state[COEF] : A(0);
  adjoint[GY1] = state[Y1];
  adjoint[GY2] = state[Y2];
  adjoint[GSIGMA] = c;
  if (ggamma) *ggamma = factor * dot;
}

// y <- (y - e (e . y)) / norm, where y waits for the factor w2;  x <- y w1.
__device__ void project(
    A* y, const A* e, int n, A norm, A w1, A w2, A* x, double* shared) {
  double dot = 0;
  for (int j = threadIdx.x; j < n; j += blockDim.x)
    dot += static_cast<double>(e[j]) * (y[j] * w2);
  const A d = block_sum(dot, shared);
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    y[j] = (y[j] * w2 - e[j] * d) / norm;
    if (x) x[j] = y[j] * w1;
  }
}
"""

# Iteration k of K, 0 <= k < K, from its products s = W^T u_k in vs[k] and
# W s in us[k+1]: v = s / |s|, u_{k+1} = W s / |W s|, sigma = |W s| / |s|.
# The last one settles all scalars, and u.
settle_fwd = Raw('sn_settle_fwd', """
extern "C" __global__ void __launch_bounds__(512, 1) sn_settle_fwd(
    const T* w, U* u, A* state, A* sigma_out, const A* gamma, int l, int m,
    int r, int k, int K, double factor, double eps, int update) {
  __shared__ double shared[512];
  Weight W = {w, l, m, r, 1, 1};
  Start start = {1, 1, false};
  A* norms = state + N_STATE;
  A* us = norms + 2 * K;
  A* v = us + static_cast<Size>(K + 1) * m + k * W.n();
  bool ordinary = k == 0 || state[ORDINARY] != 0;
  if (k == 0)
    for (int i = threadIdx.x; i < m; i += blockDim.x)
      us[i] = static_cast<A>(u[i]);
  const double s = normalize(v, W.n(), shared);
  const double t = normalize(us + static_cast<Size>(k + 1) * m, m, shared);
  ordinary = ordinary && is_ordinary(s) && is_ordinary(t);
  if (threadIdx.x == 0) {
    norms[k] = s;
    norms[K + k] = t / s;
    state[ORDINARY] = ordinary;
  }
  if (k + 1 < K) return;
  double sigma = t / s;
  if (!ordinary) sigma = rescue(W, u, state, K, start, shared);
  __syncthreads();
  finish(W, start, sigma, u, state, sigma_out, gamma, K, factor, eps, update);
}
""")

# sum_i d_i, then c and ggamma (with first); and y <- (y - e (e . y)) / norm.
project_bwd = Raw('sn_project_bwd', """
extern "C" __global__ void __launch_bounds__(512, 1) sn_project_bwd(
    const A* state, A* adjoint, int first, const A* dots, int n_dots,
    const A* gsigma, A* ggamma, double factor, A* y, const A* e, int n,
    int norm, A* x) {
  __shared__ double shared[512];
  if (first) {
    double dot = 0;
    for (int j = threadIdx.x; j < n_dots; j += blockDim.x) dot += dots[j];
    dot = block_sum(dot, shared);
    if (threadIdx.x == 0)
      settle_gradients(
          state, adjoint, dot, n_dots > 0, gsigma, ggamma, factor);
  }
  if (n > 0)
    project(y, e, n, state[N_STATE + norm], state[W1], state[W2], x, shared);
}
""")

# The whole forward: K iterations, u, and Y unless it is not wanted.
_FORWARD_OF_EACH = """
    const T* w, U* u, A* state, A* sigma_out, const A* gamma, T* y, int l,
    int m, int r, double factor"""
_FORWARD_OF_ALL = 'int K, double eps, int update'
fused_fwd = Fused('sn_fused_fwd', _FORWARD_OF_EACH, _FORWARD_OF_ALL, f"""
__device__ void sn_fused_fwd_of({_FORWARD_OF_EACH}, {_FORWARD_OF_ALL}) {{
""" + """  __shared__ double shared[512];
  Weight W = {w, l, m, r, 1, 1};
  Start start = {1, 1, false};
  bool ordinary = true;
  for (int i = threadIdx.x; i < m; i += blockDim.x)
    state[N_STATE + 2 * K + i] = static_cast<A>(u[i]);
  double sigma = iterate(W, state, K, &ordinary, shared);
  if (!ordinary) sigma = rescue(W, u, state, K, start, shared);
  __syncthreads();
  finish(W, start, sigma, u, state, sigma_out, gamma, K, factor, eps, update);
  if (!y) return;
  __syncthreads();
  const A y1 = state[Y1], y2 = state[Y2], coef = state[COEF];
  for (Size i = threadIdx.x; i < W.size(); i += blockDim.x)
    y[i] = static_cast<T>(static_cast<A>(w[i]) * y1 * y2 * coef);
}
""")

# The whole backward: the adjoint of K iterations, and those of gW and gu
# that are wanted; gY and gsigma may be missing.
_BACKWARD_OF_EACH = """
    const T* w, const T* gy, const A* gsigma, const A* state, A* adjoint,
    T* gw, U* gu, A* ggamma, int l, int m_, int r, double factor"""
_BACKWARD_OF_ALL = 'int K, int detach'
fused_bwd = Fused('sn_fused_bwd', _BACKWARD_OF_EACH, _BACKWARD_OF_ALL, f"""
__device__ void sn_fused_bwd_of({_BACKWARD_OF_EACH}, {_BACKWARD_OF_ALL}) {{
""" + """  __shared__ double shared[512];
  const Weight W = {w, l, m_, r, state[W1], state[W2]};
  const Size m = m_, n = W.n();
  const A* norms = state + N_STATE;
  const A* us = norms + 2 * K;
  const A* vs = us + (K + 1) * m;
  A* tbars = adjoint + N_ADJOINT;
  A* sbars = tbars + K * m;
  double dot = 0;
  if (gy) {
    for (Size i = threadIdx.x; i < W.size(); i += blockDim.x)
      dot += static_cast<A>(gy[i]) * W[i];
    dot = block_sum(dot, shared);
  }
  if (threadIdx.x == 0)
    settle_gradients(state, adjoint, dot, gy, gsigma, ggamma, factor);
  if (!detach && (gw || gu))
    for (int k = K - 1; k >= 0; --k) {
      const A* tbar = k == K - 1 ? us + K * m : tbars + k * m;
      transposed_product(W, tbar, sbars + k * n, shared);
      project(sbars + k * n, vs + k * n, n, norms[k], 1, 1, 0, shared);
      if (k == 0) break;
      product(W, sbars + k * n, tbars + (k - 1) * m, shared);
      project(tbars + (k - 1) * m, us + k * m, m, norms[K + k - 1], 1, 1, 0,
              shared);
    }
  __syncthreads();
  const A a = adjoint[GY], a1 = adjoint[GY1], a2 = adjoint[GY2];
  const A c = adjoint[GSIGMA];
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
        const A g = gy ? static_cast<A>(gy[e]) * a1 * a2 * a : A(0);
        gw[e] = static_cast<T>(g + c * gradient_of_sigma<A>(
            state, adjoint, K, m, n, detach, i, j));
      }
  }
  if (gu) {
    A* ubar = tbars;  // these have done their service
    product(W, sbars, ubar, shared);
    for (int i = threadIdx.x; i < m; i += blockDim.x)
      gu[i] = static_cast<U>(gradient_of_u<A>(state, ubar[i], c));
  }
}
""")

ALL = (scale_fwd, correct_bwd, vector_bwd, product, dot_bwd,
       settle_fwd, project_bwd, fused_fwd, fused_bwd)
