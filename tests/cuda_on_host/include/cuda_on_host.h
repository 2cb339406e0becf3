// The words of CUDA C++ that kernels use, for a compiler of the host.
#pragma once

#if defined(__has_include)
#if __has_include(<bits/c++config.h>)
#include <bits/c++config.h>
#undef _GLIBCXX_USE_STD_SPEC_FUNCS  // slow to compile, and not used here
#endif
#endif
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

extern "C" int printf(const char*, ...);

// NVRTC, with which CuPy compiles, does not have these.
#undef INFINITY
#undef NAN
#undef HUGE_VAL
#undef HUGE_VALF

#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDACC_VER_MAJOR__ 12
#define __CUDA_ARCH__ 700

#define __global__
#define __device__ __attribute__((unused)) inline
#define __host__
#define __constant__
#define __shared__ static  // found by its name in the table of symbols
#define __forceinline__ __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned int x, y, z;
};
struct dim3 {
  unsigned int x, y, z;
};

extern "C" {
// Constant for the thread that sees them; the runtime sets them at each
// switch.
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
extern char coh_dynamic_shared[];
uint64_t coh_barrier(int kind, int value);
uint64_t coh_warp(int kind, unsigned int mask, uint64_t value, int argument,
                  int width);
unsigned int coh_active();
void coh_fence();
void coh_fail(const char* format, ...) __attribute__((noreturn));
}

static const int warpSize = 32;

