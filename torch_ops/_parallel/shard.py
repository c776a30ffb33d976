"""A vocabulary in shards, one a rank: whose classes are where."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softmax_ext import contract
from torch_ops import _modes as modes
from torch_ops._parallel.collectives import gathered, maximum, minimum


class Shard(NamedTuple):
    """Which of the classes a rank has. `begin` and `classes` are tensors where a look at them would be a sync."""

    group: Any
    begin: Any
    count: int
    classes: Any
    widest: int | None  # the most classes of a rank, where known
    agreed: Tensor | None  # whether all ranks were given the same rows; None where an error would have said so

    def local(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(whether the class is in the shard, its place there: some place for other classes, markers as they are)."""
        inside = (target >= self.begin) & (target < self.begin + self.count)
        return inside, (target - self.begin).where(inside, target.clamp(max=0))


def shard_of(
    op: str,
    group: Any,
    position: int,
    count: int,
    rows: int,
    target: Tensor,
    widest: int | None = None,
    name: str = "target",
) -> Shard:
    """The shard of this rank, after one message of four integers to each other rank."""
    # A shift, another rank's batch: rows that differ would give numbers that are nobody's loss.
    told = _told(target)
    mine = [torch.full_like(told, v) for v in (position, count, rows)]
    table = gathered(torch.stack([*mine, told]), group)
    if not modes.can_look(table):
        begin = table[:, 1].where(table[:, 0] < position, 0).sum()
        return Shard(group, begin, count, table[:, 1].sum(), widest, (table[:, 2:] == table[0, 2:]).all())
    each = table.tolist()
    if len({r for _, _, r, _ in each}) > 1:
        found = ", ".join(str(r) for _, _, r, _ in each)
        contract.fail_value(op, "input", "have as many rows on every rank of group", found)
    if len({t for *_, t in each}) > 1:
        contract.fail_value(op, name, "be the same on every rank of group", "different ones")
    begin = sum(c for p, c, _, _ in each if p < position)
    counts = [c for _, c, _, _ in each]
    return Shard(group, begin, count, sum(counts), max(counts), None)


def _told(target: Tensor) -> Tensor:
    """A number of all class indices, or of a mask, that others hardly have; 0, which they never have, of numbers."""
    if target.is_floating_point():
        return torch.zeros((), dtype=torch.int64, device=target.device)
    t = target.reshape(-1).to(torch.int64)
    at = 2 * torch.arange(t.numel(), device=t.device) + 1
    # cubes: as plain numbers rows 0 and 3 add up to what rows 1 and 2 do
    return 2 * (t * at * at * at).sum() + 1


def first_of_all(value: Tensor, position: Tensor, shard: Shard) -> Tensor:
    """The place of the first maximum among the ranks' first maxima; NaN counts as the largest."""
    nan = value.isnan()
    top, some = maximum(torch.stack([value.masked_fill(nan, math.inf), nan.to(value.dtype)]), shard.group)
    here = nan.where(some > 0, value == top)
    last = torch.iinfo(torch.int64).max
    if not shard.count:
        here = torch.zeros_like(nan)
    at = minimum((position + shard.begin).where(here, last), shard.group)
    return at.masked_fill(at == last, -1)
