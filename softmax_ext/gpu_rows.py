"""Triton row kernels of softmax and log_softmax, and how every row kernel is laid over rows.

An array of logits has the layout (outer, V, inner), contiguous. A program owns ROWS whole rows and nobody else's, so
there are no atomics and any run gives the same bits. With inner > 1 its rows are neighbours along inner: the tile is
read in memory order and a middle axis needs no transpose, which would cost one more read and write of everything.
A row of at most 32768 classes (fewer for kernels that hold more than its exps) is one block, held in registers; a
longer one is read block by block.

Same algorithm and names as csrc: m the maximum, `rest` the sum of exp(z - m) over all but one position of it.
"""

# What a program sees as arrays and compile-time values Python takes for something else:
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from softmax_ext.gpu_math import exp, log1p, origin, over, ratio

# The widest row that is held in registers, by the number of arrays that live at a time: what compiles without a spill
# for sm_80, sm_90 and sm_100 (tests/test_gpu_compiled.py asserts it). Wider rows are read block by block.
HOLDS_ONE, HOLDS_TWO, HOLDS_FEW, HOLDS_MANY = 32768, 16384, 8192, 4096
HOLDS_FLOAT64 = 2048


def plan(outer, classes, inner, widest, double=False, lanes=32):
    """(number of programs, the launch's constants) for one row kernel; `lanes` make a warp."""
    widest = min(widest, HOLDS_FLOAT64 if double else HOLDS_TWO if lanes == 64 else HOLDS_ONE)
    one = classes <= widest
    if inner == 1:
        columns = triton.next_power_of_2(classes) if one else min(widest, HOLDS_FEW)
        rows = max(1, 2048 // columns)
        programs = triton.cdiv(outer, rows)
    else:
        rows = min(triton.next_power_of_2(inner), 64)
        columns = min(triton.next_power_of_2(classes), min(widest, HOLDS_MANY) // rows)
        one = classes <= columns
        programs = outer * triton.cdiv(inner, rows)
    # 16 numbers a thread (8 of float64 or where tiles are turned), more only where a block may have no more threads
    warps = min(
        max(rows * columns // (256 if double or inner > 1 else 512), 4), 32 if rows * columns > HOLDS_TWO else 16
    )
    constants = {"INNER": inner > 1, "ONE": one, "ROWS": rows, "COLS": columns, "num_warps": warps * 32 // lanes}
    # Fused products would undo what gpu_math does about rounding; 3.9 no longer fuses unasked, 3.6 does.
    return programs, {**constants, "enable_fp_fusion": False}


@triton.jit
def place(outer, V, inner, INNER: tl.constexpr, ROWS: tl.constexpr):
    """(index of each row, offset of its first class, whether it exists), each (ROWS, 1), 64-bit."""
    pid = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, ROWS)[:, None]
    if INNER:
        blocks = (inner + ROWS - 1) // ROWS
        i = (pid % blocks) * ROWS + lane
        o = pid // blocks
        return o * inner + i, o * V * inner + i, i < inner
    else:
        row = pid * ROWS + lane
        return row, row * V, row < outer


@triton.jit
def step(cols, inner, INNER: tl.constexpr):
    """Offset of each class from its row's first."""
    if INNER:
        return cols.to(tl.int64) * inner
    else:
        return cols


@triton.jit
def no_rows(ROWS: tl.constexpr, F: tl.constexpr):
    """(m, top, rest) before anything was seen."""
    return tl.full([ROWS, 1], -float("inf"), F), tl.full([ROWS, 1], 1.0, F), tl.zeros([ROWS, 1], F)


@triton.jit
def seen(z, m, top, rest, F: tl.constexpr, FAST: tl.constexpr):
    """A block's classes join their rows: (m, top, rest, exps of the block, what carries older sums to this origin).

    top = exp(m) and rest are in units of 2^c, c the origin of m. How often the block holds its maximum comes from two
    sums, of all of it and of what lies below the maximum: their difference is that many times top, and rounding the
    quotient is exact up to 2^20 columns. Only a block that raises the maximum needs it. A block of -inf alone
    changes nothing.
    """
    block = tl.max(z, axis=1, keep_dims=True)
    raised = block > m
    now = tl.where(raised, block, m)
    shift = tl.where(now > -float("inf"), now, tl.zeros_like(now))
    big, floor, magic = origin(shift, F)
    e = exp(z, big, floor, magic, F, FAST)
    new_top = exp(shift, big, floor, magic, F, False)  # never FAST: every number of the row is divided by it
    everything = tl.sum(e, axis=1, keep_dims=True)
    below = tl.sum(tl.where(z == now, tl.zeros_like(e), e), axis=1, keep_dims=True)
    times = tl.floor((everything - below) / new_top + 0.5)
    carry = tl.where(raised, ratio(exp(m, big, floor, magic, F, False), top, F), tl.full([1, 1], 1.0, F))
    grown = tl.where(raised, (rest + top) * carry + (below + (times - 1.0) * new_top), rest + everything)
    return now, new_top, grown, e, carry


@triton.jit
def closed(m, rest):
    """rest, NaN where the maximum is not finite: such a row has no distribution."""
    return tl.where(tl.abs(m) < float("inf"), rest, float("nan"))


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
):
    """y = exp(x - m) / total."""
    _row, first, real = place(outer, V, inner, INNER, ROWS)
    m, top, rest = no_rows(ROWS, F)
    cols = tl.arange(0, COLS)[None, :]
    if ONE:
        at, mask = first + step(cols, inner, INNER), real & (cols < V)
        z = tl.load(x + at, mask=mask, other=-float("inf")).to(F)
        m, top, rest, e, _ = seen(z, m, top, rest, F, FAST)
        high, low = over(tl.full([1, 1], 1.0, F), top, closed(m, rest), F)
        tl.store(y + at, tl.fma(e, high, e * low), mask=mask)
    else:
        for begin in range(0, V, COLS):
            mask = real & (begin + cols < V)
            z = tl.load(x + first + step(begin + cols, inner, INNER), mask=mask, other=-float("inf")).to(F)
            m, top, rest, _e, _c = seen(z, m, top, rest, F, FAST)
        high, low = over(tl.full([1, 1], 1.0, F), top, closed(m, rest), F)
        big, floor, magic = origin(tl.where(m > -float("inf"), m, tl.zeros_like(m)), F)
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            z = tl.load(x + at, mask=mask, other=-float("inf")).to(F)
            e = exp(z, big, floor, magic, F, FAST)
            tl.store(y + at, tl.fma(e, high, e * low), mask=mask)


@triton.jit(do_not_specialize=["outer"])
def softmax_bwd_kernel(
    dy,
    y,
    dx,
    outer,
    V,
    inner,
    F: tl.constexpr,
    INNER: tl.constexpr,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx = y (dy - sum(y dy))."""
    _row, first, real = place(outer, V, inner, INNER, ROWS)
    cols = tl.arange(0, COLS)[None, :]
    if ONE:
        at, mask = first + step(cols, inner, INNER), real & (cols < V)
        g = tl.load(dy + at, mask=mask, other=0.0).to(F)
        a = tl.load(y + at, mask=mask, other=0.0).to(F)
        tl.store(dx + at, a * (g - tl.sum(a * g, axis=1, keep_dims=True)), mask=mask)
    else:
        s = tl.zeros([ROWS, 1], F)
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            g = tl.load(dy + at, mask=mask, other=0.0).to(F)
            s += tl.sum(tl.load(y + at, mask=mask, other=0.0).to(F) * g, axis=1, keep_dims=True)
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            g = tl.load(dy + at, mask=mask, other=0.0).to(F)
            tl.store(dx + at, tl.load(y + at, mask=mask, other=0.0).to(F) * (g - s), mask=mask)


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
):
    """y = (x - m) - log1p(rest), and m, rest for the backward."""
    row, first, real = place(outer, V, inner, INNER, ROWS)
    m, top, rest = no_rows(ROWS, F)
    cols = tl.arange(0, COLS)[None, :]
    if ONE:
        at, mask = first + step(cols, inner, INNER), real & (cols < V)
        z = tl.load(x + at, mask=mask, other=-float("inf")).to(F)
        m, top, rest, _, _ = seen(z, m, top, rest, F, FAST)
        rest = ratio(closed(m, rest), top, F)
        tl.store(y + at, (z - m) - log1p(rest, F), mask=mask)
    else:
        for begin in range(0, V, COLS):
            mask = real & (begin + cols < V)
            z = tl.load(x + first + step(begin + cols, inner, INNER), mask=mask, other=-float("inf")).to(F)
            m, top, rest, _e, _c = seen(z, m, top, rest, F, FAST)
        rest = ratio(closed(m, rest), top, F)
        less = log1p(rest, F)
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            z = tl.load(x + at, mask=mask, other=-float("inf")).to(F)
            tl.store(y + at, (z - m) - less, mask=mask)
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
    """dx = dy - p sum(dy)."""
    row, first, real = place(outer, V, inner, INNER, ROWS)
    cols = tl.arange(0, COLS)[None, :]
    m = tl.load(m_in + row, mask=real, other=0.0)
    rest = tl.load(rest_in + row, mask=real, other=0.0)
    shift = tl.where(tl.abs(m) < float("inf"), m, tl.zeros_like(m))
    big, floor, magic = origin(shift, F)
    top = exp(shift, big, floor, magic, F, False)
    if ONE:
        at, mask = first + step(cols, inner, INNER), real & (cols < V)
        g = tl.load(dy + at, mask=mask, other=0.0).to(F)
        high, low = over(-tl.sum(g, axis=1, keep_dims=True), top, rest * top, F)
        e = exp(tl.load(x + at, mask=mask, other=-float("inf")).to(F), big, floor, magic, F, FAST)
        tl.store(dx + at, tl.fma(e, high, tl.fma(e, low, g)), mask=mask)
    else:
        s = tl.zeros([ROWS, 1], F)
        for begin in range(0, V, COLS):
            mask = real & (begin + cols < V)
            g = tl.load(dy + first + step(begin + cols, inner, INNER), mask=mask, other=0.0).to(F)
            s += tl.sum(g, axis=1, keep_dims=True)
        high, low = over(-s, top, rest * top, F)
        for begin in range(0, V, COLS):
            at, mask = first + step(begin + cols, inner, INNER), real & (begin + cols < V)
            g = tl.load(dy + at, mask=mask, other=0.0).to(F)
            e = exp(tl.load(x + at, mask=mask, other=-float("inf")).to(F), big, floor, magic, F, FAST)
            tl.store(dx + at, tl.fma(e, high, tl.fma(e, low, g)), mask=mask)