#undef assert
#define assert(e) \
  ((e) ? (void)0 : coh_fail("line %d: assertion failed: %s", __LINE__, #e))
#define __trap() coh_fail("line %d: trap", __LINE__)
// An assumption that is wrong is a fault.
#define __builtin_assume(e) \
  ((e) ? (void)0 : coh_fail("line %d: wrong assumption: %s", __LINE__, #e))

#define COH_FN static inline __attribute__((unused))

// ------------------------------------------------------------- barriers
COH_FN void __syncthreads() { coh_barrier(0, 0); }
COH_FN int __syncthreads_or(int p) { return (int)coh_barrier(1, p); }
COH_FN int __syncthreads_and(int p) { return (int)coh_barrier(2, p); }
COH_FN int __syncthreads_count(int p) { return (int)coh_barrier(3, p); }
COH_FN void __syncwarp(unsigned int mask = 0xffffffffu) {
  coh_warp(0, mask, 0, 0, 32);
}
COH_FN void __threadfence_block() { asm volatile("" ::: "memory"); }
COH_FN void __threadfence() {
  coh_fence();
  __threadfence_block();
}
COH_FN void __threadfence_system() { __threadfence(); }
COH_FN void __nanosleep(unsigned int) {}
COH_FN unsigned int __activemask() { return coh_active(); }

COH_FN unsigned int __ballot_sync(unsigned int mask, int p) {
  return (unsigned int)coh_warp(5, mask, p != 0, 0, 32);
}
COH_FN int __any_sync(unsigned int mask, int p) {
  return (int)coh_warp(6, mask, p != 0, 0, 32);
}
COH_FN int __all_sync(unsigned int mask, int p) {
  return (int)coh_warp(7, mask, p != 0, 0, 32);
}

template <typename T>
inline T coh_shuffle(int kind, unsigned int mask, T v, int k, int width) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  bits = coh_warp(kind, mask, bits, k, width);
  memcpy(static_cast<void*>(&v), &bits, sizeof(T));
  return v;
}

#define COH_SHUFFLES(T)                                                     \
  COH_FN T __shfl_sync(unsigned int m, T v, int k, int w = 32) {            \
    return coh_shuffle(1, m, v, k, w);                                      \
  }                                                                         \
  COH_FN T __shfl_up_sync(unsigned int m, T v, unsigned int k, int w = 32) {\
    return coh_shuffle(2, m, v, (int)k, w);                                 \
  }                                                                         \
  COH_FN T __shfl_down_sync(unsigned int m, T v, unsigned int k,            \
                            int w = 32) {                                   \
    return coh_shuffle(3, m, v, (int)k, w);                                 \
  }                                                                         \
  COH_FN T __shfl_xor_sync(unsigned int m, T v, int k, int w = 32) {        \
    return coh_shuffle(4, m, v, k, w);                                      \
  }
COH_SHUFFLES(int)
COH_SHUFFLES(unsigned int)
COH_SHUFFLES(long)
COH_SHUFFLES(unsigned long)
COH_SHUFFLES(long long)
COH_SHUFFLES(unsigned long long)
COH_SHUFFLES(float)
COH_SHUFFLES(double)

// -------------------------------------------------------------- atomics
// Threads change places at barriers only, so plain code is atomic.
#ifdef COH_RACES
extern "C" void coh_atomic(void* p, size_t n);
#define COH_ATOMIC_FN COH_FN __attribute__((noinline, no_sanitize("thread")))
#else
#define coh_atomic(p, n)
#define COH_ATOMIC_FN COH_FN
#endif
#define COH_ATOMIC(name, T, expression) \
  COH_ATOMIC_FN T name(T* p, T v) {     \
    coh_atomic(p, sizeof(T));           \
    const T old = *p;                   \
    *p = (expression);                  \
    return old;                         \
  }
#define COH_ATOMICS(T)                             \
  COH_ATOMIC(atomicMin, T, old < v ? old : v)      \
  COH_ATOMIC(atomicMax, T, old > v ? old : v)      \
  COH_ATOMIC(atomicAnd, T, old & v)                \
  COH_ATOMIC(atomicOr, T, old | v)                 \
  COH_ATOMIC(atomicXor, T, old ^ v)
COH_ATOMICS(int)
COH_ATOMICS(unsigned int)
COH_ATOMICS(long long)
COH_ATOMICS(unsigned long long)
COH_ATOMIC(atomicAdd, int, (int)((unsigned int)old + (unsigned int)v))
COH_ATOMIC(atomicAdd, unsigned int, old + v)
COH_ATOMIC(atomicAdd, unsigned long long, old + v)
COH_ATOMIC(atomicAdd, float, old + v)
COH_ATOMIC(atomicAdd, double, old + v)
COH_ATOMIC(atomicSub, int, (int)((unsigned int)old - (unsigned int)v))
COH_ATOMIC(atomicSub, unsigned int, old - v)
COH_ATOMIC(atomicExch, int, v)
COH_ATOMIC(atomicExch, unsigned int, v)
COH_ATOMIC(atomicExch, unsigned long long, v)
COH_ATOMIC(atomicExch, float, v)
COH_ATOMIC(atomicInc, unsigned int, old >= v ? 0 : old + 1)
COH_ATOMIC(atomicDec, unsigned int, old == 0 || old > v ? v : old - 1)
#define COH_CAS(T)                                 \
  COH_ATOMIC_FN T atomicCAS(T* p, T compare, T v) { \
    coh_atomic(p, sizeof(T));                      \
    const T old = *p;                              \
    if (old == compare) *p = v;                    \
    return old;                                    \
  }
COH_CAS(int)
COH_CAS(unsigned int)
COH_CAS(unsigned long long)
COH_CAS(unsigned short)

// -------------------------------------------------------------- numbers
template <typename To, typename From>
inline To coh_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "the sizes differ");
  To r;
  memcpy(static_cast<void*>(&r), &v, sizeof(To));
  return r;
}
COH_FN int __float_as_int(float v) { return coh_bits<int>(v); }
COH_FN unsigned int __float_as_uint(float v) {
  return coh_bits<unsigned int>(v);
}
COH_FN float __int_as_float(int v) { return coh_bits<float>(v); }
COH_FN float __uint_as_float(unsigned int v) { return coh_bits<float>(v); }
COH_FN long long __double_as_longlong(double v) {
  return coh_bits<long long>(v);
}
COH_FN double __longlong_as_double(long long v) {
  return coh_bits<double>(v);
}

COH_FN int __popc(unsigned int v) { return __builtin_popcount(v); }
COH_FN int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
COH_FN int __clz(int v) { return v ? __builtin_clz((unsigned int)v) : 32; }
COH_FN int __clzll(long long v) {
  return v ? __builtin_clzll((unsigned long long)v) : 64;
}
COH_FN int __ffs(int v) { return __builtin_ffs(v); }
COH_FN int __ffsll(long long v) { return __builtin_ffsll(v); }
COH_FN int __mulhi(int a, int b) { return (int)(((long long)a * b) >> 32); }
COH_FN unsigned int __umulhi(unsigned int a, unsigned int b) {
  return (unsigned int)(((unsigned long long)a * b) >> 32);
}

COH_FN float rsqrtf(float v) { return 1.0f / sqrtf(v); }
COH_FN float rsqrt(float v) { return 1.0f / sqrtf(v); }
COH_FN double rsqrt(double v) { return 1.0 / sqrt(v); }
COH_FN float __saturatef(float v) {
  return v >= 1 ? 1.0f : v > 0 ? v : 0.0f;
}
#define __expf(v) expf(v)  // macros, as a libc has functions of the names
#define __logf(v) logf(v)
#define __powf(a, b) powf(a, b)
COH_FN float __fdividef(float a, float b) { return a / b; }
COH_FN float __fadd_rn(float a, float b) { return a + b; }
COH_FN float __fsub_rn(float a, float b) { return a - b; }
COH_FN float __fmul_rn(float a, float b) { return a * b; }
COH_FN float __fdiv_rn(float a, float b) { return a / b; }
COH_FN float __frcp_rn(float v) { return 1.0f / v; }
COH_FN float __fsqrt_rn(float v) { return sqrtf(v); }
COH_FN float __frsqrt_rn(float v) { return (float)(1.0 / sqrt((double)v)); }
COH_FN float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
COH_FN double __dadd_rn(double a, double b) { return a + b; }
COH_FN double __dmul_rn(double a, double b) { return a * b; }
COH_FN double __ddiv_rn(double a, double b) { return a / b; }
COH_FN double __dsqrt_rn(double v) { return sqrt(v); }
COH_FN double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
COH_FN float __double2float_rn(double v) { return (float)v; }
COH_FN float __int2float_rn(int v) { return (float)v; }
COH_FN int __float2int_rn(float v) { return (int)rintf(v); }
COH_FN int __float2int_rz(float v) { return (int)v; }

// The overloads of CUDA, no more: what is ambiguous there is so here.
#define COH_MINMAX(R, A, B)                            \
  COH_FN R min(A a, B b) {                             \
    return (R)a < (R)b ? (R)a : (R)b;                  \
  }                                                    \
  COH_FN R max(A a, B b) {                             \
    return (R)a > (R)b ? (R)a : (R)b;                  \
  }
#define COH_MINMAXES(S, U) \
  COH_MINMAX(S, S, S)      \
  COH_MINMAX(U, U, U)      \
  COH_MINMAX(U, S, U)      \
  COH_MINMAX(U, U, S)
COH_MINMAXES(int, unsigned int)
COH_MINMAXES(long, unsigned long)
COH_MINMAXES(long long, unsigned long long)
COH_FN float min(float a, float b) { return fminf(a, b); }
COH_FN float max(float a, float b) { return fmaxf(a, b); }
COH_FN double min(double a, double b) { return fmin(a, b); }
COH_FN double max(double a, double b) { return fmax(a, b); }
COH_FN double min(float a, double b) { return fmin((double)a, b); }
COH_FN double max(float a, double b) { return fmax((double)a, b); }
COH_FN double min(double a, float b) { return fmin(a, (double)b); }
COH_FN double max(double a, float b) { return fmax(a, (double)b); }

// -------------------------------------------------------------- vectors
#define COH_VECTOR2(T, name, bytes)                                        \
  struct __align__(bytes) name##2 { T x, y; };                             \
  COH_FN name##2 make_##name##2(T x, T y) { return name##2{x, y}; }
#define COH_VECTOR4(T, name, bytes)                                        \
  struct __align__(bytes) name##4 { T x, y, z, w; };                       \
  COH_FN name##4 make_##name##4(T x, T y, T z, T w) {                      \
    return name##4{x, y, z, w};                                            \
  }
