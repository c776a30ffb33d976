// cross_entropy over one contiguous row: forward, gradient, and both in one visit.
#pragma once
#include "cross_entropy.h"
#include "wide.h"

namespace softmax_ext::SX_ISA {

// What is asked beyond the integer-target loss. T: logits; Y: dense targets.
template <class T, class Y> struct WideExtras {
  using F = Compute<T>;
  const T* x;
  const Y* y;  // null: integer targets
  const F* w;  // null: ones
  bool smooth, entropy;
  const Transform<F>& tr;

  void operator()(int64_t begin, int64_t count, F shift, RowState& st) const {
    Sum<F> ed, wd, ad, asum, aothers, wsum;
    Vec<F> w_inf = {}, a_inf = {}, zero = {};
    Shift<F> s(all<F>(shift));
    const F low = -__builtin_inff();
    F ones[W<F>];
    store(ones, all<F>(1));
    each_vector<F>(count, [&](int64_t i0, int64_t n) SX_LAMBDA {
      int64_t i = begin + i0;
      Vec<F> z = load_n(x + i, n, low);
      if (tr.on) z = tr(z);
      if (entropy) {
        Exped<F> q = exp_shifted<F>(z, s);
        ed.add(q.e * q.d);
      }
      Ints<F> masked = z - shift == all<F>(low);  // -inf, or so far below that the distance overflows
      Vec<F> d = masked ? zero : z - shift;
      Vec<F> wv = w ? load_n(w + i, n, F(0)) : load_n(ones, n, F(0));
      if (smooth) {
        wd.add(wv * d);
        wsum.add(wv);
        w_inf += (masked & (wv != 0)) ? wv * low : zero;
      }
      if (y) {
        Vec<F> a = load_n(y + i, n, F(0)) * wv;
        ad.add(a * d);
        asum.add(a);
        aothers.add(z == all<F>(shift) ? zero : a);
        a_inf += (masked & (a != 0)) ? a * low : zero;
      }
    });
    st.ed += ed.total();
    st.wd += wd.total();
    st.w += wsum.total();
    st.ad += ad.total();
    st.a += asum.total();
    st.a_others += aothers.total();
    st.w_inf += lane_sum<F>(w_inf);
    st.a_inf += lane_sum<F>(a_inf);
  }
};

template <class T, class Y, bool Tr, bool Extra>
SX_INLINE RowState ce_visit(const CrossEntropy& a, const T* x, const Y* y, bool entropy,
                            const Transform<Compute<T>>& tr) {
  using F = Compute<T>;
  if constexpr (Extra)
    return visit_row<T, Tr>(x, a.layout.V, tr,
                            WideExtras<T, Y>{x, y, (const F*)a.weight, a.smooth != nullptr, entropy, tr});
  else
    return visit_row<T, Tr>(x, a.layout.V, tr);
}

// out_j = (A p_j - g_j - d_entropy p_j (log p_j + H)) dz/dx over the row, the entries of the integer target and
// of a heavy class apart.
template <class T, class Y, bool Tr, bool Extra>
void ce_gradient(const CrossEntropy& a, const T* x, const Y* y, T* out, int64_t t, double m, const GradRow& g,
                 double a_others, const Transform<Compute<T>>& tr) {
  using F = Compute<T>;
  const int64_t V = a.layout.V;
  const F* w = (const F*)a.weight;
  F top = m - m == 0 ? (F)m : F(0);
  // read before the row is overwritten
  F at_target = 0;
  if (t >= 0) {
    F xt = get(x + t);
    double slope = Tr ? (double)tr.slope_one(xt) : 1;
    at_target = (F)(g.at_target((double)(Tr ? tr.one(xt) : xt) - (double)top, w ? (double)w[t] : 1) * slope);
  }
  int64_t apart = -1;
  F at_heavy = 0;
  if (Extra && a.heavy >= 0 && g.smooth != 0 && g.rest < 1) {
    F xh = get(x + a.heavy);
    if ((Tr ? tr.one(xh) : xh) == top) {
      apart = a.heavy;
      double aside = y ? g.nll * a_others : apart == t ? 0 : g.nll;
      at_heavy = (F)(g.at_heavy(aside, a.weight_aside) * (Tr ? (double)tr.slope_one(xh) : 1));
    }
  }
  Shift<F> s(all<F>(top));
  Split<F> factor(g.A / g.total), entropy(-g.entropy / g.total);
  // at the maximum of a confident row, without w_m: A - a_m by the others' mass, less A (1 - p_m)
  Split<F> at_top(g.nll * a_others + g.others - (g.A * g.rest) / g.total);
  Vec<F> smooth = all<F>((F)-g.smooth);
  const F nll = (F)g.nll, log_shift = (F)g.log_shift, low = -__builtin_inff();
  // p_j as 1 - rest / total only where that is small: with rest >= 1 it would be the form that cancels
  const F confident_at = g.rest < 1 ? top : (F)nan;
  each_vector<F>(V, [&](int64_t i, int64_t n) SX_LAMBDA {
    Vec<F> raw = load_n(x + i, n, low), z = Tr ? tr(raw) : raw, dz;
    Exped<F> q = exp_shifted<F>(z, s);
    if (!Extra) {
      dz = factor.times_plus(q.e, smooth);
    } else {
      Vec<F> gj = w ? load_n(w + i, n, F(0)) * smooth : smooth;  // minus g_j
      if (y) {
        Vec<F> yj = load_n(y + i, n, F(0));
        if (w) yj = yj * load_n(w + i, n, F(0));
        Vec<F> confident = (at_top.hi + gj) + at_top.lo;
        gj = gj - nll * yj;
        dz = z == all<F>(confident_at) ? confident : factor.times_plus(q.e, gj);
      } else {
        dz = factor.times_plus(q.e, gj);
      }
      if (g.entropy != 0) dz = dz + entropy.times(q.e) * (q.d + log_shift);
    }
    if (Tr) dz = dz * tr.slope(raw);
    store_n(out + i, n, dz);
  });
  if (t >= 0) put(out + t, at_target);
  if (apart >= 0) put(out + apart, at_heavy);
}

// Forward and gradient with one exp per element, left in `kept` meanwhile, which may be `out`, which may be x: integer
// targets, no more asked.
template <class T>
void ce_row_keeping(const CrossEntropy& a, int64_t r, const T* x, T* out, Compute<T>* kept, int64_t t) {
  using F = Compute<T>;
  const int64_t V = a.layout.V;
  F zt = t >= 0 ? get(x + t) : (F)nan;
  RowState st = visit_row_keeping(x, kept, V);
  write_results<F>(a, r, st, zt);
  if (t < 0 || st.rest != st.rest) return fill_row(out, V, (F)nan);
  GradRow g(st.rest, 1, a.weight_sum, 0, row_value<F>(a.d_nll, r), row_value<F>(a.d_lse, r),
            row_value<F>(a.d_smooth, r), 0);
  Split<F> factor(g.A / g.total);
  Vec<F> smooth = all<F>((F)-g.smooth);
  each_vector<F>(V, [&](int64_t i, int64_t n) SX_LAMBDA {
    store_n(out + i, n, factor.times_plus(load_n(kept + i, n, F(0)), smooth));
  });
  put(out + t, (F)g.at_target((double)zt - st.m, a.weight ? (double)((const F*)a.weight)[t] : 1));
}

template <class T, class Y, Do what, bool Tr, bool Extra>
void ce_row(const CrossEntropy& a, int64_t r, const Transform<Compute<T>>& tr, [[maybe_unused]] Compute<T>* kept) {
  using F = Compute<T>;
  const int64_t V = a.layout.V;
  const T* x = (const T*)a.logits + r * V;
  T* out = (T*)a.dlogits + r * V;
  const bool dense = is_dense(a);
  const Y* y = dense ? (const Y*)a.target + r * V : nullptr;
  int64_t t = -2;
  if (!dense) {
    t = target_at(a, r);
    RowKind kind = kind_of(t, V);
    if (kind == RowKind::ignored) {
      if (what != Do::bwd) write_ignored<F>(a, r);
      if (what != Do::fwd) fill_row(out, V, F(0));
      return;
    }
    if (kind == RowKind::invalid) t = -2;
  }
  const bool invalid = !dense && t < 0;
  if (what == Do::bwd && invalid) return fill_row(out, V, (F)nan);

  double d_entropy = what == Do::fwd ? 0 : row_value<F>(a.d_entropy, r);
  RowState st;
  if (what == Do::bwd) {
    st.m = row_value<F>(a.m, r);
    st.rest = row_value<F>(a.rest, r);
    if constexpr (Extra) {  // sum of g and the entropy are sums over the row: one more visit where they matter
      if (y || d_entropy != 0) {
        WideExtras<T, Y> more{x, y, (const F*)a.weight, false, d_entropy != 0, tr};
        for (int64_t b = 0; b < V; b += block_elements)
          more(b, V - b < block_elements ? V - b : block_elements, (F)(st.m - st.m == 0 ? st.m : 0), st);
      }
    }
  } else {
    if constexpr (what == Do::both && !Tr && !Extra)
      if (V <= keep_up_to) {
        if constexpr (std::is_same_v<T, F>) kept = out;
        return ce_row_keeping(a, r, x, out, kept, t);
      }
    st = ce_visit<T, Y, Tr, Extra>(a, x, y, a.entropy || d_entropy != 0, tr);
    double zt = t >= 0 ? (double)(Tr ? tr.one(get(x + t)) : get(x + t)) : nan;
    write_results<F>(a, r, st, zt);
    if (what == Do::fwd) return;
    if (invalid) return fill_row(out, V, (F)nan);
  }
  double H = d_entropy != 0 ? log1p_positive(st.rest) - st.ed / (1 + st.rest) : 0;
  GradRow g(st.rest, dense ? st.a : 1, a.weight_sum, H, row_value<F>(a.d_nll, r), row_value<F>(a.d_lse, r),
            row_value<F>(a.d_smooth, r), d_entropy);
  ce_gradient<T, Y, Tr, Extra>(a, x, y, out, t, st.m, g, st.a_others, tr);
}

// kept: room for one row's exps where the gradient cannot hold them unrounded (`Do::both`, V <= keep_up_to).
template <class T, class Y, Do what>
void ce_rows(const CrossEntropy& a, int64_t begin, int64_t end, Compute<T>* kept) {
  Transform<Compute<T>> tr(a.scale, a.softcap);
  bool extra = is_dense(a) || (what != Do::bwd && (a.smooth || a.entropy)) ||
               (what != Do::fwd && (a.d_entropy || (a.d_smooth && a.weight)));
  for (int64_t r = begin; r < end; ++r) {
    if (tr.on) extra ? ce_row<T, Y, what, true, true>(a, r, tr, kept) : ce_row<T, Y, what, true, false>(a, r, tr, kept);
    else extra ? ce_row<T, Y, what, false, true>(a, r, tr, kept) : ce_row<T, Y, what, false, false>(a, r, tr, kept);
  }
}

}  // namespace softmax_ext::SX_ISA
