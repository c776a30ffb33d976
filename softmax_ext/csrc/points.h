// K points a row, stratified: point k at (k + u_k) / K of the row's off-target mass, in class order.
//
// One scan leaves the mass before each group of eight vectors, summed in double: its error is 2^-53 a term, and no
// float32 row of any length loses a point to it. The points then go up the groups, and only a group that one falls in
// is looked into: a vector, and then a class. Every sum belongs to one row, in class order, so no number of threads
// changes a bit.
#pragma once
#include "picked.h"
#include "row_state.h"
#include "transform.h"

namespace softmax_ext::SX_ISA {

// In place, by a heap: a row of targets may have thousands.
inline void sort(int64_t* x, int64_t n) {
  auto sink = [&](int64_t i, int64_t end) {
    for (int64_t c; (c = 2 * i + 1) < end; i = c) {
      if (c + 1 < end && x[c + 1] > x[c]) ++c;
      if (x[i] >= x[c]) return;
      int64_t t = x[i];
      x[i] = x[c], x[c] = t;
    }
  };
  for (int64_t i = n / 2; i-- > 0;) sink(i, n);
  for (int64_t end = n; --end > 0;) {
    int64_t t = x[0];
    x[0] = x[end], x[end] = t;
    sink(0, end);
  }
}
// The first of n sorted numbers that is at least v.
inline int64_t first_from(const int64_t* x, int64_t n, int64_t v) {
  int64_t low = 0;
  while (n > 0) {
    int64_t half = n / 2;
    if (x[low + half] < v) low += half + 1, n -= half + 1;
    else n = half;
  }
  return low;
}

template <class T> struct PointsRow {
  using F = Compute<T>;
  static constexpr int64_t group = 8 * W<F>;

  const T* x;
  int64_t V;
  const Transform<F>& tr;
  Shift<F> shift;
  const int64_t* except;               // sorted
  int64_t excepts;
  double* before;                      // (groups + 1,)
  F e[group];                          // of the group looked into
  double of_vector[8];
  int64_t looked_into = -1;

  int64_t groups() const { return (V + group - 1) / group; }

  SX_INLINE Vec<F> exps(int64_t i) const {
    int64_t n = V - i < W<F> ? V - i : W<F>;
    Vec<F> v = n > 0 ? load_n(x + i, n, F(-__builtin_inff())) : all<F>(-__builtin_inff());
    return exp_shifted<F>(tr.on ? tr(v) : v, shift).e;
  }

  // The exps of a group and the sums of its vectors; what is left out is 0.
  double look(int64_t g) {
    if (g != looked_into) {
      looked_into = g;
      for (int l = 0; l < 8; ++l) store(e + l * W<F>, exps(g * group + l * W<F>));
      for (int64_t t = first_from(except, excepts, g * group); t < excepts && except[t] < (g + 1) * group; ++t)
        e[except[t] - g * group] = 0;
      for (int l = 0; l < 8; ++l) of_vector[l] = lane_sum<F>(load(e + l * W<F>));
    }
    double sum = 0;
    for (double s : of_vector) sum += s;
    return sum;
  }

  double scan() {
    int64_t t = 0;
    before[0] = 0;
    for (int64_t g = 0; g < groups(); ++g) {
      while (t < excepts && except[t] < g * group) ++t;
      double sum;
      if ((t < excepts && except[t] < (g + 1) * group) || (g + 1) * group > V) {
        sum = look(g);
      } else {
        VD s = {};
        for (int l = 0; l < 8; ++l) {
          Vec<F> v = load(x + g * group + l * W<F>);
          s += doubled(exp_shifted<F>(tr.on ? tr(v) : v, shift).e);
        }
        sum = tree<W<double>>(s);
      }
      before[g + 1] = before[g] + sum;
    }
    return before[groups()];
  }

  // The first class where the mass passes `at`; g, the group to begin with, goes up to its group. Where rounding has
  // brought `at` to the whole, it is the last class that has mass.
  int64_t find(double at, int64_t& g) {
    while (g + 1 < groups() && before[g + 1] <= at) ++g;
    while (g > 0 && before[g + 1] == before[g]) --g;
    look(g);
    double sum = before[g];
    int l = 0;
    for (; l < 7 && sum + of_vector[l] <= at; ++l) sum += of_vector[l];
    for (; l > 0 && of_vector[l] == 0; --l) at = inf;
    int64_t found = 0;
    for (int i = 0; i < W<F> && sum <= at; ++i) {
      if (e[l * W<F> + i] == 0) continue;
      found = g * group + l * W<F> + i;
      sum += (double)e[l * W<F> + i];
    }
    return found;
  }
};

template <class F> SX_INLINE double two(const void* p, int64_t at) {
  return (double)((const F*)p)[2 * at] + (double)((const F*)p)[2 * at + 1];
}

template <class T> bool points(const Points& a, int64_t begin, int64_t end) {
  using F = Compute<T>;
  const int64_t V = a.layout.V, groups = V / PointsRow<T>::group + 2;
  Scratch scratch((groups + 1 + a.E) * 8);
  if (!scratch.p) return false;
  double* before = (double*)scratch.p;
  int64_t* except = (int64_t*)(before + groups + 1);
  Transform<F> tr(a.scale, a.softcap);
  for (int64_t r = begin; r < end; ++r) {
    int64_t kept = 0, none = 0;
    for (int64_t k = 0; k < a.E; ++k) {
      int64_t t = id_at(a.except, a.except_kind, r * a.E + k);
      if (t >= 0 && t < V) except[kept++] = t;
      none += t == -1;
    }
    sort(except, kept);
    int32_t* ids = a.ids + r * a.K;
    F* mass = (F*)a.mass + 2 * r;
    const double m = (double)((const F*)a.m)[r], rest = (double)((const F*)a.rest)[r];
    const bool ignored = a.E > 0 && none == a.E, bad = !(m - m == 0) || rest != rest;
    mass[0] = !ignored && bad ? (F)__builtin_nan("") : F(0);
    mass[1] = 0;
    if (ignored || bad) {
      for (int64_t k = 0; k < a.K; ++k) ids[k] = ignored ? -1 : 0;
      continue;
    }
    PointsRow<T> row{(const T*)a.logits + r * V, V, tr, Shift<F>(all<F>((F)m)), except, kept, before, {}, {}};
    const double own = row.scan();
    mass[0] = (F)own;
    mass[1] = (F)(own - (double)mass[0]);
    double from = 0, to = own, whole = own;
    if (a.span) from = two<F>(a.span, 3 * r), to = two<F>(a.span, 3 * r + 1), whole = two<F>(a.span, 3 * r + 2);
    int64_t g = 0;
    for (int64_t k = 0; k < a.K; ++k) {
      double at = ((double)k + (double)a.u[r * a.K + k]) / (double)a.K * whole;
      if (!a.span && at >= whole) at = whole;
      ids[k] = own > 0 && at >= from && (at < to || !a.span) ? (int32_t)row.find(at - from, g) : -1;
    }
  }
  return true;
}

}  // namespace softmax_ext::SX_ISA
