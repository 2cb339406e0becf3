// Several vectors of one weight, of the number B: see subspace.py.  What one
// block does for them, and what is rare enough for one block to do it for a
// weight of any size.
//
// The vectors are next to each other in memory, so a thread reads entry i of
// all of them at once.  A matrix of B x B is in shared memory.
enum { B = N_VECTORS, EVEN = (B + 1) / 2 * 2 };

// Entry i of all vectors.
#define ROW_SIZE (B * sizeof(A))
#define ROW_UNIT (ROW_SIZE & (~ROW_SIZE + 1))
struct __align__(ROW_UNIT > 16 ? 16 : ROW_UNIT) Row {
  A x[B];
};

// Behind the singular values: 1 - u . u' of the vector that follows u, and the
// residual.
enum { TURN = B, RESIDUAL, N_VALUES = (B + 3) / 2 * 2 };

// What a forward keeps, see workspace.py; behind what it keeps for K = 1.
struct Space {
  State state;
  double* values;
  double* E;
  A* mix;
  Row *start, *U, *T, *S;

  __device__ Space(double* numbers, const Weight& W) : state(numbers, W, 1) {
    const Size end = reinterpret_cast<char*>(state.v(1))
        - reinterpret_cast<char*>(numbers);
    values = numbers + (end + 15) / 16 * 2;
    E = values + N_VALUES;
    mix = reinterpret_cast<A*>(E + (B * B + 1) / 2 * 2);
    start = reinterpret_cast<Row*>(mix + padded(B * B));
    U = after(start, W.m);
    T = after(U, W.m);
    S = after(T, W.m);
  }
  __device__ static Row* after(Row* x, int m) {
    return reinterpret_cast<Row*>(
        reinterpret_cast<A*>(x) + padded(static_cast<Size>(m) * B));
  }
};

// Of one block, in shared memory.
struct Small {
  double *E, *M, *N, *C;
  A* mix;
  __device__ Small(double* x)
      : E(x), M(x + EVEN * EVEN), N(x + 2 * EVEN * EVEN),
        C(x + 3 * EVEN * EVEN), mix(reinterpret_cast<A*>(N)) {}
};
#define SMALL_SIZE (4 * EVEN * EVEN)

// Where entries q + i * by are, in units of V entries: as Blocks and Steps of
// products.cuh.
template <int V>
struct InRows {
  int length;
  Size block;
  __device__ Size operator()(int q, int i, int by) const {
    const int j = (q + i * by) * V;
    return j / length * block + j % length;
  }
};

// Adds the products of W with all vectors, at q, q + by, ... of V entries
// each, N of them on their way at once; those before end, unless all are.  By
// rows they are of R rows, the first at w; of these the last is there, and
// stands for others.  sum[r] is of row r; by columns, sum[v] is of column v.
template <int N, int R, int V, bool is_row, bool is_full, typename At>
__device__ void add_batch_of_all(
    const T* __restrict__ w, Size row, int last, const Row* __restrict__ x,
    A scale, const At& at, int q, int end, int by, Row* sum) {
  Pack<T, V> ws[N][R];
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (is_full || q + i * by < end) {
      const T* here = w + at(q, i, by);
#pragma unroll
      for (int r = 0; r < R; ++r)
        ws[i][r] = *pack<V>(here + (r < last ? r : last) * row);
    }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (is_full || q + i * by < end) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Row of_x = x[is_row ? (q + i * by) * V + v : q + i * by];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const A a = static_cast<A>(ws[i][r].x[v]) * scale;
          Row& y = sum[is_row ? r : v];
#pragma unroll
          for (int j = 0; j < B; ++j) y.x[j] += a * of_x.x[j];
        }
      }
    }
}

