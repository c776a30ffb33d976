"""Arithmetic of the Triton rows: exp, log1p, division and soft cap that lose no digits, and for half precision few.

`F` is the compute type, tl.float32 or tl.float64. Every product that may be fused with a sum is written as `tl.fma`,
and the launches switch fusion off (`enable_fp_fusion=False`): scale * x - max, contracted, made softmax(x / 0.7) NaN
near 3e10 in a compiler that did. But for the exp2 of half-precision rows nothing comes from a vendor's library or the
chip: it is the same code on every back end and in the interpreter. Constants of exp and log1p: see csrc/exp.h and
csrc/log1p.h.
"""

import triton
import triton.language as tl


@triton.jit
def origin(shift, F: tl.constexpr, FAST: tl.constexpr):
    """Three numbers that `exp` needs of a row's shift, a finite number near the row's maximum.

    exp(z - shift) is never formed. `exp` returns exp(z) 2^-c for a c near shift / ln 2, so that no z - shift is ever
    rounded (that costs up to 64 ulp). Where |shift| is so large that z / ln 2 would no longer have fraction bits, shift
    is subtracted first (`big`): exact there by Sterbenz wherever exp is not 0.

    Accurate: (big, floor, magic), c an integer. FAST: (big, factor, c), c = factor * shift rounded, which all numbers
    of the row have in common. FAST == 2, for logits that are half-precision numbers as they stand: big is not used.
    From 2^16 on such numbers are at least 256 apart: factor 1 serves as well as 1 / ln 2 there, and c is shift itself.
    """
    if FAST:
        if FAST == 2:
            big = tl.zeros_like(shift)
            factor = tl.where(tl.abs(shift) < 65536.0, 1.4426950408889634 + big, 1.0 + big)
        else:
            big = tl.where(tl.abs(shift) >= 256.0, shift, tl.zeros_like(shift))
            factor = 1.4426950408889634 + tl.zeros_like(shift)
        return big, factor, (shift - big) * factor
    elif F == tl.float64:
        big = tl.where(tl.abs(shift) >= 2048.0, shift, tl.zeros_like(shift))
        c = tl.fma(shift - big, tl.full([1, 1], 1.4426950408889634, F), tl.full([1, 1], 6755399441055744.0, F))
        c = c - 6755399441055744.0
        return big, (c - 1022.75) * 0.6931471805599453, 6755399441056767.0 - c  # 1.5 * 2^52 + 1023 - c
    else:
        big = tl.where(tl.abs(shift) >= 256.0, shift, tl.zeros_like(shift))
        c = tl.fma(shift - big, tl.full([1, 1], 1.44269502162933349609375, F), tl.full([1, 1], 12582912.0, F))
        c = c - 12582912.0
        return big, (c - 126.75) * 0.693147182464599609375, 12583039.0 - c  # 1.5 * 2^23 + 127 - c


@triton.jit
def exp(z, big, floor, magic, F: tl.constexpr, FAST: tl.constexpr):
    """exp(z - big) 2^-c; 0 for -inf and for everything below the smallest normal number; NaN for NaN.

    n = round(z / ln 2) comes out of the low bits of a sum, which are also the exponent of 2^(n - c): at `floor` that
    field is 0 and so is the power. With n the argument is reduced exactly to 2^-26 (one rounding of a number below
    1/2, twice), whatever z was; then a minimax polynomial of csrc/exp.h, within half an ulp. Twelve operations.

    FAST, for half-precision logits: the hardware's exp2 (2 ulp on NVIDIA by its manual, 1 on AMD) of one fused product
    and sum, whose rounding is 2^-24 of log2 of the result. Two operations, where a half-precision loss at the speed of
    memory leaves room for fourteen in all. `floor` is the factor then, and `magic` c.
    """
    if FAST:
        a = z
        if FAST == 1:
            a = z - big
        return tl.exp2(tl.fma(a, floor, -magic))
    else:
        a = tl.maximum(z - big, floor, propagate_nan=tl.PropagateNan.ALL)
        if F == tl.float64:
            t = tl.fma(a, tl.full([1, 1], 1.4426950408889634, F), magic)
            n = t - magic
            r = tl.fma(n, tl.full([1, 1], -0.6931471805599453, F), a)
            r = tl.fma(n, tl.full([1, 1], -2.3190468138462996e-17, F), r)
        else:
            t = tl.fma(a, tl.full([1, 1], 1.44269502162933349609375, F), magic)
            n = t - magic
            r = tl.fma(n, tl.full([1, 1], -0.693147182464599609375, F), a)
            r = tl.fma(n, tl.full([1, 1], 1.90465429995776804525e-09, F), r)
        return tl.fma(_tail(r, F), r, tl.full([1, 1], 1.0, F)) * _power(t, F)


