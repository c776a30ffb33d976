// softmax and log_softmax: forward and backward, wide rows and lanes.
#pragma once
#include "lanes.h"
#include "rows.h"
#include "split.h"
#include "wide.h"

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

// dx_j = y_j (dy_j - sum_i y_i dy_i)
template <class T> void softmax_bwd_row(const T* dy, const T* y, T* dx, int64_t V) {
  using F = Compute<T>;
  Sum<F> sum;
  add_all(sum, V, [&](int64_t i, int64_t n) SX_LAMBDA { return load_n(y + i, n, F(0)) * load_n(dy + i, n, F(0)); });
  double total = sum.total();
  F hi = (F)total, lo = (F)(total - (double)hi);
  each_vector<F>(V, [&](int64_t i, int64_t n) SX_LAMBDA {
    store_n(dx + i, n, load_n(y + i, n, F(0)) * ((load_n(dy + i, n, F(0)) - hi) - lo));
  });
}
template <class F, class DY, class Y, class DX> void softmax_bwd_lanes(DY dy, Y y, DX dx, int64_t V) {
  Sum<F> sum;
  for (int64_t v = 0; v < V; ++v) sum.add(y[v] * dy[v]);
  for (int64_t v = 0; v < V; ++v) dx.set(v, y[v] * ((dy[v] - sum.hi) - sum.lo));
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

// dx_j = dy_j - p_j sum_i dy_i, with p from the input: a bf16 log p would put |log p| 2^-9 into p
template <class T>
void log_softmax_bwd_row(const T* dy, const T* x, double m, double rest, T* dx, int64_t V) {
  using F = Compute<T>;
  Sum<F> sum;
  add_all(sum, V, [&](int64_t i, int64_t n) SX_LAMBDA { return load_n(dy + i, n, F(0)); });
  Shift<F> s(all<F>(m - m == 0 ? (F)m : F(0)));
  Split<F> r(-sum.total() / (1 + rest));
  each_vector<F>(V, [&](int64_t i, int64_t n) SX_LAMBDA {
    store_n(dx + i, n, r.times_plus(exp_shifted<F>(load_n(x + i, n, F(0)), s).e, load_n(dy + i, n, F(0))));
  });
}
template <class F, class DY, class X, class DX>
void log_softmax_bwd_lanes(DY dy, X x, const void* m_in, const void* rest_in, DX dx, int64_t r0, int64_t n,
                           int64_t V) {
  double m[W<F>], rest[W<F>], total[W<F>];
  rows_in<F>(m_in, r0, n, m);
  rows_in<F>(rest_in, r0, n, rest);
  Sum<F> sum;
  for (int64_t v = 0; v < V; ++v) sum.add(dy[v]);
  sum.lanes(total);
  for (int l = 0; l < W<F>; ++l) {
    total[l] = -total[l] / (1 + rest[l]);
    m[l] = m[l] - m[l] == 0 ? m[l] : 0;
  }
  Split<F> r(total);
  Shift<F> s(to_vec<F>(m));
  for (int64_t v = 0; v < V; ++v) dx.set(v, r.times_plus(exp_shifted<F>(x[v], s).e, dy[v]));
}

}  // namespace softmax_ext::SX_ISA