// All of q = first, first + by, ... < end.  Full batches apart from others
// take fewer instructions, and more registers.
template <int N, int R, int V, bool is_row, bool is_apart, typename At>
__device__ void add_all(
    const T* w, Size row, int last, const Row* x, A scale, const At& at,
    int first, int end, int by, Row* sum) {
  int q = first;
  for (; is_apart && q + (N - 1) * by < end; q += N * by)
    add_batch_of_all<N, R, V, is_row, true>(
        w, row, last, x, scale, at, q, end, by, sum);
  for (; (N > 1 || !is_apart) && q < end; q += N * by)
    add_batch_of_all<N, R, V, is_row, false>(
        w, row, last, x, scale, at, q, end, by, sum);
}

// y = W x, or W^T x, for all vectors.
__device__ void product_of_all(
    const Weight& W, bool is_transposed, const Row* x, Row* y,
    double* shared) {
  const int N = ROW_SIZE <= 32 ? 32 / sizeof(A) : sizeof(A) == 4 ? 4 : 1;
  A* part = reinterpret_cast<A*>(shared);
  __syncthreads();
  if (is_by_rows(W, is_transposed)) {
    const Rows rows(W, is_transposed);
    for (int o = threadIdx.x / 32; o < rows.n_out; o += blockDim.x / 32) {
      Row sum = {};
      add_all<N, 1, 1, true, false>(
          W.w + rows.base(o), 0, 0, x, W.scale,
          InRows<1>{rows.length, rows.block}, threadIdx.x % 32, rows.n_in, 32,
          &sum);
#pragma unroll
      for (int j = 0; j < B; ++j) sum.x[j] = sum_over(sum.x[j], 32, part);
      if (threadIdx.x % 32 == 0) y[o] = sum;
    }
    __syncthreads();
    return;
  }
  const Columns columns(W, is_transposed);
  int width = blockDim.x;  // of o, each with blockDim.x / width threads
  while (width > 32 && width / 2 >= columns.n_out) width /= 2;
  const int lane = threadIdx.x % width, group = threadIdx.x / width;
  for (int start = 0; start < columns.n_out; start += width) {
    const int o = start + lane;
    Row sum = {};
    if (o < columns.n_out)
      add_all<N, 1, 1, false, false>(
          W.w + columns.base(o), 0, 0, x, W.scale,
          Steps(columns.step, blockDim.x / width), group, columns.n_in,
          blockDim.x / width, &sum);
#pragma unroll
    for (int j = 0; j < B; ++j) {
      part[threadIdx.x] = sum.x[j];
      __syncthreads();
      if (group == 0)
        for (int k = threadIdx.x + width; k < static_cast<int>(blockDim.x);
             k += width)
          sum.x[j] += part[k];
      __syncthreads();
    }
    if (group == 0 && o < columns.n_out) y[o] = sum;
  }
  __syncthreads();
}

// G[j, k] = x_j . x_k, of n entries; squares of D x D are by one thread each,
// or by several.
__device__ void gram(const Row* x, int n, double* G, double* shared) {
  enum { D = 2 - B % 2, SIDE = B / D, SQUARES = SIDE * SIDE };
  int width = 1;  // of neighbouring threads with different squares
  while (width < SQUARES && width < static_cast<int>(blockDim.x)) width *= 2;
  const int span = width < 32 ? 32 : width;
  const int by = blockDim.x / width, group = threadIdx.x / width;
  __syncthreads();
  for (int first = 0; first < SQUARES; first += width) {
    const int square = first + threadIdx.x % width;
    const int j = square / SIDE * D, k = square % SIDE * D;
    double sum[D][D] = {};
    // In A a few at a time: conversions take longer than products.
    for (int start = group; square < SQUARES && start < n; start += 16 * by) {
      A part[D][D] = {};
#pragma unroll 4
      for (int i = start; i < min(n, start + 16 * by); i += by) {
        const Pack<A, D> a = *pack<D>(x[i].x + j), b = *pack<D>(x[i].x + k);
#pragma unroll
        for (int d = 0; d < D * D; ++d)
          part[d / D][d % D] += a.x[d / D] * b.x[d % D];
      }
#pragma unroll
      for (int d = 0; d < D * D; ++d) sum[d / D][d % D] += part[d / D][d % D];
    }
#pragma unroll
    for (int d = 0; d < D * D; ++d) {
      double y = sum[d / D][d % D];
      for (int lane = 16; lane >= width; lane /= 2)
        y += __shfl_xor_sync(0xffffffffu, y, lane);
      if (static_cast<int>(threadIdx.x) % span < width)
        shared[threadIdx.x / span * width + threadIdx.x % width] = y;
      __syncthreads();
      if (group == 0 && square < SQUARES) {
        y = 0;
        for (int s = 0; s < static_cast<int>(blockDim.x) / span; ++s)
          y += shared[s * width + threadIdx.x];
        G[(j + d / D) * B + k + d % D] = y;
      }
      __syncthreads();
    }
  }
}

