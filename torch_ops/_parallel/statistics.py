"""Statistics of rows whose classes are sharded, as `_rules/statistics.py` has them of whole rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ops._head.chunks import that_fit
from torch_ops._head.linear import formed_in
from torch_ops._head.per_row import logits as head_logits
from torch_ops._head.row_map import Chunked, RowMap, run
from torch_ops._parallel.collectives import maximum, shared, summed
from torch_ops._parallel.distribution import largest_of
from torch_ops._parallel.head import HeadShard
from torch_ops._parallel.log_sum_sq import log_sum_sq
from torch_ops._parallel.logits import LogitsShard
from torch_ops._parallel.shard import Shard
from torch_ops._rows import dispatch as rows
from torch_ops._rules.plan import Plan
from torch_ops._rules.statistics import Product, below, bounded, larger, scaled


def of_logits(
    names: Sequence[str], x: Tensor, target: Tensor, dim: int, plan: Plan, shard: Shard, by: Product | None = None
) -> dict[str, Tensor]:
    """Those named of each row, of a shard of its logits; `by`: their product with an array scale."""
    x = rows.compute(_without(x, target, dim))
    product = scaled(x, by)
    with torch.no_grad():
        z = rows.capped(product, plan.scale, plan.softcap)

    def squares() -> Tensor:
        source = LogitsShard(_unscaled(plan), shard, dim, False)
        given = product
        if by is not None and plan.softcap is None:  # before it is rounded with what the row has in common
            given = by(below(x, maximum(largest_of(x.detach(), dim), shard.group)))
        return log_sum_sq(source, plan.scale, given, target.detach(), None)

    total = lambda: bounded(product, plan.scale, plan.softcap).sum(dim)  # noqa: E731
    numbers = lambda of, *args: of(z, *args, shard, dim)  # noqa: E731
    return _found(names, target, shard, squares, total, numbers, dim, x.dim())


def of_head(
    names: Sequence[str], plan: Plan, shard: Shard, x: Tensor, lw: Tensor, lb: Any, up: Any, target: Tensor
) -> list[Tensor]:
    """The same of a shard of a head, in their order."""
    kind = formed_in(x, target)  # that of the loss: rank and argmax are of one row
    x, lw = _without(x, target, 1).to(kind), lw.to(kind)
    lb, up = (a if a is None else a.to(kind) for a in (lb, up))
    layer = (lw, lb, up)
    squares = lambda: log_sum_sq(  # noqa: E731
        HeadShard(_unscaled(plan), shard), plan.scale, x, *layer, target.detach(), None
    )

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

        fn, arrays = mapped(call, 1, *args)
        return run(fn, that_fit(None, 4 * max(1, lw.shape[0]), 4), *arrays)

    return [*_found(names, target, shard, squares, total, numbers, 1, 2).values()]


def _found(
    names: Sequence[str],
    target: Tensor,
    shard: Shard,
    squares: Callable[[], Tensor],
    total: Callable[[], Tensor],
    numbers: Callable[..., Any],
    dim: int,
    ndim: int,
) -> dict[str, Tensor]:
    nothing = None if target.is_floating_point() else rows.of_rows(target, ndim, dim) == rows.IGNORED
    out = {}
    for name in names:
        if name == "log_sum_sq":
            out[name] = squares()
        elif name == "mean_logit":
            out[name] = summed(total(), shard.group) / shard.classes
        else:
            mine = summed(numbers(_at, target)[0], shard.group)
            count = summed(numbers(_larger, mine)[0].to(torch.float64), shard.group).to(torch.int64)
            out[name] = count.masked_fill(target < 0, -1)
        if nothing is not None and name != "rank":
            out[name] = out[name].masked_fill(nothing, 0.0)
    return out


def _unscaled(plan: Plan) -> Plan:
    """The plan of rows that `log_sum_sq` scales."""
    scale = 1.0 if plan.softcap is None else plan.scale
    return plan._replace(scale=scale, smooth=False, entropy=False, argmax=False)


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
