"""The gradient of a cross-entropy row, block by block. See cross_entropy.py for the formulas."""

# Compile-time values are not what Python takes them for:
# pyright: reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

from softmax_ext.gpu.arithmetic import capped, exp, over, slope
from softmax_ext.gpu.rows import step
from softmax_ext.gpu.visit import masses


@triton.jit
def target_entry(
    t,
    counts,
    target_raw,
    target_z,
    weight,
    m,
    top,
    rest,
    big,
    floor,
    magic,
    others,
    heavy,
    largest,
    lost,
    d_nll,
    d_smooth,
    d_entropy,
    log_shift,
    scale,
    cap,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    F: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """The integer target's entry of dx, from its own logit, read before anything is overwritten."""
    e_t = exp(target_z, big, floor, magic, F, FAST)
    p_high, p_low = over(e_t, top, rest, F)
    p = p_high + p_low
    q_high, q_low = over(tl.where(target_z == m, rest, (top - e_t) + rest), top, rest, F)
    at_target = others * p - d_nll * (q_high + q_low)
    if SMOOTH:
        if weight is not None:
            w = tl.load(weight + t, mask=counts, other=0.0).to(F)
            apart = (target_z == m) & (rest < top) & (w == largest)
            at_target = tl.where(apart, heavy - lost, at_target - d_smooth * w)
        else:
            at_target -= d_smooth
    if ENTROPY:
        at_target -= tl.where(e_t > 0.0, d_entropy * p * ((target_z - m) + log_shift), tl.zeros_like(p))
    return slope(at_target, target_raw, scale, cap, F, SCALED, CAPPED)


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
    heavy,
    largest,
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
    """dL/dx of a block."""
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
    if SOFT or ENTROPY or (SMOOTH and WEIGHTED):
        z = capped(raw, scale, cap, F, SCALED, CAPPED)
        if SOFT:
            # one class holds more than half: A p - g = (A - g) - A rest / total does not cancel there, where A - g is
            # formed of what lies on the others
            beside = excess - d_smooth * w if SMOOTH else excess
            if SMOOTH and WEIGHTED:
                beside = tl.where(w == largest, heavy, beside)
            dz = tl.where(confident & (z == m), beside - lost, dz)
        elif SMOOTH and WEIGHTED:
            # so are most of all weights on one class: of the target's own entry at_target tells
            dz = tl.where(confident & (z == m) & (w == largest), (heavy + d_nll) - lost, dz)
        if ENTROPY:
            d = tl.where(e > 0.0, z - m, tl.zeros_like(e))
            dz = dz + tl.fma(e, ent_high, e * ent_low) * (d + log_shift)
    dz = slope(dz, raw, scale, cap, F, SCALED, CAPPED)
    if SOFT:
        return dz
    else:
        return tl.where(here, at_target, dz)


@triton.jit
def write_block(
    dx,
    target,
    weight,
    at,
    mask,
    alive,
    cols,
    t,
    ignored,
    raw,
    e,
    at_target,
    m,
    excess,
    heavy,
    largest,
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
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    F: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """dL/dx of a block, from its logits and exps, to memory."""
    WEIGHTED: tl.constexpr = weight is not None
    w, a = e, e
    if SOFT or (SMOOTH and WEIGHTED):
        w, a = masses(target, weight, at, cols, mask & alive, SOFT, F)
    out = _gradient(
        raw, e, w, a, t == cols, at_target, m, excess, heavy, largest, lost, high, low,
        d_nll, d_smooth, d_entropy, log_shift, ent_high, ent_low, confident, scale, cap,
        SOFT, WEIGHTED, SMOOTH, ENTROPY, F, SCALED, CAPPED,
    )  # fmt: skip
    tl.store(dx + at, tl.where(ignored, tl.zeros_like(out), out), mask=mask, eviction_policy="evict_first")


@triton.jit
def write_blocks(
    dx,
    x,
    target,
    weight,
    first,
    real,
    alive,
    t,
    ignored,
    at_target,
    m,
    excess,
    heavy,
    largest,
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
    big,
    floor,
    magic,
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
    COLS: tl.constexpr,
):
    """dL/dx of a row whose logits are read once more."""
    for begin in range(0, V, COLS):
        cols = begin + tl.arange(0, COLS)[None, :]
        at, mask = first + step(cols, inner, INNER), real & (cols < V)
        raw = tl.load(x + at, mask=mask & alive, other=-float("inf"), eviction_policy="evict_first").to(F)
        e = exp(capped(raw, scale, cap, F, SCALED, CAPPED), big, floor, magic, F, FAST)
        write_block(
            dx, target, weight, at, mask, alive, cols, t, ignored, raw, e, at_target, m, excess, heavy, largest,
            lost, high, low, d_nll, d_smooth, d_entropy, log_shift, ent_high, ent_low, confident, scale, cap,
            SOFT, SMOOTH, ENTROPY, F, SCALED, CAPPED,
        )  # fmt: skip
