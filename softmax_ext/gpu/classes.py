"""Triton kernels of K class indices a row of logits: sums over equal ids, and entries written at ids."""

# What a program sees as arrays and compile-time values Python takes for something else:
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl

# Slots of a program, at most.
SLOTS = 128


@triton.jit
def by_class_kernel(ids, a, own, others, first, K, SLOTS: tl.constexpr):
    """(sum of a (N, K) over the slots of this class, over all others, whether this is the class's first)."""
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    v = tl.load(ids + row + k, mask=k < K, other=-1)
    mine, rest = tl.zeros([SLOTS], tl.float64), tl.zeros([SLOTS], tl.float64)
    before = tl.zeros([SLOTS], tl.int32)
    for j in range(K):
        same = v == tl.load(ids + row + j)
        term = tl.load(a + row + j).to(tl.float64)
        mine += tl.where(same, term, 0.0)
        rest += tl.where(same, 0.0, term)
        before += tl.where(same & (k > j), 1, 0)
    tl.store(own + row + k, mine, mask=k < K)
    tl.store(others + row + k, rest, mask=k < K)
    tl.store(first + row + k, (before == 0) & (v >= 0), mask=k < K)


@triton.jit
def place_kernel(values, ids, out, V, K, inner, count, BLOCK: tl.constexpr):
    """out[o, id, i] = values[o, k, i] at each id that names a class; equal ids have equal values."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(ids + at, mask=at < count, other=-1).to(tl.int64)
    to = (at // (K * inner)) * V * inner + v * inner + at % inner
    tl.store(out + to, tl.load(values + at, mask=at < count, other=0.0), mask=(v >= 0) & (v < V))
