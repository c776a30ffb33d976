// z = softcap * tanh(scale * x / softcap), or scale * x without a cap. One rounding for the scale, no fma
// across it: contracting scale * x - m made softmax(x / 0.7) NaN near 3e10 in a compiler that did.
#pragma once
#include "exp.h"

namespace softmax_ext::SX_ISA {

template <class F> struct Transform {
  F scale, cap;
  bool on;
  Transform(double scale_, double cap_) : scale((F)scale_), cap((F)cap_), on(scale_ != 1 || cap_ != 0) {}

  SX_INLINE Vec<F> operator()(Vec<F> x) const {
    Vec<F> z = x * scale;
    if (cap == 0) return z;
    Vec<F> u = z / cap;
    Vec<F> g = exp_both<F>(-2 * abs(u)).minus_one;  // tanh|u| = -g / (2 + g)
    Vec<F> th = -g / (2 + g) * cap;
    th = u < 0 ? -th : th;
    return x == all<F>(-__builtin_inff()) ? z : th;  // a masked class stays masked; an overflow by the scale is capped
  }
  SX_INLINE F one(F x) const { return on ? (*this)(all<F>(x))[0] : x; }

  // dz / dx = scale * (1 - tanh^2) = scale * 4 e / (1 + e)^2 with e = exp(-2 |u|): no subtraction from 1
  SX_INLINE Vec<F> slope(Vec<F> x) const {
    if (cap == 0) return all<F>(scale);
    Vec<F> e = exp_both<F>(-2 * abs(x * scale / cap)).e;
    return 4 * e / ((1 + e) * (1 + e)) * scale;
  }
  SX_INLINE F slope_one(F x) const { return on ? slope(all<F>(x))[0] : 1; }
};

}  // namespace softmax_ext::SX_ISA
