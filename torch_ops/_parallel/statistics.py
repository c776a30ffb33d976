"""Statistics of rows whose classes are sharded, as `_rules/statistics.py` has them of whole rows.

legend:  r = softmax(2 z), t a class of the row
formula: log_sum_sq = log sum_j p_j^2 = (lse(2 z) - 2 z_t) - 2 (lse(z) - z_t), two nll's of one class: at the first
         maximum neither cancels, nor the gradient 2 (r_j - p_j), in a confident row's maximum 2 (1 - p) - 2 (1 - r)
         (where all logits are nearly equal both rows round r and p by themselves, and the gradient's digits go)
2 C(s x) is the cap 2 c of 2 s x, so both rows have the rules of a row, and every order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softmax_ext.contract import fitted
from torch_ops._head.chunks import that_fit
from torch_ops._head.linear import formed_in
from torch_ops._head.per_row import logits as head_logits
from torch_ops._head.row_map import Chunked, RowMap, run
from torch_ops._parallel.collectives import shared, summed
from torch_ops._parallel.head import HeadShard
from torch_ops._parallel.logits import LogitsShard
from torch_ops._parallel.rules import sharded_rows
from torch_ops._parallel.shard import Shard, first_of_all
from torch_ops._rows import dispatch as rows
from torch_ops._rules.plan import Plan
from torch_ops._rules.statistics import bounded, larger


def of_logits(names: Sequence[str], x: Tensor, target: Tensor, dim: int, plan: Plan, shard: Shard) -> dict[str, Tensor]:
    """Those named of each row, of a shard of its logits."""
    x = _without(x, target, dim)
    with torch.no_grad():
        z = rows.capped(x, plan.scale, plan.softcap)
    nll = lambda plan, top: sharded_rows(LogitsShard(plan, shard, dim, False), x, top, None)["nll"]  # noqa: E731
    total = lambda: bounded(rows.compute(x), plan.scale, plan.softcap).sum(dim)  # noqa: E731
    numbers = lambda of, *args: of(z, *args, shard, dim)  # noqa: E731
    return _found(names, target, plan, shard, nll, total, numbers, x.dtype, dim, x.dim())


def of_head(
    names: Sequence[str], plan: Plan, shard: Shard, x: Tensor, lw: Tensor, lb: Any, up: Any, target: Tensor
) -> list[Tensor]:
    """The same of a shard of a head, in their order."""
    kind = formed_in(x, target)  # that of the loss: rank and argmax are of one row
    x, lw = _without(x, target, 1).to(kind), lw.to(kind)
    lb, up = (a if a is None else a.to(kind) for a in (lb, up))
    layer = (lw, lb, up)
    plan = plan._replace(argmax=False, smooth=False, entropy=False)
    nll = lambda plan, top: HeadShard(plan, shard).rows(x, *layer, top, None)[0]  # noqa: E731

    def mapped(call: Callable[..., Sequence[Tensor]], count: int, *more: Tensor) -> Any:
        by_row = (True, False, False, False, *[True] * len(more))
        return RowMap(call, by_row, (True,) * count), (shared(x, shard.group), *layer, *more)

    def total() -> Tensor:
        def call(x: Tensor, lw: Tensor, lb: Any, up: Any) -> list[Tensor]:
            return [bounded(rows.compute(head_logits(x, lw, lb, up)), plan.scale, plan.softcap).sum(1)]

        fn, arrays = mapped(call, 1)
        size = that_fit(None, 16 * max(1, lw.shape[0]), x.itemsize)
        return Chunked.apply(fn, size, *arrays)[0]  # pyright: ignore[reportOptionalSubscript]

    @torch.no_grad()
    def numbers(of: Callable[..., Sequence[Tensor]], *args: Tensor) -> Any:
        def call(x: Tensor, lw: Tensor, lb: Any, up: Any, *args: Tensor) -> Any:
            z = rows.capped(head_logits(x, lw, lb, up), plan.scale, plan.softcap)
            return of(z, *args, shard, 1)

        fn, arrays = mapped(call, 2 if of is _top else 1, *args)
        return run(fn, that_fit(None, 4 * max(1, lw.shape[0]), 4), *arrays)

    return [*_found(names, target, plan, shard, nll, total, numbers, x.dtype, 1, 2).values()]


def _found(
    names: Sequence[str],
    target: Tensor,
    plan: Plan,
    shard: Shard,
    nll: Callable[[Plan, Tensor], Tensor],
    total: Callable[[], Tensor],
    numbers: Callable[..., Any],
    kind: torch.dtype,
    dim: int,
    ndim: int,
) -> dict[str, Tensor]:
    nothing = None if target.is_floating_point() else rows.of_rows(target, ndim, dim) == rows.IGNORED
    out = {}
    for name in names:
        if name == "log_sum_sq":
            value, place = numbers(_top)
            top = first_of_all(value, place, shard)
            top = top if nothing is None else top.masked_fill(nothing, rows.IGNORED)
            limits = torch.finfo(torch.promote_types(kind, torch.float32))
            cap = None if plan.softcap is None else 2.0 * plan.softcap
            scale, cap = fitted(2.0 * plan.scale, cap, limits.tiny, limits.max)
            once = plan._replace(smooth=False, entropy=False, argmax=False)
            out[name] = nll(once._replace(scale=scale, softcap=cap), top) - 2.0 * nll(once, top)
        elif name == "mean_logit":
            out[name] = summed(total(), shard.group) / shard.classes
        else:
            mine = summed(numbers(_at, target)[0], shard.group)
            count = summed(numbers(_larger, mine)[0].to(torch.float64), shard.group).to(torch.int64)
            out[name] = count.masked_fill(target < 0, -1)
        if nothing is not None and name != "rank":
            out[name] = out[name].masked_fill(nothing, 0.0)
    return out


def _top(z: Tensor, _: Shard, dim: int) -> tuple[Tensor, ...]:
    """The first maximum of a shard's logits, and its place."""
    if z.shape[dim]:
        return z.amax(dim), z.argmax(dim)
    none = z.sum(dim)
    return torch.full_like(none, -math.inf), torch.zeros_like(none, dtype=torch.int64)


def _at(z: Tensor, target: Tensor, shard: Shard, dim: int) -> tuple[Tensor, ...]:
    """The logit of each target, 0 of another shard's."""
    inside, at = shard.local(target)
    if not z.shape[dim]:
        return (torch.zeros_like(target, dtype=z.dtype),)
    many, at = target.dim() == z.dim(), at.clamp(min=0)
    picked = z.gather(dim, at) if many else z.gather(dim, at.unsqueeze(dim)).squeeze(dim)
    return (picked.where(inside, 0.0),)


def _larger(z: Tensor, than: Tensor, _: Shard, dim: int) -> tuple[Tensor, ...]:
    """How many of a shard's logits are larger than each number."""
    many = than.dim() == z.dim()
    each = than if many else than.unsqueeze(dim)
    counts = torch.cat([larger(z, v, dim) for v in each.split(1, dim)], dim)
    return (counts if many else counts.squeeze(dim),)


def _without(x: Tensor, target: Tensor, dim: int) -> Tensor:
    """x with zeros in its ignored rows, which reach no result, not even through 0 * NaN."""
    if target.is_floating_point():
        return x
    return x.masked_fill((rows.of_rows(target, x.dim(), dim) == rows.IGNORED).unsqueeze(dim), 0.0)