// E, such that the rows of E U are orthonormal, of G = U U^T, of which it
// leaves the pivots on the diagonal: the squares of the part of each row, with
// length 1, that is orthogonal to those before it.  Returns the bits of rows
// that depend on those before them.
__device__ unsigned eliminate(double* G, double* E) {
  const int first = threadIdx.x, by = blockDim.x;
  unsigned bad = 0;
  for (int p = first; p < B * B; p += by)
    E[p] = p % (B + 1) == 0 ? 1 / sqrt(G[p]) : 0;
  __syncthreads();
  for (int p = first; p < B * B; p += by)
    G[p] *= E[p / B * (B + 1)] * E[p % B * (B + 1)];
  __syncthreads();
#pragma unroll 1
  for (int k = 0; k < B; ++k) {
    const double pivot = G[k * B + k];
    if (!(pivot > DEPENDENT * DEPENDENT)) {
      bad |= 1u << k;
      continue;
    }
    for (int p = first; p < (B - 1 - k) * B; p += by) {
      const int i = k + 1 + p / B, j = p % B;
      const double factor = G[i * B + k] / pivot;
      double* X = j > k ? G : E;
      X[i * B + j] -= factor * X[k * B + j];
    }
    __syncthreads();
  }
  for (int p = first; p < B * B; p += by) E[p] /= sqrt(G[p / B * (B + 1)]);
  __syncthreads();
  return bad;
}

// The largest entry of what E is for rows of length 1, of eliminate().
__device__ double most_of(const double* G, const double* E, double* shared) {
  double most = 0;
  for (int p = threadIdx.x; p < B * B; p += blockDim.x) {
    const int j = p % B * (B + 1);
    most = fmax(most, fabs(E[p]) / (E[j] * sqrt(G[j])));
  }
  return block_max(most, shared);
}

// Something between -1 and 1, the same each time.
__device__ A some_number(unsigned i) {
  i = (i + 1) * 2654435769u;
  i = (i ^ i >> 15) * 2246822519u;
  i = (i ^ i >> 13) * 3266489917u;
  return static_cast<A>(static_cast<int>(i ^ i >> 16)) / 2147483648.0f;
}

// Sets vectors to something, those of the bits of bad.
__device__ void replace(Row* x, int m, unsigned bad) {
  for (Size p = threadIdx.x; p < static_cast<Size>(m) * B; p += blockDim.x)
    if (bad >> p % B & 1) x[p / B].x[p % B] = some_number(p);
}

// x <- E x, for all entries.
__device__ void combine(Row* x, int m, const double* E) {
  for (int i = threadIdx.x; i < m; i += blockDim.x) {
    const Row row = x[i];
#pragma unroll 1
    for (int j = 0; j < B; ++j) {
      double sum = 0;
#pragma unroll
      for (int k = 0; k < B; ++k) sum += E[j * B + k] * row.x[k];
      x[i].x[j] = sum;
    }
  }
}