COH_VECTOR2(short, short, 4)
COH_VECTOR4(short, short, 8)
COH_VECTOR2(unsigned short, ushort, 4)
COH_VECTOR4(unsigned short, ushort, 8)
COH_VECTOR2(float, float, 8)
COH_VECTOR4(float, float, 16)
COH_VECTOR2(double, double, 16)
COH_VECTOR2(int, int, 8)
COH_VECTOR4(int, int, 16)
COH_VECTOR2(unsigned int, uint, 8)
COH_VECTOR4(unsigned int, uint, 16)
COH_VECTOR2(long long, longlong, 16)
COH_VECTOR2(unsigned long long, ulonglong, 16)

// Loads and stores with a hint for the caches; of no other types.
#define COH_LOAD(name, T) \
  COH_FN T name(const T* p) { return *p; }
#define COH_STORE(name, T) \
  COH_FN void name(T* p, T v) { *p = v; }
#define COH_HINTS(T)    \
  COH_LOAD(__ldg, T)    \
  COH_LOAD(__ldca, T)   \
  COH_LOAD(__ldcg, T)   \
  COH_LOAD(__ldcs, T)   \
  COH_LOAD(__ldcv, T)   \
  COH_STORE(__stwb, T)  \
  COH_STORE(__stcg, T)  \
  COH_STORE(__stcs, T)
