"""Triton kernels of x . W[id] for K classes a row, and of the two products that are its derivatives: csrc/picked.h.

    z_ik = x_i . W[id_ik]          dX_i = sum_k c_ik W[id_ik]          dW[v] = sum of c_ik x_i over id_ik = v

A program of z or dX owns a row, one of dW a class, and all of them some features: no atomics, and sums in one order.
For dW the pairs (row, slot) come sorted by class. A class that many rows name would be one program's long work: the
sorted pairs are also cut into parts of equal length, a part that is all one class's is summed by a program of its own,
and the class adds the parts up in their order.
"""

# What a program sees as arrays and compile-time values Python takes for something else:
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

# Pairs of a part, at least; ids of a program of z; rows whose loads are on their way together.
PART, IDS, AHEAD = 256, 16, 8


def features(count, itemsize):
    """How many features a program has: eight loads of 16 bytes a thread at most, four warps."""
    return max(16, min(triton.next_power_of_2(count), 4096 // itemsize))


@triton.jit
def picked_fwd_kernel(x, w, ids, z, V, K, D, F: tl.constexpr, IDS: tl.constexpr, COLS: tl.constexpr):
    """z (N, K): 0 at an id of -1, NaN at any other that names no class."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * IDS + tl.arange(0, IDS)[:, None]
    v = tl.load(ids + row * K + k, mask=k < K, other=-1).to(tl.int64)
    names = (v >= 0) & (v < V)
    s = tl.zeros([IDS, COLS], F)
    for begin in range(0, D, COLS):
        cols = begin + tl.arange(0, COLS)[None, :]
        a = tl.load(x + row * D + cols, mask=cols < D, other=0.0).to(F)
        b = tl.load(w + v * D + cols, mask=names & (cols < D), other=0.0).to(F)
        s = tl.fma(b, a, s)
    found = tl.sum(s, axis=1, keep_dims=True)
    found = tl.where(names, found, tl.where(v == -1, 0.0, float("nan")))
    tl.store(z + row * K + k, found, mask=k < K)


@triton.jit
def _begun(by, of_all, r, cols, D, F: tl.constexpr):
    """What a sum begins with: by_r of_all, or nothing."""
    if by is None:
        return tl.zeros_like(cols).to(F)
    else:
        return tl.load(by + r).to(F) * tl.load(of_all + cols, mask=cols < D, other=0.0).to(F)


@triton.jit
def picked_input_bwd_kernel(
    c, w, ids, by, of_all, dx, V, K, C, D, F: tl.constexpr, COLS: tl.constexpr, AHEAD: tl.constexpr
):
    """dX (N, D); c has C columns, the first of which is that of all leading ids."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    s = _begun(by, of_all, row, cols, D, F)
    lost = 0
    for begin in range(0, K, AHEAD):
        for i in tl.static_range(AHEAD):
            k = begin + i
            v = tl.load(ids + row * K + k, mask=k < K, other=-1).to(tl.int64)
            names = (v >= 0) & (v < V)
            lost += ((names == 0) & (v != -1)).to(tl.int32)
            by_k = tl.load(c + row * C + tl.maximum(k - (K - C), 0), mask=names, other=0.0)
            here = tl.where(names, D, 0)  # a class that is none has no features
            s = tl.fma(tl.load(w + v * D + cols, mask=cols < here, other=0.0).to(F), by_k, s)
    s = tl.where(lost > 0, float("nan"), s)
    tl.store(dx + row * D + cols, s, mask=cols < D)


@triton.jit
def _added(s, c, x, rows, begin, end, cols, D, F: tl.constexpr, AHEAD: tl.constexpr):
    """s and the sorted pairs from begin to end."""
    for p in range(begin, end, AHEAD):
        for i in tl.static_range(AHEAD):
            real = p + i < end
            row = tl.load(rows + p + i, mask=real, other=0).to(tl.int64)
            by = tl.load(c + p + i, mask=real, other=0.0)
            here = tl.where(real, D, 0)
            s = tl.fma(tl.load(x + row * D + cols, mask=cols < here, other=0.0).to(F), by, s)
    return s


@triton.jit
def picked_parts_kernel(
    c, x, rows, ids, parts, V, D, F: tl.constexpr, PART: tl.constexpr, COLS: tl.constexpr, AHEAD: tl.constexpr
):
    """The sum of each part that is all one class's; other parts are not written, nor read."""
    part = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    v = tl.load(ids + part * PART)
    if (v < V) & (v == tl.load(ids + part * PART + PART - 1)):
        s = _added(tl.zeros_like(cols).to(F), c, x, rows, part * PART, part * PART + PART, cols, D, F, AHEAD)
        tl.store(parts + part * D + cols, s, mask=cols < D)


@triton.jit
def picked_weight_bwd_kernel(
    c,
    x,
    rows,
    start,
    parts,
    by,
    of_all,
    dw,
    D,
    F: tl.constexpr,
    PART: tl.constexpr,
    COLS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """dW (V, D) of pairs sorted by class: coefficient and row of each, and where each class's begin."""
    v = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin, end = tl.load(start + v), tl.load(start + v + 1)
    s = _begun(by, of_all, v, cols, D, F)
    first, last = (begin + PART - 1) // PART, end // PART
    whole = first < last
    s = _added(s, c, x, rows, begin, tl.where(whole, first * PART, end), cols, D, F, AHEAD)
    if whole:
        for part in range(first, last):
            s += tl.load(parts + part * D + cols, mask=cols < D, other=0.0)
        s = _added(s, c, x, rows, last * PART, end, cols, D, F, AHEAD)
    tl.store(dw + v * D + cols, s, mask=cols < D)