// start, of the vectors given.  Those that are zero or not finite are
// replaced, and those of extreme size are made of about length 1.  Returns
// whether any was replaced.
__device__ bool begin_all(const U* u, int m, Row* start, double* shared) {
  unsigned bad = 0;
#pragma unroll 1
  for (int j = 0; j < B; ++j) {
    const U* x = u + static_cast<Size>(j) * m;
    const double size = largest(x, m, shared);
    if (!(size > 0 && size < infinity())) bad |= 1u << j;
    const double unit = is_ordinary(size) ? 1 : unit_of(size);
    for (int i = threadIdx.x; i < m; i += blockDim.x)
      start[i].x[j] = static_cast<A>(static_cast<double>(x[i]) / unit);
  }
  __syncthreads();
  if (bad) replace(start, m, bad);
  return bad != 0;
}

// E of U.  Rows of U that depend on others are replaced, in start as well; and
// where much would cancel in E U, U is replaced by that.  Returns whether one
// was replaced.
__device__ bool orthonormalize(
    Row* U, Row* start, int m, const Small& small, double* shared) {
  bool is_replaced = false;
  for (int attempt = 0; attempt < 4; ++attempt) {
    gram(U, m, small.M, shared);
    const unsigned bad = eliminate(small.M, small.E);
    if (bad) {
      is_replaced = true;
      replace(U, m, bad);
      if (start) replace(start, m, bad);
    } else if (most_of(small.M, small.E, shared) < 1 / INDEPENDENT) {
      break;
    } else {
      combine(U, m, small.E);
    }
    start = 0;  // they differ from here on, or need no more
  }
  return is_replaced;
}

// Takes a symmetric M to diagonal form: C M C^T is it, in one of M and N, that
// is returned.  A sweep turns all pairs of axes, half of EVEN at a time: each
// thread makes squares of 2 x 2 of what comes next, from M to N and back.
__device__ double* diagonalize(
    double* M, double* N, double* C, double* shared) {
  enum { HALF = EVEN / 2, ROUND = EVEN - 1 };
  const int first = threadIdx.x, by = blockDim.x;
  for (int p = first; p < EVEN * EVEN; p += by) C[p] = p % (EVEN + 1) == 0;
  for (int sweep = 0; sweep < 20; ++sweep) {
    double off = 0, most = 0;
    __syncthreads();
    for (int p = first; p < EVEN * EVEN; p += by)
      if (p % (EVEN + 1) == 0)
        most = fmax(most, fabs(M[p]));
      else
        off = fmax(off, fabs(M[p]));
    most = block_max(most, shared);
    if (block_max(off, shared) <= 1e-15 * most) break;
    for (int step = 0; step < ROUND; ++step) {  // as in a tournament
      for (int square = first; square < HALF * HALF; square += by) {
        int at[2][2];
        double c[2], s[2];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int i = side == 0 ? square / HALF : square % HALF;
          const int p = (step + i) % ROUND;
          const int q = i == 0 ? ROUND : (step - i + ROUND) % ROUND;
          const double x = M[p * EVEN + q];
          const double theta =
              (M[q * EVEN + q] - M[p * EVEN + p]) / (2 * x);
          const double t = x == 0 ? 0
              : copysign(1.0, theta) / (fabs(theta) + sqrt(1 + theta * theta));
          at[side][0] = p;
          at[side][1] = q;
          c[side] = 1 / sqrt(1 + t * t);
          s[side] = t * c[side];
        }
        double x[2][2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const double a = M[at[0][0] * EVEN + at[1][k]];
          const double b = M[at[0][1] * EVEN + at[1][k]];
          x[0][k] = c[0] * a - s[0] * b;
          x[1][k] = s[0] * a + c[0] * b;
        }
        const bool is_pair = square / HALF == square % HALF;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          double* to = N + at[0][i] * EVEN;
          to[at[1][0]] = is_pair && i == 1
              ? 0 : c[1] * x[i][0] - s[1] * x[i][1];
          to[at[1][1]] = is_pair && i == 0
              ? 0 : s[1] * x[i][0] + c[1] * x[i][1];
          // And two columns of C, in place.
          const int column = square % HALF * 2 + i;
          double* a = C + at[0][0] * EVEN + column;
          double* b = C + at[0][1] * EVEN + column;
          const double before = *a;
          *a = c[0] * before - s[0] * *b;
          *b = s[0] * before + c[0] * *b;
        }
      }
      __syncthreads();
      double* next = N;
      N = M;
      M = next;
    }
  }
  return M;
}

