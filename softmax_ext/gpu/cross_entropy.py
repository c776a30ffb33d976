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

from softmax_ext.gpu.arithmetic import capped, origin
from softmax_ext.gpu.factors import factors, stored
from softmax_ext.gpu.gradient import target_entry, write_block, write_blocks
from softmax_ext.gpu.rows import HOLDS_FEW, HOLDS_MANY, HOLDS_ONE, HOLDS_TWO, closed, place, step
from softmax_ext.gpu.visit import kinds, number, option, results, visit


def widest(half, way, capped, many):
    """The widest block of "fwd", "bwd" or "both"; `many`: soft targets, smoothing or entropy are part of the call."""
    if many:
        return HOLDS_MANY
    if capped or way == "bwd":
        return HOLDS_FEW
    return HOLDS_ONE if way == "both" and half else HOLDS_TWO


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
    scale, cap = option(scale, scale_bits, F), option(cap, cap_bits, F)
    t, counts, ignored = kinds(target, row, real, V, SOFT)
    SMOOTH: tl.constexpr = smooth_out is not None
    ENTROPY: tl.constexpr = entropy_out is not None
    target_z = tl.load(x + first + step(t, inner, INNER), mask=counts, other=float("nan")).to(F)
    target_z = capped(target_z, scale, cap, F, SCALED, CAPPED)
    m, top, rest, ed, wd, ws, ad, asum, _, _, _ = visit(
        x, target, weight, first, real & (ignored == 0), V, inner, scale, cap,
        SOFT, SMOOTH, ENTROPY, F, FAST, SCALED, CAPPED, INNER, ONE, ROWS, COLS, LANES, VECTOR, False,
    )  # fmt: skip
    results(
        row, real, counts, ignored, target_z, m, top, rest, ed, wd, ws, ad, asum,
        nll_out, lse_out, smooth_out, entropy_out, m_out, rest_out, SOFT, F,
    )  # fmt: skip


@triton.jit(do_not_specialize=["outer", "scale_bits", "cap_bits"])
def cross_entropy_bwd_kernel(
    x,
    target,
    weight,
    weight_sums,
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
    scale, cap = option(scale, scale_bits, F), option(cap, cap_bits, F)
    t, counts, ignored = kinds(target, row, real, V, SOFT)
    alive = real & (ignored == 0)
    SMOOTH: tl.constexpr = d_smooth_in is not None
    ENTROPY: tl.constexpr = d_entropy_in is not None
    target_raw = tl.load(x + first + step(t, inner, INNER), mask=counts, other=0.0).to(F)
    target_z = capped(target_raw, scale, cap, F, SCALED, CAPPED)
    if BOTH:
        m, top, rest, ed, wd, ws, ad, asum, aside, raw, e = visit(
            x, target, weight, first, alive, V, inner, scale, cap,
            SOFT, smooth_out is not None, ENTROPY or entropy_out is not None,
            F, FAST, SCALED, CAPPED, INNER, ONE, ROWS, COLS, LANES, VECTOR, True,
        )  # fmt: skip
        results(
            row, real, counts, ignored, target_z, m, top, rest, ed, wd, ws, ad, asum,
            nll_out, lse_out, smooth_out, entropy_out, m_row, rest_row, SOFT, F,
        )  # fmt: skip
        rest = closed(m, rest)
        m = tl.where(tl.abs(m) < float("inf"), m, tl.zeros_like(m))
        big, floor, magic = origin(m, F, FAST)
    else:
        m, top, rest, ed, asum, aside, big, floor, magic = stored(
            m_row, rest_row, x, target, weight, row, first, alive, V, inner, scale, cap,
            SOFT, ENTROPY, F, FAST, SCALED, CAPPED, INNER, ROWS, COLS,
        )  # fmt: skip
    d_nll, d_lse = number(d_nll_in, row, real, F), number(d_lse_in, row, real, F)
    d_smooth, d_entropy = number(d_smooth_in, row, real, F), number(d_entropy_in, row, real, F)
    others, log_shift, excess, heavy, largest, lost, high, low, ent_high, ent_low = factors(
        weight, weight_sums, V, ed, asum, aside, top, rest, d_nll, d_lse, d_smooth, d_entropy, SOFT, SMOOTH, ENTROPY, F
    )
    at_target = target_entry(
        t, counts, target_raw, target_z, weight, m, top, rest, big, floor, magic, others, heavy, largest, lost,
        d_nll, d_smooth, d_entropy, log_shift, scale, cap, SMOOTH, ENTROPY, F, FAST, SCALED, CAPPED,
    )  # fmt: skip
    if not SOFT:
        dead = tl.where(counts, tl.zeros_like(m), float("nan"))  # NaN over the whole row of an invalid target
        high, lost, at_target = high + dead, lost + dead, at_target + dead
    tl.debug_barrier()  # every thread has the target's logit: in place, another may be about to write over it

    if BOTH and ONE:
        cols = tl.arange(0, COLS)[None, :]
        at, mask = first + step(cols, inner, INNER), real & (cols < V)
        write_block(
            dx, target, weight, at, mask, alive, cols, t, ignored, raw, e, at_target, m, excess, heavy, largest,
            lost, high, low, d_nll, d_smooth, d_entropy, log_shift, ent_high, ent_low, rest < top, scale, cap,
            SOFT, SMOOTH, ENTROPY, F, SCALED, CAPPED,
        )  # fmt: skip
    else:
        write_blocks(
            dx, x, target, weight, first, real, alive, t, ignored, at_target, m, excess, heavy, largest,
            lost, high, low, d_nll, d_smooth, d_entropy, log_shift, ent_high, ent_low, rest < top, big, floor, magic,
            V, inner, scale, cap, SOFT, SMOOTH, ENTROPY, F, FAST, SCALED, CAPPED, INNER, COLS,
        )  # fmt: skip
