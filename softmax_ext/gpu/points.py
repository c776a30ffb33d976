"""Triton kernels of K stratified points a row: the twin of csrc/points.h.

Point k lies at (k + u_k) / K of the row's off-target mass, in class order. One kernel reads the logits once and leaves
the mass of each group of GROUP classes; another puts right the groups that hold a class left out; a third adds a row's
groups up; a fourth finds each point's group by halves and reads that one group again. What runs over groups, or over
the classes of one, is summed in float64: no row of any length loses a point to its own length. A group's own sum is a
tree of eight steps. All of it is a row's own, in one order, so every run gives the same bits.

exps are in units of 2^c, c that of m's origin (arithmetic.py); `top` of them make exp(m), the unit of what is returned.
"""

# What a program sees as arrays and compile-time values Python takes for something else:
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

from softmax_ext.gpu.arithmetic import at_origin, capped, exp, origin
from softmax_ext.gpu.rows import finite
from softmax_ext.gpu.visit import option

GROUP = 256
# Groups of a program of the first kernel, of one step of a row's sum; points, or classes left out, of a program.
GROUPS, SUMMED, TOGETHER = 32, 512, 16


@triton.jit
def _exps(
    x,
    excepted,
    first,
    row,
    group,
    real,
    V,
    E,
    big,
    floor,
    magic,
    scale,
    cap,
    F: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    LESS: tl.constexpr,
):
    """The exps of some groups (R, 1) of a row; 0 outside it, and LESS the classes left out."""
    cols, begin = tl.arange(0, GROUP)[None, :], group.to(tl.int64) * GROUP
    inside = real & (cols < tl.minimum(V - begin, GROUP).to(tl.int32))
    z = tl.load(x + (first + begin) + cols, mask=inside, other=-float("inf")).to(F)
    e = exp(capped(z, scale, cap, F, SCALED, CAPPED), big, floor, magic, F, FAST)
    if LESS:
        for i in range(E):
            less = tl.load(excepted + row * E + i).to(tl.int64) - begin
            e = tl.where(cols == tl.where(less < GROUP, less, -1).to(tl.int32), tl.zeros_like(e), e)
    return e