// Singular values and mix, of E and H = S S^T, which is in M.  Returns sigma,
// in units of the weight; what is zero or not finite has no mix.
__device__ double solve(
    const Small& small, double* values, A scale, double* shared) {
  const int first = threadIdx.x, by = blockDim.x;
  double *H = small.M, *X = small.N, *M = small.C, total = 0;
  __syncthreads();
  for (int j = 0; j < B; ++j) total += H[j * B + j];
  if (!(total > 0 && total < infinity())) {
    total *= 0;
    for (int j = first; j < B; j += by) values[j] = total;
    return total;
  }
  for (int p = first; p < B * B; p += by) {
    double sum = 0;
    for (int k = 0; k < B; ++k)
      sum += small.E[p / B * B + k] * H[k * B + p % B];
    X[p] = sum;
  }
  __syncthreads();
  for (int p = first; p < EVEN * EVEN; p += by) {
    const int i = p / EVEN, j = p % EVEN;
    double sum = 0;
    if (i < B && j < B)
      for (int k = 0; k < B; ++k) sum += X[i * B + k] * small.E[j * B + k];
    M[p] = sum;
  }
  __syncthreads();
  double* C = small.M;  // H is not needed any more, and neither is X
  const double* l = diagonalize(M, X, C, shared);
  __syncthreads();
  for (int j = first; j < B; j += by) {
    const double mine = l[j * (EVEN + 1)];
    int rank = 0;
    for (int k = 0; k < B; ++k) {
      const double other = l[k * (EVEN + 1)];
      if (other > mine || (other == mine && k < j)) ++rank;
    }
    shared[rank] = j;
    values[rank] = sqrt(fmax(mine, 0.0)) / scale;
  }
  __syncthreads();
  for (int p = first; p < B * B; p += by) {
    const int j = static_cast<int>(shared[p / B]);
    double sum = 0;
    for (int k = 0; k < B; ++k)
      sum += C[j * EVEN + k] * small.E[k * B + p % B];
    small.mix[p] = sum;  // behind the next barrier
  }
  return values[0] * scale;
}


// Squares of |W v| / sigma, of what follows u, and of the residual.
struct Followed {
  double t, next, off;
  __device__ double turn() const { return 1 - 1 / sqrt(t); }
  __device__ double residual() const { return sqrt(off); }
  // By one thread.
  __device__ void write(double* values) const {
    values[TURN] = turn();
    values[RESIDUAL] = residual();
  }
};

// T <- what follows U, of W S in parts; its first vector is not of length 1.
__device__ Followed follow(
    const Space& space, const A* mix, const Row* parts, int n_parts, int m,
    double scale, Size first, Size by) {
  const double first_value = space.values[0] * scale;
  const double last_value = space.values[B - 1] * scale;
  const double square = first_value * first_value;
  const double shift = SHIFT * last_value * last_value - REGULAR * square;
  Followed sums = {0, 0, 0};
  for (Size i = first; i < m; i += by) {
    Row raw = parts[i];
    for (int p = 1; p < n_parts; ++p) {
      const Row more = parts[static_cast<Size>(p) * m + i];
#pragma unroll
      for (int k = 0; k < B; ++k) raw.x[k] += more.x[k];
    }
    const Row& row = space.U[i];  // not in registers, too
#pragma unroll 1
    for (int j = 0; j < B; ++j) {
      A t = 0, u = 0;
#pragma unroll
      for (int k = 0; k < B; ++k) {
        t += mix[j * B + k] * raw.x[k];
        u += mix[j * B + k] * row.x[k];
      }
      const double value = space.values[j] * scale;
      // What the span hardly has, and W is large on, must not be all that is
      // left of each.
      const double next = fmax(-MOST, fmin(
          MOST, (t - shift * u) / (value * value - shift)));
      space.T[i].x[j] = static_cast<A>(next);
      if (j > 0) continue;
      const double of_v = t / square;
      sums.t += of_v * of_v;
      sums.next += next * next;
      sums.off += (of_v - u) * (of_v - u);
    }
  }
  return sums;
}

