"""Triton row kernels of cross_entropy: forward, gradient, and both in one visit of each row.

Formulas as in csrc/cross_entropy.h, with L = log1p(rest), a_j = w_j y_j for soft targets, Y one-hot:

    forward    nll     integer t: (m - z_t) + L        soft: L sum a_j - sum a_j (z_j - m)
               lse     m + L                           smooth: L sum w_j - sum w_j (z_j - m)
               entropy L - sum e_j (z_j - m) / total
    backward   g_j = d_nll Y_j + d_smooth w_j,  A = sum g_j + d_lse
               dz_j = A p_j - g_j - d_entropy p_j (log p_j + entropy),  dx_j = dz_j dz/dx

The target's d_nll (p_t - 1) is -d_nll q_t: q_t = rest / total at the maximum, (total - e_t) / total elsewhere, where
e_t <= total / 2. Never 1 subtracted from p.

Integer targets: [0, V) counts, -1 is an ignored row (its logits are not even read; results 0, gradient exactly 0),
anything else an invalid one (nll and gradient NaN). No target is used as an address unchecked.
"""

# Compile-time values are not what Python takes them for:
# pyright: reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

from softmax_ext.gpu.arithmetic import at_origin, capped, exp, log1p, origin, over, ratio, slope
from softmax_ext.gpu.rows import (
    HOLDS_FEW,
    HOLDS_MANY,
    HOLDS_ONE,
    HOLDS_TWO,
    closed,
    dealt,
    finite,
    joined,
    no_rows,
    nothing,
    of_row,
    place,
    seen,
    step,
    total,
    whole,
)


def widest(half, both, capped, many):
    """The widest row that is one block; `many`: soft targets, smoothing or entropy are part of the call."""
    if many:
        return HOLDS_MANY
    if capped:
        return HOLDS_FEW
    return HOLDS_ONE if both and half else HOLDS_TWO


@triton.jit
def _row(pointer, row, real, F: tl.constexpr):
    """A row's number, 0 where the caller gave none."""
    if pointer is None:
        return tl.zeros_like(row).to(F)
    else:
        return tl.load(pointer + row, mask=real, other=0.0).to(F)


@triton.jit
def _wide(scale, scale_bits, F: tl.constexpr):
    """A float option in the compute type: Triton hands over every Python float as float32, so float64 has its bits."""
    if F == tl.float64:
        return scale_bits.to(tl.int64).to(F, bitcast=True)
    else:
        return scale


@triton.jit
def _masses(target, weight, at, cols, mask, SOFT: tl.constexpr, F: tl.constexpr):
    """(w_j, a_j) of a block, 0 outside the row."""
    if weight is None:
        w = tl.where(mask, tl.full([1, 1], 1.0, F), tl.full([1, 1], 0.0, F))
    else:
        w = tl.load(weight + cols, mask=mask, other=0.0).to(F)
    if SOFT:
        a = tl.load(target + at, mask=mask, other=0.0).to(F)
        if weight is not None:
            a = a * w
    else:
        a = w
    return w, a


@triton.jit
def _dot(mass, d, LANES: tl.constexpr):
    """sum of mass_j d_j, where a mass of 0 on a d of -inf counts 0."""
    free = (mass == 0.0) & (d == -float("inf"))
    return total(tl.where(free, tl.zeros_like(d), mass * d), LANES)


@triton.jit
def _moved(sum_of_masses, by):
    """What a sum of mass_j d_j grows by where each d_j does; no mass on an infinite d is none."""
    return tl.where(sum_of_masses == 0.0, tl.zeros_like(by), sum_of_masses * by)


@triton.jit
def _kinds(target, row, real, V, SOFT: tl.constexpr):
    """(class, whether the row counts, whether it is ignored), each (ROWS, 1)."""
    if SOFT:
        return tl.zeros_like(row), real, real & (row < 0)
    else:
        t = tl.load(target + row, mask=real, other=-1).to(tl.int64)
        return t, real & (t >= 0) & (t < V), t == -1


