"""Every CUDA kernel of the package, its formula above it; arrays only.

``T`` is the type of the weight, ``U`` that of ``u`` and ``A`` that of vectors
and products: float32 for float16 and float32, float64 for float64.  Norms and
what follows from them are float64.  A weight is the C-contiguous array
``(l, m, r)`` of :mod:`.matrix`, with ``n = l r``.  What a forward computes for
its backward, and what a backward computes on the way, stays on the device, in
one piece each (:mod:`.workspace` has the places):

    forward   scalars, s_norms K, t_norms K    float64
              us (K+1, m), vs (K, n)           A
              what blocks leave for the next   float64
    backward  coefficients                     float64
              tbars (K, m), sbars (K, n)       A
              what blocks leave for the next   float64

A forward of b vectors keeps what one of K = 1 does, and behind that singular
values, vectors of shape (m, b) and (n, b), and matrices of b x b.

Where a norm is so large or small that products may have left the range of
``A``, one block does all again with a weight in units of about its largest
entry.

A kernel of CuPy's own kinds does where its formula is all there is to say.  A
raw one says above it what it gains.
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
from sn_function._arithmetic.subspace import (
    DEPENDENT,
    INDEPENDENT,
    MOST,
    REGULAR,
    SHIFT,
)

# Weights of up to this many entries go through kernels of one block.  On an
# H200 one block takes 28 us at 2^15 entries, in a graph, and many take 24; but
# it saves the host three launches, which is more than that.
FUSED_SIZE = 1 << 15
# Threads of a block: of the only one of a weight, and of one of many.  Powers
# of two, as products deal out their threads by halving.
FUSED_BLOCK_SIZE = 512
BLOCK_SIZE = 256
# In one launch: an argument for each of them takes room.
MAX_WEIGHTS = 16
# Of a weight: the matrices of several vectors are in shared memory.
MAX_VECTORS = 32
# For a pointer that a raw kernel does not use.
NULL = numpy.intp(0)

# 1 over the unit of the weight, 1 unless it is extreme; what u was divided by
# for u_0; whether u_0 is another vector than u; sigma; what W is divided by;
# whether that is sigma; Y = COEF W; gamma, if it is made anew, else 0.  An
# even number, for the alignment of what follows.
NUMBERS = ('SCALE', 'U_NORM', 'RESTARTED', 'SIGMA', 'DIVISOR', 'ABOVE', 'COEF',
           'NEW_GAMMA')
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

# What raw kernels share, by the name of the file; the last is for those of
# several vectors.
SHARED = {name: (pathlib.Path(__file__).parent / f'{name}.cuh').read_text(
    encoding='utf-8') for name in (
        'products', 'block', 'entries', 'grid', 'subspace')}


def rows_of_a_thread(b: int, itemsize: int) -> int:
    """How many rows a thread of ``sn_product_subspace`` has, by rows.

    Its sums have to fit into registers, with the entries, of ``itemsize``
    bytes, that it reads at once.
    """
    rows = 2 if itemsize == 2 else 8
    while rows > 1 and rows * b * max(4, itemsize) > 128:
        rows //= 2
    return rows


class Elementwise:
    """A ``cupy.ElementwiseKernel``, compiled on first use on each device."""

    def __init__(self, name: str, in_params: str, out_params: str,
                 operation: str) -> None:
        self.name = name
        self.arguments = in_params, out_params, operation

    def __call__(self, *args: Any) -> Any:
        return cuda.elementwise(
            *self.arguments, self.name, preamble=_LAYOUT)(*args)


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
    """A ``cupy.RawKernel`` for several weights, compiled on first use.

    What it does for a weight is the function ``NAME_of`` of the code, called
    with the arguments of that weight and those that all have in common.  They
    all come as arguments of the kernel: nothing is copied to the device for
    them.  Weight ``blockIdx.y`` has the first ``blocks`` of the blocks in x.

    Args:
        name: Its name.
        own: Parameters of a weight; the last is ``int blocks``.
        common: Parameters that all have in common.
        code: Definition of ``NAME_of``, without its parameters.
        threads: Name of the constant with the number of threads of a block.
        bounds: Limits for its registers, as ``__launch_bounds__`` takes them.
        has_several: Whether it is for weights of several vectors, of a number
            that is compiled in.

    """

    def __init__(self, name: str, own: str, common: str, code: str,
                 threads: str = 'BLOCK_SIZE', bounds: str = '256, 2',
                 has_several: bool = False) -> None:
        self.name = name
        self.own = [' '.join(text.split()) for text in own.split(',')]
        self.common = [' '.join(text.split())
                       for text in common.split(',') if text.strip()]
        self.code = code
        self.threads = threads
        self.bounds = bounds
        self.has_several = has_several
        # Else the type of u is that of sums.
        self.has_u = any(text.startswith(('U*', 'const U*'))
                         for text in self.own)
        # By T, U, number of weights and of vectors.
        self._sources: dict[Any, str] = {}

    def source(
            self, T: Any, U: Any, n: int = 1, n_vectors: int | None = None,
    ) -> str:
        """Returns the source for up to ``n`` weights of these dtypes."""
        shared = dict(SHARED)
        constants = ''
        if n_vectors is None:
            del shared['subspace']
        else:
            constants = _constants(n_vectors, T)
        types = dict(zip('TUA', map(_c_name, (T, U, accumulator_dtype(T)))))
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
        return ''.join([
            _INCLUDES,
            *[f'typedef {c} {name};\n' for name, c in types.items()],
            _LAYOUT, constants, *shared.values(), f"""
