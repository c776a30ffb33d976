"""The divergences on more than one device: classes sharded over a group, rows over others; DTensor or plain tensors.

The same steps as in divergence.py and _head/divergence_loss.py. Arguments have passed the contract.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softmax_ext.contract import DivergenceOptions
from torch_ops._head.divergence import divergence_rows, divergence_sum
from torch_ops._head.divergence_loss import of_heads, pair_of, reduced, weight_of
from torch_ops._head.two_heads import Plan
from torch_ops._parallel.call import place_of, shard_here
from torch_ops._parallel.collectives import shared, summed
from torch_ops._parallel.divergence_rules import HeadPair, LogitsPair, sharded
from torch_ops._parallel.mesh import Place, head_place, logits_place
from torch_ops._parallel.shard import Shard
from torch_ops._rules.divergence import divergence_row
from torch_ops._rules.scaled import times


def divergence(arrays: dict[str, Any], options: DivergenceOptions, group: Any, *, axis: int) -> Tensor:
    """The divergence of two arrays of logits with class dimension `axis`."""
    op, shape = "divergence", arrays["input"].shape
    place, found = place_of(op, arrays, group), [*arrays.values()]
    if place is None:
        place, found = logits_place(op, arrays, axis=axis)
    x, teacher, token_weight, keep, scale = found
    rows = math.prod(x.shape[:axis] + x.shape[axis + 1 :])
    here = _shard(op, place, x.shape[axis], rows, keep, x, shape[axis])
    shape = (*shape[:axis], *shape[axis + 1 :])
    if scale is not None:  # each rank multiplies its own classes
        own = scale if here is None else shared(scale, place.group)
        x = times(x, own, axis, None if keep is None else ~keep)
    dtype = torch.promote_types(x.dtype, teacher.dtype)
    pair, given = pair_of(options, axis, dtype), (x.to(dtype), teacher.to(dtype), keep)
    values = divergence_row(*given, *pair) if here is None else sharded(LogitsPair(pair, here), *given)
    weight = weight_of(values, token_weight, keep)
    losses = values if token_weight is None else weight * values
    if options.reduction != "none":
        losses = reduced(losses.sum(), weight, keep, options.reduction, lambda own: summed(own, *place.row_groups))
    return _result(losses, options, place, here, shape)


def linear_divergence(
    arrays: dict[str, Any], options: DivergenceOptions, group: Any, *, shift: int, memory: str, chunk_size: int | None
) -> Tensor:
    """The divergence of two linear layers' logits."""
    op, lead = "linear_divergence", arrays["input"].shape[:-1]
    place, found = place_of(op, arrays, group), [*arrays.values()]
    if place is None:
        place, found = head_place(op, arrays, axis=len(lead), shift=shift)
    x, lw, *_, keep, _ = found
    rows = math.prod(x.shape[:-1])
    here = _shard(op, place, lw.shape[0], rows, keep, x, arrays["linear_weight"].shape[0])
    shape = (*lead[:-1], max(lead[-1] - shift, 0)) if shift else lead
    calls: Any = {"rows": divergence_rows, "total": divergence_sum}
    if here is not None:
        dtype = torch.promote_types(x.dtype, found[3].dtype)
        source = HeadPair(Plan(pair_of(options, 1, dtype), memory == "lean", chunk_size), here)
        calls = {"rows": source.rows, "total": source.sum}
    over = lambda own: summed(own, *place.row_groups)  # noqa: E731
    static: Any = {"shift": shift, "memory": memory, "chunk_size": chunk_size}
    loss = of_heads(found, options, **static, **calls, over=over)
    return _result(loss, options, place, here, shape)


def _shard(op: str, place: Place, count: int, rows: int, keep: Tensor | None, x: Tensor, classes: int) -> Shard | None:
    """This rank's shard; ranks that mean other rows are told apart by their number and by `keep`."""
    if keep is None and place.group is not None:  # all of them: another rank may say so, or keep none
        keep = torch.ones(rows, dtype=torch.bool, device=x.device)
    return shard_here(op, place, count, rows, x if keep is None else keep, classes, "keep")


def _result(loss: Tensor, options: DivergenceOptions, place: Place, here: Shard | None, shape: Any) -> Tensor:
    if here is not None and here.agreed is not None:
        loss = loss.where(here.agreed, math.nan)
    return place.result(loss, shape if options.reduction == "none" else ())