@triton.jit
def _visit(
    x,
    target,
    weight,
    first,
    alive,
    V,
    inner,
    scale,
    cap,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    F: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    INNER: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """What one read of a row leaves: (m, top, rest, sums, its only block's x and exps if ONE).

    sums = (sum e_j d_j, sum w_j d_j, sum w_j, sum a_j d_j, sum a_j) with d_j = z_j - m; those not asked for are 0.
    """
    cols = tl.arange(0, COLS)[None, :]
    if ONE:
        zero = tl.zeros([ROWS, 1], F)
        ed, wd, ws, ad, asum = zero, zero, zero, zero, zero
        at, mask = first + step(cols, inner, INNER), alive & (cols < V)
        raw = tl.load(x + at, mask=mask, other=-float("inf")).to(F)
        z = capped(raw, scale, cap, F, SCALED, CAPPED)
        m, top, rest, e = whole(z, F, FAST)
        if SOFT or SMOOTH or ENTROPY:
            d = z - finite(m)
            if ENTROPY:
                ed = total(tl.where(e > 0.0, e * d, tl.zeros_like(e)), 1)
            if SOFT or SMOOTH:
                w, a = _masses(target, weight, at, cols, mask, SOFT, F)
                if SMOOTH:
                    wd, ws = _dot(w, d, 1), total(w, 1)
                if SOFT:
                    ad, asum = _dot(a, d, 1), total(a, 1)
        return m, top, rest, ed, wd, ws, ad, asum, raw, e
    else:
        m, top, rest = no_rows(ROWS, F, LANES)
        zero = nothing(ROWS, F, LANES)
        ed, wd, ws, ad, asum = zero, zero, zero, zero, zero
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), alive & (begin + cols < V)
            raw = dealt(tl.load(x + at, mask=mask, other=-float("inf")), LANES, VECTOR).to(F)
            z = capped(raw, scale, cap, F, SCALED, CAPPED)
            old, old_top, old_rest = m, top, rest
            m, top, rest, e, carry = seen(z, m, top, rest, F, FAST, LANES)
            if SOFT or SMOOTH or ENTROPY:
                # older sums move to the new origin: d_j grows by old - m for each
                now = finite(m)
                by = finite(old) - now
                d = z - now
                if ENTROPY:  # by may be near -inf where nothing of before is carried on
                    before = tl.where(carry > 0.0, carry * (ed + by * (old_top + old_rest)), zero)
                    ed = before + total(tl.where(e > 0.0, e * d, tl.zeros_like(e)), LANES)
                if SOFT or SMOOTH:
                    w, a = _masses(target, weight, at, begin + cols, mask, SOFT, F)
                    if SMOOTH:
                        w = dealt(w, LANES, VECTOR)
                        wd = _dot(w, d, LANES) + (wd + _moved(ws, by))
                        ws += total(w, LANES)
                    if SOFT:
                        a = dealt(a, LANES, VECTOR)
                        ad = _dot(a, d, LANES) + (ad + _moved(asum, by))
                        asum += total(a, LANES)
        lane, lane_top, lane_rest = m, top, rest
        m, top, rest, carry = joined(m, top, rest, F, FAST, LANES)
        if LANES > 1:
            by = finite(lane) - tl.reshape(finite(m), [ROWS, 1, 1, 1])
            if ENTROPY:
                ed = tl.where(carry > 0.0, carry * (ed + by * (lane_top + lane_rest)), zero)
            if SMOOTH:
                wd = wd + _moved(ws, by)
            if SOFT:
                ad = ad + _moved(asum, by)
        ed, wd, ws, ad, asum = (
            of_row(ed, LANES),
            of_row(wd, LANES),
            of_row(ws, LANES),
            of_row(ad, LANES),
            of_row(asum, LANES),
        )
        none = tl.zeros([ROWS, 1], F)
        return m, top, rest, ed, wd, ws, ad, asum, none, none