__device__ __forceinline__ void {self.name}_of(
    {', '.join(self.own + self.common)}) {self.code}
extern "C" __global__ void __launch_bounds__({self.bounds}) {self.name}(
    {', '.join(parameters)}) {{
  switch (blockIdx.y) {{
{cases}    default: break;
  }}
  if (blockIdx.x < blocks0) {self.name}_of({arguments});
}}
"""])

    def __call__(
            self, T: Any, U: Any, own: Sequence[tuple[Any, ...]],
            *common: Any, n_vectors: int | None = None) -> None:
        threads = globals()[self.threads],
        for start in range(0, len(own), MAX_WEIGHTS):
            chosen = own[start:start + MAX_WEIGHTS]
            n = len(chosen)
            n_slots = 1 if n == 1 else MAX_WEIGHTS
            # Unused ones are like the first, and not looked at.
            args = (*[x for weight in chosen for x in weight],
                    *chosen[0] * (n_slots - n), *common)
            width = max([int(weight[-1]) for weight in chosen])
            key = T.char, U.char, n_slots, n_vectors
            source = self._sources.get(key)
            if source is None:
                source = self._sources[key] = self.source(
                    T, U, n_slots, n_vectors)
            cuda.raw(source, self.name)((width, n), threads, args)


def _constants(n_vectors: int, T: Any) -> str:
    """What a kernel of several vectors has to know."""
    rows = rows_of_a_thread(n_vectors, T.itemsize)
    return f"""
