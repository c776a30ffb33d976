"""Triton row kernels of divergences: forward, the sums of a part of the classes, gradient, and forward with gradient.

Formulas, the shift in two numbers and its correction as in csrc/divergence.h. A row's state is m and rest of the
student, of the teacher, the two numbers of the shift and <u>; forward and backward form p, q and d from it alike. Both
rows are read once from memory; the visits that follow (the shift's error, the terms, the gradient) should find them in
the chip's cache. KIND is that of csrc: 0 forward_kl, 1 reverse_kl, 2 jsd, 3 tv.
"""

# Compile-time values are not what Python takes them for:
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

from softmax_ext.gpu.arithmetic import capped, log1p, slope
from softmax_ext.gpu.pair import both_rows, log1p_both, meet, probability, share
from softmax_ext.gpu.rows import HOLDS_MANY, place, step, total
from softmax_ext.gpu.visit import option


def widest(itemsize, many):
    """(the widest block, the most numbers of a thread); `many`: both sides' caps or a jsd's logarithms are formed."""
    if itemsize == 8:
        return HOLDS_MANY // 4, 4
    return (HOLDS_MANY // 2, 8) if many else (HOLDS_MANY, 16)


@triton.jit
def _kept(keep, row, real):
    if keep is None:
        return real
    else:
        return real & (tl.load(keep + row, mask=real, other=0) != 0)


@triton.jit
def _numbers(state, row, alive, F: tl.constexpr):
    """A row's state."""
    at = state + row * 7
    zero = tl.zeros_like(row).to(F)
    return (
        tl.load(at, mask=alive, other=0.0) + zero,
        tl.load(at + 1, mask=alive, other=0.0) + zero,
        tl.load(at + 2, mask=alive, other=0.0) + zero,
        tl.load(at + 3, mask=alive, other=0.0) + zero,
        tl.load(at + 4, mask=alive, other=0.0) + zero,
        tl.load(at + 5, mask=alive, other=0.0) + zero,
        tl.load(at + 6, mask=alive, other=0.0) + zero,
    )


@triton.jit
def _sums(
    x, y, first, alive, V, inner, m, rest, n, n_rest, hi, lo, unit, beta, scale, cap, y_scale, y_cap,
    KIND: tl.constexpr, ALL: tl.constexpr, RAW: tl.constexpr, F: tl.constexpr,
    FAST_X: tl.constexpr, SCALED_X: tl.constexpr, CAPPED_X: tl.constexpr,
    FAST_Y: tl.constexpr, SCALED_Y: tl.constexpr, CAPPED_Y: tl.constexpr,
    INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(sum of p - q, sum of q f(p / q), sum of p u for jsd and tv); the first alone unless ALL."""
    cols = tl.arange(0, COLS)[None, :]
    zero = tl.zeros([ROWS, COLS], F)
    all_less, all_terms, all_weighed = zero, zero, zero
    s_big, s_floor, s_magic, s_high, s_low = share(m, rest, F, FAST_X)
    t_big, t_floor, t_magic, t_high, t_low = share(n, n_rest, F, FAST_Y)
    for begin in range(0, V, COLS):
        at, mask = first + step(begin + cols, inner, INNER), alive & (begin + cols < V)
        a = tl.load(x + at, mask=mask, other=-float("inf"), eviction_policy="evict_last").to(F)
        b = tl.load(y + at, mask=mask, other=-float("inf"), eviction_policy="evict_last").to(F)
        s, t = capped(a, scale, cap, F, SCALED_X, CAPPED_X), capped(b, y_scale, y_cap, F, SCALED_Y, CAPPED_Y)
        p = probability(s, s_big, s_floor, s_magic, s_high, s_low, F, FAST_X)
        q = probability(t, t_big, t_floor, t_magic, t_high, t_low, F, FAST_Y)
        less, term, u = meet(s, t, a, b, p, q, hi, lo, unit, beta, KIND if ALL else 0, RAW, F)
        all_less += less
        if ALL:
            all_terms += term
            if KIND >= 2:
                all_weighed += tl.where(p == 0.0, tl.zeros_like(p), p * u)
    return total(all_less, 1), total(all_terms, 1), total(all_weighed, 1)


@triton.jit
def _corrected(hi, lo, less, unit, F: tl.constexpr):
    """(the shift put right by what sum_j (p_j - q_j) came out as, by how much)."""
    off, _ = log1p_both(tl.minimum(tl.maximum(less, -0.5), 1.0), F)
    off = tl.where(less == less, off, less)
    more = lo + off / unit
    all_of_it = hi + more
    return all_of_it, (hi - all_of_it) + more, off


@triton.jit
def _row(
    x, y, first, alive, V, inner, unit, beta, scale, cap, y_scale, y_cap,
    KIND: tl.constexpr, RAW: tl.constexpr, F: tl.constexpr,
    FAST_X: tl.constexpr, SCALED_X: tl.constexpr, CAPPED_X: tl.constexpr,
    FAST_Y: tl.constexpr, SCALED_Y: tl.constexpr, CAPPED_Y: tl.constexpr,
    INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(the divergence, m, rest, n, n_rest, hi, lo, mean) of each row."""
    m, rest, n, n_rest = both_rows(
        x, y, first, alive, V, inner, scale, cap, y_scale, y_cap, F,
        FAST_X, SCALED_X, CAPPED_X, FAST_Y, SCALED_Y, CAPPED_Y, INNER, ROWS, COLS, LANES, VECTOR,
    )  # fmt: skip
    hi = ((m - n) + (log1p(rest, F) - log1p(n_rest, F))) / unit
    lo = tl.zeros_like(hi)
    less, _, _ = _sums(
        x, y, first, alive, V, inner, m, rest, n, n_rest, hi, lo, unit, beta, scale, cap, y_scale, y_cap,
        KIND, False, RAW, F, FAST_X, SCALED_X, CAPPED_X, FAST_Y, SCALED_Y, CAPPED_Y, INNER, ROWS, COLS,
    )  # fmt: skip
    hi, lo, _ = _corrected(hi, lo, less, unit, F)
    less, value, mean = _sums(
        x, y, first, alive, V, inner, m, rest, n, n_rest, hi, lo, unit, beta, scale, cap, y_scale, y_cap,
        KIND, True, RAW, F, FAST_X, SCALED_X, CAPPED_X, FAST_Y, SCALED_Y, CAPPED_Y, INNER, ROWS, COLS,
    )  # fmt: skip
    # what is left of the shift's error, to the first order that is not 0
    hi, lo, off = _corrected(hi, lo, less, unit, F)
    if KIND == 3:
        value -= off * mean
    elif KIND == 2:
        bend = beta * (1.0 - beta) * off
        value -= 0.5 * bend * off
        mean -= bend
    else:
        value -= 0.5 * off * off
    value = tl.where(value < 0.0, tl.zeros_like(value), value)
    broken = (tl.abs(hi) < float("inf")) == 0
    value = tl.where(broken, float("nan"), value)
    if KIND == 0:
        mean = tl.zeros_like(value)
    elif KIND == 1:
        mean = value
    return value, m, rest, n, n_rest, hi, lo, tl.where(broken, float("nan"), mean)


@triton.jit(do_not_specialize=["outer", "beta_bits", "scale_bits", "cap_bits", "y_scale_bits", "y_cap_bits"])
def divergence_fwd_kernel(
    x, y, keep, value_out, state, outer, V, inner,
    beta, beta_bits, scale, scale_bits, cap, cap_bits, y_scale, y_scale_bits, y_cap, y_cap_bits,
    KIND: tl.constexpr, RAW: tl.constexpr, F: tl.constexpr,
    FAST_X: tl.constexpr, SCALED_X: tl.constexpr, CAPPED_X: tl.constexpr,
    FAST_Y: tl.constexpr, SCALED_Y: tl.constexpr, CAPPED_Y: tl.constexpr,
    INNER: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(divergence, state) of each row."""
    row, first, real = place(outer, V, inner, INNER, ROWS)
    alive = _kept(keep, row, real)
    beta, scale, cap = option(beta, beta_bits, F), option(scale, scale_bits, F), option(cap, cap_bits, F)
    y_scale, y_cap = option(y_scale, y_scale_bits, F), option(y_cap, y_cap_bits, F)
    unit = scale if RAW else scale / scale
    value, m, rest, n, n_rest, hi, lo, mean = _row(
        x, y, first, alive, V, inner, unit, beta, scale, cap, y_scale, y_cap, KIND, RAW, F,
        FAST_X, SCALED_X, CAPPED_X, FAST_Y, SCALED_Y, CAPPED_Y, INNER, ROWS, COLS, LANES, VECTOR,
    )  # fmt: skip
    zero, at = tl.zeros_like(value), state + row * 7
    tl.store(value_out + row, tl.where(alive, value, zero), mask=real)
    tl.store(at, tl.where(alive, m, zero), mask=real)
    tl.store(at + 1, tl.where(alive, rest, zero), mask=real)
    tl.store(at + 2, tl.where(alive, n, zero), mask=real)
    tl.store(at + 3, tl.where(alive, n_rest, zero), mask=real)
    tl.store(at + 4, tl.where(alive, hi, zero), mask=real)
    tl.store(at + 5, tl.where(alive, lo, zero), mask=real)
    tl.store(at + 6, tl.where(alive, mean, zero), mask=real)


@triton.jit(do_not_specialize=["outer", "beta_bits", "scale_bits", "cap_bits", "y_scale_bits", "y_cap_bits"])
def divergence_sums_kernel(
    x, y, keep, state, sums, outer, V, inner,
    beta, beta_bits, scale, scale_bits, cap, cap_bits, y_scale, y_scale_bits, y_cap, y_cap_bits,
    KIND: tl.constexpr, RAW: tl.constexpr, F: tl.constexpr,
    FAST_X: tl.constexpr, SCALED_X: tl.constexpr, CAPPED_X: tl.constexpr,
    FAST_Y: tl.constexpr, SCALED_Y: tl.constexpr, CAPPED_Y: tl.constexpr,
    INNER: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Some classes' sums of q f(p / q), p - q and, of jsd and tv, p u, given the state of whole rows."""
    row, first, real = place(outer, V, inner, INNER, ROWS)
    alive = _kept(keep, row, real)
    beta, scale, cap = option(beta, beta_bits, F), option(scale, scale_bits, F), option(cap, cap_bits, F)
    y_scale, y_cap = option(y_scale, y_scale_bits, F), option(y_cap, y_cap_bits, F)
    unit = scale if RAW else scale / scale
    m, rest, n, n_rest, hi, lo, _ = _numbers(state, row, alive, F)
    less, value, weighed = _sums(
        x, y, first, alive, V, inner, m, rest, n, n_rest, hi, lo, unit, beta, scale, cap, y_scale, y_cap,
        KIND, True, RAW, F, FAST_X, SCALED_X, CAPPED_X, FAST_Y, SCALED_Y, CAPPED_Y, INNER, ROWS, COLS,
    )  # fmt: skip
    broken, zero, at = (tl.abs(hi) < float("inf")) == 0, tl.zeros_like(value), sums + row * 3
    tl.store(at, tl.where(alive, tl.where(broken, float("nan"), value), zero), mask=real)
    tl.store(at + 1, tl.where(alive, tl.where(broken, float("nan"), less), zero), mask=real)
    tl.store(at + 2, tl.where(alive, tl.where(broken, float("nan"), weighed), zero), mask=real)


@triton.jit(do_not_specialize=["outer", "beta_bits", "scale_bits", "cap_bits", "y_scale_bits", "y_cap_bits"])
def divergence_bwd_kernel(
    x, y, keep, state, value_out, d_value, dx, outer, V, inner,
    beta, beta_bits, scale, scale_bits, cap, cap_bits, y_scale, y_scale_bits, y_cap, y_cap_bits,
    BOTH: tl.constexpr, KIND: tl.constexpr, RAW: tl.constexpr, F: tl.constexpr,
    FAST_X: tl.constexpr, SCALED_X: tl.constexpr, CAPPED_X: tl.constexpr,
    FAST_Y: tl.constexpr, SCALED_Y: tl.constexpr, CAPPED_Y: tl.constexpr,
    INNER: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dL/dx of each row; `dx` may be x. BOTH: the divergence too, no state read or kept."""
    row, first, real = place(outer, V, inner, INNER, ROWS)
    alive = _kept(keep, row, real)
    beta, scale, cap = option(beta, beta_bits, F), option(scale, scale_bits, F), option(cap, cap_bits, F)
    y_scale, y_cap = option(y_scale, y_scale_bits, F), option(y_cap, y_cap_bits, F)
    unit = scale if RAW else scale / scale
    if BOTH:
        value, m, rest, n, n_rest, hi, lo, mean = _row(
            x, y, first, alive, V, inner, unit, beta, scale, cap, y_scale, y_cap, KIND, RAW, F,
            FAST_X, SCALED_X, CAPPED_X, FAST_Y, SCALED_Y, CAPPED_Y, INNER, ROWS, COLS, LANES, VECTOR,
        )  # fmt: skip
        tl.store(value_out + row, tl.where(alive, value, tl.zeros_like(value)), mask=real)
    else:
        m, rest, n, n_rest, hi, lo, mean = _numbers(state, row, alive, F)
    up = tl.load(d_value + row, mask=real, other=0.0).to(F)
    broken = (tl.abs(hi + mean) < float("inf")) == 0
    cols = tl.arange(0, COLS)[None, :]
    s_big, s_floor, s_magic, s_high, s_low = share(m, rest, F, FAST_X)
    t_big, t_floor, t_magic, t_high, t_low = share(n, n_rest, F, FAST_Y)
    for begin in range(0, V, COLS):
        at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
        a = tl.load(x + at, mask=mask & alive, other=-float("inf"), eviction_policy="evict_first").to(F)
        b = tl.load(y + at, mask=mask & alive, other=-float("inf"), eviction_policy="evict_first").to(F)
        s, t = capped(a, scale, cap, F, SCALED_X, CAPPED_X), capped(b, y_scale, y_cap, F, SCALED_Y, CAPPED_Y)
        p = probability(s, s_big, s_floor, s_magic, s_high, s_low, F, FAST_X)
        q = probability(t, t_big, t_floor, t_magic, t_high, t_low, F, FAST_Y)
        g, _, u = meet(s, t, a, b, p, q, hi, lo, unit, beta, KIND, RAW, F)
        if KIND != 0:
            g = tl.where(p == 0.0, tl.zeros_like(p), p * (u - mean))
        g = tl.where(broken, float("nan"), slope(g, a, scale, cap, F, SCALED_X, CAPPED_X)) * up
        tl.store(dx + at, tl.where(alive, g, tl.zeros_like(g)), mask=mask, eviction_policy="evict_first")