@triton.jit
def _results(
    row,
    real,
    counts,
    ignored,
    target_z,
    m,
    top,
    rest,
    ed,
    wd,
    ws,
    ad,
    asum,
    nll_out,
    lse_out,
    smooth_out,
    entropy_out,
    m_out,
    rest_out,
    SOFT: tl.constexpr,
    F: tl.constexpr,
):
    """A row's numbers from what its visit left."""
    zero = tl.zeros_like(m)
    told = tl.where((m == -float("inf")) & (rest != rest), float("nan"), m)  # of -inf alone rest is a number
    rest = ratio(closed(m, rest), top, F)  # in units of exp(m) from here on
    less = log1p(rest, F)
    nll = less * asum - ad if SOFT else tl.where(counts, m - target_z + less, float("nan"))
    tl.store(nll_out + row, tl.where(ignored, zero, nll), mask=real)
    tl.store(lse_out + row, tl.where(ignored, zero, m + less), mask=real)
    if smooth_out is not None:
        # a row without a distribution has no sum either: its masses may cancel the NaN only by being 0
        tl.store(smooth_out + row, tl.where(ignored, zero, less * ws - wd), mask=real)
    if entropy_out is not None:
        tl.store(entropy_out + row, tl.where(ignored, zero, less - ratio(ratio(ed, top, F), 1.0 + rest, F)), mask=real)
    tl.store(m_out + row, tl.where(ignored, zero, told), mask=real)
    tl.store(rest_out + row, tl.where(ignored, zero, rest), mask=real)