// Y <- X, for all entries of all vectors.
__device__ void copy_all(const Row* x, Row* y, int m) {
  __syncthreads();
  for (int i = threadIdx.x; i < m; i += blockDim.x) y[i] = x[i];
}

// One pass of U over the weight, or two, with what follows it in T.  Returns
// sigma.
__device__ double pass_of_all(
    const Weight& W, const Space& space, bool moves, const Small& small,
    double* shared) {
  double sigma = 0;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {  // so that it is compiled once
    product_of_all(W, side == 0, side == 0 ? space.U : space.S,
                   side == 0 ? space.S : space.T, shared);
    if (side == 1) break;
    gram(space.S, W.n(), small.M, shared);
    sigma = solve(small, space.values, W.scale, shared) / W.scale;
    if (moves && sigma > 0 && isfinite(sigma)) continue;
    if (threadIdx.x == 0)
      space.values[TURN] = space.values[RESIDUAL] = 0;
    __syncthreads();
    return sigma;
  }
  Followed all = follow(
      space, small.mix, space.T, 1, W.m, W.scale, threadIdx.x, blockDim.x);
  all.t = block_sum(all.t, shared);
  all.next = block_sum(all.next, shared);
  all.off = block_sum(all.off, shared);
  if (threadIdx.x == 0) all.write(space.values);
  const A norm = sqrt(all.next);
  for (int i = threadIdx.x; i < W.m; i += blockDim.x)
    space.T[i].x[0] /= norm;
  __syncthreads();
  return sigma;
}

// When other vectors are looked for first, as in interface.py.
struct Renewal {
  int n_warmup;
  double limit, rtol;  // the second is below 0 without a tolerance
  __device__ bool accepts(double turn, double residual, double limit) const {
    return rtol < 0 ? turn <= limit : residual <= rtol;
  }
};

// K passes from start, and again from what follows them where the renewal says
// so.  Where sigma must be ordinary, it ends where it is not.
__device__ double passes_anew(
    const Weight& W, const Space& space, int K, bool moves,
    const Renewal& renewal, bool must_be_ordinary, bool* ordinary,
    bool* is_replaced, const Small& small, double* shared) {
  double limit = renewal.limit;
  *ordinary = true;
  for (int i = 0;; i += K) {
    double sigma = 0;
    for (int k = 0; k < K; ++k) {
      copy_all(k == 0 ? space.start : space.T, space.U, W.m);
      if (orthonormalize(space.U, k == 0 ? space.start : 0, W.m, small,
                         shared))
        *is_replaced = true;
      sigma = pass_of_all(
          W, space, moves || k < K - 1, small, shared);
      *ordinary = *ordinary && is_ordinary(sigma);
      if (!(sigma > 0 && isfinite(sigma))) break;
    }
    if ((must_be_ordinary && !*ordinary) || i >= renewal.n_warmup
        || renewal.accepts(
            space.values[TURN], space.values[RESIDUAL], limit))
      return sigma;
    limit = SETTLED;
    copy_all(space.T, space.start, W.m);
  }
}

