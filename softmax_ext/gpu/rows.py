"""How every Triton row kernel is laid over rows, and the numbers a row is known by while it is read.

An array of logits has the layout (outer, V, inner), contiguous. A program owns ROWS whole rows and nobody else's, so
there are no atomics and any run gives the same bits. With inner > 1 its rows are neighbours along inner: the tile is
read in memory order and a middle axis needs no transpose, which would cost one more read and write of everything.
A row of at most 16384 classes (fewer for kernels that hold more than its exps, or need hold nothing) is one block, held
in registers; a longer one is read block by block. Then a row's columns are dealt out to LANES, one to a thread, and
each lane keeps numbers of its own: threads wait for one another once a row, not once a block. What is read a second
time should still lie in the chip's cache: few large programs, whose rows fit there together, and loads that say so.

Same algorithm and names as csrc: m the maximum, `rest` the sum of exp(z - m) over all but one position of it.
"""

# What a program sees as arrays and compile-time values Python takes for something else:
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from softmax_ext.gpu.arithmetic import at_origin, exp, origin, ratio

# The widest block, by the number of arrays that live at a time: what compiles without a spill for sm_80, sm_90 and
# sm_100 (tests/rows/gpu/test_compiled.py asserts it). Up to HOLDS_TWO a row is one block, held in registers. Wider ones
# are faster read twice: on an H100 (8192, 32000) bfloat16 takes softmax 0.389 ms in registers and 0.356 by blocks.
HOLDS_ONE, HOLDS_TWO, HOLDS_FEW, HOLDS_MANY = 32768, 16384, 8192, 4096
HOLDS_FLOAT64 = 2048
# Beyond this a row that need be read only once is read by blocks too: smaller programs, so that several share a
# processor and one sums up while another loads.
STREAMS = 8192
# Bytes of a row that may still lie in the cache when it is read again: an H100's 50 MiB over its 132 processors.
CACHED = 320 * 1024


