// exp(x - m) to about one ulp, without ever rounding x - m.
//
// With n = round((x - m) / ln 2):  exp(x - m) = 2^n exp(r),  r = x - (m + n ln 2).
// m = hi + lo with hi on a grid coarse enough that hi + n * ln2_hi is exact, so the one fma c = n * ln2_hi + hi
// and the subtraction x - c (|x - c| < 0.36) lose at most 2^-26, and r = (x - c) - (n * ln2_lo + lo).
// This carries what TwoDiff(x, m) would carry in four operations fewer; a rounded x - m costs up to 64 ulp.
// Where |m| >= `far` that grid no longer fits, but there x - m is exact by Sterbenz wherever exp is not 0.
//
// Results below the smallest normal number are 0 (run() sets flush-to-zero, as XLA does for its own code): a row of
// randn * 20 is full of subnormal probabilities, and each vector of them cost 20 to 40 times a normal one. At -floor
// the power is 2^-127, whose exponent field is 0: exp is exactly 0 there and below.
//
// No product here is ever contracted by the compiler: the file is built with -ffp-contract=off.
#pragma once
#include "vec.h"

namespace softmax_ext::SX_ISA {

template <class F> struct Exp;
template <> struct Exp<float> {
  static constexpr float log2e = 1.44269504f, magic = 0x1.8p23f + 127, ln2_hi = 0.693145751953125f,
                         ln2_lo = 1.4286068203094172e-6f, grid = 0x1.8p10f, far = 256, floor = 88;
  // minimax of (exp(r) - 1 - r) / r^2 weighted by r^2 / exp(r) on |r| <= 0.34662: relative error of exp 2^-27.9
  static constexpr float c[5] = {0.49999993446472f, 0.16666520612447f, 0.0416683883042291f, 0.00836871924292452f,
                                 0.00138145915115698f};
};
template <> struct Exp<double> {
  static constexpr double log2e = 1.4426950408889634, magic = 0x1.8p52 + 1023, ln2_hi = 0.6931471805601177038624883,
                          ln2_lo = -1.72394445256148347731635e-13, grid = 0x1.8p12, far = 2048, floor = 709;
  // the same, relative error 2^-56.3
  static constexpr double c[10] = {0.50000000000000106301,    0.16666666666666412405,    0.041666666666530126516,
                                   0.0083333333334945297843,  0.0013888888943640073602,  0.00019841269506451420022,
                                   0.000024801493087230434864, 2.7557586466857348738e-6, 2.7630252971345932241e-7,
                                   2.5000039251155398401e-8};
};

// The shift m, prepared: one per row (every lane the same) or one per lane.
template <class F> struct Shift {
  using V = Vec<F>;
  V big, small, hi, lo, floor;
  // m must be finite
  explicit SX_INLINE Shift(V m) {
    V none = {};
    big = abs(m) >= Exp<F>::far ? m : none;
    small = m - big;
    hi = (small + Exp<F>::grid) - Exp<F>::grid;
    lo = small - hi;
    floor = small - Exp<F>::floor;
  }
};

template <class F> SX_INLINE bool is_near(F m) { return m < Exp<F>::far && -m < Exp<F>::far; }

template <class F> SX_INLINE Vec<F> exp_tail(Vec<F> r) {  // (exp(r) - 1) / r
  constexpr int n = sizeof(Exp<F>::c) / sizeof(F);
  Vec<F> q = all<F>(Exp<F>::c[n - 1]);
  for (int i = n - 2; i >= 0; --i) q = fma(q, r, all<F>(Exp<F>::c[i]));
  return fma(q, r, all<F>(1));
}

// d is x - m rounded (and held above -floor): good for everything that is not exponentiated.
template <class F> struct Exped { Vec<F> e, d; };

// Near: the caller has seen that |m| < far in every lane, and saves the subtraction of 0.
template <class F, bool Near = false> SX_INLINE Exped<F> exp_shifted(Vec<F> x, const Shift<F>& s) {
  using E = Exp<F>;
  x = max(s.floor, Near ? x : x - s.big);  // a NaN passes; -inf becomes a number whose exp is 0
  Vec<F> d = x - s.small;
  Vec<F> t = fma(d, all<F>(E::log2e), all<F>(E::magic));
  Vec<F> n = t - E::magic;
  Vec<F> c = fma(n, all<F>(E::ln2_hi), s.hi);
  Vec<F> r = (x - c) - fma(n, all<F>(E::ln2_lo), s.lo);
  Vec<F> p = fma_last(exp_tail<F>(r), r, all<F>(1));
  return {p * power_of_two(t), d};
}

// For x <= 0: exp(x), and exp(x) - 1 with a relative error of a few ulp also near 0.
template <class F> struct ExpBoth { Vec<F> e, minus_one; };

template <class F> SX_INLINE ExpBoth<F> exp_both(Vec<F> x) {
  using E = Exp<F>;
  x = max(all<F>(-E::floor), x);
  Vec<F> t = fma(x, all<F>(E::log2e), all<F>(E::magic));
  Vec<F> n = t - E::magic;
  Vec<F> r = fma(-n, all<F>(E::ln2_lo), fma(-n, all<F>(E::ln2_hi), x));
  Vec<F> power = power_of_two(t), s = r * exp_tail<F>(r);
  return {fma(power, s, power), fma(power, s, power - 1)};
}

}  // namespace softmax_ext::SX_ISA
