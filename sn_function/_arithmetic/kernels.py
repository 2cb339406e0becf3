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
# For a pointer that a raw kernel does not use.
NULL = numpy.intp(0)

# The unit of the weight, 1 unless it is extreme; what u was divided by for
# u_0; whether u_0 is another vector than u; sigma; max(sigma, eps); whether
# that is sigma; Y = COEF W; whether all norms so far were ordinary.
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

# What one block does.  All threads call these functions together, and each
# gets what they return; shared has room for one double a thread.  Products
# begin and end with a barrier, so what they read may have just been written.
_BLOCK = """
// An (l, m, r) array.
struct Weight {
  const T* w;
  int l, m, r;
  __device__ Size n() const { return static_cast<Size>(l) * r; }
  __device__ Size size() const { return n() * m; }
  __device__ A operator[](Size i) const { return static_cast<A>(w[i]); }
};

// The same in units of its largest entry.
struct InUnits : Weight {
  double unit;
  __device__ InUnits(const Weight& W, double unit) : Weight(W), unit(unit) {}
  __device__ A operator[](Size i) const {
    return static_cast<A>(static_cast<double>(w[i]) / unit);
  }
};

__device__ double infinity() {
  return __longlong_as_double(0x7ff0000000000000LL);
}

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
template <typename M>
__device__ void strided_product(
    const M& W, const A* x, A* y, int n_out, int r, Size block, int n_in,
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
template <typename M>
__device__ void contiguous_product(
    const M& W, const A* x, A* y, int n_out, int stride, int l, int r,
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
template <typename M>
__device__ void transposed_product(
    const M& W, const A* x, A* y, double* shared) {
  if (W.r == 1)
    contiguous_product(W, x, y, W.l, W.m, 1, W.m, 0);
  else
    strided_product(W, x, y, W.l * W.r, W.r,
                    static_cast<Size>(W.m) * W.r, W.m, W.r, shared);
}

// y = W x
template <typename M>
__device__ void product(const M& W, const A* x, A* y, double* shared) {
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

// As ORDINARY of the host has it.
__device__ bool is_ordinary(double norm) {
  const double limit = sizeof(A) == 4 ? 1e12 : 1e100;
  return norm > 1 / limit && norm < limit;
}

// s_k = W^T u_{k-1}, v_k = s_k / |s_k|, t_k = W v_k, u_k = t_k / |t_k|, for
// k = 1..K.  Returns |t_K|.
template <typename M>
__device__ double iterate(
    const M& W, double unit, double* numbers, A* vectors, int K,
    bool* ordinary, double* shared) {
  const Size m = W.m, n = W.n();
  double* norms = numbers + N_NUMBERS;
  A* u = vectors;
  A* v = u + (K + 1) * m;
  double t = 0;
  for (int k = 0; k < K; ++k, u += m, v += n) {
    transposed_product(W, u, v, shared);
    const double s = normalize(v, n, shared) * unit;
    product(W, v, u + m, shared);
    t = normalize(u + m, m, shared) * unit;
    if (threadIdx.x == 0) {
      norms[k] = s == 0 ? 1 : s;
      norms[K + k] = t == 0 ? 1 : t;
    }
    *ordinary = *ordinary && is_ordinary(s) && is_ordinary(t);
  }
  return t;
}

// u_0 <- e_i, with i the row of largest norm, never orthogonal to itself.
__device__ void start_from_largest_row(
    const InUnits& W, A* u, double* shared) {
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
  for (int i = threadIdx.x; i < W.m; i += blockDim.x) u[i] = i == row;
}

// iterate() for a W or a u of extreme size, for a u that is zero or not
// finite, and for one that W^T makes zero.
__device__ double rescue(
    const Weight& plain, const U* u, double* numbers, A* vectors, int K,
    double* shared) {
  const Size m = plain.m, n = plain.n();
  const double w_largest = largest(plain.w, plain.size(), shared);
  const double u_largest = largest(u, m, shared);
  if (isinf(w_largest)) {
    const double nan = infinity() - infinity();
    for (int k = threadIdx.x; k < 2 * K; k += blockDim.x)
      numbers[N_NUMBERS + k] = nan;
    // u_0 stays: it may be good.
    for (Size j = m + threadIdx.x; j < (K + 1) * m + K * n; j += blockDim.x)
      vectors[j] = nan;
    return nan;
  }
  const double unit = w_largest > 0 ? w_largest : 1;
  const InUnits W(plain, unit);
  double u_norm = 1;
  bool restarted = !(u_largest > 0 && u_largest < infinity());
  if (restarted) {
    start_from_largest_row(W, vectors, shared);
  } else {
    for (int i = threadIdx.x; i < m; i += blockDim.x)
      vectors[i] = static_cast<A>(static_cast<double>(u[i]) / u_largest);
    u_norm = normalize(vectors, m, shared) * u_largest;
  }
  bool ordinary = true;  // nobody asks here
  double sigma = iterate(W, unit, numbers, vectors, K, &ordinary, shared);
  if (sigma == 0 && w_largest > 0 && !restarted) {
    restarted = true;
    start_from_largest_row(W, vectors, shared);
    sigma = iterate(W, unit, numbers, vectors, K, &ordinary, shared);
  }
  if (threadIdx.x == 0) {
    numbers[UNIT] = unit;
    numbers[U_NORM] = u_norm;
    numbers[RESTARTED] = restarted;
  }
  return sigma;
}

// The numbers of an ordinary weight, which rescue() changes.  By one thread.
__device__ void start(double* numbers) {
  numbers[UNIT] = 1;
  numbers[U_NORM] = 1;
  numbers[RESTARTED] = 0;
}

// The numbers that follow from sigma, and u <- u_K where that is good.
__device__ void finish(
    const Weight& W, double sigma, U* u, double* numbers, const A* vectors,
    A* sigma_out, const A* gamma, int K, double factor, double eps,
    int update) {
  const A* last = vectors + static_cast<Size>(K) * W.m;
  if (update && sigma > 0 && isfinite(sigma))
    for (int i = threadIdx.x; i < W.m; i += blockDim.x)
      u[i] = static_cast<U>(last[i]);
  if (threadIdx.x != 0) return;
  if (sigma_out) *sigma_out = sigma;
  const bool above = !(sigma < eps || sigma == 0);
  // With eps 0, a sigma of 0 means that W is 0.
  const double divisor = above ? sigma : eps > 0 ? eps : 1;
  numbers[SIGMA] = sigma;
  numbers[DIVISOR] = divisor;
  numbers[ABOVE] = above;
  numbers[COEF] = (gamma ? static_cast<double>(*gamma) : 1) * factor / divisor;
}

// c = gsigma - above coef <gY, W> / sigma, and ggamma = f <gY, W> / divisor,
// of dot = <gY, W>.  By one thread.
__device__ void settle_gradients(
    const double* numbers, double* coefficients, double dot, bool has_gy,
    const A* gsigma, A* ggamma, double factor) {
  dot /= numbers[DIVISOR];
  double c = gsigma ? static_cast<double>(*gsigma) : 0;
  if (has_gy && numbers[ABOVE] != 0) c -= dot * numbers[COEF];
  coefficients[GY] = has_gy ? numbers[COEF] : 0;
  coefficients[GSIGMA] = c;
  if (ggamma) *ggamma = factor * dot;
}

// y <- (y - e (e . y)) / norm, or y / norm without e.
__device__ void project(
    A* y, const A* e, int n, double norm, double* shared) {
  const A divisor = norm;
  A d = 0;
  if (e) {
    double dot = 0;
    for (int j = threadIdx.x; j < n; j += blockDim.x)
      dot += static_cast<double>(e[j]) * y[j];
    d = block_sum(dot, shared);
  }
  for (int j = threadIdx.x; j < n; j += blockDim.x)
    y[j] = (e ? y[j] - e[j] * d : y[j]) / divisor;
}

// gu = c ubar / |u|, or 0 where u_0 was not u.  By one thread.
__device__ double gradient_of_u(
    const double* numbers, const double* coefficients, A ubar) {
  if (numbers[RESTARTED] != 0) return 0;
  return ubar * (coefficients[GSIGMA] * numbers[UNIT]) / numbers[U_NORM];
}

// The bars of all iterations, and with need_u ubar where tbar_K would be.
template <typename M>
__device__ void go_back(
    const M& W, const double* numbers, const A* vectors, A* bars, int K,
    bool need_u, double* shared) {
  const Size m = W.m, n = W.n();
  const double* norms = numbers + N_NUMBERS;
  const double unit = numbers[UNIT];
  const A* vs = vectors + (K + 1) * m;
  A* sbars = bars + K * m;
  for (int k = K - 1; k >= 0; --k) {
    const A* tbar = k == K - 1 ? vectors + K * m : bars + k * m;
    transposed_product(W, tbar, sbars + k * n, shared);
    project(sbars + k * n, vs + k * n, n, norms[k] / unit, shared);
    if (k == 0) break;
    A* next = bars + (k - 1) * m;
    product(W, sbars + k * n, next, shared);
    project(next, 0, m, norms[K + k - 1] / unit, shared);
  }
  if (need_u) product(W, sbars, bars + (K - 1) * m, shared);
}
"""

