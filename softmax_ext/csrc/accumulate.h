// A sum that carries its rounding errors (Knuth's TwoSum, lane by lane): V terms cost no more than one rounding.
// A plain float sum of 128256 equal terms measured hundreds of ulp off: equal terms round the same way every time.
#pragma once
#include "vec.h"

namespace softmax_ext::SX_ISA {

template <class X> SX_INLINE X tree_of(const X (&x)[8]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

template <class F> struct Sum {
  using V = Vec<F>;
  V hi = {}, lo = {};
  SX_INLINE void add(V x) {
    V s = hi + x;
    V b = s - hi;
    lo += (hi - (s - b)) + (x - b);
    hi = s;
  }
  // eight at a time share one carried step: the three roundings of the tree average out over a row, and a row of equal
  // terms has none
  SX_INLINE void add(const V (&x)[8]) { add(tree_of(x)); }
  // once hi has overflowed lo is inf - inf and means nothing: hi alone carries the infinity
  SX_INLINE V rest() const { return lo - lo == 0 ? lo : V{}; }
  SX_INLINE double total() const { return tree<W<double>>(doubled(hi) + doubled(rest())); }
  SX_INLINE void lanes(double* out) const {
    F h[W<F>], l[W<F>];
    store(h, hi);
    store(l, rest());
    for (int i = 0; i < W<F>; ++i) out[i] = (double)h[i] + (double)l[i];
  }
};

// Adds f(i, n), the terms of elements [i, i + n), over [0, count). A group of eight vectors and the vectors left at the
// end take one carried step each: carried one by one, the last seven cost a row of 1000 more than a third of its exps.
template <class F, class Terms> SX_INLINE void add_all(Sum<F>& sum, int64_t count, Terms f) {
  int64_t i = 0;
  for (; i + 8 * W<F> <= count; i += 8 * W<F>) {
    Vec<F> part[8];
    for (int k = 0; k < 8; ++k) part[k] = f(i + k * W<F>, (int64_t)W<F>);
    sum.add(part);
  }
  if (i == count) return;
  Vec<F> left = {};
  for (; i + W<F> <= count; i += W<F>) left += f(i, (int64_t)W<F>);
  if (i < count) left += f(i, count - i);
  sum.add(left);
}

}  // namespace softmax_ext::SX_ISA
