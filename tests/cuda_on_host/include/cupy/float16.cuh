// The float16 of CuPy: a half that computes as float.
#pragma once

#include "cuda_fp16.h"
#include "cupy/carray.cuh"

class float16 {
 private:
  half data_;

 public:
  float16() = default;
  float16(float v) : data_(v) {}
  explicit float16(bool v) : data_(float(v)) {}
  explicit float16(double v) : data_(v) {}
  explicit float16(int v) : data_(v) {}
  explicit float16(unsigned int v) : data_(v) {}
  explicit float16(long long v) : data_(v) {}
  explicit float16(unsigned long long v) : data_(v) {}
  explicit float16(const half& v) : data_(v) {}
  explicit float16(const __half_raw& v) : data_(v) {}

  operator float() const { return float(data_); }

  float16& operator=(const float16&) = default;
  float16(const float16&) = default;
  template <typename T>
  float16& operator=(const T& v) {
    *this = static_cast<float16>(v);
    return *this;
  }

  static const unsigned short nan = 0x7e00u;

  unsigned short to_bits() const { return __half_as_ushort(data_); }
  static float16 from_bits(unsigned short v) {
    return float16(__ushort_as_half(v));
  }

  int iszero() const { return (to_bits() & 0x7fffu) == 0; }
  int isnan() const { return (to_bits() & 0x7fffu) > 0x7c00u; }
  int isinf() const { return (to_bits() & 0x7fffu) == 0x7c00u; }
  int isfinite() const { return (to_bits() & 0x7c00u) != 0x7c00u; }
  int signbit() const { return (to_bits() & 0x8000u) != 0; }

  template <typename T>
  float16& operator+=(const T& v) {
    *this = *this + v;
    return *this;
  }
  template <typename T>
  float16& operator-=(const T& v) {
    *this = *this - v;
    return *this;
  }
  template <typename T>
  float16& operator*=(const T& v) {
    *this = *this * v;
    return *this;
  }
  template <typename T>
  float16& operator/=(const T& v) {
    *this = *this / v;
    return *this;
  }

  friend float16 copysign(float16 x, float16 y) {
    return from_bits((x.to_bits() & 0x7fffu) | (y.to_bits() & 0x8000u));
  }
};

COH_FN float16 min(float16 x, float16 y) {
  return float16(min(float(x), float(y)));
}
COH_FN float16 max(float16 x, float16 y) {
  return float16(max(float(x), float(y)));
}
COH_FN float16 fmin(float16 x, float16 y) {
  return float16(fmin(float(x), float(y)));
}
COH_FN float16 fmax(float16 x, float16 y) {
  return float16(fmax(float(x), float(y)));
}
COH_FN int iszero(float16 x) { return x.iszero(); }
COH_FN int isnan(float16 x) { return x.isnan(); }
COH_FN int isinf(float16 x) { return x.isinf(); }
COH_FN int isfinite(float16 x) { return x.isfinite(); }
COH_FN int signbit(float16 x) { return x.signbit(); }