COH_HINTS(char)
COH_HINTS(signed char)
COH_HINTS(unsigned char)
COH_HINTS(short)
COH_HINTS(unsigned short)
COH_HINTS(int)
COH_HINTS(unsigned int)
COH_HINTS(long)
COH_HINTS(unsigned long)
COH_HINTS(long long)
COH_HINTS(unsigned long long)
COH_HINTS(float)
COH_HINTS(double)
COH_HINTS(short2)
COH_HINTS(short4)
COH_HINTS(ushort2)
COH_HINTS(ushort4)
COH_HINTS(int2)
COH_HINTS(int4)
COH_HINTS(uint2)
COH_HINTS(uint4)
COH_HINTS(longlong2)
COH_HINTS(ulonglong2)
COH_HINTS(float2)
COH_HINTS(float4)
COH_HINTS(double2)

// -------------------------------- how the host learns of and calls a kernel
struct __half;
class float16;

namespace cuda_on_host {

template <typename T>
struct Code {
  static const int value = 'x';
};
#define COH_CODE(T, c)                \
  template <>                         \
  struct Code<T> {                    \
    static const int value = c;       \
  };
COH_CODE(bool, 'b')
COH_CODE(char, 'i')
COH_CODE(signed char, 'i')
COH_CODE(short, 'i')
COH_CODE(int, 'i')
COH_CODE(long, 'i')
COH_CODE(long long, 'i')
COH_CODE(unsigned char, 'u')
COH_CODE(unsigned short, 'u')
COH_CODE(unsigned int, 'u')
COH_CODE(unsigned long, 'u')
COH_CODE(unsigned long long, 'u')
COH_CODE(float, 'f')
COH_CODE(double, 'f')
COH_CODE(__half, 'f')
COH_CODE(float16, 'f')
COH_CODE(void, 'v')

template <typename T>
struct Plain {
  typedef T type;
  static const int constant = 0;
};
template <typename T>
struct Plain<const T> {
  typedef T type;
  static const int constant = 1;
};
template <typename T>
struct Plain<volatile T> {
  typedef T type;
  static const int constant = 0;
};
template <typename T>
struct Plain<const volatile T> {
  typedef T type;
  static const int constant = 1;
};

template <typename T>
struct Size {
  static const int value = sizeof(T);
};
template <>
struct Size<void> {
  static const int value = 0;
};

template <typename T>
struct Parameter {
  static void describe(int64_t* p) {
    p[0] = 0;
    p[1] = 0;
    p[2] = Code<T>::value;
    p[3] = sizeof(T);
  }
};
template <typename T>
struct Parameter<T*> {
  static void describe(int64_t* p) {
    p[0] = 1;
    p[1] = Plain<T>::constant;
    p[2] = Code<typename Plain<T>::type>::value;
    p[3] = Size<typename Plain<T>::type>::value;
  }
};

template <int... I>
struct Indices {};
template <int n, int... I>
struct MakeIndices : MakeIndices<n - 1, n - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  typedef Indices<I...> type;
};

template <typename... P>
int describe(void (*)(P...), int64_t* p) {
  int64_t ignored[] = {0, (Parameter<P>::describe(p), p += 4, 0)...};
  (void)ignored;
  return sizeof...(P);
}

template <typename... P, int... I>
inline void call_with(void (*f)(P...), void** a, Indices<I...>) {
  (void)a;
  f(*static_cast<typename Plain<P>::type*>(a[I])...);
}

template <typename... P>
inline void call(void (*f)(P...), void** a) {
  call_with(f, a, typename MakeIndices<sizeof...(P)>::type());
}

}  // namespace cuda_on_host

#define COH_EXPORT(...)                                                \
  extern "C" __attribute__((visibility("default"))) void coh_thunk(    \
      void** a) {                                                      \
    cuda_on_host::call(&__VA_ARGS__, a);                               \
  }                                                                    \
  extern "C" __attribute__((visibility("default"))) int coh_describe(  \
      int64_t* p) {                                                    \
    return cuda_on_host::describe(&__VA_ARGS__, p);                    \
  }