@triton.jit
def at_origin(shift, big, floor, magic, F: tl.constexpr, FAST: tl.constexpr):
    """exp of the shift itself, which every number of the row is divided by: never the hardware's.

    FAST: within 2^-8 of 1, for c is shift / ln 2 but for its rounding.
    """
    if FAST:
        a = shift
        if FAST == 1:
            a = shift - big
        r = tl.fma(a, floor, -magic) * 0.6931471805599453
        p = tl.fma(r, tl.full([1, 1], 1.0 / 6, F), tl.full([1, 1], 0.5, F))
        p = tl.fma(p, r, tl.full([1, 1], 1.0, F))
        return tl.fma(p, r, tl.full([1, 1], 1.0, F))
    else:
        return exp(shift, big, floor, magic, F, FAST)


@triton.jit
def _power(t, F: tl.constexpr):
    """2^(k - bias) where k stands in the lowest bits of t's mantissa."""
    if F == tl.float64:
        return (t.to(tl.int64, bitcast=True) << 52).to(F, bitcast=True)
    else:
        return (t.to(tl.int32, bitcast=True) << 23).to(F, bitcast=True)


@triton.jit
def _tail(r, F: tl.constexpr):
    """(exp(r) - 1) / r for |r| <= ln 2 / 2."""
    if F == tl.float64:
        q = tl.fma(r, tl.full([1, 1], 2.5000039251155398401e-8, F), tl.full([1, 1], 2.7630252971345932241e-7, F))
        q = tl.fma(q, r, tl.full([1, 1], 2.7557586466857348738e-6, F))
        q = tl.fma(q, r, tl.full([1, 1], 0.000024801493087230434864, F))
        q = tl.fma(q, r, tl.full([1, 1], 0.00019841269506451420022, F))
        q = tl.fma(q, r, tl.full([1, 1], 0.0013888888943640073602, F))
        q = tl.fma(q, r, tl.full([1, 1], 0.0083333333334945297843, F))
        q = tl.fma(q, r, tl.full([1, 1], 0.041666666666530126516, F))
        q = tl.fma(q, r, tl.full([1, 1], 0.16666666666666412405, F))
        q = tl.fma(q, r, tl.full([1, 1], 0.50000000000000106301, F))
    else:
        q = tl.fma(r, tl.full([1, 1], 0.00138145915115698, F), tl.full([1, 1], 0.00836871924292452, F))
        q = tl.fma(q, r, tl.full([1, 1], 0.0416683883042291, F))
        q = tl.fma(q, r, tl.full([1, 1], 0.16666520612447, F))
        q = tl.fma(q, r, tl.full([1, 1], 0.49999993446472, F))
    return tl.fma(q, r, tl.full([1, 1], 1.0, F))


