// One vector register of F. GCC vector extensions (GCC and Clang, x86 and arm64); intrinsics only for the
// few operations that plain expressions cannot name. Compiled once per instruction set: everything lives in
// a namespace of its own, because a function shared between translation units of different -march could
// be linked in its AVX-512 form for a machine without it.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SX_AVX512 1
#define SX_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SX_AVX2 1
#define SX_BYTES 32
#else
#define SX_BYTES 16
#endif
#define SX_INLINE inline __attribute__((always_inline))
#define SX_LAMBDA __attribute__((always_inline))

namespace softmax_ext::SX_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

typedef float VF __attribute__((vector_size(SX_BYTES)));
typedef double VD __attribute__((vector_size(SX_BYTES)));
typedef int32_t VI __attribute__((vector_size(SX_BYTES)));
typedef int64_t VL __attribute__((vector_size(SX_BYTES)));
typedef uint32_t VU __attribute__((vector_size(SX_BYTES)));
typedef uint16_t VH __attribute__((vector_size(SX_BYTES / 2)));

template <class F> struct Of;
template <> struct Of<float> { using V = VF; using I = VI; using Int = int32_t; };
template <> struct Of<double> { using V = VD; using I = VL; using Int = int64_t; };
template <class F> using Vec = typename Of<F>::V;
template <class F> using Ints = typename Of<F>::I;
template <class F> constexpr int W = SX_BYTES / sizeof(F);

template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
template <class T> using Compute = typename ComputeOf<T>::type;

template <class F> SX_INLINE Vec<F> all(F x) { return x - Vec<F>{}; }  // + would turn -0 into 0

SX_INLINE VF fma(VF a, VF b, VF c) {
#if SX_AVX512
  return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SX_AVX2
  return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (VF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
SX_INLINE VD fma(VD a, VD b, VD c) {
#if SX_AVX512
  return (VD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif SX_AVX2
  return (VD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (VD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// The same where one more rounding would show in the result: without the instruction, through double.
SX_INLINE VF fma_last(VF a, VF b, VF c) {
#if SX_AVX512 || SX_AVX2 || defined(__aarch64__)
  return fma(a, b, c);
#else
  float x[W<float>], y[W<float>], z[W<float>];
  std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y), std::memcpy(z, &c, sizeof z);
  for (int i = 0; i < W<float>; ++i) x[i] = (float)((double)x[i] * (double)y[i] + (double)z[i]);
  std::memcpy(&a, x, sizeof x);
  return a;
#endif
}
SX_INLINE VD fma_last(VD a, VD b, VD c) { return fma(a, b, c); }

// max(a, b) is b where either is NaN, on every instruction set: with the running maximum as b a NaN logit is
// skipped, with the data as b it passes through.
SX_INLINE VF max(VF a, VF b) {
#if SX_AVX512
  return (VF)_mm512_max_ps((__m512)a, (__m512)b);
#elif SX_AVX2
  return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (VF)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
SX_INLINE VD max(VD a, VD b) {
#if SX_AVX512
  return (VD)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif SX_AVX2
  return (VD)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  return (VD)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}

SX_INLINE VF abs(VF x) { return (VF)((VI)x & 0x7fffffff); }
SX_INLINE VD abs(VD x) { return (VD)((VL)x & 0x7fffffffffffffff); }

// Over the lanes, in a tree of doubles: a chain of additions would cost a short row more than its exponentials, and
// arrays that the compiler keeps in memory cost as much again.
template <int N> struct Doubles { typedef double V __attribute__((vector_size(N * sizeof(double)))); };
template <int N> SX_INLINE double tree(typename Doubles<N>::V v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typename Doubles<N / 2>::V part[2];
    std::memcpy(part, &v, sizeof v);
    return tree<N / 2>(part[0] + part[1]);
  }
}
SX_INLINE VD doubled(VF v) {  // the upper half of the lanes added to the lower
#if SX_AVX512  // GCC converts a vector of eight by halves
  return (VD)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)) +
         (VD)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#else
  typedef float Half __attribute__((vector_size(SX_BYTES / 2)));
  Half part[2];
  std::memcpy(part, &v, sizeof v);
  return __builtin_convertvector(part[0], VD) + __builtin_convertvector(part[1], VD);
#endif
}
SX_INLINE VD doubled(VD v) { return v; }
template <class F> SX_INLINE double lane_sum(Vec<F> v) { return tree<W<double>>(doubled(v)); }
template <class F> SX_INLINE F lane_max(Vec<F> v) {
#if SX_AVX512
  if constexpr (sizeof(F) == 4) return _mm512_reduce_max_ps((__m512)v);
#endif
  F a[W<F>];
  std::memcpy(a, &v, sizeof a);
  for (int k = W<F> / 2; k > 0; k /= 2)
    for (int i = 0; i < k; ++i) a[i] = a[i + k] > a[i] ? a[i + k] : a[i];
  return a[0];
}
// 2^n from t = n + magic, where the low bits of t hold n plus the exponent bias (see exp.h).
SX_INLINE VF power_of_two(VF t) { return (VF)((VU)t << 23); }
SX_INLINE VD power_of_two(VD t) {
  typedef uint64_t VUL __attribute__((vector_size(SX_BYTES)));
  return (VD)((VUL)t << 52);
}

}  // namespace softmax_ext::SX_ISA
