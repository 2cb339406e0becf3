// What one block does for one weight: K iterations, their adjoint, and what is
// rare enough for one block to do it for a weight of any size.  All threads
// call these functions together, and each gets what they return.  Products
// begin and end with a barrier, so what they read may have just been written.

// The first of several vectors starts at a multiple of 16 bytes.
__device__ Size padded(Size n) { return (n + 3) / 4 * 4; }

// What a forward keeps, see kernels.py.  k counts from 0, and u(0) is u_0.
struct State {
  double* numbers;
  int K, m, n;
  __device__ State(double* numbers, const Weight& W, int K)
      : numbers(numbers), K(K), m(W.m), n(W.n()) {}
  __device__ double& s_norm(int k) const { return numbers[N_NUMBERS + k]; }
  __device__ double& t_norm(int k) const { return s_norm(K + k); }
  __device__ A* u(int k) const {
    return reinterpret_cast<A*>(&t_norm(K)) + static_cast<Size>(k) * m;
  }
  __device__ A* v(int k) const {
    return u(0) + padded(static_cast<Size>(K + 1) * m)
        + static_cast<Size>(k) * n;
  }
};

// y = W x, or W^T x.
__device__ void product(
    const Weight& W, bool is_transposed, const A* x, A* y, double* shared) {
  const int N = 32 / sizeof(A);
  A* part = reinterpret_cast<A*>(shared);
  Found found;
  __syncthreads();
  if (is_by_rows(W, is_transposed)) {
    const Rows rows(W, is_transposed);
    for (int o = threadIdx.x / 32; o < rows.n_out; o += blockDim.x / 32) {
      A sum = 0;
      if (rows.length == rows.n_in)
        add_products<N, 1, false, true>(
            W.w + rows.base(o), W.w, x, W.scale, Steps(1, 32),
            threadIdx.x % 32, rows.n_in, 32, &sum, &found);
      else
        add_products<N, 1, false, true>(
            W.w + rows.base(o), W.w, x, W.scale,
            Blocks{rows.length, rows.block}, threadIdx.x % 32, rows.n_in, 32,
            &sum, &found);
      sum = sum_over(sum, 32, part);
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
    A sum = 0;
    if (o < columns.n_out)
      add_products<N, 1, false, false>(
          W.w + columns.base(o), W.w, x, W.scale,
          Steps(columns.step, blockDim.x / width), group, columns.n_in,
          blockDim.x / width, &sum, &found);
    part[threadIdx.x] = sum;
    __syncthreads();
    if (group == 0 && o < columns.n_out) {
      for (int j = threadIdx.x + width; j < static_cast<int>(blockDim.x);
           j += width)
        sum += part[j];
      y[o] = sum;
    }
    __syncthreads();
  }
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

// max |x|, or infinity where an x is not finite.
template <typename X>
__device__ double largest(const X* x, Size n, double* shared) {
  double y = 0;
  for (Size j = threadIdx.x; j < n; j += blockDim.x) {
    const A a = fabs(static_cast<A>(x[j]));
    y = isfinite(a) ? fmax(y, static_cast<double>(a)) : infinity();
    if (isinf(y)) break;
  }
  return block_max(y, shared);
}

// As ORDINARY of the host has it.
__device__ bool is_ordinary(double norm) {
  const double limit = sizeof(A) == 4 ? 1e12 : 1e100;
  return norm > 1 / limit && norm < limit;
}

// s_k = W^T u_{k-1}, v_k = s_k / |s_k|, t_k = W v_k, u_k = t_k / |t_k|, for
// k = 1..K.  Returns |t_K|.
__device__ double iterate(
    const Weight& W, const State& state, int K, bool* ordinary,
    double* shared) {
  double norm = 0;
  *ordinary = true;
  for (int step = 0; step < 2 * K; ++step) {
    const int k = step / 2;
    const bool is_s = step % 2 == 0;
    A* y = is_s ? state.v(k) : state.u(k + 1);
    product(W, is_s, is_s ? state.u(k) : state.v(k), y, shared);
    norm = normalize(y, is_s ? W.n() : W.m, shared) / W.scale;
    if (threadIdx.x == 0)
      state.s_norm(is_s ? k : K + k) = norm == 0 ? 1 : norm;
    *ordinary = *ordinary && is_ordinary(norm);
  }
  return norm;
}

// 1 - u_0 . u_1 / |u_0|, or 0 for a zero or a NaN; u_0 . W v_1 = |W^T u_0|.
__device__ double turn_of(double sigma, double s_1, double t_1, double u_0) {
  return sigma > 0 && isfinite(sigma) ? 1 - s_1 / t_1 / u_0 : 0;
}

__device__ double turn(double sigma, const State& state, double* shared) {
  double sum = 0;
  for (int i = threadIdx.x; i < state.m; i += blockDim.x)
    sum += static_cast<double>(state.u(0)[i]) * state.u(0)[i];
  sum = block_sum(sum, shared);  // its barriers also show the norms to all
  return turn_of(sigma, state.s_norm(0), state.t_norm(0), sqrt(sum));
}

// A tolerance for |W^T u_K - sigma v_K| / sigma, if next_s has room for W^T
// u_K.
struct Tolerance {
  A* next_s;
  double rtol;

  __device__ bool is_met(
      double sigma, const Weight& W, const State& state,
      double* shared) const {
    if (!(sigma > 0 && isfinite(sigma))) return true;
    product(W, true, state.u(state.K), next_s, shared);
    const A divisor = sigma * W.scale;
    double sum = 0;
    for (int j = threadIdx.x; j < state.n; j += blockDim.x) {
      const double d = next_s[j] / divisor - state.v(state.K - 1)[j];
      sum += d * d;
    }
    return sqrt(block_sum(sum, shared)) <= rtol;
  }
};

// iterate(), and again from u_K where the first iteration turns u_0 by more
// than limit, until it hardly does: then u was one of another weight.  Or
// until the tolerance is met.  Where norms must be ordinary, it ends where one
// is not.
__device__ double iterate_anew(
    const Weight& W, const State& state, int K, int n_warmup, double limit,
    const Tolerance& tolerance, bool must_be_ordinary, bool* ordinary,
    double* shared) {
  for (int i = 0;; i += K) {
    const double sigma = iterate(W, state, K, ordinary, shared);
    if ((must_be_ordinary && !*ordinary) || i >= n_warmup) return sigma;
    if (tolerance.next_s ? tolerance.is_met(sigma, W, state, shared)
                         : turn(sigma, state, shared) <= limit)
      return sigma;
    limit = SETTLED;
    for (int j = threadIdx.x; j < W.m; j += blockDim.x)
      state.u(0)[j] = state.u(K)[j];
  }
}

// u_0 <- e_i, with i the row of largest norm, never orthogonal to itself.
__device__ void start_from_largest_row(
    const Weight& W, A* u, double* shared) {
  double most = -1;
  int row = 0;
  for (int i = 0; i < W.m; ++i) {
    double sum = 0;
    for (int j = threadIdx.x; j < W.n(); j += blockDim.x) {
      const Size block = static_cast<Size>(j / W.r) * W.m + i;
      const double w = static_cast<A>(W.w[block * W.r + j % W.r]) * W.scale;
      sum += w * w;
    }
    sum = block_sum(sum, shared);
    if (sum > most) {
      most = sum;
      row = i;
    }
  }
  for (int i = threadIdx.x; i < W.m; i += blockDim.x) u[i] = i == row;
}

// The power of two next to x, such that its inverse is in the range of A, too.
__device__ double unit_of(double x) {
  const int limit = sizeof(A) == 4 ? 126 : 1022;
  const int exponent = x > 0 ? ilogb(x) : 0;
  return ldexp(1.0, exponent > limit    ? limit
                    : exponent < -limit ? -limit
                                        : exponent);
}

// sigma and all that belongs to it, however hard W and u make it.  The first
// attempt takes them as they are.  The second is for extreme ones: W in units
// of about its largest entry, and u divided by its norm where that is extreme.
// The third is for a u that is zero, not finite, or made zero by W^T: it starts
// from another vector.  u_0 is there already.  The first attempt may go on
// where n_done iterations have turned it.
__device__ double estimate(
    Weight W, const U* u, const State& state, int K, int n_warmup,
    double limit, const Tolerance& tolerance, int attempt, int n_done,
    double* shared) {
  double w_largest = 0, u_norm = 1, sigma = 0;
  const int first = attempt;
  for (;; ++attempt) {
    if (attempt == 1) {
      w_largest = largest(W.w, W.size(), shared);
      const double u_largest = largest(u, W.m, shared);
      const bool is_u_good = u_largest > 0 && u_largest < infinity();
      // All is zero, as it should be.
      if (w_largest == 0 && is_u_good && first == 0) break;
      if (isinf(w_largest)) {
        sigma = infinity() - infinity();
        // u_0 stays: it may be good.
        for (int k = 0; k < K; ++k) {
          for (int i = threadIdx.x; i < W.m; i += blockDim.x)
            state.u(k + 1)[i] = sigma;
          for (int j = threadIdx.x; j < W.n(); j += blockDim.x)
            state.v(k)[j] = sigma;
        }
        break;
      }
      W.scale = 1 / unit_of(w_largest);
      if (is_u_good) {
        for (int i = threadIdx.x; i < W.m; i += blockDim.x)
          state.u(0)[i] =
              static_cast<A>(static_cast<double>(u[i]) / u_largest);
        u_norm = normalize(state.u(0), W.m, shared) * u_largest;
        if (is_ordinary(u_norm)) {
          u_norm = 1;
          for (int i = threadIdx.x; i < W.m; i += blockDim.x)
            state.u(0)[i] = static_cast<A>(u[i]);
        }
      } else {
        attempt = 2;
      }
    }
    if (attempt == 2) start_from_largest_row(W, state.u(0), shared);
    bool ordinary;
    const bool goes_on = attempt == 0 && n_done > 0;
    sigma = iterate_anew(
        W, state, K, goes_on ? n_warmup - n_done : n_warmup,
        goes_on ? SETTLED : limit, tolerance, attempt == 0, &ordinary, shared);
    if (attempt == 0 ? ordinary
                     : attempt == 2 || sigma != 0 || w_largest == 0)
      break;
  }
  if (threadIdx.x == 0) {
    state.numbers[SCALE] = W.scale;
    state.numbers[U_NORM] = u_norm;
    state.numbers[RESTARTED] = attempt == 2;
  }
  return sigma;
}

// The numbers that follow from sigma.  By one thread.
struct Outcome {
  double divisor, gamma;
  bool is_above, is_new_gamma;

  // gamma is sigma where it still is initial_gamma, and sigma is another.
  __device__ Outcome(
      double sigma, double turn, const A* gamma_, const A* initial_gamma,
      double eps, double at_zero)
      : gamma(gamma_ ? static_cast<double>(*gamma_) : 1),
        is_new_gamma(false) {
    is_above = !(sigma < eps || sigma == 0);
    divisor = is_above ? sigma : sigma == 0 ? at_zero : eps;
    if (!initial_gamma || *gamma_ != *initial_gamma) return;
    const A value = static_cast<A>(sigma) == 0 ? 1 : sigma;
    is_new_gamma = fabs(sigma - gamma) > GAMMA_LIMIT * gamma
        && (sigma > gamma || turn <= GAMMA_TURN) && isfinite(value);
    if (is_new_gamma) gamma = value;
  }

  __device__ double coefficient(double factor) const {
    return gamma * factor / divisor;
  }

  __device__ void write(
      double sigma, double factor, double* numbers, A* sigma_out) const {
    if (sigma_out) *sigma_out = sigma;
    numbers[SIGMA] = sigma;
    numbers[DIVISOR] = divisor;
    numbers[ABOVE] = is_above;
    numbers[COEF] = coefficient(factor);
    numbers[NEW_GAMMA] = is_new_gamma ? gamma : 0;
  }
};

// What a backward keeps.  tbar_K is u_K, and its place is for ubar.
struct Bars {
  double* coefficients;
  int K, m, n;
  __device__ Bars(double* coefficients, const Weight& W, int K)
      : coefficients(coefficients), K(K), m(W.m), n(W.n()) {}
  __device__ A* t(int k) const {
    return reinterpret_cast<A*>(coefficients + N_COEFFICIENTS)
        + static_cast<Size>(k) * m;
  }
  __device__ A* s(int k) const {
    return t(0) + padded(static_cast<Size>(K) * m) + static_cast<Size>(k) * n;
  }
};

// gW = a gY + c G, with c = gsigma - above coef <gY, W> / sigma, and
// ggamma = f <gY, W> / divisor.
struct Coefficients {
  double a, c, quotient;
  __device__ Coefficients(
      const double* numbers, double dot, bool has_gy, const A* gsigma)
      : a(has_gy ? numbers[COEF] : 0),
        c(gsigma ? static_cast<double>(*gsigma) : 0),
        quotient(has_gy ? dot / numbers[DIVISOR] : 0) {
    if (has_gy && numbers[ABOVE] != 0) c -= quotient * numbers[COEF];
  }
  // By one thread.
  __device__ void write(
      double factor, double* coefficients, A* ggamma) const {
    coefficients[GY] = a;
    coefficients[GSIGMA] = c;
    if (ggamma) *ggamma = factor * quotient;
  }
};

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

// The bars of all iterations, and ubar if it is needed.
__device__ void go_back(
    const Weight& W, const State& state, const Bars& bars, int K, bool need_u,
    double* shared) {
  for (int step = 0; step < 2 * K - !need_u; ++step) {
    const int k = K - 1 - step / 2;
    const bool is_s = step % 2 == 0;
    A* tbar = bars.t((is_s ? k + 1 : k == 0 ? K : k) - 1);
    product(W, is_s, !is_s ? bars.s(k) : step == 0 ? state.u(K) : tbar,
            is_s ? bars.s(k) : tbar, shared);
    if (is_s || k > 0)
      project(is_s ? bars.s(k) : tbar, is_s ? state.v(k) : 0,
              is_s ? W.n() : W.m,
              state.s_norm(is_s ? k : K + k - 1) * W.scale,
              shared);
  }
}
