// softmax: forward and backward, wide rows and lanes.
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
// 0); or, which saves a visit, the mean of its first few dy where s' is then small beside what it sums.
// (dy_m in every row would not do: for dy one-hot at m, g_j - s' is -1 + (1 - y_m), off by 1 / y_m units.)
template <class F> constexpr F alike = sizeof(F) == 4 ? (F)0x1p-16 : (F)0x1p-45;
template <class F> SX_INLINE F finite_or_0(F c) { return c - c == 0 ? c : 0; }

// What a visit of y and dy - c leaves: the sum of their products and that of y, by groups of eight vectors whose lanes
// are bunches of up to eight classes. First: of bunches also the largest sum of y and where it is, the sum of
// |sum of y (dy - c)| and the largest of these.
template <class T, bool First> struct Weighed {
  using F = Compute<T>;
  using X = Vec<F>;
  static constexpr bool halves = !std::is_same_v<T, F>;
  static constexpr int64_t group = 8 * W<F>;
  Sum<F> sum;
  X whole = {}, size = {}, most = {}, top = {};
  Ints<F> at = {};

  SX_INLINE void add(X y, X p, int64_t i) {
    sum.add(p);
    if (halves) whole += y;
    if (!First) return;
    at = y > top ? Ints<F>{} + (typename Of<F>::Int)(i / group) : at;
    top = max(y, top);
    most = max(abs(p), most);
    size += abs(p);
  }
  SX_INLINE Weighed(const T* dy, const T* y, int64_t V, F pivot) {
    const X c = all<F>(pivot);
    int64_t i = 0;
    for (; i + group <= V; i += group) {
      X a[8], p[2];
      for (int k = 0; k < 8; ++k) {
        a[k] = load(y + i + k * W<F>);
        X g = load(dy + i + k * W<F>) - c;
        p[k / 4] = k % 4 ? fma(a[k], g, p[k / 4]) : a[k] * g;
      }
      add(First || halves ? tree_of(a) : X{}, p[0] + p[1], i);
    }
    if (i == V) return;
    X a = {}, p = {};
    for (int64_t j = i; j < V; j += W<F>) {
      const int64_t n = V - j < W<F> ? V - j : W<F>;
      const X one = load_n(y + j, n, F(0));
      a += one;
      p = fma(one, load_n(dy + j, n, pivot) - c, p);
    }
    add(a, p, i);
  }
  double mass() const {
    double s = halves ? lane_sum<F>(whole) : 1;
    return s > 0 ? s : 1;  // a row of zeros has no distribution and no gradient
  }
  // Where the largest y of the largest bunch is: if any y > 1/2, that.
  int64_t place(const T* y, int64_t V) const {
    const uint64_t lanes = bits_of<F>(top == all<F>(lane_max<F>(top)));
    const int lane = lanes ? __builtin_ctzll(lanes) : 0;
    typename Of<F>::Int from[W<F>];
    std::memcpy(from, &at, sizeof from);
    int64_t i = from[lane] * group + lane, best = i;
    for (int k = 1; k < 8 && (i += W<F>) < V; ++k) best = get(y + i) > get(y + best) ? i : best;
    return best;
  }
};
// expects: whether the row before was confident. Such a row is asked for its maximum alone, without the first visit.
template <class T> void softmax_bwd_row(const T* dy, const T* y, T* dx, int64_t V, bool& expects) {
  using F = Compute<T>;
  constexpr F over_half = F(0.5) + (sizeof(F) == 4 ? F(0x1p-24) : F(0x1p-53));
  double mean = 0, whole = 1;
  F c = 0;
  bool known = false;
  int64_t m = expects ? first_from(y, V, over_half, dy) : -1;
  expects = m >= 0;
  if (expects) {
    c = get(dy + m);
  } else {
    // 0, unless the first dy lie near one another: their mean then, which is exact where all are alike (it adds and
    // divides by powers of two). A mean in every row would be waited for, 1.3 times as long at (4096, 1000); the CPU
    // foresees this branch.
    const F one = get(dy);
    if (!bits_of<F>(abs(load(dy) - all<F>(one)) >= F(0.5) * abs(all<F>(one)))) {
      Vec<F> few[8];
      for (int k = 0; k < 8; ++k) few[k] = load(dy + k * W<F>);
      c = finite_or_0((F)(lane_sum<F>(tree_of(few)) / (8 * W<F>)));
    }
    for (;; c = 0) {
      Weighed<T, true> first(dy, y, V, c);
      whole = first.mass();
      mean = first.sum.total() / whole;
      // Of sum y |dy - s|, the unit of the gradient's error, at least size - |s'| is there, and of its largest bunch
      // all but its y |s'|: half of size, or else c is not near enough.
      const double size = lane_sum<F>(first.size), off = __builtin_fabs(mean), top = lane_max<F>(first.top);
      known = !(off > 0.5 * size && lane_max<F>(first.most) - top * off < 0.5 * size);
      if (known && top <= 0.5) break;
      // As a row of which it is expected: the bits are not to depend on the row before, whatever y is.
      expects = top > 0.5;
      m = expects ? first_from(y, V, over_half, dy) : first.place(y, V);
      if (m < 0) m = first.place(y, V);
      known = known && !expects;
      if (known) break;
      if (!expects && c != 0) continue;  // the first dy are no measure of those that count, nor is s about them
      const F at_m = get(dy + m);
      c = expects || __builtin_fabs(at_m - mean) <= alike<F> * off ? at_m : (F)mean;
      break;
    }
  }
  if (!known) {
    c = finite_or_0(c);
    Weighed<T, false> about(dy, y, V, c);
    whole = about.mass();
    mean = about.sum.total() / whole;
  }
  F hi = (F)mean, lo = finite_or_0((F)(mean - (double)hi));
  each_vector<F>(V, [&](int64_t i, int64_t n) SX_LAMBDA {
    store_n(dx + i, n, load_n(y + i, n, F(0)) * (((load_n(dy + i, n, F(0)) - c) - hi) - lo));
  });
}
// Halves: y was rounded to a half type. Lanes have their rows in L1: s is always the pivot where no class is confident.
template <class F, bool Halves, class DY, class Y, class DX>
SX_INLINE void softmax_bwd_lanes_of(DY dy, Y y, DX dx, int64_t V) {
  Vec<F> mean = {}, top = {}, at_top = {}, whole = {};
  for (int64_t v = 0; v < V; ++v) {
    Vec<F> a = y[v], g = dy[v];
    at_top = a > top ? g : at_top;
    top = max(a, top);
    mean = fma(a, g, mean);
    if (Halves) whole += a;
  }
  const Vec<F> one = all<F>(1), part = Halves ? one / (whole > 0 ? whole : one) : one;
  if (Halves) mean *= part;
  Vec<F> c = ((top > F(0.5)) | (abs(at_top - mean) <= alike<F> * abs(mean))) ? at_top : mean;
  c = c - c == 0 ? c : Vec<F>{};
  Sum<F> sum;
  int64_t v = 0;
  for (; v + 8 <= V; v += 8) {
    Vec<F> p[2];
    for (int64_t k = 0; k < 8; ++k) {
      const Vec<F> a = y[v + k], g = dy[v + k] - c;
      p[k / 4] = k % 4 ? fma(a, g, p[k / 4]) : a * g;
    }
    sum.add(p[0] + p[1]);
  }
  Vec<F> left = {};
  for (int64_t k = v; k < V; ++k) left = fma(y[k], dy[k] - c, left);
  sum.add(left);
  Vec<F> hi = Halves ? (sum.hi + sum.rest()) * part : sum.hi, lo = Halves ? Vec<F>{} : sum.rest();
  for (int64_t v = 0; v < V; ++v) dx.set(v, y[v] * (((dy[v] - c) - hi) - lo));
}

// Few classes stay in registers from the first visit to the last where their number is a constant: (512, 3, 200) takes
// three quarters of the time.
template <class F, bool Halves, class DY, class Y, class DX> void softmax_bwd_lanes(DY dy, Y y, DX dx, int64_t V) {
  switch (V) {
    case 2: return softmax_bwd_lanes_of<F, Halves>(dy, y, dx, 2);
    case 3: return softmax_bwd_lanes_of<F, Halves>(dy, y, dx, 3);
    case 4: return softmax_bwd_lanes_of<F, Halves>(dy, y, dx, 4);
  }
  softmax_bwd_lanes_of<F, Halves>(dy, y, dx, V);
}

}  // namespace softmax_ext::SX_ISA