@triton.jit
def _gradient(
    raw,
    e,
    w,
    a,
    here,
    at_target,
    m,
    excess,
    lost,
    high,
    low,
    d_nll,
    d_smooth,
    d_entropy,
    log_shift,
    ent_high,
    ent_low,
    confident,
    scale,
    cap,
    SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    F: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """dL/dx of a block, from its logits and exps."""
    if SOFT or SMOOTH:
        if SOFT:
            g = -d_nll * a
            if SMOOTH:
                g = g - d_smooth * w
        elif WEIGHTED:
            g = -d_smooth * w
        else:
            g = -d_smooth
        dz = tl.fma(e, high, tl.fma(e, low, g))
    else:
        dz = tl.fma(e, high, e * low)
    if SOFT or ENTROPY:
        z = capped(raw, scale, cap, F, SCALED, CAPPED)
        if SOFT:
            # one class holds more than half: A p - g = (A - g) - A rest / total does not cancel there
            dz = tl.where(confident & (z == m), (excess + g) - lost, dz)
        if ENTROPY:
            d = tl.where(e > 0.0, z - m, tl.zeros_like(e))
            dz = dz + tl.fma(e, ent_high, e * ent_low) * (d + log_shift)
    dz = slope(dz, raw, scale, cap, F, SCALED, CAPPED)
    if SOFT:
        return dz
    else:
        return tl.where(here, at_target, dz)


@triton.jit(do_not_specialize=["outer", "scale_bits", "cap_bits"])
def cross_entropy_fwd_kernel(
    x,
    target,
    weight,
    nll_out,
    lse_out,
    smooth_out,
    entropy_out,
    m_out,
    rest_out,
    outer,
    V,
    inner,
    scale,
    scale_bits,
    cap,
    cap_bits,
    SOFT: tl.constexpr,
    F: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    INNER: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """(nll, lse, [smooth], [entropy], m, rest) of each row."""
    row, first, real = place(outer, V, inner, INNER, ROWS)
    scale, cap = _wide(scale, scale_bits, F), _wide(cap, cap_bits, F)
    t, counts, ignored = _kinds(target, row, real, V, SOFT)
    SMOOTH: tl.constexpr = smooth_out is not None
    ENTROPY: tl.constexpr = entropy_out is not None
    target_z = tl.load(x + first + step(t, inner, INNER), mask=counts, other=float("nan")).to(F)
    target_z = capped(target_z, scale, cap, F, SCALED, CAPPED)
    m, top, rest, ed, wd, ws, ad, asum, _, _ = _visit(
        x, target, weight, first, real & (ignored == 0), V, inner, scale, cap,
        SOFT, SMOOTH, ENTROPY, F, FAST, SCALED, CAPPED, INNER, ONE, ROWS, COLS, LANES, VECTOR,
    )  # fmt: skip
    _results(
        row, real, counts, ignored, target_z, m, top, rest, ed, wd, ws, ad, asum,
        nll_out, lse_out, smooth_out, entropy_out, m_out, rest_out, SOFT, F,
    )  # fmt: skip


@triton.jit(do_not_specialize=["outer", "scale_bits", "cap_bits"])
def cross_entropy_bwd_kernel(
    x,
    target,
    weight,
    weight_sum,
    nll_out,
    lse_out,
    smooth_out,
    entropy_out,
    m_row,
    rest_row,
    d_nll_in,
    d_lse_in,
    d_smooth_in,
    d_entropy_in,
    dx,
    outer,
    V,
    inner,
    scale,
    scale_bits,
    cap,
    cap_bits,
    BOTH: tl.constexpr,
    SOFT: tl.constexpr,
    F: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    INNER: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """dL/dx of each row; `dx` may be x. BOTH: the forward's results too, m and rest written instead of read."""
    row, first, real = place(outer, V, inner, INNER, ROWS)
    scale, cap = _wide(scale, scale_bits, F), _wide(cap, cap_bits, F)
    t, counts, ignored = _kinds(target, row, real, V, SOFT)
    alive = real & (ignored == 0)
    SMOOTH: tl.constexpr = d_smooth_in is not None
    ENTROPY: tl.constexpr = d_entropy_in is not None
    WEIGHTED: tl.constexpr = weight is not None
    cols = tl.arange(0, COLS)[None, :]
    zero = tl.zeros([ROWS, 1], F)

    target_raw = tl.load(x + first + step(t, inner, INNER), mask=counts, other=0.0).to(F)
    target_z = capped(target_raw, scale, cap, F, SCALED, CAPPED)
    ed, asum = zero, zero
    if BOTH:
        m, top, rest, ed, wd, ws, ad, asum, raw, e = _visit(
            x, target, weight, first, alive, V, inner, scale, cap,
            SOFT, smooth_out is not None, ENTROPY or entropy_out is not None,
            F, FAST, SCALED, CAPPED, INNER, ONE, ROWS, COLS, LANES, VECTOR,
        )  # fmt: skip
        _results(
            row, real, counts, ignored, target_z, m, top, rest, ed, wd, ws, ad, asum,
            nll_out, lse_out, smooth_out, entropy_out, m_row, rest_row, SOFT, F,
        )  # fmt: skip
        rest = closed(m, rest)
        m = tl.where(tl.abs(m) < float("inf"), m, zero)
        big, floor, magic = origin(m, F, FAST)
    else:
        m, rest = _row(m_row, row, alive, F), _row(rest_row, row, alive, F)
        m = tl.where(tl.abs(m) < float("inf"), m, zero)
        big, floor, magic = origin(m, F, FAST)
        top = at_origin(m, big, floor, magic, F, FAST)
        rest = rest * top
        if SOFT or ENTROPY:  # sums over the row that the forward did not keep
            e_d, a_all = tl.zeros([ROWS, COLS], F), tl.zeros([ROWS, COLS], F)
            for begin in range(0, V, COLS):
                at, mask = first + step(begin + cols, inner, INNER), alive & (begin + cols < V)
                if ENTROPY:
                    z = tl.load(x + at, mask=mask, other=-float("inf")).to(F)
                    z = capped(z, scale, cap, F, SCALED, CAPPED)
                    ez = exp(z, big, floor, magic, F, FAST)
                    e_d += tl.where(ez > 0.0, ez * (z - m), tl.zeros_like(ez))
                if SOFT:
                    _w, a = _masses(target, weight, at, begin + cols, mask, SOFT, F)
                    a_all += a
            ed, asum = total(e_d, 1), total(a_all, 1)
    d_nll, d_lse = _row(d_nll_in, row, real, F), _row(d_lse_in, row, real, F)
    d_smooth, d_entropy = _row(d_smooth_in, row, real, F), _row(d_entropy_in, row, real, F)

    others = d_lse  # A without the target's own part
    if SMOOTH:
        if WEIGHTED:
            others += d_smooth * tl.load(weight_sum)
        else:
            others += d_smooth * V
    total_rest = ratio(rest, top, F)
    log_shift = zero
    if ENTROPY:  # log p_j + H = (z_j - m) + log_shift: L cancels
        log_shift = -ratio(ratio(ed, top, F), 1.0 + total_rest, F)
    excess = others + d_nll * asum if SOFT else others + d_nll
    high, low = over(excess, top, rest, F)
    ent_high, ent_low = over(-d_entropy, top, rest, F)
    lost_high, lost_low = over(excess * rest, top, rest, F)

    # the integer target's entry, from its own logit, read before anything is overwritten
    e_t = exp(target_z, big, floor, magic, F, FAST)
    p_high, p_low = over(e_t, top, rest, F)
    p = p_high + p_low
    q_high, q_low = over(tl.where(target_z == m, rest, (top - e_t) + rest), top, rest, F)
    at_target = others * p - d_nll * (q_high + q_low)
    if SMOOTH:
        if WEIGHTED:
            at_target -= d_smooth * tl.load(weight + t, mask=counts, other=0.0).to(F)
        else:
            at_target -= d_smooth
    if ENTROPY:
        at_target -= tl.where(e_t > 0.0, d_entropy * p * ((target_z - m) + log_shift), zero)
    at_target = slope(at_target, target_raw, scale, cap, F, SCALED, CAPPED)
    if not SOFT:
        dead = tl.where(counts, zero, float("nan"))  # NaN over the whole row of an invalid target
        high, at_target = high + dead, at_target + dead
    tl.debug_barrier()  # every thread has the target's logit: in place, another may be about to write over it

    if BOTH and ONE:
        at, mask = first + step(cols, inner, INNER), real & (cols < V)
        w, a = e, e
        if SOFT or (SMOOTH and WEIGHTED):
            w, a = _masses(target, weight, at, cols, mask & alive, SOFT, F)
        out = _gradient(
            raw, e, w, a, t == cols, at_target, m, excess, lost_high + lost_low, high, low,
            d_nll, d_smooth, d_entropy, log_shift, ent_high, ent_low, rest < top, scale, cap,
            SOFT, WEIGHTED, SMOOTH, ENTROPY, F, SCALED, CAPPED,
        )  # fmt: skip
        tl.store(dx + at, tl.where(ignored, tl.zeros_like(out), out), mask=mask)
    else:
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            x_block = tl.load(x + at, mask=mask & alive, other=-float("inf")).to(F)
            z = capped(x_block, scale, cap, F, SCALED, CAPPED)
            e_block = exp(z, big, floor, magic, F, FAST)
            w, a = e_block, e_block
            if SOFT or (SMOOTH and WEIGHTED):
                w, a = _masses(target, weight, at, begin + cols, mask & alive, SOFT, F)
            out = _gradient(
                x_block, e_block, w, a, t == begin + cols, at_target, m, excess, lost_high + lost_low, high, low,
                d_nll, d_smooth, d_entropy, log_shift, ent_high, ent_low, rest < top, scale, cap,
                SOFT, WEIGHTED, SMOOTH, ENTROPY, F, SCALED, CAPPED,
            )  # fmt: skip
            tl.store(dx + at, tl.where(ignored, tl.zeros_like(out), out), mask=mask)
