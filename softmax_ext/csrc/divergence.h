// How far a student's row of logits is from a teacher's, and its derivative at the student's.
//
// legend    s, t  logits after scale and cap; p, q their softmaxes (p the student's)
//           d_j = log p_j - log q_j = (s_j - t_j) - shift,  shift = lse_s - lse_t
// forward   a divergence is sum_j q_j f(p_j / q_j) with f(1) = f'(1) = 0, so that no term is negative and none cancels:
//             forward_kl  q (expm1(d) - d)          reverse_kl  p (expm1(-d) + d)          tv  |p - q| / 2
//             jsd         beta q h((1 - beta) expm1(d)) + (1 - beta) p h(beta expm1(-d)),  h(w) = w - log1p(w)
// backward  ds_j = p_j (u_j - sum_k p_k u_k),  u = f'(p / q):
//             forward_kl  -expm1(-d): ds = p - q    reverse_kl  d                          tv  sign(d) / 2
//             jsd         -(1 - beta) log1p(beta expm1(-d))
// Where |d| <= ln 2, p - q is formed as q expm1(d); elsewhere as it stands, where it does not cancel.
//
// s_j - t_j carries its rounding error, and the shift is a sum of two numbers: the maxima and sums of both rows give it
// to a few ulp of lse, too coarse for two rows that are next to each other. But sum_j (p_j - q_j) is 0, so what it comes
// out as is the shift's error, to the last digits of the terms: it is put right once, or twice where it was large.
#pragma once
#include "cross_entropy.h"
#include "scratch.h"
#include "wide.h"

namespace softmax_ext::SX_ISA {

// (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2, by its series
template <class F> SX_INLINE Vec<F> exp_curve(Vec<F> r) {
  constexpr int n = sizeof(F) == 4 ? 7 : 13;
  F c[n], over = 0.5;
  for (int i = 0; i < n; ++i) c[i] = over, over /= (F)(i + 3);
  Vec<F> q = all<F>(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) q = fma(q, r, all<F>(c[i]));
  return q;
}

// log(1 + x) and x - log(1 + x) for -1 < x <= 1. Reduction and coefficients: FreeBSD msun s_log1p.c, s_log1pf.c.
template <class F> struct Log1p { Vec<F> log, less; };
template <class F> SX_INLINE Log1p<F> log1p_both(Vec<F> x) {
  constexpr bool single = sizeof(F) == 4;
  constexpr int bits = single ? 23 : 52;
  using I = typename Of<F>::Int;
  constexpr I half_root = single ? (I)0x3f3504f3 : (I)0x3fe6a09e667f3bcdLL;
  Vec<F> u = 1 + x;
  Ints<F> whole = (Ints<F>)u, k = (whole - half_root) >> bits;
  Ints<F> plain = k == 0;
  Vec<F> f = plain ? x : (Vec<F>)(whole - (k << bits)) - 1;
  Vec<F> lost = plain ? Vec<F>{} : (x < all<F>(1) ? x - (u - 1) : 1 - (u - x)) / u;
  Vec<F> half = F(0.5) * f * f, s = f / (2 + f), z = s * s, R;
  if constexpr (single) {
    R = z * fma(z, fma(z, fma(z, all<F>(0.24279078841f), all<F>(0.28498786688f)), all<F>(0.40000972152f)),
                all<F>(0.66666662693f));
  } else {
    constexpr F c[7] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                        2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                        1.479819860511658591e-01};
    R = all<F>(c[6]);
    for (int i = 5; i >= 0; --i) R = fma(R, z, all<F>(c[i]));
    R *= z;
  }
  Vec<F> curved = half - s * (half + R), kd = __builtin_convertvector(k, Vec<F>);
  constexpr F ln2_hi = single ? F(6.9313812256e-01) : F(6.93147180369123816490e-01);
  constexpr F ln2_lo = single ? F(9.0580006145e-06) : F(1.90821492927058770002e-10);
  Vec<F> log = plain ? f - curved : kd * ln2_hi - ((half - (s * (half + R) + (kd * ln2_lo + lost))) - f);
  return {log, plain ? curved : x - log};
}

// What both rows leave for their elements.
template <class F> struct Pair {
  Shift<F> s, t;
  Split<F> over_s, over_t;
  Vec<F> hi, lo, beta, other;  // other: 1 - beta
  Vec<F> apart;                // d is this times the difference less the shift: the scale both sides share, or 1
  bool raw;                    // whether it is the scale: then logits are subtracted as they stand
};

