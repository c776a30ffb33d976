"""Triton kernels of class indices: any integer type to the canonical form, and the mean over rows that are kept."""

# Compile-time values are not what Python takes them for:
# pyright: reportArgumentType=false

import triton
import triton.language as tl

BLOCK = 1024
# Rows that one program sums up in less time than several kernels are launched in; more are for all of the chip.
FEW_ROWS = 1 << 15


@triton.jit(do_not_specialize=["count", "classes", "ignored"])
def canonical_kernel(target, out, count, classes, ignored, BLOCK: tl.constexpr):
    """A class in [0, classes), -1 (ignored) or -2 (it names no class)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    t = tl.load(target + at, mask=mask, other=0).to(tl.int64)
    # The marker wins: it may be a class that exists.
    found = tl.where((t >= 0) & (t < classes), t, -2)
    tl.store(out + at, tl.where(t == ignored, -1, found), mask=mask)


@triton.jit
def kept_mean_kernel(nll, target, loss, kept, count, F: tl.constexpr, BLOCK: tl.constexpr):
    """(the mean of nll where the canonical target is not -1, 0 / 0 where it is everywhere; how many are kept)."""
    total = tl.zeros([BLOCK], F)
    rows = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < count
        total += tl.load(nll + at, mask=mask, other=0.0)  # an ignored row's is 0
        rows += (mask & (tl.load(target + at, mask=mask, other=-1) != -1)).to(tl.int32)
    found = tl.sum(rows, axis=0)
    tl.store(loss, tl.sum(total, axis=0) / found.to(F))
    tl.store(kept, found.to(tl.int64))
