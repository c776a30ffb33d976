// cross_entropy over W rows side by side.
#pragma once
#include "cross_entropy.h"
#include "lanes.h"

namespace softmax_ext::SX_ISA {

template <class F> struct LaneTargets {
  Ints<F> t;        // -1 where no class of this call matches: ignored, invalid or dense
  Ints<F> ignored;  // masks
  Ints<F> invalid;
  double keep[W<F>];  // 0 for an ignored row, else 1
  SX_INLINE LaneTargets(const CrossEntropy& a, int64_t r0, int64_t n) {
    typename Of<F>::Int wanted[W<F>], skip[W<F>], bad[W<F>];
    for (int l = 0; l < W<F>; ++l) wanted[l] = -1, skip[l] = 0, bad[l] = 0, keep[l] = 1;
    if (!is_dense(a))
      for (int64_t l = 0; l < n; ++l) {
        int64_t at = target_at(a, r0 + l);
        RowKind kind = kind_of(at, a.layout.V);
        wanted[l] = kind == RowKind::counted ? (typename Of<F>::Int)at : -1;
        skip[l] = kind == RowKind::ignored ? -1 : 0;
        bad[l] = kind == RowKind::invalid ? -1 : 0;
        keep[l] = kind == RowKind::ignored ? 0 : 1;
      }
    std::memcpy(&t, wanted, sizeof t);
    std::memcpy(&ignored, skip, sizeof ignored);
    std::memcpy(&invalid, bad, sizeof invalid);
  }
};

// The state of W rows as arrays over lanes, so that the scalar formulas become loops the compiler vectorises.
template <class F> struct LaneRows {
  double m[W<F>], rest[W<F>], ed[W<F>], wd[W<F>], ad[W<F>], a[W<F>], a_others[W<F>];
  double w_inf[W<F>], a_inf[W<F>], zt[W<F>], L[W<F>];
};

template <class F, class X, class Y>
SX_INLINE void ce_lane_extras(const CrossEntropy& a, X x, Y y, const Transform<F>& tr, Vec<F> shift, bool smooth,
                              bool entropy, LaneRows<F>& st) {
  const F* w = (const F*)a.weight;
  const bool dense = is_dense(a);
  const F low = -__builtin_inff();
  Sum<F> ed, wd, ad, asum, aothers;
  Vec<F> w_inf = {}, a_inf = {}, zero = {};
  Shift<F> s(shift);
  if (smooth || entropy || dense)
    for (int64_t v = 0; v < a.layout.V; ++v) {
      Vec<F> z = tr.on ? tr(x[v]) : x[v];
      if (entropy) {
        Exped<F> q = exp_shifted<F>(z, s);
        ed.add(q.e * q.d);
      }
      Ints<F> masked = z - shift == all<F>(low);  // -inf, or so far below that the distance overflows
      Vec<F> d = masked ? zero : z - shift;
      F wv = w ? w[v] : 1;
      if (smooth) {
        wd.add(wv * d);
        if (wv != 0) w_inf += masked ? all<F>(wv * low) : zero;
      }
      if (dense) {
        Vec<F> g = y[v] * wv;
        ad.add(g * d);
        asum.add(g);
        aothers.add(z == shift ? zero : g);
        a_inf += (masked & (g != 0)) ? g * low : zero;
      }
    }
  ed.lanes(st.ed);
  wd.lanes(st.wd);
  ad.lanes(st.ad);
  asum.lanes(st.a);
  aothers.lanes(st.a_others);
  F w_lost[W<F>], a_lost[W<F>];
  store(w_lost, w_inf);
  store(a_lost, a_inf);
  for (int l = 0; l < W<F>; ++l) {
    st.w_inf[l] = w_lost[l];
    st.a_inf[l] = a_lost[l];
  }
}

template <class F, class X, class Y>
SX_INLINE void ce_lanes_visit(const CrossEntropy& a, X x, Y y, const LaneTargets<F>& targets, const Transform<F>& tr,
                              bool entropy, LaneRows<F>& st) {
  LaneState<F> s;
  s.find_max(x, a.layout.V, tr);
  Shift<F> shift(s.shift);
  Vec<F> zt = all<F>((F)nan);
  Ints<F> index = {};
  for (int64_t v = 0; v < a.layout.V; ++v) {
    Vec<F> raw = x[v], z = tr.on ? tr(raw) : raw;
    s.add(raw, exp_shifted<F>(z, shift).e);
    zt = index == targets.t ? z : zt;
    index += 1;
  }
  s.close(st.m, st.rest);
  F target_z[W<F>];
  store(target_z, zt);
  for (int l = 0; l < W<F>; ++l) st.zt[l] = target_z[l];
  for (int l = 0; l < W<F>; ++l) st.L[l] = log1p_positive(st.rest[l]);
  ce_lane_extras<F>(a, x, y, tr, s.shift, a.smooth != nullptr, entropy, st);
}

template <class F>
SX_INLINE void ce_lanes_write(const CrossEntropy& a, int64_t r0, int64_t n, const LaneTargets<F>& targets,
                              const LaneRows<F>& st) {
  const bool dense = is_dense(a);
  double nll[W<F>], lse[W<F>], m[W<F>], rest[W<F>];
  const double* keep = targets.keep;
  for (int l = 0; l < W<F>; ++l) {
    double dense_nll = (st.L[l] * st.a[l] - st.ad[l]) - st.a_inf[l];
    double hard_nll = (st.m[l] - st.zt[l]) + st.L[l];
    bool kept = keep[l] != 0;
    nll[l] = kept ? (dense ? dense_nll : hard_nll) : 0;
    lse[l] = kept ? st.m[l] + st.L[l] : 0;
    m[l] = kept ? st.m[l] : 0;
    rest[l] = kept ? st.rest[l] : 0;
  }
  rows_out<F>(a.nll, r0, n, nll);
  rows_out<F>(a.lse, r0, n, lse);
  rows_out<F>(a.m, r0, n, m);
  rows_out<F>(a.rest, r0, n, rest);
  if (a.smooth) {
    for (int l = 0; l < W<F>; ++l)
      nll[l] = keep[l] != 0 ? (st.L[l] * a.weight_sum - st.wd[l]) - st.w_inf[l] : 0;
    rows_out<F>(a.smooth, r0, n, nll);
  }
  if (a.entropy) {
    for (int l = 0; l < W<F>; ++l) nll[l] = keep[l] != 0 ? st.L[l] - st.ed[l] / (1 + st.rest[l]) : 0;
    rows_out<F>(a.entropy, r0, n, nll);
  }
}

// dz at the maximum of confident rows whose maximum is the heavy class, without what entropy adds.
template <class F>
SX_INLINE Vec<F> ce_lanes_heavy(const CrossEntropy& a, const LaneTargets<F>& targets, const LaneRows<F>& st,
                                const double* nll, const double* lse, const double* smooth) {
  const bool dense = is_dense(a);
  typename Of<F>::Int t[W<F>];
  std::memcpy(t, &targets.t, sizeof t);
  double dz[W<F>];
  for (int l = 0; l < W<F>; ++l) {
    const double A = nll[l] * (dense ? st.a[l] : 1) + lse[l] + smooth[l] * a.weight_sum;
    const double nll_aside = dense ? nll[l] * st.a_others[l] : (int64_t)t[l] == a.heavy ? 0 : nll[l];
    dz[l] = (nll_aside + lse[l] + smooth[l] * a.weight_aside) - (A * st.rest[l]) / (1 + st.rest[l]);
  }
  return to_vec<F>(dz);
}

template <class F, class X, class Y, class Out>
SX_INLINE void ce_lanes_gradient(const CrossEntropy& a, X x, Y y, Out out, int64_t r0, int64_t n,
                                 const LaneTargets<F>& targets, const Transform<F>& tr, const LaneRows<F>& st) {
  const bool dense = is_dense(a);
  const F* w = (const F*)a.weight;
  double nll[W<F>], lse[W<F>], smooth[W<F>], entropy[W<F>], A[W<F>], top[W<F>];
  rows_in<F>(a.d_nll, r0, n, nll);
  rows_in<F>(a.d_lse, r0, n, lse);
  rows_in<F>(a.d_smooth, r0, n, smooth);
  rows_in<F>(a.d_entropy, r0, n, entropy);
  double factor[W<F>], at_top[W<F>], less_nll[W<F>], scale_e[W<F>], log_shift[W<F>], total[W<F>];
  const int64_t heavy = a.d_smooth ? a.heavy : -1;
  for (int l = 0; l < W<F>; ++l) {
    total[l] = 1 + st.rest[l];
    const double beside = smooth[l] * a.weight_sum + lse[l];
    A[l] = nll[l] * (dense ? st.a[l] : 1) + beside;
    factor[l] = A[l] / total[l];
    at_top[l] = (dense ? nll[l] * st.a_others[l] : 0) + beside - (A[l] * st.rest[l]) / total[l];
    A[l] = beside / total[l];
    less_nll[l] = -nll[l] / total[l];
    top[l] = st.m[l] - st.m[l] == 0 ? st.m[l] : 0;
  }
  if (a.d_entropy)  // log p_j + H = (z_j - m) - L + (L - ed / total)
    for (int l = 0; l < W<F>; ++l) scale_e[l] = -entropy[l] / total[l], log_shift[l] = -st.ed[l] / total[l];
  Vec<F> m = to_vec<F>(top), d_nll = to_vec<F>(nll), d_smooth = to_vec<F>(smooth), zero = {};
  Vec<F> to_nll = to_vec<F>(less_nll), rest = to_vec<F>(st.rest);
  Split<F> f(factor), confident(at_top), whole(total);  // of a confident row: dz at the maximum, without w_m
  Split<F> f_target(A);                                 // what multiplies e_t beside the -d_nll q_t
  Vec<F> at_heavy = heavy < 0 ? zero : ce_lanes_heavy<F>(a, targets, st, nll, lse, smooth);
  Vec<F> entropy_scale = {}, entropy_shift = {};
  if (a.d_entropy) {
    entropy_scale = to_vec<F>(scale_e);
    entropy_shift = to_vec<F>(log_shift);
  }
  Ints<F> poison = targets.invalid;
  Shift<F> s(m);
  Ints<F> index = {};
  for (int64_t v = 0; v < a.layout.V; ++v) {
    Vec<F> raw = x[v], z = tr.on ? tr(raw) : raw;
    Exped<F> q = exp_shifted<F>(z, s);
    Vec<F> g = -(w ? w[v] * d_smooth : d_smooth), dz;  // minus g_j
    Ints<F> is_top = z == m;
    if (dense) {
      Vec<F> at_maximum = (confident.hi + g) + confident.lo;
      g = g - d_nll * (w ? y[v] * w[v] : y[v]);
      // p_j as 1 - rest / total only where that is small: with rest >= 1 it would be the form that cancels
      dz = (is_top & (rest < 1)) ? at_maximum : f.times_plus(q.e, g);
    } else {
      // d_nll q_t = d_nll / total * (rest, or total - e_t)
      Vec<F> others = is_top ? rest : (whole.hi - q.e) + whole.lo;
      Ints<F> is_target = index == targets.t;
      Vec<F> c = is_target ? fma(to_nll, others, g) : g;
      dz = is_target ? f_target.times_plus(q.e, c) : f.times_plus(q.e, c);
      index += 1;
    }
    if (v == heavy) dz = (is_top & (rest < 1)) ? at_heavy : dz;
    if (a.d_entropy) dz = dz + entropy_scale * q.e * (q.d + entropy_shift);
    if (tr.on) dz = dz * tr.slope(raw);
    dz = poison ? all<F>((F)nan) : dz;
    out.set(v, targets.ignored ? zero : dz);
  }
}

template <class F, class X, class Y, class Out>
void ce_lanes(const CrossEntropy& a, bool fwd, bool bwd, X x, Y y, Out out, int64_t r0, int64_t n) {
  Transform<F> tr(a.scale, a.softcap);
  LaneTargets<F> targets(a, r0, n);
  LaneRows<F> st;
  if (fwd) {
    ce_lanes_visit<F>(a, x, y, targets, tr, a.entropy || (bwd && a.d_entropy), st);
    ce_lanes_write<F>(a, r0, n, targets, st);
  } else {
    rows_in<F>(a.m, r0, n, st.m);
    rows_in<F>(a.rest, r0, n, st.rest);
    if (a.d_entropy || is_dense(a)) {
      double top[W<F>];
      for (int l = 0; l < W<F>; ++l) top[l] = st.m[l] - st.m[l] == 0 ? st.m[l] : 0;
      ce_lane_extras<F>(a, x, y, tr, to_vec<F>(top), false, a.d_entropy != nullptr, st);
    }
  }
  if (bwd) ce_lanes_gradient<F>(a, x, y, out, r0, n, targets, tr, st);
}

}  // namespace softmax_ext::SX_ISA
