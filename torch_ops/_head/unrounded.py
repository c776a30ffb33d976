"""Half-precision matmuls summed into float32 as cuBLAS forms them: no product is rounded, or stands beside the sum.

PyTorch has them as an overload with `out_dtype`, on CUDA, from 2.8 on; adding to a float32 sum is refused ("self and
mat2 must have the same dtype") until pull request 167931 of November 2025, which 2.11 has. Read in its source, not run.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> bool:
    """out += a b, or out = a b; False, and nothing done, where PyTorch would round the product."""
    if out.dtype != torch.float32 or a.dtype not in (torch.bfloat16, torch.float16) or not _offered(a.device, a.dtype):
        return False
    (_set if first else _add)(out, a, b)
    return True


@cache
def _offered(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch takes both calls. Asked of values that nobody reads, so a stream is not waited for.

    Asked first while a CUDA graph is captured, it adds two tiny matmuls to that graph, of memory that is the graph's.
    """
    if not _may_offer(device):
        return False
    a, out = torch.empty(8, 8, device=device, dtype=dtype), torch.empty(8, 8, device=device)
    try:
        _set(out, a, a)
        _add(out, a, a)
    except (RuntimeError, TypeError):  # an older PyTorch, or one tuned to other kernels
        return False
    return True


def _may_offer(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _set(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