@triton.jit
def _exp_both(x, F: tl.constexpr):
    """(exp(x), exp(x) - 1) for x <= 0, the second with a relative error of a few ulp also near 0."""
    if F == tl.float64:
        a = tl.maximum(x, tl.full([1, 1], -709.0, F), propagate_nan=tl.PropagateNan.ALL)
        t = tl.fma(a, tl.full([1, 1], 1.4426950408889634, F), tl.full([1, 1], 6755399441056767.0, F))
        n = t - 6755399441056767.0
        r = tl.fma(n, tl.full([1, 1], -0.6931471805599453, F), a)
        r = tl.fma(n, tl.full([1, 1], -2.3190468138462996e-17, F), r)
    else:
        a = tl.maximum(x, tl.full([1, 1], -88.0, F), propagate_nan=tl.PropagateNan.ALL)
        t = tl.fma(a, tl.full([1, 1], 1.44269502162933349609375, F), tl.full([1, 1], 12583039.0, F))
        n = t - 12583039.0
        r = tl.fma(n, tl.full([1, 1], -0.693147182464599609375, F), a)
        r = tl.fma(n, tl.full([1, 1], 1.90465429995776804525e-09, F), r)
    power, s = _power(t, F), r * _tail(r, F)
    return tl.fma(power, s, power), tl.fma(power, s, power - 1.0)


@triton.jit
def ratio(a, b, F: tl.constexpr):
    """a / b rounded once: float32's `/` is 2 ulp on NVIDIA, too much for a row's numbers, which cost little."""
    if F == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def log1p(x, F: tl.constexpr):
    """log(1 + x) for x >= 0 within 1 ulp; NaN for NaN and inf, the rule for such rows."""
    u = 1.0 + x
    lost = tl.where(x < 1.0, x - (u - 1.0), 1.0 - (u - x))  # what the addition rounded away
    if F == tl.float64:
        bits = u.to(tl.int64, bitcast=True)
        k = (bits - 0x3FE6A09E667F3BCD) >> 52
        f = (bits - (k << 52)).to(F, bitcast=True) - 1.0
    else:
        bits = u.to(tl.int32, bitcast=True)
        k = (bits - 0x3F3504F3) >> 23
        f = (bits - (k << 23)).to(F, bitcast=True) - 1.0
    n = k.to(F)
    half, s = 0.5 * f * f, ratio(f, 2.0 + f, F)
    z = s * s
    w = z * z
    if F == tl.float64:
        odd = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01))
        even = w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01))
        even = z * (6.666666666666735130e-01 + even)
        low, high = n * 1.90821492927058770002e-10, n * 6.93147180369123816490e-01
    else:
        odd = w * (0.40000972152 + w * 0.24279078841)
        even = z * (0.66666662693 + w * 0.28498786688)
        low, high = n * 9.0580006145e-06, n * 6.9313812256e-01
    return high - ((half - (s * (half + (odd + even)) + (low + ratio(lost, u, F)))) - f)


@triton.jit
def plus(a, b):
    """a + b as the rounded sum and what the rounding lost (Knuth)."""
    s = a + b
    back = s - a
    return s, (a - (s - back)) + (b - back)


@triton.jit
def over(x, a, b, F: tl.constexpr):
    """x / (a + b) in two parts, good to half an ulp more than F holds; NaN stays NaN."""
    total, lost = plus(a, b)
    inverse = 1.0 / total
    less = tl.fma(-total, inverse, tl.full([1, 1], 1.0, F)) - lost * inverse
    high = x * inverse
    return high, tl.fma(x, inverse, -high) + high * less


@triton.jit
def capped(x, scale, cap, F: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """z = cap tanh(scale x / cap), or scale x; a -inf logit stays -inf. One rounding for the scale."""
    z = x
    if SCALED:
        z = x * scale
    if CAPPED:
        u = z / cap
        _, less = _exp_both(-2.0 * tl.abs(u), F)  # tanh |u| = -less / (2 + less)
        th = -less / (2.0 + less) * cap
        z = tl.where(x == -float("inf"), z, tl.where(u < 0.0, -th, th))
    return z


@triton.jit
def slope(dz, x, scale, cap, F: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """dz times dz/dx = scale (1 - tanh^2) = scale 4 e / (1 + e)^2, e = exp(-2 |u|): no subtraction from 1."""
    if CAPPED:
        e, _ = _exp_both(-2.0 * tl.abs(x * scale / cap), F)
        return dz * (4.0 * e / ((1.0 + e) * (1.0 + e)) * scale)
    elif SCALED:
        return dz * scale
    else:
        return dz
