"""A student's class beside a teacher's, and the numbers both their rows are known by. See divergence.py."""

# Compile-time values are not what Python takes them for:
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

from softmax_ext.gpu.arithmetic import at_origin, capped, exp, origin, over, ratio
from softmax_ext.gpu.rows import closed, dealt, joined, no_rows, seen, step


@triton.jit
def both_rows(
    x,
    y,
    first,
    alive,
    V,
    inner,
    scale,
    cap,
    y_scale,
    y_cap,
    F: tl.constexpr,
    FAST_X: tl.constexpr,
    SCALED_X: tl.constexpr,
    CAPPED_X: tl.constexpr,
    FAST_Y: tl.constexpr,
    SCALED_Y: tl.constexpr,
    CAPPED_Y: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """(m, rest) of both rows from one read of both, rest in units of exp(m) and NaN where m is not finite."""
    cols = tl.arange(0, COLS)[None, :]
    m, top, rest = no_rows(ROWS, F, LANES)
    n, n_top, n_rest = no_rows(ROWS, F, LANES)
    for begin in range(0, V, COLS):
        at, mask = first + step(begin + cols, inner, INNER), alive & (begin + cols < V)
        a = tl.load(x + at, mask=mask, other=-float("inf"), eviction_policy="evict_last")
        a = capped(dealt(a, LANES, VECTOR).to(F), scale, cap, F, SCALED_X, CAPPED_X)
        m, top, rest, _, _ = seen(a, m, top, rest, F, FAST_X, LANES)
        b = tl.load(y + at, mask=mask, other=-float("inf"), eviction_policy="evict_last")
        b = capped(dealt(b, LANES, VECTOR).to(F), y_scale, y_cap, F, SCALED_Y, CAPPED_Y)
        n, n_top, n_rest, _, _ = seen(b, n, n_top, n_rest, F, FAST_Y, LANES)
    m, top, rest, _ = joined(m, top, rest, F, FAST_X, LANES)
    n, n_top, n_rest, _ = joined(n, n_top, n_rest, F, FAST_Y, LANES)
    # of -inf alone rest is a number
    m = tl.where((m == -float("inf")) & (rest != rest), float("nan"), m)
    n = tl.where((n == -float("inf")) & (n_rest != n_rest), float("nan"), n)
    return m, ratio(closed(m, rest), top, F), n, ratio(closed(n, n_rest), n_top, F)


@triton.jit
def share(m, rest, F: tl.constexpr, FAST: tl.constexpr):
    """What p = exp(z) / total needs of a row's m and rest: exp's origin, and 1 / total in two parts."""
    m = tl.where(tl.abs(m) < float("inf"), m, tl.zeros_like(m))
    big, floor, magic = origin(m, F, FAST)
    top = at_origin(m, big, floor, magic, F, FAST)
    high, low = over(tl.full([1, 1], 1.0, F), top, rest * top, F)
    return big, floor, magic, high, low


@triton.jit
def probability(z, big, floor, magic, high, low, F: tl.constexpr, FAST: tl.constexpr):
    """exp(z) / total."""
    e = exp(z, big, floor, magic, F, FAST)
    return tl.fma(e, high, e * low)


@triton.jit
def _exp_curve(r, F: tl.constexpr):
    """(exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2, by its series."""
    if F == tl.float64:
        q = tl.fma(r, tl.full([1, 1], 1.0 / 87178291200, F), tl.full([1, 1], 1.0 / 6227020800, F))
        q = tl.fma(q, r, tl.full([1, 1], 1.0 / 479001600, F))
        q = tl.fma(q, r, tl.full([1, 1], 1.0 / 39916800, F))
        q = tl.fma(q, r, tl.full([1, 1], 1.0 / 3628800, F))
        q = tl.fma(q, r, tl.full([1, 1], 1.0 / 362880, F))
        q = tl.fma(q, r, tl.full([1, 1], 1.0 / 40320, F))
        q = tl.fma(q, r, tl.full([1, 1], 1.0 / 5040, F))
    else:
        q = tl.fma(r, tl.full([1, 1], 1.0 / 40320, F), tl.full([1, 1], 1.0 / 5040, F))
    q = tl.fma(q, r, tl.full([1, 1], 1.0 / 720, F))
    q = tl.fma(q, r, tl.full([1, 1], 1.0 / 120, F))
    q = tl.fma(q, r, tl.full([1, 1], 1.0 / 24, F))
    q = tl.fma(q, r, tl.full([1, 1], 1.0 / 6, F))
    return tl.fma(q, r, tl.full([1, 1], 0.5, F))


@triton.jit
def log1p_both(x, F: tl.constexpr):
    """log(1 + x) and x - log(1 + x) for -1 < x <= 1, within a few ulp of each. See csrc/divergence.h."""
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
    plain = k == 0
    n, f = k.to(F), tl.where(plain, x, f)
    lost = tl.where(plain, tl.zeros_like(x), lost / u)
    half, s = 0.5 * f * f, f / (2.0 + f)
    z = s * s
    if F == tl.float64:
        q = tl.fma(z, tl.full([1, 1], 1.479819860511658591e-01, F), tl.full([1, 1], 1.531383769920937332e-01, F))
        q = tl.fma(q, z, tl.full([1, 1], 1.818357216161805012e-01, F))
        q = tl.fma(q, z, tl.full([1, 1], 2.222219843214978396e-01, F))
        q = tl.fma(q, z, tl.full([1, 1], 2.857142874366239149e-01, F))
        q = tl.fma(q, z, tl.full([1, 1], 3.999999999940941908e-01, F))
        q = tl.fma(q, z, tl.full([1, 1], 6.666666666666735130e-01, F))
        low, high = n * 1.90821492927058770002e-10, n * 6.93147180369123816490e-01
    else:
        q = tl.fma(z, tl.full([1, 1], 0.24279078841, F), tl.full([1, 1], 0.28498786688, F))
        q = tl.fma(q, z, tl.full([1, 1], 0.40000972152, F))
        q = tl.fma(q, z, tl.full([1, 1], 0.66666662693, F))
        low, high = n * 9.0580006145e-06, n * 6.9313812256e-01
    bend = s * (half + q * z)
    curved = half - bend
    log = tl.where(plain, f - curved, high - ((half - (bend + (low + lost))) - f))
    return log, tl.where(plain, curved, x - log)


@triton.jit
def meet(s, t, x, y, p, q, hi, lo, unit, beta, KIND: tl.constexpr, RAW: tl.constexpr, F: tl.constexpr):
    """(p - q, q f(p / q), f'(p / q)) of a block of classes; RAW: logits are subtracted as they stand."""
    zero = tl.zeros_like(p)
    a, b = s, t
    if RAW:
        a, b = x, y
    apart = a - b
    back = apart - a
    lost = (a - (apart - back)) - (b + back)
    lost = tl.where(tl.abs(lost) < float("inf"), lost, zero)
    d = ((apart - hi) + (lost - lo)) * unit
    v, base = d, q
    if KIND == 1:
        v, base = -d, p
    near = tl.abs(v) <= 0.693147
    r = tl.where(near, 0.5 * v, zero)
    bend = r * r * _exp_curve(r, F)
    half = r + bend
    grown = half * (half + 2.0)  # expm1(v)
    less = p - q
    if KIND == 1:
        less = q - p
    less = tl.where(near, base * grown, less)
    if KIND <= 1:
        paid = tl.where(base == 0.0, zero, base * v)  # no mass pays nothing, not even where v is infinite
        term = tl.where(near, base * (half * half + 2.0 * bend), less - paid)
        u = d
    elif KIND == 3:
        term = 0.5 * tl.abs(less)
        u = tl.where(d > 0.0, zero + 0.5, tl.where(d < 0.0, zero - 0.5, zero))
    else:
        ahead, other = d >= 0.0, 1.0 - beta
        most = tl.where(ahead, p, q)
        shrunk = tl.where(most == 0.0, zero, tl.where(ahead, q - p, p - q) / most)  # expm1(-|d|)
        one, one_less = log1p_both(tl.where(near, other * grown, tl.where(ahead, beta, other) * shrunk), F)
        two, two_less = log1p_both(beta * (-grown / (1.0 + grown)), F)
        of_q = tl.where(q == 0.0, zero, q * tl.where(ahead, one + d, one))
        of_p = tl.where(near, two, tl.where(ahead, one, one - d))
        far = -(beta * of_q) - other * tl.where(p == 0.0, zero, p * of_p)
        term = tl.where(near, beta * q * one_less + other * p * two_less, far)
        u = -other * of_p
    if KIND == 1:
        less = -less
    return less, term, u
