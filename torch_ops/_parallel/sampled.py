"""A head's sampled gradient where its classes or rows lie on several devices: the same points on every rank.

Each rank's off-target mass is told to the others, so each knows where in the whole sum its own classes stand, and
takes the points that fall there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_ops._head.draws import uniform
from torch_ops._head.fast import rows_that_fit
from torch_ops._head.linear import first_maximum
from torch_ops._head.sampled import Sampled, sampled
from torch_ops._parallel.collectives import gathered, of_first, summed
from torch_ops._parallel.head import ROWS
from torch_ops._parallel.mesh import Place
from torch_ops._parallel.rules import merged, told_from_nan, without_classes
from torch_ops._parallel.shard import Shard, first_of_all
from torch_ops._rows import dispatch as rows
from torch_ops._rows.points import points
from torch_ops._rules.plan import Plan


def sampled_shards(
    samples: int, generator: torch.Generator | None, place: Place, shard: Shard | None
) -> Callable[..., Any]:
    """per_row's twin for a place, its gradient sampled at K points a row."""

    def call(x: Tensor, lw: Tensor, lb: Tensor | None, _: None, target: Tensor, weight: Any, *plan: Any) -> Any:
        u = _drawn(x, samples, generator, place)
        if shard is None:
            return sampled(x, lw, lb, target, weight, u, *plan)[:-2]
        own = SampledShard(Plan(*plan), shard, x)
        found: Any = Sampled.apply(x, lw, lb, target, weight, of_first(u, shard.group), own.plan, own)
        return found[:-2]

    return call


def _drawn(x: Tensor, samples: int, generator: torch.Generator | None, place: Place) -> Tensor:
    """u of this rank's rows: ranks of other rows, whose generators may be in the same state, have others."""
    at, count = 0, 1
    for group in place.row_groups:
        at, count = at * dist.get_world_size(group) + dist.get_rank(group), count * dist.get_world_size(group)
    return uniform(count, x.shape[0], samples, device=x.device, generator=generator)[at]


class SampledShard:
    """The classes of one rank, for Sampled; rows of logits for `merged`."""

    dim = 1

    def __init__(self, plan: Plan, shard: Shard, x: Tensor) -> None:
        self.plan, self.shard = plan, shard
        widest = torch.promote_types(x.dtype, torch.float32)
        size = plan.chunk_size or (shard.widest is None and ROWS)
        self.chunk_size = size or rows_that_fit(x, shard.widest or 0, widest, None)

    def chunk(self, z: Tensor, target: Tensor, weight: Tensor | None, u: Tensor) -> list[Tensor]:
        """[nll, lse, [smooth], [entropy], m, rest, [argmax], ids, q] of whole rows, the ids of this rank's classes."""
        plan, shard = self.plan, self.shard
        argmax = torch.zeros_like(target.reshape(z.shape[0], -1).sum(1)) if plan.argmax else None
        if shard.count:
            local: Any = [*rows.cross_entropy_fwd(z, shard.local(target)[1], weight, **plan.wanted)]
            local[-2] = told_from_nan(z, local[-2], 1)
            dead = local[-2] == -math.inf
            if argmax is not None:
                argmax = first_maximum(z, plan.scale, plan.softcap)[1]
        else:
            local, dead = without_classes(z.sum(1), plan)
        values, m, rest, _ = merged(self, local, dead, (target, weight))  # pyright: ignore[reportArgumentType]
        found = [*values.values(), m, rest]
        if argmax is not None:
            own, own_rest = local[plan.values : plan.values + 2]
            value = own.masked_fill(own_rest.isnan() & ~dead & (own != math.inf), math.nan)
            found.append(first_of_all(value, argmax, shard))
        return [*found, *self._points(z, m, rest, target.reshape(z.shape[0], -1), u)]

    def _points(self, z: Tensor, m: Tensor, rest: Tensor, target: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        layout: dict[str, Any] = {"scale": self.plan.scale, "softcap": self.plan.softcap}
        inside = (target >= self.shard.begin) & (target < self.shard.begin + self.shard.count)
        excepted = (target - self.shard.begin).where(inside, target.clamp(max=rows.INVALID).where(target >= 0, target))
        own = m.new_zeros(z.shape[0])
        if self.shard.count:
            own = points(z, m, rest, excepted, u[:, :0], **layout)[1]
        total = 1.0 + rest.double()
        begin, end, whole = self._spans(own.double() * total)
        q = (whole / total).to(m.dtype)
        if not self.shard.count:
            return torch.full_like(u, rows.IGNORED, dtype=torch.int32), q
        span = torch.stack([begin, end, whole], 1)
        return points(z, m, rest, excepted, u, span=span, **layout)[0], q

    def _spans(self, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where in the sum over all ranks this one's begins and ends, and all of it: the same numbers on every rank."""
        group = self.shard.group
        first = own.new_zeros(1) + self.shard.begin  # own is float64; a number is added where the array lies
        table = gathered(torch.cat([first, own]), group)
        order = table[:, 0].sort(stable=True)[1]
        ends = [torch.zeros_like(own)]
        for mass in table[:, 1:].index_select(0, order).unbind():
            ends.append(ends[-1] + mass)
        at = order.argsort()[dist.get_rank(group)].reshape(1)
        both = (torch.stack(e).index_select(0, at).squeeze(0) for e in (ends[:-1], ends[1:]))
        return *both, ends[-1]  # pyright: ignore[reportReturnType]

    def here(self, ids: Tensor) -> Tensor:
        """Ids of the whole vocabulary as this rank's, IGNORED where they are another's."""
        inside = (ids >= self.shard.begin) & (ids < self.shard.begin + self.shard.count)
        return (ids - self.shard.begin).where(inside, rows.IGNORED)

    def over_ranks(self, own: Tensor) -> Tensor:
        """The ranks' sum."""
        return summed(own, self.shard.group)

    def over_others(self, own: Tensor) -> Tensor:
        """The other ranks' sum, which is no difference."""
        each = gathered(own, self.shard.group)
        here = torch.arange(len(each), device=own.device) == dist.get_rank(self.shard.group)
        return each.masked_fill(here, 0.0).sum()