template <class F> struct Met { Vec<F> p, q, d, less, term, u; };  // less: p - q

template <class F, Kind K> SX_INLINE Met<F> meet(Vec<F> s, Vec<F> t, Vec<F> difference, Vec<F> lost, const Pair<F>& a) {
  const Vec<F> none = {};
  Met<F> e;
  e.p = a.over_s.times(exp_shifted<F>(s, a.s).e);
  e.q = a.over_t.times(exp_shifted<F>(t, a.t).e);
  lost = lost - lost == 0 ? lost : none;
  e.d = ((difference - a.hi) + (lost - a.lo)) * a.apart;
  constexpr bool turned = K == Kind::reverse_kl;
  Vec<F> x = turned ? -e.d : e.d, base = turned ? e.p : e.q;
  Ints<F> near = abs(x) <= all<F>(F(0.693147));
  Vec<F> r = near ? F(0.5) * x : none;
  Vec<F> bend = r * r * exp_curve<F>(r), half = r + bend, grown = half * (half + 2);  // expm1(x)
  Vec<F> less = near ? base * grown : turned ? e.q - e.p : e.p - e.q;
  e.less = turned ? -less : less;
  if constexpr (K == Kind::forward_kl || K == Kind::reverse_kl) {
    Vec<F> paid = base == 0 ? none : base * x;  // no mass pays nothing, not even where x is infinite
    e.term = near ? base * (half * half + 2 * bend) : less - paid;
    e.u = e.d;
  } else if constexpr (K == Kind::tv) {
    e.term = F(0.5) * abs(less);
    e.u = e.d > none ? all<F>(F(0.5)) : e.d < none ? all<F>(F(-0.5)) : none;
  } else {
    Ints<F> ahead = e.d >= none;
    Vec<F> most = ahead ? e.p : e.q;
    Vec<F> shrunk = most == 0 ? none : (ahead ? e.q - e.p : e.p - e.q) / most;  // expm1(-|d|)
    Log1p<F> one = log1p_both<F>(near ? a.other * grown : (ahead ? a.beta : a.other) * shrunk);
    Log1p<F> two = log1p_both<F>(a.beta * (-grown / (1 + grown)));
    Vec<F> of_q = ahead ? one.log + e.d : one.log, of_p = near ? two.log : ahead ? one.log : one.log - e.d;
    of_q = e.q == 0 ? none : e.q * of_q;
    Vec<F> far = -(a.beta * of_q) - a.other * (e.p == 0 ? none : e.p * of_p);
    e.term = near ? a.beta * e.q * one.less + a.other * e.p * two.less : far;
    e.u = -a.other * of_p;
  }
  return e;
}

template <class F> SX_INLINE Vec<F> weighed(const Met<F>& e, Vec<F> u) {  // p u, 0 where there is no p
  return e.p == 0 ? Vec<F>{} : e.p * u;
}

// Calls each(i, n, Met) along the row.
template <class T, Kind K, bool Tr, class Each>
SX_INLINE void along(const Divergence& a, const T* s, const T* t, const Pair<Compute<T>>& pair,
                     const Transform<Compute<T>>& of_s, const Transform<Compute<T>>& of_t, Each each) {
  using F = Compute<T>;
  each_vector<F>(a.layout.V, [&](int64_t i, int64_t n) SX_LAMBDA {
    Vec<F> x = load_n(s + i, n, F(-__builtin_inff())), y = load_n(t + i, n, F(-__builtin_inff()));
    Vec<F> zs = Tr ? of_s(x) : x, zt = Tr ? of_t(y) : y;
    if (!pair.raw) x = zs, y = zt;
    Vec<F> difference = x - y, back = difference - x;
    Vec<F> lost = (x - (difference - back)) - (y + back);  // Knuth's TwoSum
    each(i, n, meet<F, K>(zs, zt, difference, lost, pair));
  });
}

struct Totals { double term, less, weighed; };

