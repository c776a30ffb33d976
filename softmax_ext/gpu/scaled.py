"""Triton kernel of a gradient by one number: read once, rounded once, written in another type.

`count` is a number that Triton looks at: where 16 divides it the mask is known to hold for whole vectors.
"""

# Compile-time values are not what Python takes them for:
# pyright: reportArgumentType=false

import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8


@triton.jit
def scaled_kernel(x, factor, out, count, F: tl.constexpr, BLOCK: tl.constexpr):
    """out = x * factor, formed in F."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    tl.store(out + at, tl.load(x + at, mask=mask, other=0.0).to(F) * tl.load(factor).to(F), mask=mask)
