// x . W[id] for K classes a row, and the two products that are its derivatives.
//
//   z_ik = x_i . W[id_ik]          dX_i = sum_k c_ik W[id_ik]          dW[v] = sum of c_ik x_i over id_ik = v
//
// Rows of W lie anywhere: each is fetched while the one before it is worked on. Half-precision rows are summed in
// float32 and rounded once.
#pragma once
#include "rows.h"
#include "scratch.h"
#include "vec.h"

namespace softmax_ext::SX_ISA {

inline int64_t id_at(const void* ids, Target kind, int64_t at) {
  return kind == Target::i64 ? ((const int64_t*)ids)[at] : (int64_t)((const int32_t*)ids)[at];
}

// The row of W named by the next id, to be fetched ahead: null where it names none.
template <class T> SX_INLINE const T* row_of(const Picked& a, int64_t i, int64_t k) {
  if (k >= a.K) return nullptr;
  int64_t v = id_at(a.ids, a.ids_kind, i * a.K + k);
  return v >= 0 && v < a.V ? (const T*)a.w + v * a.layout.V : nullptr;
}

template <class T> bool picked_fwd(const Picked& a, int64_t begin, int64_t end) {
  using F = Compute<T>;
  const int64_t D = a.layout.V;
  for (int64_t i = begin; i < end; ++i) {
    const T* x = (const T*)a.x + i * D;
    const T* next = row_of<T>(a, i, 0);
    for (int64_t k = 0; k < a.K; ++k) {
      const T* w = next;
      next = row_of<T>(a, i, k + 1);
      F* z = (F*)a.z + i * a.K + k;
      if (!w) {
        *z = id_at(a.ids, a.ids_kind, i * a.K + k) == -1 ? F(0) : (F)__builtin_nan("");
        continue;
      }
      Vec<F> s[4] = {};
      int64_t d = 0;
      for (; d + 4 * W<F> <= D; d += 4 * W<F>)
        for (int l = 0; l < 4; ++l) {
          if (next) __builtin_prefetch(next + d + l * W<F>);
          s[l] = fma(load(x + d + l * W<F>), load(w + d + l * W<F>), s[l]);
        }
      for (; d < D; d += W<F>) {
        int64_t n = D - d < W<F> ? D - d : W<F>;
        if (next) __builtin_prefetch(next + d);
        s[0] = fma(load_n(x + d, n, F(0)), load_n(w + d, n, F(0)), s[0]);
      }
      *z = (F)lane_sum<F>((s[0] + s[1]) + (s[2] + s[3]));
    }
  }
  return true;
}

// sum += c * row, `ahead` being fetched meanwhile
template <class T> SX_INLINE void add_row(Compute<T>* sum, const T* row, Compute<T> c, int64_t D, const T* ahead) {
  using F = Compute<T>;
  each_vector<F>(D, [&](int64_t d, int64_t n) SX_LAMBDA {
    if (ahead) __builtin_prefetch(ahead + d);
    store_n(sum + d, n, fma(all<F>(c), load_n(row + d, n, F(0)), load_n(sum + d, n, F(0))));
  });
}

template <class T> SX_INLINE void begin_row(const Picked& a, int64_t r, Compute<T>* sum) {
  using F = Compute<T>;
  const F by = a.by ? ((const F*)a.by)[r] : F(0);
  for (int64_t d = 0; d < a.layout.V; ++d) sum[d] = a.by ? by * ((const F*)a.of_all)[d] : F(0);
}

template <class T> SX_INLINE void end_row(const Picked& a, void* out, int64_t r, const Compute<T>* sum) {
  using F = Compute<T>;
  const int64_t D = a.layout.V;
  if (a.wide) std::memcpy((F*)out + r * D, sum, (size_t)D * sizeof(F));
  else each_vector<F>(D, [&](int64_t d, int64_t n) SX_LAMBDA { store_n((T*)out + r * D + d, n, load_n(sum + d, n, F(0))); });
}

template <class F> SX_INLINE F coefficient(const Picked& a, int64_t i, int64_t k) {
  int64_t at = k - (a.K - a.C);
  return ((const F*)a.c)[i * a.C + (at > 0 ? at : 0)];
}

template <class T> bool picked_input_bwd(const Picked& a, int64_t begin, int64_t end) {
  using F = Compute<T>;
  const int64_t D = a.layout.V;
  Scratch scratch(D * (int64_t)sizeof(F));
  if (!scratch.p) return false;
  F* sum = (F*)scratch.p;
  for (int64_t i = begin; i < end; ++i) {
    begin_row<T>(a, i, sum);
    const T* next = row_of<T>(a, i, 0);
    for (int64_t k = 0; k < a.K; ++k) {
      const T* w = next;
      next = row_of<T>(a, i, k + 1);
      if (w) add_row(sum, w, coefficient<F>(a, i, k), D, next);
      else if (id_at(a.ids, a.ids_kind, i * a.K + k) != -1) fill_row(sum, D, (F)__builtin_nan(""));
    }
    end_row<T>(a, a.dx, i, sum);
  }
  return true;
}

// A class many rows name: partial sums of 256 terms, so that the rounding of a long sum does not grow with its length.
template <class T> struct LongSum {
  using F = Compute<T>;
  static constexpr int64_t part = 256;
  F *sum, *whole;
  int64_t D, count = 0;
  SX_INLINE void add(const T* row, F c, const T* ahead) {
    if (count == part) fold();
    add_row(sum, row, c, D, ahead);
    ++count;
  }
  void fold() {
    for (int64_t d = 0; d < D; ++d) whole[d] += sum[d], sum[d] = 0;
    count = 0;
  }
};

template <class T> bool picked_weight_bwd(const Picked& a, int64_t begin, int64_t end) {
  using F = Compute<T>;
  const int64_t D = a.layout.V;
  const Pairs& s = *a.pairs;
  const T* x = (const T*)a.x;
  Scratch scratch(2 * D * (int64_t)sizeof(F));
  if (!scratch.p) return false;
  F *sum = (F*)scratch.p, *whole = sum + D;
  auto c = [&](int64_t p) { return coefficient<F>(a, p / a.K, p % a.K); };
  auto pair = [&](int64_t at) { return s.small ? (int64_t)s.small[at] : s.large[at]; };
  for (int64_t v = s.unit[begin]; v < s.unit[end]; ++v) {
    const int64_t n = s.start[v + 1] - s.start[v], first = s.start[v] - s.start[s.from];
    const bool is_long = n > LongSum<T>::part;
    begin_row<T>(a, v, sum);
    if (is_long) fill_row(whole, D, F(0));
    LongSum<T> to{sum, whole, D};
    if (s.small || s.large) {
      for (int64_t i = 0; i < n; ++i) {
        int64_t p = pair(first + i);
        to.add(x + p / a.K * D, c(p), i + 1 < n ? x + pair(first + i + 1) / a.K * D : nullptr);
      }
    } else if (n) {
      for (int64_t p = 0; p < a.layout.outer * a.K; ++p)
        if (id_at(a.ids, a.ids_kind, p) == v) to.add(x + p / a.K * D, c(p), nullptr);
    }
    if (is_long) to.fold();
    end_row<T>(a, a.dw, v, is_long ? whole : sum);
  }
  return true;
}

}  // namespace softmax_ext::SX_ISA