template <class T, Kind K, bool Tr>
Totals totals(const Divergence& a, const T* s, const T* t, const Pair<Compute<T>>& pair,
              const Transform<Compute<T>>& of_s, const Transform<Compute<T>>& of_t) {
  using F = Compute<T>;
  Sum<F> sums[3];
  Vec<F> part[3] = {};
  int count = 0;
  along<T, K, Tr>(a, s, t, pair, of_s, of_t, [&](int64_t, int64_t, const Met<F>& e) SX_LAMBDA {
    part[0] += e.term, part[1] += e.less;
    if constexpr (K == Kind::jsd || K == Kind::tv) part[2] += weighed(e, e.u);
    if (++count == 8) {  // as Sum's own groups of eight
      for (int k = 0; k < 3; ++k) sums[k].add(part[k]), part[k] = Vec<F>{};
      count = 0;
    }
  });
  for (int k = 0; k < 3; ++k) sums[k].add(part[k]);
  return {sums[0].total(), sums[1].total(), sums[2].total()};
}

enum { of_m_s, of_rest_s, of_m_t, of_rest_t, of_hi, of_lo, of_mean };  // a row's state

inline bool is_raw(const Divergence& a) {
  return a.softcap == 0 && a.teacher_softcap == 0 && a.scale == a.teacher_scale;
}

template <class F> Pair<F> pair_of(const Divergence& a, const double* state) {
  auto shift = [](double m) { return Shift<F>(all<F>((F)m)); };
  return {shift(state[of_m_s]), shift(state[of_m_t]), Split<F>(1 / (1 + state[of_rest_s])),
          Split<F>(1 / (1 + state[of_rest_t])), all<F>((F)state[of_hi]), all<F>((F)state[of_lo]),
          all<F>((F)a.beta), all<F>((F)(1 - a.beta)), all<F>(is_raw(a) ? (F)a.scale : F(1)), is_raw(a)};
}

// The value, and the row's state for the backward.
template <class T, Kind K, bool Tr>
double divergence_fwd_row(const Divergence& a, const T* s, const T* t, double* state,
                          const Transform<Compute<T>>& of_s, const Transform<Compute<T>>& of_t) {
  using F = Compute<T>;
  RowState S = visit_row<T, Tr>(s, a.layout.V, of_s), R = visit_row<T, Tr>(t, a.layout.V, of_t);
  // rounded here as they will be read back: one row function for both directions
  state[of_m_s] = (F)S.m, state[of_rest_s] = (F)S.rest, state[of_m_t] = (F)R.m, state[of_rest_t] = (F)R.rest;
  const double unit = is_raw(a) ? (double)(F)a.scale : 1;
  double shift = ((S.m - R.m) + (log1p_positive(S.rest) - log1p_positive(R.rest))) / unit;
  double more = 0, value = nan, mean = nan;
  auto keep_shift = [&] {
    state[of_hi] = (F)shift, state[of_lo] = (F)((shift - (double)(F)shift) + more);
  };
  keep_shift();
  if (shift - shift == 0)
    for (int turn = 0; turn < 3; ++turn) {
      Totals sum = totals<T, K, Tr>(a, s, t, pair_of<F>(a, state), of_s, of_t);
      double off = sum.less > -0.5 ? __builtin_log1p(sum.less) : 0;
      value = sum.term, mean = sum.weighed;
      if (!(off - off == 0)) break;
      double step = off / unit, next = shift + step, back = next - shift;
      more += (shift - (next - back)) + (step - back);
      shift = next;
      keep_shift();
      // what is left of it after the last turn, to the first order that is not 0
      const double bend = K == Kind::jsd ? a.beta * (1 - a.beta) : 1;
      value -= K == Kind::tv ? off * mean : bend * off * off / 2;
      if (K == Kind::jsd) mean -= bend * off;
      // Terms of far classes move with it by the first order; a row's own rounding is less than two units.
      constexpr double unit_roundoff = sizeof(F) == 4 ? 0x1p-24 : 0x1p-53;
      const double size = off < 0 ? -off : off;
      if (size <= 2 * unit_roundoff && (K == Kind::tv ? size : off * off) <= 0x1p-12 * value) break;
    }
  state[of_mean] = K == Kind::forward_kl ? 0 : K == Kind::reverse_kl ? value : mean;
  return value < 0 ? 0 : value;
}

