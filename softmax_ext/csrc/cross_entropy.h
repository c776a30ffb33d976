// The scalar formulas of one cross-entropy row, shared by wide rows and lanes.
//
//   forward    nll     integer t: (m - z_t) + L          dense y: -sum a_j (z_j - m) + L sum a_j,  a_j = w_j y_j
//              lse     m + L                             L = log1p(rest)
//              smooth  -sum w_j (z_j - m) + L sum w_j    entropy  L - sum e_j (z_j - m) / total
//   backward   with g_j = d_nll Y_j + d_smooth w_j  (Y one-hot, or a)  and  A = sum g_j + d_lse:
//              dz_j = A p_j - g_j - d_entropy p_j (log p_j + entropy),   dx_j = dz_j dz/dx
//              The target's d_nll (p_t - 1) is formed as -d_nll q_t: q_t = rest / total at the maximum and
//              (total - e_t) / total elsewhere, where e_t <= total / 2. Never 1 subtracted from p. What else multiplies
//              p_t is summed without d_nll, not A - d_nll: a small z-loss beside a loss would lose its digits.
//              Of a confident row's maximum that holds most of W = sum w_j too, W p - w is (W - w) - W q, W - w the
//              others' sum.
#pragma once
#include "row_state.h"
#include "rows.h"
#include "split.h"
#include "transform.h"

namespace softmax_ext::SX_ISA {

enum class Do { fwd, bwd, both };
enum class RowKind { counted, ignored, invalid };

inline int64_t target_at(const CrossEntropy& a, int64_t r) {
  return a.target_kind == Target::i64 ? ((const int64_t*)a.target)[r] : (int64_t)((const int32_t*)a.target)[r];
}
inline bool is_dense(const CrossEntropy& a) { return (int32_t)a.target_kind >= 2; }
inline RowKind kind_of(int64_t t, int64_t V) {
  return t == -1 ? RowKind::ignored : t >= 0 && t < V ? RowKind::counted : RowKind::invalid;
}
template <class F> SX_INLINE double row_value(const void* p, int64_t r) { return p ? (double)((const F*)p)[r] : 0; }
template <class F> SX_INLINE void set_row(void* p, int64_t r, double x) { if (p) ((F*)p)[r] = (F)x; }

template <class F> inline void write_ignored(const CrossEntropy& a, int64_t r) {
  void* const results[] = {a.nll, a.lse, a.smooth, a.entropy, a.m, a.rest};
  for (void* p : results) set_row<F>(p, r, 0);
}
// `target_z`: z at the target, NaN for an invalid row
template <class F>
SX_INLINE void write_results(const CrossEntropy& a, int64_t r, const RowState& st, double target_z) {
  double L = log1p_positive(st.rest);
  set_row<F>(a.nll, r, is_dense(a) ? (L * st.a - st.ad) - st.a_inf : (st.m - target_z) + L);
  set_row<F>(a.lse, r, st.m + L);
  set_row<F>(a.smooth, r, (L * a.weight_sum - st.wd) - st.w_inf);
  set_row<F>(a.entropy, r, L - st.ed / (1 + st.rest));
  set_row<F>(a.m, r, st.m);
  set_row<F>(a.rest, r, st.rest);
}

// What the gradient of one row needs beside e_j.
struct GradRow {
  double total, rest, A, nll, lse, smooth, entropy;  // upstream gradients, A as above
  double others;                                // A without the d_nll of the class that at_target is asked for
  double log_shift;                             // log p_j + entropy = (z_j - m) + log_shift
  SX_INLINE GradRow(double rest_, double target_mass, double weight_sum, double H, double nll_, double lse_,
                    double smooth_, double entropy_)
      : total(1 + rest_), rest(rest_), nll(nll_), lse(lse_), smooth(smooth_), entropy(entropy_) {
    others = smooth * weight_sum + lse;
    A = nll * target_mass + others;
    log_shift = entropy != 0 ? H - log1p_positive(rest) : 0;
  }
  // dz at an integer target: z = its logit, d = z - m, w = its weight
  SX_INLINE double at_target(double d, double w) const {
    double e = __builtin_exp(d), p = e / total;
    double q = d == 0 ? rest / total : (total - e) / total;
    double dz = others * p - nll * q - smooth * w;
    return entropy != 0 && p > 0 ? dz - entropy * p * (d + log_shift) : dz;
  }
  // dz at the maximum of a confident row, from what the other classes have of d_nll Y and of w
  SX_INLINE double at_heavy(double nll_aside, double weight_aside) const {
    double dz = (nll_aside + lse + smooth * weight_aside) - A * rest / total;
    return entropy != 0 ? dz - entropy / total * log_shift : dz;
  }
};

}  // namespace softmax_ext::SX_ISA
