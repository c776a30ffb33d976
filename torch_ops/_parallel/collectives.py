"""What the ranks of a group tell each other about rows: sums and maxima of numbers of which a row has a few.

A tensor is either replicated (every rank holds the same, and is given the same gradient of it) or a rank's own.
`Summed` leads from the second to the first and `Shared` back; each is the other's derivative, so both have every order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class Summed(Function):
    """apply(own, group): the sum over ranks, replicated."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _reduced(own, group, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return Shared.apply(grads[0], ctx.group), None


class Shared(Function):
    """apply(replicated, group): the same tensor for a rank's own use; what the ranks' uses give it is summed."""

    @staticmethod
    def forward(ctx: Any, replicated: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return replicated.view_as(replicated)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return Summed.apply(grads[0], ctx.group), None


def summed(own: Tensor, *groups: Any) -> Tensor:
    """The sum over the ranks of some groups."""
    for group in groups:
        own = Summed.apply(own, group)  # pyright: ignore[reportAssignmentType]
    return own


def shared(replicated: Tensor, *groups: Any) -> Tensor:
    """A replicated tensor for a rank's own use."""
    for group in groups:
        replicated = Shared.apply(replicated, group)  # pyright: ignore[reportAssignmentType]
    return replicated


def maximum(own: Tensor, group: Any) -> Tensor:
    """The largest of the ranks' values, without a derivative; what becomes of NaN is the backend's affair."""
    return _reduced(own.detach(), group, dist.ReduceOp.MAX)


def minimum(own: Tensor, group: Any) -> Tensor:
    """The smallest of the ranks' values, without a derivative."""
    return _reduced(own.detach(), group, dist.ReduceOp.MIN)


def gathered(own: Tensor, group: Any) -> Tensor:
    """(ranks, *shape) of a tensor of the same shape on every rank, without a derivative."""
    out = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, own.detach().contiguous(), group=group)
    return torch.stack(out)


def of_first(own: Tensor, group: Any) -> Tensor:
    """What the group's first rank holds, on every rank."""
    out = own.contiguous()
    if out.numel():
        dist.broadcast(out, dist.get_global_rank(group, 0), group=group)
    return out


def _reduced(own: Tensor, group: Any, op: Any) -> Tensor:
    # A sum of half-precision numbers is rounded once, not once a rank.
    kind = torch.promote_types(own.dtype, torch.float32) if own.is_floating_point() else own.dtype
    out = own.to(kind, copy=True, memory_format=torch.contiguous_format)
    if out.numel():
        dist.all_reduce(out, op=op, group=group)
    return out.to(own.dtype)
