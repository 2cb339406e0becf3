// What many blocks do for one weight.  A block leaves its sums in memory, and
// each block of the next launch adds them up: nothing waits in between.

// The sums that a product leaves, for each block: y . y, e . y and e . e.
struct Sums {
  double yy, ey, ee;
  __device__ Sums() : yy(0), ey(0), ee(0) {}
  __device__ void add(A y, const A* e, Size o) {
    yy += static_cast<double>(y) * y;
    if (!e) return;
    ey += static_cast<double>(e[o]) * y;
    ee += static_cast<double>(e[o]) * e[o];
  }
  __device__ void write(double* sums, int blocks, double* shared) const {
    const double all[] = {block_sum(yy, shared), block_sum(ey, shared),
                          block_sum(ee, shared)};
    if (threadIdx.x == 0)
      for (int i = 0; i < 3; ++i) sums[i * blocks + blockIdx.x] = all[i];
  }
};

// What a product is multiplied by: 1 / |x|, of the sums that x left, where x is
// raw, or 1 / |divisor| in units of the weight.  The first block keeps |x|.
__device__ double multiplier(
    const double* x_sums, int n_x_sums, int is_raw, double* norm,
    const double* divisor, A scale, double* shared) {
  if (divisor) return 1 / (*divisor * scale);
  if (!x_sums || (!is_raw && blockIdx.x > 0)) return 1;
  const double x = sqrt(sum_of(x_sums, n_x_sums, shared));
  if (blockIdx.x == 0 && threadIdx.x == 0) *norm = x;
  return is_raw && x != 0 ? 1 / x : 1;
}

// y = factor W^T x or factor W x, and how it is dealt out: see workspace.py.
struct Task {
  Weight W;
  bool is_transposed, is_wide;
  const T* gy;
  A* y;
  const A* e;
  double factor;
  int lanes, parts, blocks;
  A* shared;
};

// By columns: a tile of lanes columns each, of V entries, and a part of the
// rows.
template <int V, bool has_gy, typename X>
__device__ void product_by_columns(
    const Task& task, const X* x, Sums* sums, Found* found) {
  const Weight& W = task.W;
  const int lanes = task.lanes, parts = task.parts;
  A* part = task.shared;
  const Columns columns(W, task.is_transposed);
  const int n = columns.n_out / V, lane = threadIdx.x % lanes;
  const int tiles = (n + lanes - 1) / lanes;
  const int chunk = (columns.n_in + parts - 1) / parts;
  const int width = lanes * V, apart = max(lanes, 32);
  for (int job = blockIdx.x; job < tiles * parts; job += task.blocks) {
    const int start = job % tiles * width, p = job / tiles;
    const int o = start + lane * V;
    const int end = min(columns.n_in, (p + 1) * chunk);
    A sum[V] = {};
    if (o < columns.n_out) {
      const Size base = columns.base(o);
      add_products<batch_of<V>(), V, has_gy, false>(
          W.w + base, task.gy + base, x, W.scale,
          Steps(columns.step, blockDim.x / lanes),
          p * chunk + threadIdx.x / lanes, end, blockDim.x / lanes, sum,
          found);
    }
    // Of a warp first, then of all.
    for (int d = 16; d >= lanes; d /= 2)
#pragma unroll
      for (int v = 0; v < V; ++v)
        sum[v] += __shfl_xor_sync(0xffffffffu, sum[v], d);
    __syncthreads();
    if (threadIdx.x % apart < lanes)
#pragma unroll
      for (int v = 0; v < V; ++v)
        part[threadIdx.x / apart * width + lane * V + v] = sum[v];
    __syncthreads();
    for (int i = threadIdx.x; i < min(width, columns.n_out - start);
         i += blockDim.x) {
      A y = 0;
      for (int k = i; k < static_cast<int>(blockDim.x) / apart * width;
           k += width)
        y += part[k];
      y *= task.factor;
      task.y[static_cast<Size>(p) * columns.n_out + start + i] = y;
      sums->add(y, task.e, start + i);
    }
  }
}

// The same by rows, of entries that follow each other, with lanes threads for
// each.  The last row comes first: it may still be in the cache.
template <int V, bool has_gy, typename X>
__device__ void product_by_rows(
    const Task& task, const X* x, Sums* sums, Found* found) {
  const Weight& W = task.W;
  const int lanes = task.lanes, parts = task.parts;
  const Rows rows(W, task.is_transposed);
  const int height = blockDim.x / lanes;
  const int tiles = (rows.n_out + height - 1) / height;
  const int n = rows.n_in / V, chunk = (n + parts - 1) / parts;
  for (int job = blockIdx.x; job < tiles * parts; job += task.blocks) {
    const int p = job / tiles;
    const int o = rows.n_out - 1 - job % tiles * height - threadIdx.x / lanes;
    A sum = 0;
    if (o >= 0)
      add_products<batch_of<V>(), V, has_gy, true>(
          W.w + rows.base(o), task.gy + rows.base(o), x, W.scale,
          Steps(V, lanes), p * chunk + threadIdx.x % lanes,
          min(n, (p + 1) * chunk), lanes, &sum, found);
    sum = sum_over(sum, lanes, task.shared) * task.factor;
    if (o < 0 || threadIdx.x % lanes != 0) continue;
    task.y[static_cast<Size>(p) * rows.n_out + o] = sum;
    sums->add(sum, task.e, o);
  }
}

// In the way and by the width that fit.
template <bool has_gy, typename X>
__device__ void product_of(
    const Task& task, const X* x, Sums* sums, Found* found) {
  if (is_by_rows(task.W, task.is_transposed)) {
    if (task.is_wide)
      product_by_rows<WIDE, has_gy>(task, x, sums, found);
    else
      product_by_rows<1, has_gy>(task, x, sums, found);
  } else if (task.is_wide) {
    product_by_columns<(WIDE < 4 ? WIDE : 4), has_gy>(task, x, sums, found);
  } else {
    product_by_columns<1, has_gy>(task, x, sums, found);
  }
}
