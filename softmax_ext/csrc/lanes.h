// Visits of W rows side by side, one row per lane: for a middle axis (inner >= W), where neighbouring lanes are
// neighbours in memory, and for short rows, which are transposed into scratch first.
#pragma once
#include "accumulate.h"
#include "row_state.h"
#include "transform.h"
#include "rows.h"
#include <type_traits>
#include <utility>

namespace softmax_ext::SX_ISA {

// Element v of all W rows.
template <class T> struct Strip {
  T* p;
  int64_t stride;
  SX_INLINE Vec<Compute<std::remove_const_t<T>>> operator[](int64_t v) const { return load(p + v * stride); }
  SX_INLINE void set(int64_t v, Vec<Compute<std::remove_const_t<T>>> x) const { store(p + v * stride, x); }
};

// Where rows r0 .. r0 + n of an (outer, V, inner) array begin. Missing lanes repeat the last row, so that they hold
// harmless numbers; scatter() never writes them.
template <class F> SX_INLINE void row_bases(const Layout& y, int64_t r0, int64_t n, int64_t (&base)[W<F>]) {
  if (y.inner == 1) {
    for (int64_t l = 0; l < W<F>; ++l) base[l] = (r0 + (l < n ? l : n - 1)) * y.V;
    return;
  }
  int64_t o = r0 / y.inner, i = r0 % y.inner;  // one division for all: sixteen cost more than sixteen exponentials
  for (int64_t l = 0; l < W<F>; ++l) {
    base[l] = o * y.V * y.inner + i;
    if (l + 1 < n && ++i == y.inner) i = 0, ++o;
  }
}

// A square of W registers, transposed by exchanging blocks of 1, 2, 4, ... lanes between pairs of rows.
template <class F, int K, size_t... I>
SX_INLINE void exchange(Vec<F>& a, Vec<F>& b, std::index_sequence<I...>) {
  Vec<F> low = __builtin_shufflevector(a, b, (I & K ? W<F> + I - K : I)...);
  b = __builtin_shufflevector(a, b, (I & K ? W<F> + I : I + K)...);
  a = low;
}
template <class F, int K = 1> SX_INLINE void transpose(Vec<F> (&x)[W<F>]) {
  for (int r = 0; r < W<F>; ++r)
    if (!(r & K)) exchange<F, K>(x[r], x[r + K], std::make_index_sequence<W<F>>());
  if constexpr (2 * K < W<F>) transpose<F, 2 * K>(x);
}

// The rows as a strip in scratch, which has room for V rounded up to W.
template <class T> void gather(const T* x, const Layout& y, int64_t r0, int64_t n, Compute<T>* scratch) {
  using F = Compute<T>;
  int64_t base[W<F>];
  row_bases<F>(y, r0, n, base);
  if (y.inner == 1) {
    for (int64_t v = 0; v < y.V; v += W<F>) {
      Vec<F> square[W<F>];
      int64_t columns = y.V - v < W<F> ? y.V - v : W<F>;
      if (columns == W<F>)
        for (int l = 0; l < W<F>; ++l) square[l] = load(x + base[l] + v);
      else
        for (int l = 0; l < W<F>; ++l) square[l] = load_part(x + base[l] + v, columns, F(0));
      transpose<F>(square);
      for (int c = 0; c < W<F>; ++c) store(scratch + (v + c) * W<F>, square[c]);
    }
    return;
  }
  for (int64_t v = 0; v < y.V; ++v)
    for (int l = 0; l < W<F>; ++l) scratch[v * W<F> + l] = get(x + base[l] + v * y.inner);
}
template <class T> void scatter(const Compute<T>* scratch, const Layout& y, int64_t r0, int64_t n, T* x) {
  using F = Compute<T>;
  int64_t base[W<F>];
  row_bases<F>(y, r0, n, base);
  if (y.inner == 1) {
    for (int64_t v = 0; v < y.V; v += W<F>) {
      Vec<F> square[W<F>];
      int64_t columns = y.V - v < W<F> ? y.V - v : W<F>;
      for (int c = 0; c < W<F>; ++c) square[c] = load(scratch + (v + c) * W<F>);
      transpose<F>(square);
      if (columns == W<F> && n == W<F>)
        for (int l = 0; l < W<F>; ++l) store(x + base[l] + v, square[l]);
      else
        for (int64_t l = 0; l < n; ++l) store_n(x + base[l] + v, columns, square[l]);
    }
    return;
  }
  for (int64_t l = 0; l < n; ++l)
    for (int64_t v = 0; v < y.V; ++v) put(x + base[l] + v * y.inner, scratch[v * W<F> + l]);
}

template <class F> struct LaneState {
  Vec<F> top;    // maximum of the raw logits
  Vec<F> m;      // the same after scale and cap
  Vec<F> shift;  // m, or 0 where it is not finite
  Sum<F> sum;    // exp over everything below the maximum
  Ints<F> ties = {};  // minus the number of positions of the maximum

  template <class X> SX_INLINE void find_max(X x, int64_t V, const Transform<F>& tr) {
    Vec<F> a = all<F>(-__builtin_inff()), b = a;
    int64_t v = 0;
    for (; v + 2 <= V; v += 2) {
      a = max(x[v], a);
      b = max(x[v + 1], b);
    }
    if (v < V) a = max(x[v], a);
    top = max(a, b);
    m = tr.on ? tr(top) : top;
    shift = abs(m) < all<F>(__builtin_inff()) ? m : Vec<F>{};
  }
  SX_INLINE void add(Vec<F> x, Vec<F> e) {
    Ints<F> is_top = x == top;
    ties += is_top;
    sum.add(is_top ? Vec<F>{} : e);
  }
  // rest, and NaN for a row whose maximum is not finite
  SX_INLINE void close(double* m_out, double* rest) const {
    F top_m[W<F>];
    typename Of<F>::Int count[W<F>];
    store(top_m, m);
    std::memcpy(count, &ties, sizeof count);
    sum.lanes(rest);
    for (int l = 0; l < W<F>; ++l) {
      double mm = (double)top_m[l], r = rest[l] - (double)(count[l] + 1);
      m_out[l] = mm;
      rest[l] = mm - mm == 0 ? r : nan;
    }
  }
};

// Per-lane arrays from and to row-shaped arrays, n lanes of them.
template <class F> SX_INLINE void rows_in(const void* p, int64_t r0, int64_t n, double* out) {
  const F* f = p ? (const F*)p + r0 : nullptr;
  if (p && n == W<F>)
    for (int l = 0; l < W<F>; ++l) out[l] = (double)f[l];
  else
    for (int l = 0; l < W<F>; ++l) out[l] = p && l < n ? (double)f[l] : 0;
}
template <class F> SX_INLINE void rows_out(void* p, int64_t r0, int64_t n, const double* x) {
  if (!p) return;
  F* f = (F*)p + r0;
  if (n == W<F>)
    for (int l = 0; l < W<F>; ++l) f[l] = (F)x[l];
  else
    for (int64_t l = 0; l < n; ++l) f[l] = (F)x[l];
}
template <class F> SX_INLINE Vec<F> to_vec(const double* x) {
  F v[W<F>];
  for (int l = 0; l < W<F>; ++l) v[l] = (F)x[l];
  return load(v);
}

}  // namespace softmax_ext::SX_ISA