# Iteration k of K, 0 <= k < K, from its products s = W^T u_k in vs[k] and
# W s in us[k+1]: v = s / |s|, u_{k+1} = W s / |W s|, sigma = |W s| / |s|.
# The last one settles all numbers, and u.
settle_fwd = Raw('sn_settle_fwd', """
extern "C" __global__ void __launch_bounds__(512, 1) sn_settle_fwd(
    const T* w, U* u, double* numbers, A* vectors, A* sigma_out,
    const A* gamma, int l, int m, int r, int k, int K, double factor,
    double eps, int update) {
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
  ordinary = ordinary && is_ordinary(s) && is_ordinary(sigma);
  if (threadIdx.x == 0) {
    norms[k] = s;
    norms[K + k] = sigma;
    numbers[ORDINARY] = ordinary;
    start(numbers);
  }
  if (k + 1 < K) return;
  __syncthreads();
  if (!ordinary) sigma = rescue(W, u, numbers, vectors, K, shared);
  __syncthreads();
  finish(W, sigma, u, numbers, vectors, sigma_out, gamma, K, factor, eps,
         update);
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
    const T* w, U* u, double* numbers, A* vectors, A* sigma_out,
    const A* gamma, T* y, int l, int m, int r, double factor"""
_FORWARD_OF_ALL = 'int K, double eps, int update'
fused_fwd = Fused('sn_fused_fwd', _FORWARD_OF_EACH, _FORWARD_OF_ALL, f"""
__device__ void sn_fused_fwd_of({_FORWARD_OF_EACH}, {_FORWARD_OF_ALL}) {{
""" + """  __shared__ double shared[512];
  const Weight W = {w, l, m, r};
  bool ordinary = true;
  for (int i = threadIdx.x; i < m; i += blockDim.x)
    vectors[i] = static_cast<A>(u[i]);
  if (threadIdx.x == 0) start(numbers);
  double sigma = iterate(W, 1, numbers, vectors, K, &ordinary, shared);
  if (!ordinary) sigma = rescue(W, u, numbers, vectors, K, shared);
  __syncthreads();
  finish(W, sigma, u, numbers, vectors, sigma_out, gamma, K, factor, eps,
         update);
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
