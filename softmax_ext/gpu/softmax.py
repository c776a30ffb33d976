"""Triton row kernels of softmax and log_softmax."""

# What a program sees as arrays and compile-time values Python takes for something else:
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from softmax_ext.gpu.arithmetic import at_origin, exp, log1p, origin, over, ratio
from softmax_ext.gpu.rows import (
    closed,
    dealt,
    finite,
    joined,
    largest,
    no_rows,
    nothing,
    of_row,
    place,
    seen,
    step,
    total,
    whole,
)


@triton.jit(do_not_specialize=["outer"])
def softmax_fwd_kernel(
    x,
    y,
    outer,
    V,
    inner,
    F: tl.constexpr,
    FAST: tl.constexpr,
    INNER: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """y = exp(x - m) / total."""
    _row, first, real = place(outer, V, inner, INNER, ROWS)
    cols = tl.arange(0, COLS)[None, :]
    if ONE:
        at, mask = first + step(cols, inner, INNER), real & (cols < V)
        z = tl.load(x + at, mask=mask, other=-float("inf")).to(F)
        m, top, rest, e = whole(z, F, FAST)
        high, low = over(tl.full([1, 1], 1.0, F), top, closed(m, rest), F)
        tl.store(y + at, e * high if FAST else tl.fma(e, high, e * low), mask=mask)
    else:
        m, top, rest = no_rows(ROWS, F, LANES)
        for begin in range(0, V, COLS):
            mask = real & (begin + cols < V)
            at = first + step(begin + cols, inner, INNER)
            z = tl.load(x + at, mask=mask, other=-float("inf"), eviction_policy="evict_last").to(F)
            m, top, rest, _e, _c = seen(dealt(z, LANES, VECTOR), m, top, rest, F, FAST, LANES)
        m, top, rest, _c = joined(m, top, rest, F, FAST, LANES)
        high, low = over(tl.full([1, 1], 1.0, F), top, closed(m, rest), F)
        big, floor, magic = origin(finite(m), F, FAST)
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            z = tl.load(x + at, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(F)
            e = exp(z, big, floor, magic, F, FAST)
            tl.store(y + at, e * high if FAST else tl.fma(e, high, e * low), mask=mask, eviction_policy="evict_first")


@triton.jit
def pivot(s, size, whole, top, at_top, F: tl.constexpr, ROUNDED: tl.constexpr):
    """(c, s / whole, whole): what softmax's backward subtracts from dy before its sums round.

    s = sum(y dy), size = sum(|y dy|), whole = sum(y), 1 unless y was ROUNDED to half precision; at_top is dy at y's
    maximum top. Where c is not 0 the mean is to be formed again, of dy - c.
    """
    if ROUNDED:
        whole = tl.where(whole > 0.0, whole, 1.0)
        s = s / whole
    else:
        whole = tl.full([1, 1], 1.0, F)
    near = 2.842170943040401e-14 if F == tl.float64 else 1.52587890625e-05  # 2^-45, 2^-16
    its = (top > 0.5) | (tl.abs(at_top - s) <= near * tl.abs(s))
    c = tl.where(its, at_top, s)
    c = tl.where((top > 0.5) | (tl.abs(s) > 0.5 * size), c, tl.zeros_like(c))
    return tl.where(tl.abs(c) < float("inf"), c, tl.zeros_like(c)), s, whole


@triton.jit(do_not_specialize=["outer"])
def softmax_bwd_kernel(
    dy,
    y,
    dx,
    outer,
    V,
    inner,
    F: tl.constexpr,
    ROUNDED: tl.constexpr,
    INNER: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """dx = y (dy - sum(y dy)), about a pivot: see csrc/softmax.h, whose rules these are."""
    _row, first, real = place(outer, V, inner, INNER, ROWS)
    cols = tl.arange(0, COLS)[None, :]
    none = tl.full([1, 1], -float("inf"), F)
    if ONE:
        at, mask = first + step(cols, inner, INNER), real & (cols < V)
        g = tl.load(dy + at, mask=mask, other=0.0).to(F)
        a = tl.load(y + at, mask=mask, other=0.0).to(F)
        p, top = a * g, largest(a, 1)
        whole = total(a, 1)
        c, mean, whole = pivot(
            total(p, 1), total(tl.abs(p), 1), whole, top, largest(tl.where(a == top, g, none), 1), F, ROUNDED
        )
        g -= c
        mean = tl.where(c == 0.0, mean, total(a * g, 1) / whole)
        tl.store(dx + at, a * (g - mean), mask=mask)
    else:
        s = nothing(ROWS, F, LANES)
        size, whole, top, at_top = s, s, s - 1.0, s
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            g = dealt(tl.load(dy + at, mask=mask, other=0.0, eviction_policy="evict_last").to(F), LANES, VECTOR)
            a = dealt(tl.load(y + at, mask=mask, other=0.0, eviction_policy="evict_last").to(F), LANES, VECTOR)
            p, block = a * g, largest(a, LANES)
            s += total(p, LANES)
            size += total(tl.abs(p), LANES)
            if ROUNDED:
                whole += total(a, LANES)
            at_top = tl.where(block > top, largest(tl.where(a == block, g, none), LANES), at_top)
            top = tl.maximum(top, block)
        if LANES > 1:
            highest = tl.max(top, axis=2, keep_dims=True)
            at_top = tl.max(tl.where(top == highest, at_top, none), axis=2, keep_dims=True)
            top, at_top = tl.reshape(highest, [ROWS, 1]), tl.reshape(at_top, [ROWS, 1])
        s, size, whole = of_row(s, LANES), of_row(size, LANES), of_row(whole, LANES)
        c, mean, whole = pivot(s, size, whole, top, at_top, F, ROUNDED)
        if tl.max(tl.max((c != 0.0).to(tl.int32), axis=1), axis=0) > 0:
            rest = nothing(ROWS, F, LANES)  # of another shape than s now
            for begin in range(0, V, COLS):
                at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
                h = tl.load(dy + at, mask=mask, other=0.0, eviction_policy="evict_last").to(F) - c
                a = tl.load(y + at, mask=mask, other=0.0, eviction_policy="evict_last").to(F)
                rest += total(dealt(a * h, LANES, VECTOR), LANES)
            mean = of_row(rest, LANES) / whole
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            g = tl.load(dy + at, mask=mask, other=0.0, eviction_policy="evict_first").to(F) - c
            a = tl.load(y + at, mask=mask, other=0.0, eviction_policy="evict_first").to(F)
            tl.store(dx + at, a * (g - mean), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["outer"])
def log_softmax_fwd_kernel(
    x,
    y,
    m_out,
    rest_out,
    outer,
    V,
    inner,
    F: tl.constexpr,
    FAST: tl.constexpr,
    INNER: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """y = (x - m) - log1p(rest), and m, rest for the backward."""
    row, first, real = place(outer, V, inner, INNER, ROWS)
    cols = tl.arange(0, COLS)[None, :]
    if ONE:
        at, mask = first + step(cols, inner, INNER), real & (cols < V)
        z = tl.load(x + at, mask=mask, other=-float("inf")).to(F)
        m, top, rest, _ = whole(z, F, FAST)
        rest = ratio(closed(m, rest), top, F)
        tl.store(y + at, (z - m) - log1p(rest, F), mask=mask)
    else:
        m, top, rest = no_rows(ROWS, F, LANES)
        for begin in range(0, V, COLS):
            mask = real & (begin + cols < V)
            at = first + step(begin + cols, inner, INNER)
            z = tl.load(x + at, mask=mask, other=-float("inf"), eviction_policy="evict_last").to(F)
            m, top, rest, _e, _c = seen(dealt(z, LANES, VECTOR), m, top, rest, F, FAST, LANES)
        m, top, rest, _c = joined(m, top, rest, F, FAST, LANES)
        rest = ratio(closed(m, rest), top, F)
        less = log1p(rest, F)
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            z = tl.load(x + at, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(F)
            tl.store(y + at, (z - m) - less, mask=mask, eviction_policy="evict_first")
    tl.store(m_out + row, m, mask=real)
    tl.store(rest_out + row, rest, mask=real)


@triton.jit(do_not_specialize=["outer"])
def log_softmax_bwd_kernel(
    dy,
    x,
    m_in,
    rest_in,
    dx,
    outer,
    V,
    inner,
    F: tl.constexpr,
    FAST: tl.constexpr,
    INNER: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx = dy - p sum(dy); at a confident row's maximum from the others' sum, as csrc/softmax.h says."""
    row, first, real = place(outer, V, inner, INNER, ROWS)
    cols = tl.arange(0, COLS)[None, :]
    m = tl.load(m_in + row, mask=real, other=0.0)
    rest = tl.load(rest_in + row, mask=real, other=0.0)
    confident = rest < 1.0
    shift = tl.where(tl.abs(m) < float("inf"), m, tl.zeros_like(m))
    big, floor, magic = origin(shift, F, FAST)
    top = at_origin(shift, big, floor, magic, F, FAST)
    if ONE:
        at, mask = first + step(cols, inner, INNER), real & (cols < V)
        g = tl.load(dy + at, mask=mask, other=0.0).to(F)
        z = tl.load(x + at, mask=mask, other=-float("inf")).to(F)
        is_top = confident & (z == m)
        others, own = total(tl.where(is_top, tl.zeros_like(g), g), 1), total(tl.where(is_top, g, tl.zeros_like(g)), 1)
        high, low = over(-(others + own), top, rest * top, F)
        e = exp(z, big, floor, magic, F, FAST)
        mine = (own * rest - others) / (1.0 + rest)
        tl.store(dx + at, tl.where(is_top, mine, tl.fma(e, high, tl.fma(e, low, g))), mask=mask)
    else:
        s = tl.zeros([ROWS, COLS], F)
        own = tl.zeros([ROWS, COLS], F)
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            g = tl.load(dy + at, mask=mask, other=0.0, eviction_policy="evict_last").to(F)
            # only a confident row is read here
            z = tl.load(x + at, mask=mask & confident, other=-float("inf"), eviction_policy="evict_last").to(F)
            is_top = confident & (z == m)
            s += tl.where(is_top, tl.zeros_like(g), g)
            own += tl.where(is_top, g, tl.zeros_like(g))
        others, own = total(s, 1), total(own, 1)
        high, low = over(-(others + own), top, rest * top, F)
        mine = (own * rest - others) / (1.0 + rest)
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            g = tl.load(dy + at, mask=mask, other=0.0, eviction_policy="evict_first").to(F)
            z = tl.load(x + at, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(F)
            e = exp(z, big, floor, magic, F, FAST)
            dz = tl.fma(e, high, tl.fma(e, low, g))
            tl.store(dx + at, tl.where(confident & (z == m), mine, dz), mask=mask, eviction_policy="evict_first")
