"""Gradients of a head in half precision: levelled before they can flush or overflow, scaled after, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ops._head.chunks import lines, spans
from torch_ops._modes import is_traced, may_write
from torch_ops._rows import triton


def levelled(
    arrays: Sequence[Any], upstream: list[Any], over: Callable[[Tensor], Tensor] = lambda own: own
) -> tuple[Tensor | None, list[Any]]:
    """(a power of 2, [d_nll, d_lse, d_smooth, d_entropy] by it), in float16.

    G by 1/N would flush to 0, and G of large weights, or its product with many rows of x, would overflow: the power
    brings G below 1, and lower where the rows' sum could pass the half of the type's range. A shard of the
    classes is levelled by what whole rows have, `over` all shards: what it multiplies p_j by is theirs too.
    """
    x, target, weight = arrays[0], arrays[4], arrays[5]
    given = [u for u in upstream if u is not None]
    if x.dtype != torch.float16 or not given[0].numel():
        return None, upstream
    # G_j = A p_j - a_j: at most an upstream times the mass it multiplies
    mass = 1.0 if not target.is_floating_point() else over(target.float().abs().sum(1)).amax()
    smooth = 0.0
    if upstream[2] is not None:
        smooth = over(given[0].new_full((), arrays[1].shape[0]) if weight is None else weight.abs().sum())
    # of K classes a row, all: they multiply p_j together
    of_rows = [u if u is None or u.dim() == 1 else u.abs().sum(1) for u in upstream]
    sizes = zip(of_rows, (mass, 1.0, smooth, 1.0), strict=True)
    top = torch.stack([u.abs().amax() * size for u, size in sizes if u is not None]).amax()
    if x.numel():
        rows = x.detach().abs().amax().float() * (x.shape[0] / 32768.0)
        top = top * torch.where(rows.isfinite(), rows, 1.0).clamp(min=1.0)
    _, exponent = torch.frexp(top)
    peak = torch.where((top > 0) & top.isfinite(), torch.ldexp(torch.ones_like(top), exponent), 1.0)
    return peak, [u if u is None else u / peak for u in upstream]


def scaled(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(x * factor) in the type given: formed in the compute type, rounded once, with no temporary of x's size."""
    kind = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == dtype == kind:
        return x if factor is None else x * factor
    if factor is None and x.dtype == dtype:
        return x
    if factor is not None and (is_traced() or not may_write(factor)):
        return (x.to(kind) * factor).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    if x.device.type != "cpu":
        return _at_once(x, factor, out)
    if factor is None:
        return out.copy_(x)
    # With as many dimensions as x it keeps its type: a half-precision x would round a 0-d factor.
    by = factor.to(kind).reshape([1] * x.dim())
    for i, j in spans(x.shape[0], lines(x)):  # x in the factor's type is a temporary
        torch.mul(x[i:j], by, out=out[i:j])
    return out


def _at_once(x: Tensor, factor: Tensor | None, out: Tensor) -> Tensor:
    """x * factor in one kernel, which converts on its way in and out; on a CPU temporaries would do that."""
    if factor is None:
        return out.copy_(x)
    if triton.scaled(x, factor, out):
        return out
    return torch.mul(x, factor.reshape([1] * x.dim()), out=out)
