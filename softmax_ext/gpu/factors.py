"""What a cross-entropy gradient needs to know of whole rows before it forms an entry. See cross_entropy.py."""

# Compile-time values are not what Python takes them for:
# pyright: reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

from softmax_ext.gpu.arithmetic import at_origin, capped, exp, origin, over, ratio
from softmax_ext.gpu.rows import step, total
from softmax_ext.gpu.visit import masses, number


@triton.jit
def _sums(
    x,
    target,
    weight,
    first,
    alive,
    m,
    confident,
    big,
    floor,
    magic,
    V,
    inner,
    scale,
    cap,
    SOFT: tl.constexpr,
    ENTROPY: tl.constexpr,
    F: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(sum e_j d_j, sum a_j, sum a_j but at the maximum), sums over the row that the forward did not keep.

    The last only of a confident row, whose logits are read for it.
    """
    cols = tl.arange(0, COLS)[None, :]
    e_d, a_all, a_side = tl.zeros([ROWS, COLS], F), tl.zeros([ROWS, COLS], F), tl.zeros([ROWS, COLS], F)
    for begin in range(0, V, COLS):
        at, mask = first + step(begin + cols, inner, INNER), alive & (begin + cols < V)
        if ENTROPY or SOFT:
            z = tl.load(x + at, mask=mask if ENTROPY else mask & confident, other=-float("inf")).to(F)
            z = capped(z, scale, cap, F, SCALED, CAPPED)
        if ENTROPY:
            ez = exp(z, big, floor, magic, F, FAST)
            e_d += tl.where(ez > 0.0, ez * (z - m), tl.zeros_like(ez))
        if SOFT:
            _w, a = masses(target, weight, at, begin + cols, mask, SOFT, F)
            a_all += a
            a_side += tl.where(z < m, a, tl.zeros_like(a))
    return total(e_d, 1), total(a_all, 1), total(a_side, 1)


@triton.jit
def stored(
    m_row,
    rest_row,
    x,
    target,
    weight,
    row,
    first,
    alive,
    V,
    inner,
    scale,
    cap,
    SOFT: tl.constexpr,
    ENTROPY: tl.constexpr,
    F: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(m, top, rest, the three of _sums, the three numbers of exp's origin) of rows that were visited before."""
    m, rest = number(m_row, row, alive, F), number(rest_row, row, alive, F)
    m = tl.where(tl.abs(m) < float("inf"), m, tl.zeros_like(m))
    big, floor, magic = origin(m, F, FAST)
    top = at_origin(m, big, floor, magic, F, FAST)
    ed, asum, aside = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    if SOFT or ENTROPY:
        ed, asum, aside = _sums(
            x, target, weight, first, alive, m, rest < 1.0, big, floor, magic, V, inner, scale, cap,
            SOFT, ENTROPY, F, FAST, SCALED, CAPPED, INNER, ROWS, COLS,
        )  # fmt: skip
    return m, top, rest * top, ed, asum, aside, big, floor, magic


@triton.jit
def factors(
    weight,
    weight_sums,
    V,
    ed,
    asum,
    aside,
    top,
    rest,
    d_nll,
    d_lse,
    d_smooth,
    d_entropy,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    F: tl.constexpr,
):
    """What all of a row's entries are multiplied by; `others` and `excess` are A without the target's own part.

    `heavy` is `excess` without a maximum that has the largest class weight, `largest`: of the other weights' own sum.
    """
    others = d_lse
    heavy, largest = tl.zeros_like(top), tl.zeros_like(top)
    if SMOOTH:
        if weight is not None:
            others += d_smooth * tl.load(weight_sums)
            heavy, largest = d_lse + d_smooth * tl.load(weight_sums + 1), largest + tl.load(weight_sums + 2)
            if SOFT:
                heavy += d_nll * aside
        else:
            others += d_smooth * V
    log_shift = tl.zeros_like(top)
    if ENTROPY:  # log p_j + H = (z_j - m) + log_shift: L cancels
        log_shift = -ratio(ratio(ed, top, F), 1.0 + ratio(rest, top, F), F)
    every = others + d_nll * asum if SOFT else others + d_nll
    excess = others + d_nll * aside if SOFT else others
    high, low = over(every, top, rest, F)
    ent_high, ent_low = over(-d_entropy, top, rest, F)
    lost_high, lost_low = over(every * rest, top, rest, F)
    return others, log_shift, excess, heavy, largest, lost_high + lost_low, high, low, ent_high, ent_low
