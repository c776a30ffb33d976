"""Triton kernel of class indices: any integer type to the canonical form that the row kernels read."""

# Compile-time values are not what Python takes them for:
# pyright: reportArgumentType=false

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit(do_not_specialize=["count", "classes", "ignored"])
def canonical_kernel(target, out, count, classes, ignored, BLOCK: tl.constexpr):
    """A class in [0, classes), -1 (ignored) or -2 (it names no class)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    t = tl.load(target + at, mask=mask, other=0).to(tl.int64)
    # The marker wins: it may be a class that exists.
    found = tl.where((t >= 0) & (t < classes), t, -2)
    tl.store(out + at, tl.where(t == ignored, -1, found), mask=mask)
