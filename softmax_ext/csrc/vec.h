// Vector registers and memory: loads and stores, unaligned, of whole vectors and parts, converting storage types.
#pragma once
#include "registers.h"

namespace softmax_ext::SX_ISA {

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