@triton.jit(do_not_specialize=["scale_bits", "cap_bits"])
def points_mass_kernel(
    x,
    m_row,
    mass,
    V,
    groups,
    parts,
    scale,
    scale_bits,
    cap,
    cap_bits,
    F: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The mass (N, groups) of each group, nothing left out."""
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    scale, cap = option(scale, scale_bits, F), option(cap, cap_bits, F)
    m = finite(tl.load(m_row + row + tl.zeros([1, 1], tl.int32)))
    m = tl.where(m < float("inf"), m, tl.zeros_like(m))
    big, floor, magic = origin(m, F, FAST)
    group = (pid % parts) * GROUPS + tl.arange(0, GROUPS)[:, None]
    real = group < groups
    e = _exps(
        x, x, row * V, row, group, real, V, 0, big, floor, magic, scale, cap, F, FAST, SCALED, CAPPED, GROUP, False,
    )  # fmt: skip
    tl.store(mass + row * groups + group, tl.sum(e, axis=1, keep_dims=True), mask=real)


@triton.jit(do_not_specialize=["scale_bits", "cap_bits"])
def points_except_kernel(
    x,
    m_row,
    excepted,
    mass,
    V,
    groups,
    E,
    parts,
    scale,
    scale_bits,
    cap,
    cap_bits,
    F: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The mass of the groups that hold a class left out: summed without it, not less it, which would cancel."""
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    scale, cap = option(scale, scale_bits, F), option(cap, cap_bits, F)
    m = finite(tl.load(m_row + row + tl.zeros([1, 1], tl.int32)))
    m = tl.where(m < float("inf"), m, tl.zeros_like(m))
    big, floor, magic = origin(m, F, FAST)
    i = (pid % parts) * TOGETHER + tl.arange(0, TOGETHER)[:, None]
    t = tl.load(excepted + row * E + i, mask=i < E, other=-1).to(tl.int64)
    real = (t >= 0) & (t < V)
    group = tl.where(real, t, tl.zeros_like(t)) // GROUP
    e = _exps(
        x, excepted, row * V, row, group, real, V, E, big, floor, magic, scale, cap,
        F, FAST, SCALED, CAPPED, GROUP, True,
    )  # fmt: skip
    tl.store(mass + row * groups + group, tl.sum(e, axis=1, keep_dims=True), mask=real)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _kind(m_row, rest_row, excepted, row, E):
    """(m, the row is ignored, it has no distribution), each (1, 1)."""
    none = tl.zeros_like(row).to(tl.int32)
    for i in range(E):
        none += (tl.load(excepted + row * E + i) == -1).to(tl.int32)
    m, rest = tl.load(m_row + row), tl.load(rest_row + row)
    bad = (tl.abs(m) == float("inf")) | (m != m) | (rest != rest)
    return tl.where(bad, tl.zeros_like(m), m), (none == E) & (E > 0), bad


@triton.jit
def points_sums_kernel(
    m_row,
    rest_row,
    excepted,
    mass,
    sums,
    q,
    groups,
    E,
    F: tl.constexpr,
    FAST: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """The sums (N, groups) of a row's mass up to each group's end, and all of it, q (N, 2) in two parts.

    They never fall, whatever the order in which a step adds up, and a group of no mass has the sum before it: no point
    falls in one.
    """
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    m, ignored, bad = _kind(m_row, rest_row, excepted, row, E)
    big, floor, magic = origin(m, F, FAST)
    top = at_origin(m, big, floor, magic, F, FAST).to(tl.float64)
    own = tl.zeros([1, 1], tl.float64)
    for begin in range(0, groups, SUMMED):
        group = begin + tl.arange(0, SUMMED)[None, :]
        s = tl.load(mass + row * groups + group, mask=group < groups, other=0.0).to(tl.float64)
        so_far = tl.where(s > 0.0, own + tl.cumsum(s, axis=1), own)
        so_far = tl.associative_scan(so_far, 1, _larger)
        tl.store(sums + row * groups + group, so_far, mask=group < groups)
        own = tl.max(so_far, axis=1, keep_dims=True)
    own = tl.where(ignored, 0.0, tl.where(bad, float("nan"), own / top))
    large = own.to(F)
    tl.store(q + 2 * row, large)
    tl.store(q + 2 * row + 1, tl.where(bad | ignored, 0.0, own - large.to(tl.float64)).to(F))


@triton.jit
def _group_of(sums, at, whole, groups, halves):
    """(the first group (R, 1) whose sum passes `at`, the sum before it); from `whole` on the last that has mass."""
    low, high = tl.zeros_like(at).to(tl.int32), tl.zeros_like(at).to(tl.int32) + groups
    for _ in range(halves):
        some = low < high
        middle = (low + high) // 2
        s = tl.load(sums + middle, mask=some, other=0.0)
        passed = tl.where(at < whole, s <= at, s < whole)
        low, high = tl.where(some & passed, middle + 1, low), tl.where(some & (passed == 0), middle, high)
    return low, tl.load(sums + low - 1, mask=low > 0, other=0.0)


@triton.jit
def _pair(span, at):
    """A number handed over in two parts."""
    return tl.load(span + 2 * at).to(tl.float64) + tl.load(span + 2 * at + 1).to(tl.float64)


@triton.jit(do_not_specialize=["scale_bits", "cap_bits"])
def points_kernel(
    x,
    m_row,
    rest_row,
    excepted,
    u,
    span,
    sums,
    ids,
    V,
    groups,
    halves,
    E,
    K,
    parts,
    scale,
    scale_bits,
    cap,
    cap_bits,
    F: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """ids (N, K) of the points, some of a row's to a program."""
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    scale, cap = option(scale, scale_bits, F), option(cap, cap_bits, F)
    m, ignored, bad = _kind(m_row, rest_row, excepted, row, E)
    big, floor, magic = origin(m, F, FAST)
    top = at_origin(m, big, floor, magic, F, FAST).to(tl.float64)
    own = tl.load(sums + row * groups + groups - 1)
    low, high, whole = tl.zeros_like(own), own + float("inf"), own
    if span is not None:
        low, high, whole = _pair(span, 3 * row) * top, _pair(span, 3 * row + 1) * top, _pair(span, 3 * row + 2) * top
    k = (pid % parts) * TOGETHER + tl.arange(0, TOGETHER)[:, None]
    at = (k.to(tl.float64) + tl.load(u + row * K + k, mask=k < K, other=0.0).to(tl.float64)) / K * whole
    mine = (k < K) & (own > 0.0) & (at >= low) & (at < high) & ((ignored | bad) == 0)
    at = at - low
    group, before = _group_of(sums + row * groups, tl.where(mine, at, tl.zeros_like(at)), own, groups, halves)
    at = tl.where(at < own, at - before, float("inf"))  # rounding may bring a threshold to the whole
    e = _exps(
        x, excepted, row * V, row, group, mine, V, E, big, floor, magic, scale, cap, F, FAST, SCALED, CAPPED, GROUP,
        True,
    )  # fmt: skip
    cols, some = tl.arange(0, GROUP)[None, :], e > 0.0
    found = tl.where((tl.cumsum(e.to(tl.float64), axis=1) > at) & some, cols, GROUP)
    found = tl.min(found, axis=1, keep_dims=True)
    last = tl.max(tl.where(some, cols, 0), axis=1, keep_dims=True)
    found = group * GROUP + tl.where(found < GROUP, found, last)
    none = tl.where(bad & (ignored == 0), 0, -1)
    tl.store(ids + row * K + k, tl.where(mine, found, none), mask=k < K)
