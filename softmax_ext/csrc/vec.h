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

template <class V> SX_INLINE V abs(V x) { return x < 0 ? -x : x; }

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
  typedef float Half __attribute__((vector_size(SX_BYTES / 2)));
  Half part[2];
  std::memcpy(part, &v, sizeof v);
  return __builtin_convertvector(part[0], VD) + __builtin_convertvector(part[1], VD);
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

// Loads and stores, unaligned, converting storage types. Halves are rounded once, to nearest even.
SX_INLINE VF load(const float* p) { VF v; std::memcpy(&v, p, sizeof v); return v; }
SX_INLINE VD load(const double* p) { VD v; std::memcpy(&v, p, sizeof v); return v; }
SX_INLINE void store(float* p, VF v) { std::memcpy(p, &v, sizeof v); }
SX_INLINE void store(double* p, VD v) { std::memcpy(p, &v, sizeof v); }

SX_INLINE VF load(const bf16* p) {
  VH h;
  std::memcpy(&h, p, sizeof h);
  return (VF)(__builtin_convertvector(h, VU) << 16);
}
SX_INLINE VH bf16_bits(VF v) {
  VU u = (VU)v;
  VU rounded = (u + (((u >> 16) & 1) + 0x7fff)) >> 16;
  VI nan = v != v;
  VU r = ((VU)~nan & rounded) | ((VU)nan & 0x7fc0);
  return __builtin_convertvector(r, VH);
}
SX_INLINE void store(bf16* p, VF v) {
  VH h = bf16_bits(v);
  std::memcpy(p, &h, sizeof h);
}

SX_INLINE float f16_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, mag = h & 0x7fff, u;
  if (mag >= 0x7c00) u = 0x7f800000 | (mag & 0x3ff) << 13;
  else if (mag >= 0x400) u = (mag << 13) + (112u << 23);
  else { float f = (float)mag * 0x1p-24f; std::memcpy(&u, &f, 4); }
  u |= sign;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
SX_INLINE uint16_t float_to_f16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and above round to infinity
  if (a >= 0x38800000) return (uint16_t)(sign | ((a + 0xfff + (a >> 13 & 1) - (112u << 23)) >> 13));
  float mag;
  std::memcpy(&mag, &a, 4);
  mag += 0.5f;  // the sum's last bit is 2^-24, the spacing of f16 subnormals: the addition rounds
  std::memcpy(&a, &mag, 4);
  return (uint16_t)(sign | (a - 0x3f000000));
}
SX_INLINE VF load(const f16* p) {
#if SX_AVX512
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif SX_AVX2
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (VF)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
#else
  VF v;
  for (int i = 0; i < W<float>; ++i) v[i] = f16_to_float(p[i].bits);
  return v;
#endif
}
SX_INLINE void store(f16* p, VF v) {
#if SX_AVX512
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif SX_AVX2
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < W<float>; ++i) p[i].bits = float_to_f16(v[i]);
#endif
}

// One element. The half conversions go through the vector code, so that a tail rounds like the body.
SX_INLINE float get(const float* p) { return *p; }
SX_INLINE double get(const double* p) { return *p; }
SX_INLINE float get(const bf16* p) {
  uint32_t u = (uint32_t)p->bits << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
SX_INLINE float get(const f16* p) { return f16_to_float(p->bits); }
SX_INLINE void put(float* p, float v) { *p = v; }
SX_INLINE void put(double* p, double v) { *p = v; }
SX_INLINE void put(bf16* p, float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  p->bits = v != v ? 0x7fc0 : (uint16_t)((u + ((u >> 16 & 1) + 0x7fff)) >> 16);
}
SX_INLINE void put(f16* p, float v) { p->bits = float_to_f16(v); }

// The first n < W elements, the rest of the register holding `fill`; never touches memory past p + n.
template <class T> SX_INLINE Vec<Compute<T>> load_part(const T* p, int64_t n, Compute<T> fill) {
  using F = Compute<T>;
  alignas(SX_BYTES) F buffer[W<F>];
  for (int i = 0; i < W<F>; ++i) buffer[i] = fill;
  for (int64_t i = 0; i < n; ++i) buffer[i] = get(p + i);
  return load(buffer);
}
template <class T> SX_INLINE void store_part(T* p, int64_t n, Vec<Compute<T>> v) {
  using F = Compute<T>;
  alignas(SX_BYTES) F buffer[W<F>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) put(p + i, buffer[i]);
}
#if SX_AVX512
SX_INLINE __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }
template <> SX_INLINE VF load_part<float>(const float* p, int64_t n, float fill) {
  return (VF)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p);
}
template <> SX_INLINE void store_part<float>(float* p, int64_t n, VF v) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
// Element by element, the tail of a bf16 row of 1000 costs as much as the rest of it.
template <> SX_INLINE VF load_part<bf16>(const bf16* p, int64_t n, float fill) {
  __m512i u = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16);
  return (VF)_mm512_mask_blend_ps(first_lanes(n), _mm512_set1_ps(fill), _mm512_castsi512_ps(u));
}
template <> SX_INLINE void store_part<bf16>(bf16* p, int64_t n, VF v) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)bf16_bits(v));
}
template <> SX_INLINE VF load_part<f16>(const f16* p, int64_t n, float fill) {
  __m512 v = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  return (VF)_mm512_mask_blend_ps(first_lanes(n), _mm512_set1_ps(fill), v);
}
template <> SX_INLINE void store_part<f16>(f16* p, int64_t n, VF v) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif SX_AVX2
SX_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <> SX_INLINE VF load_part<float>(const float* p, int64_t n, float fill) {
  __m256i m = first_lanes(n);
  return (VF)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
}
template <> SX_INLINE void store_part<float>(float* p, int64_t n, VF v) {
  _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
}
#endif

template <class T> SX_INLINE Vec<Compute<T>> load_n(const T* p, int64_t n, Compute<T> fill) {
  return n == W<Compute<T>> ? load(p) : load_part(p, n, fill);
}
template <class T> SX_INLINE void store_n(T* p, int64_t n, Vec<Compute<T>> v) {
  if (n == W<Compute<T>>) store(p, v);
  else store_part(p, n, v);
}
// Calls f(i, n) for full vectors (n = W) and once for what is left (n < W).
template <class F, class Body> SX_INLINE void each_vector(int64_t count, Body f) {
  int64_t i = 0;
  for (; i + W<F> <= count; i += W<F>) f(i, (int64_t)W<F>);
  if (i < count) f(i, count - i);
}

template <class T> void fill_row(T* out, int64_t n, Compute<T> value) {
  for (int64_t i = 0; i < n; ++i) put(out + i, value);
}

}  // namespace softmax_ext::SX_ISA