// Sigma and all that belongs to it, as estimate() of one vector.
__device__ double estimate_all(
    Weight W, const U* u, const Space& space, int K, bool moves,
    const Renewal& renewal, int attempt, const Small& small, double* shared) {
  double sigma = 0;
  bool is_replaced = false, ordinary;
  for (;; ++attempt) {
    __syncthreads();
    is_replaced = begin_all(u, W.m, space.start, shared);
    if (attempt == 1) {
      const double w_largest = largest(W.w, W.size(), shared);
      if (w_largest == 0 || isinf(w_largest)) {
        sigma = w_largest == 0 ? 0 : infinity() - infinity();
        copy_all(space.start, space.U, W.m);
        for (int j = threadIdx.x; j < N_VALUES; j += blockDim.x)
          space.values[j] = j < B ? sigma : 0;
        for (int j = threadIdx.x; j < W.n(); j += blockDim.x)
          space.S[j] = Row();
        break;
      }
      W.scale = 1 / unit_of(w_largest);
    }
    if (attempt == 2) {
      A* x = space.T[0].x;  // there is room
      start_from_largest_row(W, x, shared);
      for (int i = threadIdx.x; i < W.m; i += blockDim.x)
        space.start[i].x[0] = x[i];
    }
    sigma = passes_anew(
        W, space, K, moves, renewal, attempt == 0, &ordinary,
        &is_replaced, small, shared);
    if (attempt == 0 ? ordinary : attempt == 2 || sigma != 0) break;
  }
  if (threadIdx.x == 0) {
    space.state.numbers[SCALE] = W.scale;
    space.state.numbers[U_NORM] = 1;
    space.state.numbers[RESTARTED] = is_replaced || attempt == 2;
  }
  __syncthreads();
  return sigma;
}

// u, v, and the basis, which takes the place of U.
__device__ void finish_all(
    const Weight& W, const Space& space, const A* mix, double sigma,
    Size first, Size by) {
  const bool is_good = sigma > 0 && isfinite(sigma);
  const A divisor = sigma * W.scale, nothing = 0 * sigma;
  for (Size i = first; i < W.m; i += by) {
    const Row row = space.U[i];
    if (!is_good) space.state.u(1)[i] = row.x[0] + nothing;
#pragma unroll 1
    for (int j = 0; is_good && j < B; ++j) {
      A sum = 0;
#pragma unroll
      for (int k = 0; k < B; ++k) sum += mix[j * B + k] * row.x[k];
      space.U[i].x[j] = sum;
      if (j == 0) space.state.u(1)[i] = sum;
    }
  }
  for (Size o = first; o < W.n(); o += by) {
    A sum = 0;
    if (is_good) {
      const Row row = space.S[o];
#pragma unroll
      for (int k = 0; k < B; ++k) sum += mix[k] * row.x[k];
    }
    space.state.v(0)[o] = is_good ? sum / divisor : nothing;
  }
}

// U of the caller <- T, its first vector divided by norm.
__device__ void store_all(
    const Space& space, U* u, int m, double norm, Size first, Size by) {
  const A divisor = norm;
  for (Size p = first; p < static_cast<Size>(m) * B; p += by) {
    const int j = p / m;
    const A x = space.T[p % m].x[j];
    u[p] = static_cast<U>(j == 0 ? x / divisor : x);
  }
}

// What many blocks do: Y = W X, or W^T X, in parts, as in grid.cuh.

struct TaskOfAll {
  Weight W;
  bool is_transposed;
  const Row* x;
  Row* y;
  int lanes, parts, blocks;
  A* shared;  // room for 1024 of A, by columns for 64 bytes a thread
};

