// A double factor as two F: e * factor then costs one rounding instead of two.
#pragma once
#include "vec.h"

namespace softmax_ext::SX_ISA {

template <class F> struct Split {
  Vec<F> hi, lo;
  Split() = default;
  explicit SX_INLINE Split(double x) {
    F h = (F)x, l = (F)(x - (double)h);
    hi = all<F>(h);
    lo = all<F>(l - l == 0 ? l : 0);  // inf - inf: the high part says it all
  }
  explicit SX_INLINE Split(const double* x) {
    F h[W<F>], r[W<F>];
    for (int l = 0; l < W<F>; ++l) {
      h[l] = (F)x[l];
      r[l] = (F)(x[l] - (double)h[l]);
    }
    hi = load(h);
    lo = load(r);
    lo = lo - lo == 0 ? lo : Vec<F>{};
  }
  SX_INLINE Vec<F> times(Vec<F> e) const { return fma_last(e, hi, e * lo); }
  SX_INLINE Vec<F> times_plus(Vec<F> e, Vec<F> c) const { return fma_last(e, hi, fma(e, lo, c)); }
};

}  // namespace softmax_ext::SX_ISA
