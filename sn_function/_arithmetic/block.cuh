// What one block does for one weight: the text that all raw kernels of
// kernels.py begin with.  T, U, A, Size and the names of numbers are defined
// before it.
//
// All threads call these functions together, and each gets what they return;
// shared has room for one double a thread.  Products begin and end with a
// barrier, so what they read may have just been written.

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

// 1 - u_0 . u_1 / |u_0|, or 0 for a zero or a NaN.
__device__ double turn(
    double sigma, const double* numbers, const A* vectors, int m, int K,
    double* shared) {
  const double* norms = numbers + N_NUMBERS;
  double sum = 0;
  for (int i = threadIdx.x; i < m; i += blockDim.x)
    sum += static_cast<double>(vectors[i]) * vectors[i];
  sum = block_sum(sum, shared);  // its barriers also show the norms to all
  // u_0 . W v_1 = |W^T u_0|
  return sigma > 0 && isfinite(sigma)
      ? 1 - norms[0] / norms[K] / sqrt(sum) : 0;
}

// u_0 <- u_K
__device__ void move_on(A* vectors, Size m, int K) {
  for (Size i = threadIdx.x; i < m; i += blockDim.x)
    vectors[i] = vectors[K * m + i];
}

// iterate(), and again from u_K where the first iteration turns u_0 by more
// than limit, until it hardly does: then u was one of another weight.  Without
// ordinary, all numbers are fine.
template <typename M>
__device__ double iterate_anew(
    const M& W, double unit, double* numbers, A* vectors, int K, int n_warmup,
    double limit, bool* ordinary, double* shared) {
  bool all_ordinary = true;
  double sigma;
  for (int i = 0;; i += K) {
    sigma = iterate(W, unit, numbers, vectors, K, &all_ordinary, shared);
    if (ordinary && !all_ordinary) break;
    if (i >= n_warmup
        || turn(sigma, numbers, vectors, W.m, K, shared) <= limit)
      break;
    limit = SETTLED;
    move_on(vectors, W.m, K);
  }
  if (ordinary) *ordinary = all_ordinary;
  return sigma;
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

// iterate_anew() for a W or a u of extreme size, for a u that is zero or not
// finite, and for one that W^T makes zero.
__device__ double rescue(
    const Weight& plain, const U* u, double* numbers, A* vectors, int K,
    int n_warmup, double limit, double* shared) {
  const Size m = plain.m, n = plain.n();
  const double w_largest = largest(plain.w, plain.size(), shared);
  const double u_largest = largest(u, m, shared);
  if (isinf(w_largest)) {
    const double nan = infinity() - infinity();
    // u_0 stays: it may be good.
    for (Size j = m + threadIdx.x; j < (K + 1) * m + K * n; j += blockDim.x)
      vectors[j] = nan;
    return nan;
  }
  const double unit = w_largest > 0 ? w_largest : 1;
  const InUnits W(plain, unit);
  double u_norm = 1;
  bool restarted = !(u_largest > 0 && u_largest < infinity());
  if (!restarted) {
    for (int i = threadIdx.x; i < m; i += blockDim.x)
      vectors[i] = static_cast<A>(static_cast<double>(u[i]) / u_largest);
    u_norm = normalize(vectors, m, shared) * u_largest;
    if (is_ordinary(u_norm)) {
      u_norm = 1;
      for (int i = threadIdx.x; i < m; i += blockDim.x)
        vectors[i] = static_cast<A>(u[i]);
    }
  }
  double sigma;
  for (;; restarted = true) {
    if (restarted) start_from_largest_row(W, vectors, shared);
    sigma = iterate_anew(W, unit, numbers, vectors, K, n_warmup, limit, 0,
                         shared);
    if (restarted || sigma != 0 || w_largest == 0) break;
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

// gamma and initial_gamma <- sigma, where gamma is initial_gamma and sigma is
// another.
__device__ void renew_gamma(
    A* gamma, A* initial_gamma, double sigma, double turn) {
  const A value = static_cast<A>(sigma) == 0 ? 1 : sigma;
  const bool is_off = fabs(sigma - *gamma) > GAMMA_LIMIT * *gamma
      && (sigma > *gamma || turn <= GAMMA_TURN);
  if (*gamma == *initial_gamma && is_off && isfinite(value))
    *gamma = *initial_gamma = value;
}

// The numbers that follow from sigma, and u <- u_K where that is good.
__device__ void finish(
    const Weight& W, double sigma, U* u, double* numbers, const A* vectors,
    A* sigma_out, A* gamma, A* initial_gamma, int K, double factor,
    double eps, double at_zero, int update, double* shared) {
  const A* last = vectors + static_cast<Size>(K) * W.m;
  if (update && sigma > 0 && isfinite(sigma))
    for (int i = threadIdx.x; i < W.m; i += blockDim.x)
      u[i] = static_cast<U>(last[i]);
  const double turned = initial_gamma
      ? turn(sigma, numbers, vectors, W.m, K, shared) : 0;
  if (threadIdx.x != 0) return;
  if (initial_gamma) renew_gamma(gamma, initial_gamma, sigma, turned);
  if (sigma_out) *sigma_out = sigma;
  const bool above = !(sigma < eps || sigma == 0);
  const double divisor = above ? sigma : sigma == 0 ? at_zero : eps;
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
  dot = has_gy ? dot / numbers[DIVISOR] : 0;
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
