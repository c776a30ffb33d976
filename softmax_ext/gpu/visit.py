"""One visit of a cross-entropy row: everything its results need, from one read of its logits. See cross_entropy.py."""

# Compile-time values are not what Python takes them for:
# pyright: reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

from softmax_ext.gpu.arithmetic import capped, log1p, ratio
from softmax_ext.gpu.rows import closed, dealt, finite, joined, no_rows, nothing, of_row, seen, step, total, whole


@triton.jit
def number(pointer, row, real, F: tl.constexpr):
    """A row's number, 0 where the caller gave none."""
    if pointer is None:
        return tl.zeros_like(row).to(F)
    else:
        return tl.load(pointer + row, mask=real, other=0.0).to(F)


@triton.jit
def option(scale, scale_bits, F: tl.constexpr):
    """A float option in the compute type: Triton hands over every Python float as float32, so float64 has its bits."""
    if F == tl.float64:
        return scale_bits.to(tl.int64).to(F, bitcast=True)
    else:
        return scale


@triton.jit
def kinds(target, row, real, V, SOFT: tl.constexpr):
    """(class, whether the row counts, whether it is ignored), each (ROWS, 1)."""
    if SOFT:
        return tl.zeros_like(row), real, real & (row < 0)
    else:
        t = tl.load(target + row, mask=real, other=-1).to(tl.int64)
        return t, real & (t >= 0) & (t < V), t == -1


@triton.jit
def masses(target, weight, at, cols, mask, SOFT: tl.constexpr, F: tl.constexpr):
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
def visit(
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
    AGAIN: tl.constexpr,
):
    """What one read of a row leaves: (m, top, rest, sums, its only block's x and exps if ONE). AGAIN: another follows.

    sums = (sum e_j d_j, sum w_j d_j, sum w_j, sum a_j d_j, sum a_j, sum a_j but at the maximum) with d_j = z_j - m;
    those not asked for are 0. The last is no difference: beside a target of nearly 1 that would have no digits.
    """
    if ONE:
        return _one_block(
            x, target, weight, first, alive, V, inner, scale, cap,
            SOFT, SMOOTH, ENTROPY, F, FAST, SCALED, CAPPED, INNER, ROWS, COLS,
        )  # fmt: skip
    else:
        return _by_blocks(
            x, target, weight, first, alive, V, inner, scale, cap,
            SOFT, SMOOTH, ENTROPY, F, FAST, SCALED, CAPPED, INNER, ROWS, COLS, LANES, VECTOR, AGAIN,
        )  # fmt: skip


@triton.jit
def _one_block(
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`visit` of a row that is one block: x and its exps are kept for a gradient."""
    cols = tl.arange(0, COLS)[None, :]
    zero = tl.zeros([ROWS, 1], F)
    ed, wd, ws, ad, asum, aside = zero, zero, zero, zero, zero, zero
    at, mask = first + step(cols, inner, INNER), alive & (cols < V)
    raw = tl.load(x + at, mask=mask, other=-float("inf")).to(F)
    z = capped(raw, scale, cap, F, SCALED, CAPPED)
    m, top, rest, e = whole(z, F, FAST)
    if SOFT or SMOOTH or ENTROPY:
        d = z - finite(m)
        if ENTROPY:
            ed = total(tl.where(e > 0.0, e * d, tl.zeros_like(e)), 1)
        if SOFT or SMOOTH:
            w, a = masses(target, weight, at, cols, mask, SOFT, F)
            if SMOOTH:
                wd, ws = _dot(w, d, 1), total(w, 1)
            if SOFT:
                ad, asum = _dot(a, d, 1), total(a, 1)
                aside = total(tl.where(d < 0.0, a, tl.zeros_like(a)), 1)
    return m, top, rest, ed, wd, ws, ad, asum, aside, raw, e


@triton.jit
def _by_blocks(
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """`visit` of a longer row: sums so far move to each new origin."""
    cols = tl.arange(0, COLS)[None, :]
    m, top, rest = no_rows(ROWS, F, LANES)
    zero = nothing(ROWS, F, LANES)
    ed, wd, ws, ad, asum, aside = zero, zero, zero, zero, zero, zero
    for begin in range(0, V, COLS):
        at, mask = first + step(begin + cols, inner, INNER), alive & (begin + cols < V)
        if AGAIN:
            raw = tl.load(x + at, mask=mask, other=-float("inf"), eviction_policy="evict_last")
        else:
            raw = tl.load(x + at, mask=mask, other=-float("inf"))
        raw = dealt(raw, LANES, VECTOR).to(F)
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
                w, a = masses(target, weight, at, begin + cols, mask, SOFT, F)
                if SMOOTH:
                    w = dealt(w, LANES, VECTOR)
                    wd = _dot(w, d, LANES) + (wd + _moved(ws, by))
                    ws += total(w, LANES)
                if SOFT:
                    a = dealt(a, LANES, VECTOR)
                    ad = _dot(a, d, LANES) + (ad + _moved(asum, by))
                    aside = tl.where(m > old, asum, aside) + total(tl.where(d < 0.0, a, tl.zeros_like(a)), LANES)
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
            aside = tl.where(by < 0.0, asum, aside)
    ed, wd, ws, ad, asum, aside = (
        of_row(ed, LANES),
        of_row(wd, LANES),
        of_row(ws, LANES),
        of_row(ad, LANES),
        of_row(asum, LANES),
        of_row(aside, LANES),
    )
    none = tl.zeros([ROWS, 1], F)
    return m, top, rest, ed, wd, ws, ad, asum, aside, none, none


@triton.jit
def results(
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
