// What is done to each entry of a weight, by one block or by many: thread first
// of all threads takes first, first + by, ...

// Y = coefficient W, V entries at a time.
template <int V>
__device__ void multiply(
    const T* __restrict__ w, T* __restrict__ y, Size size, Factor coefficient,
    Size first, Size by) {
  const int N = 4;
  const Size n = size / V;
  for (Size q = first; q < n; q += N * by) {
    Pack<T, V> ws[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (q + i * by < n) ws[i] = *pack<V>(w + (q + i * by) * V);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (q + i * by < n) {
#pragma unroll
        for (int v = 0; v < V; ++v)
          ws[i].x[v] =
              static_cast<T>(coefficient * static_cast<A>(ws[i].x[v]));
        *pack<V>(y + (q + i * by) * V) = ws[i];
      }
  }
}

__device__ void multiply_all(
    const Weight& W, T* y, double coefficient, bool is_wide, Size first,
    Size by) {
  const Factor factor(coefficient);
  const Size size = W.size(), done = is_wide ? size / WIDE * WIDE : 0;
  if (is_wide) multiply<WIDE>(W.w, y, size, factor, first, by);
  multiply<1>(W.w + done, y + done, size - done, factor, first, by);
}

// <gY, W>, likewise.
template <int V>
__device__ double inner(
    const T* __restrict__ w, const T* __restrict__ gy, Size size, Size first,
    Size by) {
  const int N = 4;
  const Size n = size / V;
  double sum = 0;
  for (Size q = first; q < n; q += N * by) {
    Pack<T, V> ws[N], gs[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (q + i * by < n) {
        ws[i] = *pack<V>(w + (q + i * by) * V);
        gs[i] = *pack<V>(gy + (q + i * by) * V);
      }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (q + i * by < n)
#pragma unroll
        for (int v = 0; v < V; ++v)
          sum += static_cast<double>(gs[i].x[v])
              * static_cast<double>(ws[i].x[v]);
  }
  return sum;
}

__device__ double inner_of_all(
    const T* w, const T* gy, Size size, bool is_wide, Size first, Size by) {
  const Size done = is_wide ? size / WIDE * WIDE : 0;
  const double sum = is_wide ? inner<WIDE>(w, gy, size, first, by) : 0;
  return sum + inner<1>(w + done, gy + done, size - done, first, by);
}

// d sigma / d W = sum_k p_k q_k^T: which = 0 is tbar_k and v_k, which = 1 is
// u_{k-1} and sbar_k.  With u and v held constant only u_K and v_K are there.
struct Pairs {
  State state;
  Bars bars;
  int first, last, kinds;
  // Of K = 1: sbar is still W^T tbar, and dot its product with v.
  bool is_raw;
  A dot, norm;

  __device__ Pairs(const State& state, const Bars& bars, int K, bool detach,
                   bool is_raw, double dot)
      : state(state), bars(bars), first(detach ? K - 1 : 0), last(K - 1),
        kinds(detach ? 1 : 2), is_raw(is_raw), dot(dot),
        norm(is_raw ? state.s_norm(0) * state.numbers[SCALE] : 1) {}
  __device__ const A* p(int k, int which) const {
    return which == 1 ? state.u(k) : k == last ? state.u(k + 1) : bars.t(k);
  }
  __device__ const A* q(int k, int which) const {
    return which == 1 ? bars.s(k) : state.v(k);
  }
  // V entries of p_k or q_k.
  template <int V>
  __device__ Pack<A, V> entries(bool of_q, int k, int which, Size i) const {
    Pack<A, V> x = *pack<V>((of_q ? q(k, which) : p(k, which)) + i);
    if (!of_q || which == 0 || !is_raw) return x;
    const Pack<A, V> v = *pack<V>(state.v(k) + i);
#pragma unroll
    for (int j = 0; j < V; ++j) x.x[j] = (x.x[j] - v.x[j] * dot) / norm;
    return x;
  }
};

// gW = a gY + c sum_k p_k q_k^T, for tiles of lanes columns of V entries each
// and height rows.  Of the only pair, what belongs to the columns is kept.
template <int V, bool is_one>
__device__ void correct(
    const Weight& W, const Pairs& pairs, const T* __restrict__ gy,
    T* __restrict__ gw, Factor a, Factor c, int chunk, int blocks) {
  const int N = is_one ? 4 : 1;
  const bool is_flat = W.r == 1;  // then rows go with q, and columns with p
  const int n_rows = is_flat ? W.l : W.m, n_columns = is_flat ? W.m : W.r;
  const int n_matrices = is_flat ? 1 : W.l, n = n_columns / V;
  const int strips = (n + blockDim.x - 1) / blockDim.x;
  int lanes = (n + strips - 1) / strips;
  if (strips > 1) lanes = (lanes + 31) / 32 * 32;
  const int height = blockDim.x / lanes, lane = threadIdx.x % lanes;
  const int chunks = (n_rows + chunk - 1) / chunk;
  for (int job = blockIdx.x; job < n_matrices * strips * chunks;
       job += blocks) {
    const int matrix = job / (strips * chunks), rest = job % (strips * chunks);
    const int column = (rest % strips * lanes + lane) * V;
    const int start = rest / strips * chunk;
    const int end = min(n_rows, start + chunk);
    if (threadIdx.x >= height * lanes || column >= n_columns) continue;
    const Size j = static_cast<Size>(matrix) * W.r + column;  // of q
    Pack<A, V> kept[2] = {};
    if (is_one)
#pragma unroll
      for (int which = 0; which < 2; ++which)
        if (which < pairs.kinds)
          kept[which] = pairs.entries<V>(
              !is_flat, pairs.last, which, is_flat ? column : j);
    const Size origin =
        static_cast<Size>(matrix) * n_rows * n_columns + column;
    for (int row = start + threadIdx.x / lanes; row < end; row += N * height) {
      Pack<T, V> gs[N];
      A xs[N][2] = {};  // what belongs to the rows of the only pair
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int at = row + i * height;
        if (at >= end) continue;
        if (gy)
          gs[i] = *pack<V>(gy + origin + static_cast<Size>(at) * n_columns);
        if (is_one)
#pragma unroll
          for (int which = 0; which < 2; ++which)
            if (which < pairs.kinds)
              xs[i][which] =
                  pairs.entries<1>(is_flat, pairs.last, which, at).x[0];
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int at = row + i * height;
        if (at >= end) continue;
        A sum[V] = {};
        if (is_one) {
#pragma unroll
          for (int v = 0; v < V; ++v)
            sum[v] = xs[i][0] * kept[0].x[v] + xs[i][1] * kept[1].x[v];
        } else {
          for (int k = pairs.first; k <= pairs.last; ++k)
#pragma unroll
            for (int which = 0; which < 2; ++which) {
              const A x = pairs.entries<1>(is_flat, k, which, at).x[0];
              const Pack<A, V> y = pairs.entries<V>(
                  !is_flat, k, which, is_flat ? column : j);
#pragma unroll
              for (int v = 0; v < V; ++v) sum[v] += x * y.x[v];
            }
        }
        Pack<T, V> out;
#pragma unroll
        for (int v = 0; v < V; ++v)
          out.x[v] = static_cast<T>(
              (gy ? a * static_cast<A>(gs[i].x[v]) : 0) + c * sum[v]);
        *pack<V>(gw + origin + static_cast<Size>(at) * n_columns) = out;
      }
    }
  }
}

__device__ void correct_all(
    const Weight& W, const Pairs& pairs, const T* gy, T* gw, double a_,
    double c_, int chunk, bool is_wide, int blocks) {
  const Factor a(a_), c(c_);
  is_wide = is_wide && (W.r == 1 ? W.m : W.r) % WIDE == 0;
  if (pairs.first == pairs.last) {
    if (is_wide)
      correct<WIDE, true>(W, pairs, gy, gw, a, c, chunk, blocks);
    else
      correct<1, true>(W, pairs, gy, gw, a, c, chunk, blocks);
  } else if (is_wide) {
    correct<WIDE, false>(W, pairs, gy, gw, a, c, chunk, blocks);
  } else {
    correct<1, false>(W, pairs, gy, gw, a, c, chunk, blocks);
  }
}