template <int V>
__device__ void product_of_all_by_columns(const TaskOfAll& task) {
  enum { AT_ONCE = 64 / sizeof(A) };
  const int N = 32 / sizeof(T) / V;
  const Weight& W = task.W;
  const int lanes = task.lanes;
  const Columns columns(W, task.is_transposed);
  const int n = columns.n_out / V, lane = threadIdx.x % lanes;
  const int tiles = (n + lanes - 1) / lanes, by = blockDim.x / lanes;
  const int chunk = (columns.n_in + task.parts - 1) / task.parts;
  for (int job = blockIdx.x; job < tiles * task.parts; job += task.blocks) {
    const int start = job % tiles * lanes * V, p = job / tiles;
    const int o = start + lane * V;
    Row* y = task.y + static_cast<Size>(p) * columns.n_out;
    Row sum[V] = {};
    if (o < columns.n_out)
      add_all<N, 1, V, false, sizeof(A) == 4>(
          W.w + columns.base(o), 0, 0, task.x, W.scale,
          Steps(columns.step, by), p * chunk + threadIdx.x / lanes,
          min(columns.n_in, (p + 1) * chunk), by, sum);
#pragma unroll
    for (int first = 0; first < V * B; first += AT_ONCE) {
      __syncthreads();
#pragma unroll
      for (int k = first; k < V * B && k < first + AT_ONCE; ++k)
        task.shared[(k - first) * blockDim.x + threadIdx.x] =
            sum[k / B].x[k % B];
      __syncthreads();
      for (int at = threadIdx.x; at < AT_ONCE * lanes; at += blockDim.x) {
        const int k = first + at / lanes;
        const int here = start + at % lanes * V + k / B;
        if (k >= V * B || here >= columns.n_out) continue;
        const A* part = task.shared + (k - first) * blockDim.x + at % lanes;
        A total = 0;
        for (int g = 0; g < by; ++g) total += part[g * lanes];
        y[here].x[k % B] = total;
      }
    }
  }
}

// R = N_ROWS outputs of each thread.
template <int V>
__device__ void product_of_all_by_rows(const TaskOfAll& task) {
  enum { R = N_ROWS };
  const int N = 32 / sizeof(T) / V > R ? 32 / sizeof(T) / V / R : 1;
  const Weight& W = task.W;
  const int lanes = task.lanes, in_warp = lanes < 32 ? lanes : 32;
  const Rows rows(W, task.is_transposed);
  const int height = blockDim.x / lanes * R;
  const int tiles = (rows.n_out + height - 1) / height;
  const int n = rows.n_in / V, chunk = (n + task.parts - 1) / task.parts;
  for (int job = blockIdx.x; job < tiles * task.parts; job += task.blocks) {
    const int p = job / tiles, start = (tiles - 1 - job % tiles) * height;
    const int o = start + threadIdx.x / lanes * R;
    Row sum[R] = {};
    if (o < rows.n_out)
      add_all<N, R, V, true, false>(
          W.w + rows.base(o), rows.length, rows.n_out - 1 - o, task.x, W.scale,
          InRows<V>{rows.length, rows.block},
          p * chunk + threadIdx.x % lanes, min(n, (p + 1) * chunk), lanes,
          sum);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < R * B; ++k) {
      A x = sum[k / B].x[k % B];
      for (int d = in_warp / 2; d > 0; d /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, d);
      if (threadIdx.x % in_warp == 0)
        task.shared[threadIdx.x / in_warp * (R * B) + k] = x;
    }
    __syncthreads();
    for (int at = threadIdx.x; at < height * B; at += blockDim.x) {
      const int group = at / (R * B), k = at % (R * B);
      const int here = start + group * R + k / B;
      if (here >= rows.n_out) continue;
      A total = 0;
      for (int s = 0; s < lanes / in_warp; ++s)
        total += task.shared[(group * (lanes / in_warp) + s) * (R * B) + k];
      task.y[static_cast<Size>(p) * rows.n_out + here].x[k % B] = total;
    }
  }
}

// In the way and by the width that fit.
__device__ void product_of_all(const TaskOfAll& task, bool is_wide) {
  const int narrow = 4 / sizeof(T) > 1 ? 4 / sizeof(T) : 1;
  if (is_by_rows(task.W, task.is_transposed)) {
    if (is_wide)
      product_of_all_by_rows<WIDE>(task);
    else
      product_of_all_by_rows<1>(task);
  } else if (narrow == 1 || is_wide) {
    product_of_all_by_columns<narrow>(task);
  } else {
    product_of_all_by_columns<1>(task);
  }
}