template <class T, Kind K, bool Tr>
void divergence_bwd_row(const Divergence& a, const T* s, const T* t, const double* state, double up, T* out,
                        const Transform<Compute<T>>& of_s, const Transform<Compute<T>>& of_t) {
  using F = Compute<T>;
  const double mean = state[of_mean];
  if (!(state[of_hi] - state[of_hi] == 0) || !(mean - mean == 0)) return fill_row(out, a.layout.V, (F)nan);
  const Vec<F> c = all<F>((F)up), middle = all<F>((F)mean);
  along<T, K, Tr>(a, s, t, pair_of<F>(a, state), of_s, of_t,
                  [&](int64_t i, int64_t n, const Met<F>& e) SX_LAMBDA {
                    Vec<F> g = K == Kind::forward_kl ? e.less : weighed(e, e.u - middle);
                    if (Tr) g *= of_s.slope(load_n(s + i, n, F(0)));
                    store_n(out + i, n, g * c);
                  });
}

// Row r of the call, its logits contiguous at s and t.
template <class T, Do what, Kind K, bool Tr>
void divergence_row(const Divergence& a, int64_t r, const T* s, const T* t, T* out) {
  using F = Compute<T>;
  const Transform<F> of_s(a.scale, a.softcap), of_t(a.teacher_scale, a.teacher_softcap);
  const bool counts = !a.keep || a.keep[r];
  F* kept = a.state ? (F*)a.state + r * row_state : nullptr;
  double state[row_state] = {};
  if (what == Do::fwd && a.sums) {
    for (int i = 0; i < row_state; ++i) state[i] = (double)kept[i];
    const Totals sum = counts ? totals<T, K, Tr>(a, s, t, pair_of<F>(a, state), of_s, of_t) : Totals{};
    F* found = (F*)a.sums + r * row_sums;
    found[0] = (F)sum.term, found[1] = (F)sum.less, found[2] = (F)sum.weighed;
    return;
  }
  if (what != Do::bwd) {
    double value = counts ? divergence_fwd_row<T, K, Tr>(a, s, t, state, of_s, of_t) : 0;
    set_row<F>(a.value, r, value);
    for (int i = 0; kept && i < row_state; ++i) kept[i] = (F)state[i];
  } else {
    for (int i = 0; i < row_state; ++i) state[i] = (double)kept[i];
  }
  if (what == Do::fwd) return;
  if (!counts) return fill_row(out, a.layout.V, F(0));
  divergence_bwd_row<T, K, Tr>(a, s, t, state, row_value<F>(a.d_value, r), out, of_s, of_t);
}

template <class T, Do what, Kind K, bool Tr> bool divergence_rows(const Divergence& a, int64_t begin, int64_t end) {
  const int64_t V = a.layout.V, inner = a.layout.inner;
  const T *s = (const T*)a.student, *t = (const T*)a.teacher;
  T* out = (T*)a.dstudent;
  if (inner == 1) {
    for (int64_t r = begin; r < end; ++r) divergence_row<T, what, K, Tr>(a, r, s + r * V, t + r * V, out + r * V);
    return true;
  }
  Scratch room(2 * V * (int64_t)sizeof(T));
  if (!room.p) return false;
  T *near = (T*)room.p, *far = near + V;
  for (int64_t r = begin; r < end; ++r) {
    int64_t at = r / inner * V * inner + r % inner;
    for (int64_t v = 0; v < V; ++v) near[v] = s[at + v * inner], far[v] = t[at + v * inner];
    divergence_row<T, what, K, Tr>(a, r, near, far, near);
    if (what != Do::fwd)
      for (int64_t v = 0; v < V; ++v) out[at + v * inner] = near[v];
  }
  return true;
}

template <class T, Do what, Kind K> bool divergence_of(const Divergence& a, int64_t begin, int64_t end) {
  const bool plain = a.scale == 1 && a.softcap == 0 && a.teacher_scale == 1 && a.teacher_softcap == 0;
  return plain ? divergence_rows<T, what, K, false>(a, begin, end) : divergence_rows<T, what, K, true>(a, begin, end);
}

template <class T, Do what> bool divergence(const Divergence& a, int64_t begin, int64_t end) {
  switch (a.kind) {
    case Kind::forward_kl: return divergence_of<T, what, Kind::forward_kl>(a, begin, end);
    case Kind::reverse_kl: return divergence_of<T, what, Kind::reverse_kl>(a, begin, end);
    case Kind::jsd: return divergence_of<T, what, Kind::jsd>(a, begin, end);
    case Kind::tv: return divergence_of<T, what, Kind::tv>(a, begin, end);
  }
  return false;
}

}  // namespace softmax_ext::SX_ISA
