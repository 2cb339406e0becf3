// The atomic functions that CuPy adds to those of CUDA.
#pragma once

#include "cupy/carray.cuh"

COH_ATOMIC(atomicAdd, long long,
           (long long)((unsigned long long)old + (unsigned long long)v))

template <typename T, typename = decltype(T::from_bits(0))>
COH_ATOMIC_FN T atomicAdd(T* p, T v) {
  coh_atomic(p, sizeof(T));
  const T old = *p;
  *p = T(float(old) + float(v));
  return old;
}