def plan(outer, classes, inner, widest, itemsize=4, lanes=32, once=False, most=None):
    """(number of programs, the launch's constants) for one row kernel.

    `itemsize` is that of the logits, `lanes` make a warp, `once` says that a row need be read only once, and `most` is
    how many numbers a thread may have at a time.
    """
    widest = min(widest, HOLDS_FLOAT64 if itemsize == 8 else HOLDS_TWO if lanes == 64 else HOLDS_ONE)
    # The more numbers a thread has, the less is what each does for the whole row; kernels of many arrays have no room.
    each = 8 if itemsize == 8 else 32 if widest > HOLDS_FEW else 16
    one = classes <= min(widest, STREAMS if once else HOLDS_TWO)
    deal = {"LANES": 1, "VECTOR": 1}
    if inner == 1:
        rows = max(1, 2048 // triton.next_power_of_2(classes)) if classes <= 512 else 1
        if one:
            columns = triton.next_power_of_2(classes)
            warps = 4 if rows > 1 else max(1, columns // (32 * each))
        else:
            warps = 8
            columns = min(widest, warps * 32 * each)
            if not once and classes * itemsize <= CACHED:
                # A processor holds one or two of these programs. Timed on an H100: 4 blocks a row, 16 numbers a thread.
                columns = min(widest, max(columns, triton.next_power_of_2(classes) // 4))
                warps = min(32, max(warps, columns // (32 * min(each, 16))))
            vector = 16 // itemsize  # what a thread loads at a time
            deal = {"LANES": min(warps * 32, columns // (2 * vector)), "VECTOR": vector}
        programs = triton.cdiv(outer, rows)
    else:
        rows = min(triton.next_power_of_2(inner), 64)
        columns = min(triton.next_power_of_2(classes), min(widest, HOLDS_MANY) // rows)
        one = classes <= columns
        programs = outer * triton.cdiv(inner, rows)
        warps = min(max(rows * columns // 256, 4), 16)
    if most is not None:
        warps = max(warps, rows * columns // (32 * most))
    constants = {"INNER": inner > 1, "ONE": one, "ROWS": rows, "COLS": columns, **deal}
    # Fused products would undo what arithmetic.py does about rounding; 3.9 no longer fuses unasked, 3.6 does.
    return programs, {**constants, "num_warps": max(1, warps * 32 // lanes), "enable_fp_fusion": False}


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
def dealt(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A block (R, COLS) as (R, times, LANES, VECTOR), the last two as memory and threads have them; or as it is."""
    if LANES == 1:
        return x
    else:
        return tl.reshape(x, [x.shape[0], x.shape[1] // (LANES * VECTOR), LANES, VECTOR])


@triton.jit
def largest(x, LANES: tl.constexpr):
    """The maximum of each lane, (R, 1, LANES, 1), or of each row, (R, 1)."""
    if LANES == 1:
        return tl.max(x, axis=1, keep_dims=True)
    else:
        return tl.max(tl.max(x, axis=3, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def total(x, LANES: tl.constexpr):
    """The sum of each lane or row."""
    if LANES == 1:
        return tl.sum(x, axis=1, keep_dims=True)
    else:
        return tl.sum(tl.sum(x, axis=3, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def of_row(x, LANES: tl.constexpr):
    """The sum of a row's lanes, (R, 1)."""
    if LANES == 1:
        return x
    else:
        return tl.reshape(tl.sum(x, axis=2, keep_dims=True), [x.shape[0], 1])


@triton.jit
def nothing(ROWS: tl.constexpr, F: tl.constexpr, LANES: tl.constexpr):
    """Zeros for each lane."""
    if LANES == 1:
        return tl.zeros([ROWS, 1], F)
    else:
        return tl.zeros([ROWS, 1, LANES, 1], F)


@triton.jit
def no_rows(ROWS: tl.constexpr, F: tl.constexpr, LANES: tl.constexpr):
    """(m, top, rest) of each lane before anything was seen."""
    zero = nothing(ROWS, F, LANES)
    return zero - float("inf"), zero + 1.0, zero


@triton.jit
def finite(m):
    """m, and 0 where nothing but -inf was seen."""
    return tl.where(m > -float("inf"), m, tl.zeros_like(m))


@triton.jit
def quotient(a, b, F: tl.constexpr, FAST: tl.constexpr):
    """a / b, rounded once unless FAST."""
    if FAST:
        return a / b
    else:
        return ratio(a, b, F)


@triton.jit
def ties(everything, less, top):
    """How often a maximum occurs, from the sum of all exps and that of those below it.

    Their difference is that many times top, and rounding the quotient is exact up to 2^20 columns.
    """
    return tl.floor((everything - less) / top + 0.5)


@triton.jit
def below(e, shift, big, floor, magic, F: tl.constexpr, FAST: tl.constexpr, LANES: tl.constexpr):
    """The sum of the exps that are less than the maximum's.

    Exps are compared, not logits: a logit so little below the maximum that their exps are one number counts as one more
    maximum, which adds the same to the sum. (What is compared last needs no register for what the comparison said.)
    """
    return total(tl.where(e == exp(shift, big, floor, magic, F, FAST), tl.zeros_like(e), e), LANES)


@triton.jit
def whole(z, F: tl.constexpr, FAST: tl.constexpr):
    """(m, top, rest, exps) of rows that are one block.

    top = exp(m) and rest are in units of 2^c, c that of m's origin.
    """
    m = largest(z, 1)
    m = tl.where(m > -float("inf"), m, -float("inf"))  # no NaN
    shift = finite(m)
    big, floor, magic = origin(shift, F, FAST)
    e = exp(z, big, floor, magic, F, FAST)
    top = at_origin(shift, big, floor, magic, F, FAST)
    less = below(e, shift, big, floor, magic, F, FAST, 1)
    return m, top, less + (ties(total(e, 1), less, top) - 1.0) * top, e


@triton.jit
def seen(z, m, top, rest, F: tl.constexpr, FAST: tl.constexpr, LANES: tl.constexpr):
    """A block's classes join their lanes: (m, top, rest, exps of the block, what carries older sums to this origin).

    Only a block that raises the maximum needs to know how often it holds it. A block of -inf alone changes nothing.
    """
    block = largest(z, LANES)
    raised = block > m
    now = tl.where(raised, block, m)
    shift = finite(now)
    big, floor, magic = origin(shift, F, FAST)
    e = exp(z, big, floor, magic, F, FAST)
    new_top = at_origin(shift, big, floor, magic, F, FAST)
    everything = total(e, LANES)
    less = below(e, shift, big, floor, magic, F, FAST, LANES)
    times = ties(everything, less, new_top)
    carry = tl.where(raised, quotient(exp(m, big, floor, magic, F, FAST), top, F, FAST), 1.0)
    grown = tl.where(raised, (rest + top) * carry + (less + (times - 1.0) * new_top), rest + everything)
    return now, new_top, grown, e, carry


@triton.jit
def joined(m, top, rest, F: tl.constexpr, FAST: tl.constexpr, LANES: tl.constexpr):
    """A row's lanes become the row: (m, top, rest), each (R, 1), and what carries a lane's sums to the row's origin."""
    if LANES == 1:
        return m, top, rest, tl.full([1, 1], 1.0, F)
    else:
        most = tl.max(m, axis=2, keep_dims=True)
        shift = finite(most)
        big, floor, magic = origin(shift, F, FAST)
        e = exp(m, big, floor, magic, F, FAST)
        new_top = at_origin(shift, big, floor, magic, F, FAST)
        everything = tl.sum(e, axis=2, keep_dims=True)
        less = tl.sum(tl.where(m == most, tl.zeros_like(e), e), axis=2, keep_dims=True)
        carry = quotient(e, top, F, FAST)
        others = less + (ties(everything, less, new_top) - 1.0) * new_top
        grown = tl.sum(rest * carry, axis=2, keep_dims=True) + others
        m, top, rest = (
            tl.reshape(most, [m.shape[0], 1]),
            tl.reshape(new_top, [m.shape[0], 1]),
            tl.reshape(grown, [m.shape[0], 1]),
        )
        return m, top, rest, carry


@triton.jit
def closed(m, rest):
    """rest, NaN where the maximum is not finite: such a row has no distribution."""
    return tl.where(tl.abs(m) < float("inf"), rest, float("nan"))