#define N_VECTORS {n_vectors}
#define N_ROWS {rows}
#define SHIFT {SHIFT if n_vectors > 1 else 0}
#define REGULAR {REGULAR}
#define MOST {MOST}
#define INDEPENDENT {INDEPENDENT}
#define DEPENDENT {DEPENDENT}
"""


def _c_name(dtype: Any) -> str:
    return {'e': 'float16', 'f': 'float', 'd': 'double'}[dtype.char]


# W x, where the output axis is neither the first nor the last.
middle_product = Reduction(
    'sn_middle_product', 'T w, A x, float64 scale', 'A y',
    'static_cast<A>(w) * static_cast<A>(scale) * x', 'y = a')

# gamma and initial_gamma <- what gamma is made anew to.  A launch of its own,
# as all blocks of the one before read them.
renew_gamma = Elementwise(
    'sn_renew_gamma', 'raw float64 numbers', 'A gamma, A initial_gamma', """
    if (numbers[NEW_GAMMA] != 0) gamma = initial_gamma = numbers[NEW_GAMMA];
    """)

# gu = c ubar / |u|, or 0 where u_0 was not u.
gradient_of_u = Elementwise(
    'sn_gradient_of_u',
    'raw float64 numbers, raw float64 coefficients, A ubar', 'U gu', """
    const double c = coefficients[GSIGMA] / numbers[SCALE];
    gu = static_cast<U>(
        numbers[RESTARTED] != 0 ? 0.0 : ubar * c / numbers[U_NORM]);
    """)

# y = W x or W^T x, with y . y, e . y, e . e, and <gY, W> (with gY) or max |W|
# in sums of each block.  The first of a forward takes x from u.  x is divided
# by its norm where it is raw; what divides y instead is given as divisor.
#
# cuBLAS cannot be captured in a graph.  What it leaves, others have to read
# once more for a norm, and it takes no float16 and no second factor for W.
product = Raw('sn_product', """
    const T* w, const T* gy, const U* u, const A* x, A* start, A* y,
    const A* e, double* sums, double* extras, const double* x_sums,
    double* norm, const double* divisor, double* numbers, int n_x_sums,
    int is_raw, int is_transposed, int lanes, int parts, int is_wide, int l,
    int m, int r, int blocks""", '', """{
  __shared__ double shared[512];
  A* part = reinterpret_cast<A*>(shared);
  if (start && blockIdx.x == 0 && threadIdx.x == 0) {
    numbers[SCALE] = 1;
    numbers[U_NORM] = 1;
    numbers[RESTARTED] = 0;
  }
  const Weight W = {w, l, m, r, start ? A(1) : A(numbers[SCALE])};
  if (start)
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < m;
         i += blocks * blockDim.x)
      start[i] = static_cast<A>(u[i]);
  const double factor = multiplier(
      x_sums, n_x_sums, is_raw, norm, divisor, W.scale, shared);
  Sums all;
  Found found = {0, 0};
  const Task task = {W, is_transposed != 0, is_wide != 0, gy, y, e, factor,
                     lanes, parts, blocks, part};
  if (start && sizeof(U) != sizeof(A))
    product_of<false>(task, u, &all, &found);
  else if (gy)
    product_of<true>(task, x, &all, &found);
  else
    product_of<false>(
        task, start ? reinterpret_cast<const A*>(u) : x, &all, &found);
  if (sums) all.write(sums, blocks, shared);
  if (!extras) return;
  const double extra = gy ? block_sum(found.dot, shared)
                          : block_max(found.largest, shared);
  if (threadIdx.x == 0) extras[blockIdx.x] = extra;
}""")

# y = sum_p parts[p], with the sums of sn_product: for a product that was made
# in parts, or by sn_middle_product.
gather = Raw('sn_gather', """
    const A* y_parts, int n_parts, A* y, const A* e, double* sums,
    const double* x_sums, double* norm, const double* divisor,
    const double* numbers, int n_x_sums, int is_raw, int n, int blocks""", '',
             """{
  __shared__ double shared[512];
  const double factor = multiplier(
      x_sums, n_x_sums, is_raw, norm, divisor, numbers[SCALE], shared);
  Sums all;
  for (int o = blockIdx.x * blockDim.x + threadIdx.x; o < n;
       o += blocks * blockDim.x) {
    A sum = 0;
#pragma unroll 8
    for (int p = 0; p < n_parts; ++p)
      sum += y_parts[static_cast<Size>(p) * n + o];
    sum *= factor;
    y[o] = sum;
    all.add(sum, e, o);
  }
  all.write(sums, blocks, shared);
}""")

# The end of a forward: norms, sigma and its floor, vectors divided by their
# norms, u, and Y = gamma f W / max(sigma, eps).  Every block adds up what the
# blocks of the products left.  What is rare is done by one block alone: a
# weight or a u of extreme size, and a u that belongs to another weight.  So
# are the further iterations of a tolerance that the first ones do not reach:
# one multiprocessor reads the weight, at about a fiftieth of the bandwidth.
#
# As elementwise kernel it would need a launch of one block before it, which
# decides, and cannot store u.
finish_fwd = Raw('sn_finish_fwd', """
    const T* w, U* u, double* numbers, const double* norms,
    const double* sums, int n_sums, const double* next_sums, int n_next_sums,
    A* next_s, const double* extras, int n_extras, A* sigma_out,
    const A* gamma, const A* initial_gamma, T* y, int l, int m, int r,
    double factor, int is_wide, int blocks""", """
    int K, double eps, double at_zero, int update, int n_warmup,
    double limit, double rtol""", """{
  __shared__ double shared[512];
  const Weight W = {w, l, m, r, 1};
  const State state(numbers, W, K);
  const double last = sqrt(sum_of(sums, n_sums, shared));
  const double u_0 = sqrt(sum_of(sums + 2 * n_sums, n_sums, shared));
  bool is_alone = false;
  // Raw norms, which nothing changes here: all blocks decide the same.
  double sigma = 0, t_1 = 0;
  for (int k = 0; k < K; ++k) {
    const double s = norms[k], t = k == K - 1 ? last : norms[K + k];
    sigma = s == 0 ? 0 : t / s;
    if (k == 0) t_1 = sigma;
    // t is s sigma, so the next s is t sigma, before it is divided by t.  That
    // must have all digits in float32, and the square of t in float64.
    is_alone = is_alone || !is_ordinary(s) || !is_ordinary(sigma)
        || (sizeof(A) == 4 ? K > 1 && t * sigma <= 1e-30 : t <= 1e-140);
  }
  if (last == 0 && largest_of(extras, n_extras, shared) == 0) is_alone = false;
  double turned = turn_of(sigma, norms[0], t_1, u_0);
  bool is_stale = n_warmup > 0 && turned > limit;
  if (next_s) {  // |W^T u|^2 is sigma^2 (1 + residual^2)
    const double square =
        sum_of(next_sums, n_next_sums, shared) / (sigma * sigma) - 1;
    is_stale = n_warmup > 0 && sqrt(fmax(square, 0.0)) > rtol;
  }
  is_stale = is_stale && !is_alone;
  is_alone = is_alone || is_stale;
  if (is_alone) {
    if (blockIdx.x > 0) return;
    if (is_stale)
      for (int i = threadIdx.x; i < m; i += blockDim.x)
        state.u(0)[i] = state.u(K)[i] / static_cast<A>(last);
    sigma = estimate(
        W, u, state, K, n_warmup, limit, Tolerance{next_s, rtol},
        is_stale ? 0 : 1, is_stale ? K : 0, shared);
    turned = turn(sigma, state, shared);
  }
  const Outcome outcome(sigma, turned, gamma, initial_gamma, eps, at_zero);
  if (blockIdx.x == 0 && threadIdx.x == 0)
    outcome.write(sigma, factor, numbers, sigma_out);
  const Size first = blockIdx.x * blockDim.x + threadIdx.x;
  const Size by = is_alone ? blockDim.x : blocks * blockDim.x;
  if (!is_alone)
    for (int k = 0; k < K; ++k) {
      const double s = norms[k] == 0 ? 1 : norms[k];
      double t = k == K - 1 ? last : norms[K + k];
      t = t == 0 ? 1 : t;
      if (first == 0) {
        state.s_norm(k) = s;
        state.t_norm(k) = t / s;
      }
      for (Size i = first; i < m; i += by)
        state.u(k + 1)[i] /= static_cast<A>(t);
      for (Size j = first; j < W.n(); j += by)
        state.v(k)[j] /= static_cast<A>(s);
    }
  if (update && sigma > 0 && isfinite(sigma))
    for (Size i = first; i < m; i += by)
      u[i] = static_cast<U>(state.u(K)[i]);
  if (y) multiply_all(W, y, outcome.coefficient(factor), is_wide, first, by);
}""")

# <gY, W> in parts, one for each block, without a product of vectors.
#
# As reduction it would take ten times as long on the host.
dot_bwd = Raw('sn_dot_bwd', """
    const T* w, const T* gy, double* extras, long long size, int is_wide,
    int blocks""", '', """{
  __shared__ double shared[512];
  const double sum = block_sum(inner_of_all(
      w, gy, size, is_wide,
      static_cast<Size>(blockIdx.x) * blockDim.x + threadIdx.x,
      static_cast<Size>(blocks) * blockDim.x), shared);
  if (threadIdx.x == 0) extras[blockIdx.x] = sum;
}""", bounds='256, 4')

# y <- (y - e (e . y)) / |divisor|, of the sums that y left.
#
# As elementwise kernel it would need the sum of the sums before it.
project_bwd = Raw('sn_project_bwd', """
    A* y, const A* e, const double* sums, int n_sums, const double* divisor,
    const double* numbers, int n, int blocks""", '', """{
  __shared__ double shared[512];
  const A dot = sum_of(sums + n_sums, n_sums, shared);
  const A norm = *divisor * numbers[SCALE];
  for (int j = blockIdx.x * blockDim.x + threadIdx.x; j < n;
       j += blocks * blockDim.x)
    y[j] = (y[j] - e[j] * dot) / norm;
}""")

# gW = a gY + c sum_k p_k q_k^T, of rank 2K or 1, in one pass; ggamma.
#
# As elementwise kernel it would find the place of each entry by divisions, and
# read both vectors of each pair for it.
correct_bwd = Raw('sn_correct_bwd', """
    const T* gy, const A* gsigma, double* numbers, double* coefficients,
    const double* sums, int n_sums, const double* extras, int n_extras, T* gw,
    A* ggamma, int l, int m, int r, double factor, int chunk, int is_wide,
    int blocks""", 'int K, int detach', """{
  __shared__ double shared[512];
  const Weight W = {0, l, m, r, 1};
  const double dot = gy ? sum_of(extras, n_extras, shared) : 0;
  const double of_y = sums ? sum_of(sums + n_sums, n_sums, shared) : 0;
  const Coefficients of(numbers, dot, gy, gsigma);
  if (blockIdx.x == 0 && threadIdx.x == 0)
    of.write(factor, coefficients, ggamma);
  if (!gw) return;
  const Pairs pairs(State(numbers, W, K), Bars(coefficients, W, K), K, detach,
                    sums, of_y);
  correct_all(W, pairs, gy, gw, of.a, of.c, chunk, is_wide, blocks);
}""")

# The whole forward: K iterations, u, and Y unless it is not wanted.
fused_fwd = Raw('sn_fused_fwd', """
    const T* w, U* u, double* numbers, A* next_s, A* sigma_out, A* gamma,
    A* initial_gamma, T* y, int l, int m, int r, double factor, int is_wide,
    int blocks""", """
    int K, double eps, double at_zero, int update, int n_warmup,
    double limit, double rtol""", """{
  __shared__ double shared[512];
  const Weight W = {w, l, m, r, 1};
  const State state(numbers, W, K);
  for (int i = threadIdx.x; i < m; i += blockDim.x)
    state.u(0)[i] = static_cast<A>(u[i]);
  const double sigma = estimate(
      W, u, state, K, n_warmup, limit, Tolerance{next_s, rtol}, 0, 0, shared);
  const double turned = initial_gamma ? turn(sigma, state, shared) : 0;
  const Outcome outcome(sigma, turned, gamma, initial_gamma, eps, at_zero);
  __syncthreads();  // all have read gamma
  if (threadIdx.x == 0) {
    outcome.write(sigma, factor, numbers, sigma_out);
    if (outcome.is_new_gamma) *gamma = *initial_gamma = outcome.gamma;
  }
  if (update && sigma > 0 && isfinite(sigma))
    for (int i = threadIdx.x; i < m; i += blockDim.x)
      u[i] = static_cast<U>(state.u(K)[i]);
  if (y)
    multiply_all(W, y, outcome.coefficient(factor), is_wide, threadIdx.x,
                 blockDim.x);
}""", 'FUSED_BLOCK_SIZE', '512, 1')

# The whole backward: the adjoint of K iterations, gW, ggamma, and ubar if that
# is wanted; gY and gsigma may be missing.
fused_bwd = Raw('sn_fused_bwd', """
    const T* w, const T* gy, const A* gsigma, double* numbers,
    double* coefficients, T* gw, A* ggamma, int l, int m, int r,
    double factor, int need_u, int is_wide, int blocks""",
                'int K, int detach', """{
  __shared__ double shared[512];
  const Weight W = {w, l, m, r, static_cast<A>(numbers[SCALE])};
  const State state(numbers, W, K);
  const Bars bars(coefficients, W, K);
  const double dot = gy ? block_sum(inner_of_all(
      w, gy, W.size(), is_wide, threadIdx.x, blockDim.x), shared) : 0;
  if (threadIdx.x == 0)
    Coefficients(numbers, dot, gy, gsigma)
        .write(factor, coefficients, ggamma);
  if (!detach && (gw || need_u)) go_back(W, state, bars, K, need_u, shared);
  __syncthreads();
  if (gw)
    correct_all(W, Pairs(state, bars, K, detach, false, 0), gy, gw,
                coefficients[GY], coefficients[GSIGMA], m, is_wide, 1);
}""", 'FUSED_BLOCK_SIZE', '512, 1')

# Several vectors, see subspace.py for the letters.  In memory U and what
# follows it are (m, b), and S is (n, b): a thread that reads an entry of the
# weight multiplies it with b numbers that are next to each other.

_OF_FORWARD = """
    int K, double eps, double at_zero, int moves, int update, int n_warmup,
    double limit, double rtol"""

# The whole forward of a small weight.
fused_subspace = Raw('sn_fused_subspace', """
    const T* w, U* u, double* numbers, A* sigma_out, A* gamma,
    A* initial_gamma, T* y, int l, int m, int r, double factor, int is_wide,
    int blocks""", _OF_FORWARD, """{
  __shared__ double shared[512];
  __shared__ double matrices[SMALL_SIZE];
  Weight W = {w, l, m, r, 1};
  const Space space(numbers, W);
  const Small small(matrices);
  const double sigma = estimate_all(
      W, u, space, K, moves, Renewal{n_warmup, limit, rtol}, 0, small, shared);
  W.scale = numbers[SCALE];
  const Outcome outcome(
      sigma, space.values[TURN], gamma, initial_gamma, eps, at_zero);
  __syncthreads();  // all have read gamma
  if (threadIdx.x == 0) {
    outcome.write(sigma, factor, numbers, sigma_out);
    if (outcome.is_new_gamma) *gamma = *initial_gamma = outcome.gamma;
  }
  finish_all(W, space, small.mix, sigma, threadIdx.x, blockDim.x);
  if (update && sigma > 0 && isfinite(sigma))
    store_all(space, u, m, 1, threadIdx.x, blockDim.x);
  if (y)
    multiply_all(W, y, outcome.coefficient(factor), is_wide, threadIdx.x,
                 blockDim.x);
}""", 'FUSED_BLOCK_SIZE', '512, 1', True)

# U, of the vectors given or of those that follow, and E, such that the rows of
# E U are orthonormal.
begin_subspace = Raw('sn_begin_subspace', """
    const U* u, double* numbers, double* found, int l, int m, int r,
    int blocks""", '', """{
  __shared__ double shared[512];
  __shared__ double matrices[SMALL_SIZE];
  const Weight W = {0, l, m, r, 1};
  const Space space(numbers, W);
  const Small small(matrices);
  bool is_replaced = u && begin_all(u, m, space.start, shared);
  copy_all(u ? space.start : space.T, space.U, m);
  if (orthonormalize(space.U, u ? space.start : 0, m, small, shared))
    is_replaced = true;
  for (int p = threadIdx.x; p < B * B; p += blockDim.x)
    space.E[p] = small.E[p];
  if (!u || threadIdx.x > 0) return;
  numbers[SCALE] = 1;
  numbers[U_NORM] = 1;
  numbers[RESTARTED] = is_replaced;
  found[1] = 1;
}""", 'FUSED_BLOCK_SIZE', '512, 1', True)

# S = U W, or W S, in parts.
product_subspace = Raw('sn_product_subspace', """
    const T* w, double* numbers, A* y, int is_transposed, int lanes, int parts,
    int is_wide, int l, int m, int r, int blocks""", '', """{
  __shared__ double shared[2048];
  const Weight W = {w, l, m, r, 1};
  const Space space(numbers, W);
  product_of_all(
      TaskOfAll{W, is_transposed != 0, is_transposed ? space.U : space.S,
                reinterpret_cast<Row*>(y), lanes, parts, blocks,
                reinterpret_cast<A*>(shared)}, is_wide);
}""", has_several=True)

# S from its parts, and S S^T, of the entries of each block.
gram_subspace = Raw('sn_gram_subspace', """
    double* numbers, const A* parts, int n_parts, double* grams, int l, int m,
    int r, int blocks""", '', """{
  __shared__ double shared[512];
  __shared__ double G[B * B];
  const Weight W = {0, l, m, r, 1};
  const Space space(numbers, W);
  const int chunk = (W.n() + blocks - 1) / blocks;
  const int start = blockIdx.x * chunk;
  const int n = max(0, min(chunk, static_cast<int>(W.n()) - start));
  if (n_parts > 1)
    for (int p = threadIdx.x; p < n * B; p += blockDim.x) {
      const Size at = static_cast<Size>(start) * B + p;
      A sum = 0;
#pragma unroll 4
      for (int k = 0; k < n_parts; ++k) sum += parts[k * W.n() * B + at];
      space.S[at / B].x[at % B] = sum;
    }
  gram(space.S + start, n, G, shared);
  for (int p = threadIdx.x; p < B * B; p += blockDim.x)
    grams[blockIdx.x * (B * B) + p] = G[p];
}""", has_several=True)

# The matrix that makes singular vectors of U and of S, of H = S S^T.
solve_subspace = Raw('sn_solve_subspace', """
    double* numbers, const double* grams, int n_grams, double* found, int l,
    int m, int r, int blocks""", '', """{
  __shared__ double shared[512];
  __shared__ double matrices[SMALL_SIZE];
  const Space space(numbers, Weight{0, l, m, r, 1});
  const Small small(matrices);
  for (int p = threadIdx.x; p < B * B; p += blockDim.x) {
    double sum = 0;
#pragma unroll 4
    for (int k = 0; k < n_grams; ++k) sum += grams[k * (B * B) + p];
    small.M[p] = sum;
    small.E[p] = space.E[p];
  }
  const double sigma = solve(small, space.values, 1, shared);
  if (threadIdx.x == 0) {
    space.values[TURN] = space.values[RESIDUAL] = 0;
    found[0] = sigma;
    if (!is_ordinary(sigma)) found[1] = 0;
  }
  if (is_ordinary(sigma))
    for (int p = threadIdx.x; p < B * B; p += blockDim.x)
      space.mix[p] = small.mix[p];
}""", 'FUSED_BLOCK_SIZE', '512, 1', True)

# What follows U, of W S, and the sums that say how far it is.
follow_subspace = Raw('sn_follow_subspace', """
    double* numbers, const A* parts, int n_parts, const double* found,
    double* sums, int l, int m, int r, int blocks""", '', """{
  __shared__ double shared[512];
  if (found[1] == 0) return;
  const Space space(numbers, Weight{0, l, m, r, 1});
  const Followed all = follow(
      space, space.mix, reinterpret_cast<const Row*>(parts), n_parts, m, 1,
      blockIdx.x * blockDim.x + threadIdx.x, blocks * blockDim.x);
  const double of_block[] = {
      block_sum(all.t, shared), block_sum(all.next, shared),
      block_sum(all.off, shared)};
  if (threadIdx.x == 0)
    for (int i = 0; i < 3; ++i) sums[i * blocks + blockIdx.x] = of_block[i];
}""", has_several=True)

# The end of a forward, as sn_finish_fwd: what is rare is done by one block
# alone.  So is a tolerance that one pass does not reach: such a weight is read
# by one multiprocessor, at about a fiftieth of the bandwidth.
finish_subspace = Raw('sn_finish_subspace', """
    const T* w, U* u, double* numbers, const double* found,
    const double* sums, int n_sums, A* sigma_out, const A* gamma,
    const A* initial_gamma, T* y, int l, int m, int r, double factor,
    int is_wide, int blocks""", _OF_FORWARD, """{
  __shared__ double shared[512];
  __shared__ double matrices[SMALL_SIZE];
  Weight W = {w, l, m, r, 1};
  const Space space(numbers, W);
  const Small small(matrices);
  const Renewal renewal = {n_warmup, limit, rtol};
  double sigma = found[0];
  Followed all = {1, 1, 0};
  bool is_alone = found[1] == 0, is_stale = false;
  if (moves && !is_alone) {
    all = Followed{sum_of(sums, n_sums, shared),
                   sum_of(sums + n_sums, n_sums, shared),
                   sum_of(sums + 2 * n_sums, n_sums, shared)};
    is_stale = n_warmup > 0
        && !renewal.accepts(all.turn(), all.residual(), limit);
  }
  is_alone = is_alone || is_stale;
  if (is_alone) {
    if (blockIdx.x > 0) return;
    sigma = estimate_all(
        W, u, space, K, moves, renewal, is_stale ? 0 : 1, small, shared);
    W.scale = numbers[SCALE];
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    all.write(space.values);
  }
  const Outcome outcome(
      sigma, is_alone ? space.values[TURN] : all.turn(), gamma, initial_gamma,
      eps, at_zero);
  if (blockIdx.x == 0 && threadIdx.x == 0)
    outcome.write(sigma, factor, numbers, sigma_out);
  const Size first = blockIdx.x * blockDim.x + threadIdx.x;
  const Size by = is_alone ? blockDim.x : blocks * blockDim.x;
  finish_all(W, space, is_alone ? small.mix : space.mix, sigma, first, by);
  if (update && sigma > 0 && isfinite(sigma))
    store_all(space, u, m, is_alone ? 1 : sqrt(all.next), first, by);
  if (y) multiply_all(W, y, outcome.coefficient(factor), is_wide, first, by);
}""", has_several=True)

ALL = (middle_product, renew_gamma, gradient_of_u, product, gather, finish_fwd,
       dot_bwd, project_bwd, correct_bwd, fused_fwd, fused_bwd,
       fused_subspace, begin_subspace, product_subspace, gram_subspace,
       solve_subspace, follow_subspace, finish_subspace)
