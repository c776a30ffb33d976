// softmax and log_softmax: forward and backward, wide rows and lanes.
#pragma once
#include "lanes.h"
#include "rows.h"
#include "split.h"
#include "wide.h"
#include <type_traits>

namespace softmax_ext::SX_ISA {

template <class T> const T* at(const void* p, int64_t i) { return (const T*)p + i; }
template <class T> T* at(void* p, int64_t i) { return (T*)p + i; }

// y_j = exp(x_j - m) / (1 + rest). kept: room for the row's exps, which may be y; null where there is none.
template <class T> void softmax_fwd_row(const T* x, T* y, Compute<T>* kept, int64_t V) {
  using F = Compute<T>;
  if (kept) {
    RowState st = visit_row_keeping(x, kept, V);
    Split<F> r(1 / (1 + st.rest));
    each_vector<F>(V, [&](int64_t i, int64_t n) SX_LAMBDA { store_n(y + i, n, r.times(load_n(kept + i, n, F(0)))); });
    if (st.rest != st.rest) fill_row(y, V, (F)nan);
    return;
  }
  RowState st = visit_row<T, false>(x, V, Transform<F>(1, 0));
  Shift<F> s(all<F>((F)st.shift()));
  Split<F> r(1 / (1 + st.rest));
  each_vector<F>(V, [&](int64_t i, int64_t n) SX_LAMBDA {
    store_n(y + i, n, r.times(exp_shifted<F>(load_n(x + i, n, F(0)), s).e));
  });
}
// Keeps: y can hold an unrounded exp until the sum is known.
template <class F, bool Keeps, class X, class Y> void softmax_fwd_lanes(X x, Y y, int64_t V) {
  LaneState<F> st;
  Transform<F> none(1, 0);
  st.find_max(x, V, none);
  Shift<F> s(st.shift);
  for (int64_t v = 0; v < V; ++v) {
    Vec<F> xv = x[v], e = exp_shifted<F>(xv, s).e;
    st.add(xv, e);
    if (Keeps) y.set(v, e);
  }
  double m[W<F>], rest[W<F>];
  st.close(m, rest);
  for (int l = 0; l < W<F>; ++l) rest[l] = 1 / (1 + rest[l]);
  Split<F> r(rest);
  for (int64_t v = 0; v < V; ++v) y.set(v, r.times(Keeps ? y[v] : exp_shifted<F>(x[v], s).e));
}

// dx_j = y_j (dy_j - s), s = sum_i y_i dy_i. Since the y sum to 1, the same for any pivot c:
//
//   dx_j = y_j (g_j - s'),  g_j = dy_j - c,  s' = sum_i y_i g_i        (half precision: divided by the rounded y's sum)
//
// c chooses what is rounded. A confident row (y_m > 1/2) takes dy_m: its own term of s' is then 0, and dx_m = -y_m s'
// is a sum over the others, where dy_m - s would leave 0. Any other row takes s, rounded, so that an offset that all dy
// have in common is gone before a sum rounds: dy_m itself where s is that but for rounding (dy all alike have gradient
// 0); or 0 where s is small beside its terms, which saves a visit.
// (dy_m in every row would not do: for dy one-hot at m, g_j - s' is -1 + (1 - y_m), off by 1 / y_m units.)
template <class F> constexpr F alike = sizeof(F) == 4 ? (F)0x1p-16 : (F)0x1p-45;
template <class F> SX_INLINE F finite_or_0(F c) { return c - c == 0 ? c : 0; }

// What a visit of y and dy - c leaves: the sum of y (dy - c), that of its magnitudes, that of y, and the largest y.
template <class T, bool First> struct Weighed {
  using F = Compute<T>;
  static constexpr bool halves = !std::is_same_v<T, F>;
  Sum<F> sum;
  Vec<F> size = {}, whole = {}, top = {};

  SX_INLINE Weighed(const T* dy, const T* y, int64_t V, F pivot) {
    const Vec<F> c = all<F>(pivot);
    int64_t i = 0;
    for (; i + 8 * W<F> <= V; i += 8 * W<F>) {
      Vec<F> a[8], p[8];
      for (int k = 0; k < 8; ++k) {
        a[k] = load(y + i + k * W<F>);
        Vec<F> g = load(dy + i + k * W<F>);
        p[k] = a[k] * (First ? g : g - c);
      }
      sum.add(p);
      if (!First) continue;
      top = max(max(max(max(a[0], a[1]), max(a[2], a[3])), max(max(a[4], a[5]), max(a[6], a[7]))), top);
      if (halves) whole += ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
      for (int k = 0; k < 8; ++k) p[k] = abs(p[k]);
      size += ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
    }
    Vec<F> left = {};
    for (; i < V; i += W<F>) {
      int64_t n = V - i < W<F> ? V - i : W<F>;
      Vec<F> a = load_n(y + i, n, F(0)), g = load_n(dy + i, n, F(0)), p = a * (First ? g : g - c);
      left += p;
      if (!First) continue;
      top = max(a, top);
      if (halves) whole += a;
      size += abs(p);
    }
    sum.add(left);
  }
};
template <class T> void softmax_bwd_row(const T* dy, const T* y, T* dx, int64_t V) {
  using F = Compute<T>;
  Weighed<T, true> first(dy, y, V, 0);
  double whole = first.halves ? lane_sum<F>(first.whole) : 1;
  if (!(whole > 0)) whole = 1;  // a row of zeros has no distribution and no gradient
  double mean = first.sum.total() / whole;
  F top = lane_max<F>(first.top), c = 0;
  if (top > F(0.5) || __builtin_fabs(mean) > 0.5 * lane_sum<F>(first.size)) {
    F at_top = get(dy + position_of(y, V, top));
    bool is_pivot = top > F(0.5) || __builtin_fabs(at_top - mean) <= alike<F> * __builtin_fabs(mean);
    c = finite_or_0(is_pivot ? at_top : (F)mean);
  }
  if (c != 0) mean = Weighed<T, false>(dy, y, V, c).sum.total() / whole;
  F hi = (F)mean, lo = finite_or_0((F)(mean - (double)hi));
  each_vector<F>(V, [&](int64_t i, int64_t n) SX_LAMBDA {
    store_n(dx + i, n, load_n(y + i, n, F(0)) * (((load_n(dy + i, n, F(0)) - c) - hi) - lo));
  });
}
// Halves: y was rounded to a half type. Lanes have their rows in L1: s is always the pivot where no class is confident.
template <class F, bool Halves, class DY, class Y, class DX> void softmax_bwd_lanes(DY dy, Y y, DX dx, int64_t V) {
  Vec<F> mean = {}, top = {}, at_top = {}, whole = {};
  for (int64_t v = 0; v < V; ++v) {
    Vec<F> a = y[v], g = dy[v];
    at_top = a > top ? g : at_top;
    top = max(a, top);
    mean = fma(a, g, mean);
    if (Halves) whole += a;
  }
  whole = whole > 0 ? whole : all<F>(1);
  if (Halves) mean = mean / whole;
  Vec<F> c = (top > F(0.5)) | (abs(at_top - mean) <= alike<F> * abs(mean)) ? at_top : mean;
  c = c - c == 0 ? c : Vec<F>{};
  Sum<F> sum;
  for (int64_t v = 0; v < V; ++v) sum.add(y[v] * (dy[v] - c));
  Vec<F> hi = Halves ? (sum.hi + sum.rest()) / whole : sum.hi, lo = Halves ? Vec<F>{} : sum.rest();
  for (int64_t v = 0; v < V; ++v) dx.set(v, y[v] * (((dy[v] - c) - hi) - lo));
}

// y_j = (x_j - m) - log1p(rest): both terms are <= 0, nothing cancels
template <class T> void log_softmax_fwd_row(const T* x, T* y, Compute<T>* m, Compute<T>* rest, int64_t V) {
  using F = Compute<T>;
  RowState st = visit_row<T, false>(x, V, Transform<F>(1, 0));
  *m = (F)st.m;
  *rest = (F)st.rest;
  F top = (F)st.shift(), L = (F)log1p_positive(st.rest);
  each_vector<F>(V, [&](int64_t i, int64_t n) SX_LAMBDA {
    store_n(y + i, n, (load_n(x + i, n, F(0)) - top) - L);
  });
}
template <class F, class X, class Y>
void log_softmax_fwd_lanes(X x, Y y, void* m_out, void* rest_out, int64_t r0, int64_t n, int64_t V) {
  LaneState<F> st;
  Transform<F> none(1, 0);
  st.find_max(x, V, none);
  Shift<F> s(st.shift);
  for (int64_t v = 0; v < V; ++v) {
    Vec<F> xv = x[v];
    st.add(xv, exp_shifted<F>(xv, s).e);
  }
  double m[W<F>], rest[W<F>], L[W<F>];
  st.close(m, rest);
  for (int l = 0; l < W<F>; ++l) L[l] = log1p_positive(rest[l]);
  rows_out<F>(m_out, r0, n, m);
  rows_out<F>(rest_out, r0, n, rest);
  Vec<F> Lv = to_vec<F>(L);
  for (int64_t v = 0; v < V; ++v) y.set(v, (x[v] - st.shift) - Lv);
}

// dx_j = dy_j - p_j s, s = sum_i dy_i, with p from the input: a bf16 log p would put |log p| 2^-9 into p.
// At a confident row's maximum dy_m - p_m s would leave 0: with the others' sum o it is dy_m rest / total - o / total.
template <class T>
void log_softmax_bwd_row(const T* dy, const T* x, double m, double rest, T* dx, int64_t V) {
  using F = Compute<T>;
  const int64_t top = rest < 1 ? position_of(x, V, (F)m) : -1;  // none where x is a part of the row
  Sum<F> sum;
  auto terms = [&](int64_t i, int64_t n) SX_LAMBDA { return load_n(dy + i, n, F(0)); };
  add_all(sum, top < 0 ? V : top, terms);
  double at_top = 0;
  if (top >= 0) {
    at_top = (double)get(dy + top);
    add_all(sum, V - top - 1, [&](int64_t i, int64_t n) SX_LAMBDA { return terms(top + 1 + i, n); });
  }
  const double total = 1 + rest, others = sum.total();
  Shift<F> s(all<F>(m - m == 0 ? (F)m : F(0)));
  Split<F> r(-(others + at_top) / total);
  each_vector<F>(V, [&](int64_t i, int64_t n) SX_LAMBDA {
    store_n(dx + i, n, r.times_plus(exp_shifted<F>(load_n(x + i, n, F(0)), s).e, load_n(dy + i, n, F(0))));
  });
  if (top >= 0) put(dx + top, (F)((at_top * rest - others) / total));
}
template <class F, class DY, class X, class DX>
void log_softmax_bwd_lanes(DY dy, X x, const void* m_in, const void* rest_in, DX dx, int64_t r0, int64_t n,
                           int64_t V) {
  double m[W<F>], rest[W<F>], total[W<F>], where[W<F>];
  rows_in<F>(m_in, r0, n, m);
  rows_in<F>(rest_in, r0, n, rest);
  bool any = false;
  for (int l = 0; l < W<F>; ++l) {
    bool confident = l < n && rest[l] < 1;
    any |= confident;
    where[l] = confident ? m[l] : nan;
  }
  const Vec<F> top = to_vec<F>(where);
  Vec<F> at_top = {};
  Sum<F> sum;
  if (!any)
    for (int64_t v = 0; v < V; ++v) sum.add(dy[v]);
  else
    for (int64_t v = 0; v < V; ++v) {
      Ints<F> is_top = x[v] == top;
      Vec<F> g = dy[v];
      at_top = is_top ? g : at_top;
      sum.add(is_top ? Vec<F>{} : g);
    }
  F own[W<F>];
  store(own, at_top);
  sum.lanes(total);
  for (int l = 0; l < W<F>; ++l) {
    where[l] = ((double)own[l] * rest[l] - total[l]) / (1 + rest[l]);
    total[l] = -(total[l] + (double)own[l]) / (1 + rest[l]);
    m[l] = m[l] - m[l] == 0 ? m[l] : 0;
  }
  Split<F> r(total);
  Shift<F> s(to_vec<F>(m));
  if (!any) {
    for (int64_t v = 0; v < V; ++v) dx.set(v, r.times_plus(exp_shifted<F>(x[v], s).e, dy[v]));
    return;
  }
  const Vec<F> dx_top = to_vec<F>(where);
  for (int64_t v = 0; v < V; ++v) {
    Vec<F> xv = x[v];
    dx.set(v, xv == top ? dx_top : r.times_plus(exp_shifted<F>(xv, s).e, dy[v]));
  }
}

}  // namespace softmax_ext::SX_ISA
