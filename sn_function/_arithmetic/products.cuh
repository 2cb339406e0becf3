// How the threads of a block read a weight: sums over the block, and products
// with vectors.  T, U, A, Size and the names of numbers are defined before.
//
// All threads of a block call a function together, unless it is said to be for
// one thread.  shared has room for one double a thread.

// An (l, m, r) array, in units of 1 / scale, which is a power of two.
struct Weight {
  const T* w;
  int l, m, r;
  A scale;
  __device__ Size n() const { return static_cast<Size>(l) * r; }
  __device__ Size size() const { return n() * m; }
};

// V entries, read or written by one instruction where they have 16 bytes.
template <typename X, int V>
struct __align__(sizeof(X) * V > 16 ? 16 : sizeof(X) * V) Pack {
  X x[V];
};
#define WIDE (16 / static_cast<int>(sizeof(T)))

// How many of V entries are on their way together, for each thread of many
// blocks: as much as its registers hold, float16 taking twice its size there.
template <int V>
__device__ constexpr int batch_of() {
  return (sizeof(T) == 2 ? 16 : 64 / sizeof(T)) / V;
}

template <int V, typename X>
__device__ const Pack<X, V>* pack(const X* x) {
  return reinterpret_cast<const Pack<X, V>*>(x);
}

template <int V, typename X>
__device__ Pack<X, V>* pack(X* x) {
  return reinterpret_cast<Pack<X, V>*>(x);
}

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

__device__ double block_max(double x, double* shared) {
  for (int d = 16; d > 0; d /= 2)
    x = fmax(x, __shfl_xor_sync(0xffffffffu, x, d));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w)
    x = fmax(x, shared[w]);
  return x;
}

// What blocks have left: x[0] + ... + x[n - 1], and the largest.
__device__ double sum_of(const double* x, int n, double* shared) {
  double sum = 0;
  for (int j = threadIdx.x; j < n; j += blockDim.x) sum += x[j];
  return block_sum(sum, shared);
}

__device__ double largest_of(const double* x, int n, double* shared) {
  double y = 0;
  for (int j = threadIdx.x; j < n; j += blockDim.x) y = fmax(y, x[j]);
  return block_max(y, shared);
}

// A number of any size as two factors in the range of A.
struct Factor {
  A a, b;
  __device__ explicit Factor(double x) : b(1) {
    if (sizeof(A) == 4 && fabs(x) < 1e-36 && x != 0) b = 1e-30f;
    if (sizeof(A) == 4 && fabs(x) > 1e36) b = 1e30f;
    a = static_cast<A>(x / b);
  }
  __device__ A operator*(A x) const { return x * b * a; }
};

// y = W x or W^T x is y[o] = sum_q W[base(o) + at(q)] x[q], in one of two
// ways.  Where neighbouring o are next to each other in memory, each thread
// has an o of its own: by columns.  Else neighbouring threads take neighbouring
// q of one o: by rows.  With r = 1 the weight is (l, m), and W^T x is by rows.
__device__ bool is_by_rows(const Weight& W, bool is_transposed) {
  return is_transposed == (W.r == 1);
}

struct Columns {
  int n_out, n_in, inner;
  Size block, step;
  __device__ Columns(const Weight& W, bool is_transposed)
      : n_out(is_transposed ? W.n() : W.m),
        n_in(is_transposed ? W.m : W.l),
        inner(is_transposed ? W.r : W.m),
        block(static_cast<Size>(W.m) * W.r),
        step(inner) {}
  __device__ Size base(int o) const {
    return o < inner ? o : o / inner * block + o % inner;
  }
};

struct Rows {
  int n_out, n_in, length;
  Size block;
  __device__ Rows(const Weight& W, bool is_transposed)
      : n_out(is_transposed ? W.l : W.m),
        n_in(is_transposed ? W.m : W.n()),
        length(is_transposed ? W.m : W.r),
        block(static_cast<Size>(W.m) * W.r) {}
  __device__ Size base(int o) const { return o * static_cast<Size>(length); }
};

// What a thread learns about the weight on the way: <gY, W> and max |W|.
struct Found {
  double dot;
  A largest;
};

// Where the entries of a sum are: at equal distances, or in blocks of r.
struct Steps {
  Size step, hop;  // of one entry, and of as many as there are threads
  __device__ Steps(Size step, int by) : step(step), hop(step * by) {}
  __device__ Size operator()(int q, int i, int by) const {
    return q * step + i * hop;
  }
};

struct Blocks {
  int r;
  Size block;
  __device__ Size operator()(int q, int i, int by) const {
    const int j = q + i * by;
    return j / r * block + j % r;
  }
};

// One batch of N loads, which are on their way together: the products of V
// entries each at q, q + by, ...; those before end, unless all are.  Adds them
// to sum[v] for a column, to sum[0] for a row.  By one thread.
template <int N, int V, bool has_gy, bool is_row, bool is_full, typename X,
          typename At>
__device__ void add_batch(
    const T* __restrict__ w, const T* __restrict__ gy,
    const X* __restrict__ x, A scale, const At& at, int q, int end, int by,
    A* sum, Found* found) {
  const int V_of_x = is_row ? V : 1;
  Pack<T, V> ws[N], gs[N];
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (is_full || q + i * by < end) {
      ws[i] = *pack<V>(w + at(q, i, by));
      if (has_gy) gs[i] = *pack<V>(gy + at(q, i, by));
    }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (is_full || q + i * by < end) {
      const Pack<X, V_of_x> of_x = *pack<V_of_x>(x + (q + i * by) * V_of_x);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A a = static_cast<A>(ws[i].x[v]);
        sum[is_row ? 0 : v] +=
            a * scale * static_cast<A>(of_x.x[is_row ? v : 0]);
        if (has_gy)
          found->dot +=
              static_cast<double>(gs[i].x[v]) * static_cast<double>(a);
        else
          found->largest = fmax(found->largest, fabs(a));
      }
    }
}

// All of q = first, first + by, ... < end.
template <int N, int V, bool has_gy, bool is_row, typename X, typename At>
__device__ void add_products(
    const T* w, const T* gy, const X* x, A scale, const At& at, int first,
    int end, int by, A* sum, Found* found) {
  int q = first;
  for (; q + (N - 1) * by < end; q += N * by)
    add_batch<N, V, has_gy, is_row, true>(
        w, gy, x, scale, at, q, end, by, sum, found);
  if (q < end)
    add_batch<N, V, has_gy, is_row, false>(
        w, gy, x, scale, at, q, end, by, sum, found);
}

// The sum of x over neighbouring threads, n of them, a power of two.
__device__ A sum_over(A x, int n, A* shared) {
  const int here = n < 32 ? n : 32;
  for (int d = here / 2; d > 0; d /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, d);
  if (n <= 32) return x;
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  const int start = threadIdx.x / n * (n / 32);
  x = 0;
  for (int w = start; w < start + n / 32; ++w) x += shared[w];
  return x;
}
