// log(1 + x) for x >= 0, branch-free so that a loop over lanes vectorises; within 1 ulp of double.
// Argument reduction and coefficients: FreeBSD msun s_log1p.c. NaN and inf give NaN (the caller's rule for rows).
#pragma once
#include "vec.h"

namespace softmax_ext::SX_ISA {

SX_INLINE double log1p_positive(double x) {
  double u = 1 + x;
  double lost = x < 1 ? x - (u - 1) : 1 - (u - x);  // what the addition rounded away
  int64_t bits;
  std::memcpy(&bits, &u, 8);
  // exponent such that u / 2^k lies in [sqrt(1/2), sqrt 2)
  int64_t shifted = bits - 0x3fe6a09e667f3bcdLL;
  int64_t k = (int64_t)((uint64_t)shifted >> 52);
  bits -= (int64_t)((uint64_t)k << 52);
  double v;
  std::memcpy(&v, &bits, 8);
  // k as a double without an int64 conversion, which AVX2 lacks
  int64_t kd_bits = k + 0x4330000000000000LL;
  double kd;
  std::memcpy(&kd, &kd_bits, 8);
  kd -= 0x1p52;
  double f = v - 1, half = 0.5 * f * f, s = f / (2 + f), z = s * s, w = z * z;
  // odd and even terms apart: half as long a chain, and a row's end has nothing else to do meanwhile
  double odd = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  double even = z * (6.666666666666735130e-01 +
                     w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  double R = odd + even;
  double c = lost / u;
  return kd * 6.93147180369123816490e-01 -
         ((half - (s * (half + R) + (kd * 1.90821492927058770002e-10 + c))) - f);
}

}  // namespace softmax_ext::SX_ISA
