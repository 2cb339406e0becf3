// The half of CUDA, in software: conversions round to nearest even.
#pragma once

#include "cuda_on_host.h"

struct __half_raw {
  unsigned short x;
};

namespace cuda_on_host {

inline float half_to_float(unsigned short h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  const uint32_t exponent = h >> 10 & 0x1f, mantissa = h & 0x3ffu;
  if (exponent == 0x1f) {
    return coh_bits<float>(sign | 0x7f800000u | mantissa << 13);
  }
  if (exponent == 0) {  // zero, or exact in single precision
    const float v = (float)mantissa * 5.9604644775390625e-8f;
    return sign ? -v : v;
  }
  return coh_bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline unsigned short float_to_half(float v) {
  uint32_t x = coh_bits<uint32_t>(v);
  const uint32_t sign = x >> 16 & 0x8000u;
  x &= 0x7fffffffu;
  if (x > 0x7f800000u) return 0x7fff;  // the NaN of the device
  if (x >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);
  if (x < 0x38800000u) {  // below 2**-14: the sum rounds to 2**-24
    const float sum = coh_bits<float>(x) + 0.5f;
    return (unsigned short)(sign | (coh_bits<uint32_t>(sum) - 0x3f000000u));
  }
  x += 0xfffu + (x >> 13 & 1);
  return (unsigned short)(sign | (x - 0x38000000u) >> 13);
}

inline unsigned short double_to_half(double v) {
  uint64_t x = coh_bits<uint64_t>(v);
  const uint64_t sign = x >> 48 & 0x8000u;
  x &= 0x7fffffffffffffffull;
  if (x > 0x7ff0000000000000ull) return 0x7fff;
  const double a = coh_bits<double>(x);
  if (a >= 65520.0) return (unsigned short)(sign | 0x7c00u);
  if (a < 6.103515625e-5) {
    const double sum = a + 268435456.0;
    return (unsigned short)(
        sign | (coh_bits<uint64_t>(sum) - coh_bits<uint64_t>(268435456.0)));
  }
  x += 0x1ffffffffffull + (x >> 42 & 1);
  return (unsigned short)(sign | (x - (1008ull << 52)) >> 42);
}

}  // namespace cuda_on_host

struct __half {
  unsigned short __x;

  __half() = default;
  __half(const __half_raw& r) : __x(r.x) {}
  __half(float v) : __x(cuda_on_host::float_to_half(v)) {}
  __half(double v) : __x(cuda_on_host::double_to_half(v)) {}
  __half(int v) : __x(cuda_on_host::double_to_half(v)) {}
  __half(unsigned int v) : __x(cuda_on_host::double_to_half(v)) {}
  __half(short v) : __x(cuda_on_host::double_to_half(v)) {}
  __half(unsigned short v) : __x(cuda_on_host::double_to_half(v)) {}
  __half(long long v) : __x(cuda_on_host::double_to_half((double)v)) {}
  __half(unsigned long long v)
      : __x(cuda_on_host::double_to_half((double)v)) {}

  operator float() const { return cuda_on_host::half_to_float(__x); }
  operator __half_raw() const { return __half_raw{__x}; }

  __half& operator+=(const __half& o) {
    return *this = __half((float)*this + (float)o);
  }
  __half& operator-=(const __half& o) {
    return *this = __half((float)*this - (float)o);
  }
  __half& operator*=(const __half& o) {
    return *this = __half((float)*this * (float)o);
  }
  __half& operator/=(const __half& o) {
    return *this = __half((float)*this / (float)o);
  }
};
typedef __half half;

#define COH_HALF(op)                                           \
  COH_FN __half operator op(const __half& a, const __half& b) { \
    return __half((float)a op(float) b);                       \
  }
COH_HALF(+)
COH_HALF(-)
COH_HALF(*)
COH_HALF(/)
#undef COH_HALF
#define COH_HALF(op)                                         \
  COH_FN bool operator op(const __half& a, const __half& b) { \
    return (float)a op(float) b;                             \
  }
COH_HALF(==)
COH_HALF(!=)
COH_HALF(<)
COH_HALF(<=)
COH_HALF(>)
COH_HALF(>=)
#undef COH_HALF
COH_FN __half operator-(const __half& a) {
  return __half(__half_raw{(unsigned short)(a.__x ^ 0x8000u)});
}

COH_FN __half __float2half(float v) { return __half(v); }
COH_FN __half __float2half_rn(float v) { return __half(v); }
COH_FN __half __double2half(double v) { return __half(v); }
COH_FN float __half2float(__half v) { return (float)v; }
COH_FN unsigned short __half_as_ushort(__half v) { return v.__x; }
COH_FN __half __ushort_as_half(unsigned short v) {
  return __half(__half_raw{v});
}
COH_FN __half __hadd(__half a, __half b) { return a + b; }
COH_FN __half __hsub(__half a, __half b) { return a - b; }
COH_FN __half __hmul(__half a, __half b) { return a * b; }
COH_FN __half __hfma(__half a, __half b, __half c) {
  // exact in double but for the one rounding
  return __half((double)(float)a * (double)(float)b + (double)(float)c);
}
COH_FN bool __hisnan(__half v) { return (v.__x & 0x7fffu) > 0x7c00u; }
COH_SHUFFLES(__half)
COH_ATOMIC(atomicAdd, __half, old + v)
