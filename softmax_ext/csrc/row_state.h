// What one visit of a row leaves, as doubles, and the few scalar formulas that turn it into results.
//
//   m     the maximum of z;   rest  sum of exp(z_j - m) over all j but one position of the maximum
//   lse = m + log1p(rest);    log p_j = (z_j - m) - log1p(rest);    p_j = exp(z_j - m) / (1 + rest)
//
// Never 1 + rest - 1: a confident row keeps its loss and gradient (exp(-60), not 0).
#pragma once
#include "log1p.h"

namespace softmax_ext::SX_ISA {

constexpr double nan = __builtin_nan("");
constexpr double inf = __builtin_inf();

struct RowState {
  double m = -inf, rest = 0;
  // only where asked for, with d_j = z_j - m:
  double ed = 0;              // sum e_j d_j
  double wd = 0, w = 0;       // sum w_j d_j, sum w_j
  double ad = 0, a = 0;       // sum a_j d_j, sum a_j,  a_j = w_j y_j
  double a_others = 0;        // sum a_j where z_j < m: a - a_m would lose a small rest beside a target of nearly 1
  double w_inf = 0, a_inf = 0;  // the terms of wd and ad that are infinite: mass on a logit of -inf

  SX_INLINE double shift() const { return m > -inf ? m : 0; }

  // A larger maximum M: every sum over the part already seen moves to the new origin.
  SX_INLINE void raise(double M) {
    double old = shift(), delta = old - M;
    if (m > -inf) {
      double f = 0;
      if (delta > -800) {  // below, exp is 0, and delta may have overflowed
        // the rounding error of old - M, which in float64 rows would cost |delta| ulp
        double b = delta - old, lost = (old - (delta - b)) - (M + b);
        f = __builtin_exp(delta) * (1 + lost);
      }
      ed = f > 0 ? f * (ed + delta * (rest + 1)) : 0;
      rest = f > 0 ? f * (rest + 1) : 0;
    }
    if (w != 0) wd += w * delta;
    if (a != 0) ad += a * delta;
    a_others = a;
    m = M;
  }
  // A row whose maximum is not finite has no distribution: every result of it is NaN.
  SX_INLINE void close() {
    if (!(m - m == 0)) rest = nan;
  }
};

}  // namespace softmax_ext::SX_ISA
