// log_softmax: forward and backward, wide rows and lanes.
#pragma once
#include "lanes.h"
#include "rows.h"
#include "split.h"
#include "wide.h"

namespace softmax_ext::SX_ISA {

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
  const int64_t top = rest < 1 ? first_from(x, V, (F)m, dy) : -1;  // none where x is a part of the row
  const double at_top = top < 0 ? 0 : (double)get(dy + top);
  const int64_t before = top < 0 ? V : top / W<F> * W<F>;  // the vector of the maximum stands between two sums
  Sum<F> sum;
  add_all(sum, before, [&](int64_t i, int64_t n) SX_LAMBDA { return load_n(dy + i, n, F(0)); });
  if (top >= 0) {
    const int64_t n = V - before < W<F> ? V - before : W<F>;
    F near[W<F>];
    store(near, load_n(dy + before, n, F(0)));
    near[top - before] = 0;
    sum.add(load(near));
    const T* after = dy + before + n;
    add_all(sum, V - before - n, [&](int64_t i, int64_t n) SX_LAMBDA { return load_n(after + i, n, F(0)); });
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
  rows_in<F>(rest_in, r0, n, rest);  // the lanes beyond n hold 0: they look confident and are never written
  const Vec<F> mv = to_vec<F>(m), confident = to_vec<F>(rest), top = confident < 1 ? mv : all<F>((F)nan);
  Vec<F> at_top = {};
  Sum<F> sum;
  for (int64_t v = 0; v < V; ++v) {
    const Ints<F> is_top = x[v] == top;
    const Vec<F> g = dy[v];
    at_top = is_top ? g : at_top;
    sum.add(is_top ? Vec<F>{} : g);
  }
  F own[W<F>];
  store(own, at_top);
  sum.lanes(total);
  for (int l = 0; l < W<F>; ++l) {
    const double part = 1 / (1 + rest[l]);
    where[l] = ((double)own[l] * rest[l] - total[l]) * part;
    total[l] = -(total[l] + (double)own[l]) * part;
  }
  Split<F> r(total);
  Shift<F> s(mv - mv == 0 ? mv : Vec<F>{});
  const Vec<F> dx_top = to_vec<F>(where);
  for (int64_t v = 0; v < V; ++v) {
    const Vec<F> xv = x[v];
    dx.set(v, xv == top ? dx_top : r.times_plus(exp_shifted<F>(xv, s).e, dy[v]));
  }
}

}  // namespace softmax_ext::SX_ISA
