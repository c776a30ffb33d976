"""K stratified points of each row's distribution without its targets: kernels, or plain PyTorch ops."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_ops._modes import is_plain
from torch_ops._rows import native, triton
from torch_ops._rows.arithmetic import capped
from torch_ops._rows.classes import IGNORED


def points(
    logits: Tensor,
    m: Tensor,
    rest: Tensor,
    excepted: Tensor,
    u: Tensor,
    *,
    scale: float,
    softcap: float | None,
    span: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(ids (N, K) int32, q (N,)) of logits (N, V): q is the mass off the `excepted` (N, E) classes, IGNORED is none.

    Point k is the first class where the off-target sum passes (k + u_k) / K of its whole. Where q is 0, and in a row
    whose targets are all ignored, the ids are IGNORED; in a row without a distribution they are 0 and q is NaN.
    Of a shard of the classes, whose m and rest are those of whole rows, `span` (N, 3) in double holds where its sum
    begins and ends and the whole, in units of exp(m); points of other shards are IGNORED, and q is the shard's own.
    """
    ops = native.ops if native.serves(logits, 1) else triton.ops if triton.serves(logits, 1) else None
    if ops is not None and all(map(is_plain, (m, rest, excepted, u))):
        ids, mass = ops.points(logits, m, rest, excepted, u, _two_parts(span, m.dtype), scale, softcap)
        return ids, mass.sum(1) / (1.0 + rest)
    e = torch.exp((capped(logits, scale, softcap) - m.unsqueeze(1)).double())
    classes = logits.shape[1]
    inside = (excepted >= 0) & (excepted < classes)
    # what is out of range is scattered onto one class more, and cut off
    e = torch.cat([e, e[:, :1] * 0.0], 1).scatter(1, torch.where(inside, excepted, classes).to(torch.int64), 0.0)
    sums = e[:, :classes].cumsum(1)
    k = u.shape[1]
    at = (torch.arange(k, device=u.device) + u.double()) / max(k, 1)
    at = at * (sums[:, -1:] if span is None else span[:, 2:])
    elsewhere = torch.zeros_like(at, dtype=torch.bool)
    if span is not None:
        elsewhere = (at < span[:, :1]) | (at >= span[:, 1:2])
        at = at - span[:, :1]
    ids = torch.searchsorted(sums, at, right=True)
    last = (sums < sums[:, -1:]).sum(1, keepdim=True)  # rounding may bring the last threshold to the whole
    whole = sums[:, -1]
    ids = torch.where((whole > 0).unsqueeze(1) & ~elsewhere, torch.minimum(ids, last), IGNORED)
    ignored = (excepted == IGNORED).all(1) if excepted.shape[1] else torch.zeros_like(whole, dtype=torch.bool)
    q = (whole.to(m.dtype) / (1.0 + rest)).masked_fill(ignored, 0.0)
    ids = ids.masked_fill(q.isnan().unsqueeze(1), 0).masked_fill(ignored.unsqueeze(1), IGNORED)
    return ids.to(torch.int32), q


def _two_parts(span: Tensor | None, kind: torch.dtype) -> Tensor | None:
    """(N, 3, 2) in the compute type: numbers rounded, and what that left."""
    if span is None:
        return None
    large = span.to(kind)
    return torch.stack([large, (span - large.double()).to(kind)], -1)
