"""The rows of one shard of a linear head, for `sharded_rows`, and their weighted sum with its gradients on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ops._head import loops, ops
from torch_ops._head.fast import rows_that_fit
from torch_ops._head.lean import Slices
from torch_ops._head.linear import Linear
from torch_ops._head.per_row import per_row
from torch_ops._head.sum import LinearSum, one_pass, weighted
from torch_ops._parallel.collectives import shared, summed
from torch_ops._parallel.merge import own_upstream
from torch_ops._parallel.rules import merged, sharded_rows, told_from_nan, without_classes
from torch_ops._parallel.shard import Shard
from torch_ops._rows import dispatch as rows
from torch_ops._rules.plan import Plan


class HeadShard:
    """Rows of a linear head; arrays: x, linear_weight, linear_bias, target, weight. x is replicated."""

    dim = 1

    def __init__(self, plan: Plan, shard: Shard) -> None:
        self.plan, self.shard = plan, shard

    def forward(self, *arrays: Any) -> tuple[list[Tensor], Tensor]:
        """The shard's rows as the head's loops have them."""
        x, lw, lb, up, target, weight = arrays
        if not self.shard.count:
            return without_classes(_nothing(x, lw, lb, up), self.plan)
        values = ops.fwd((x, lw, lb, up, self._target(target), weight), self.plan)
        m = values[self.plan.values]
        if x.device.type == "cpu" and (infinite := m.isinf()).any():  # as in told_from_nan, by slices
            found = torch.zeros_like(infinite[infinite])
            for _, _, z in Slices(x[infinite], Linear(lw, lb, up), target[infinite], None):
                found |= z.isnan().any(1)
            m[infinite] = m[infinite].masked_fill(found, math.nan)
        return values, m == -math.inf

    def again(self, dead: Tensor, *arrays: Any) -> Sequence[Tensor]:
        """The shard's rows as the head has them."""
        x, lw, lb, up, target, weight = arrays
        plan, x = self.plan._replace(argmax=False), shared(x, self.shard.group)
        if not self.shard.count:
            return without_classes(_nothing(x, lw, lb, up), plan)[0]
        if not target.is_floating_point():
            unused = dead.reshape(-1, *[1] * (target.dim() - 1))
            target = self._target(target).masked_fill(unused, rows.IGNORED)
            return per_row(x, lw, lb, up, target, weight, *plan)
        if x.device.type != "cpu" or not dead.any():
            return per_row(x, lw, lb, up, target, weight, *plan)
        live = (~dead).nonzero().squeeze(1)
        few = per_row(x.index_select(0, live), lw, lb, up, target.index_select(0, live), weight, *plan)
        return [v.new_zeros(dead.shape).index_copy(0, live, v) for v in few]

    def backward(
        self, arrays: Any, upstream: dict[str, Any], whole: Any, needs: Sequence[bool], alone: bool
    ) -> list[Tensor]:
        """The head's loops', told m, rest and the shard's entropy of whole rows; dX is summed over the ranks."""
        x, lw, lb, up, target, weight = arrays
        if self.shard.count:
            ups = [upstream.get(name) for name in ("nll", "lse", "smooth", "entropy")]
            found = ops.bwd((x, lw, lb, up, self._target(target), weight, *whole, *ups), needs, self.plan)
        else:
            found = [torch.zeros_like(a) for a, need in zip(arrays, needs, strict=True) if need]
        return [summed(found[0], self.shard.group), *found[1:]] if needs[0] else found

    def rows(self, x: Tensor, lw: Tensor, lb: Any, up: Any, target: Tensor, weight: Any, *_: Any) -> list[Tensor]:
        """As per_row: (nll, lse, [smooth], [entropy], m, rest, [argmax]), but that m and rest are not told."""
        values = sharded_rows(self, x, lw, lb, up, target, weight)
        untold = values["lse"].detach()
        at = self.plan.values
        return [*list(values.values())[:at], untold, untold, *list(values.values())[at:]]

    def sum(self, *args: Any) -> Tensor:
        """As weighted_sum."""
        x, lw, lb, up, target, weight, a, s, c, index, *plan = args
        if one_pass(x, lw, lb, up, target, weight, a, s, c):
            return LinearSum.apply(*args[:10], Plan(*plan), self)  # pyright: ignore[reportReturnType]
        x = x if index is None else x.index_select(0, index)
        return weighted(self.rows(x, lw, lb, up, target, weight), a, s, c)

    def forward_backward(self, arrays: Sequence[Any], needs: Sequence[bool]) -> tuple[list[Any], list[Tensor | None]]:
        """As ops.fwd_bwd: the ranks go by the same chunks of rows, and tell each other each chunk's numbers."""
        # All ranks' chunks are those of the rank with the most classes and the widest type a CPU forms logits in.
        x = arrays[0]
        widest_type = torch.promote_types(x.dtype, torch.float32)
        size = rows_that_fit(x, self.shard.widest or 0, widest_type, self.plan.chunk_size)
        over = lambda own: summed(own, self.shard.group)  # noqa: E731
        values, grads = loops.sums(arrays, needs, self.plan._replace(chunk_size=size), self._visit, over)
        if grads[0] is not None:
            grads[0] = summed(grads[0], self.shard.group)
        return [*values, *[None] * (3 - len(values))], grads

    def _visit(self, z: Tensor, t: Tensor, weight: Any, a: Any, s: Any, c: Any, row: dict[str, Any]) -> list[Tensor]:
        """As fast.visit, of whole rows."""
        if self.shard.count:
            wanted: Any = {**row, "smooth": s is not None, "entropy": False}
            local: Any = rows.cross_entropy_fwd(z, self._target(t), weight, **wanted)
            dead = told_from_nan(z, local[-2], 1) == -math.inf
        else:
            local, dead = without_classes(z.sum(1), self.plan)
        values, m, rest, elsewhere = merged(self, local, dead, (t, weight))
        if self.shard.count:
            ups = {"nll": a, "lse": None if c is None else 2.0 * c * values["lse"], "smooth": s}
            own = own_upstream(ups, t, elsewhere, self.shard, m, 1)
            given = (z, self._target(t), weight, m, rest, own["nll"], own["lse"], own["smooth"], None)
            rows.cross_entropy_bwd(*given, **row, out=z)
        return [values["nll"], values["lse"], *([values["smooth"]] if s is not None else [])]

    def _target(self, target: Tensor) -> Tensor:
        return target if target.is_floating_point() else self.shard.local(target)[1]


def _nothing(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, up: Tensor | None) -> Tensor:
    """Zeros (n,), connected to a head of no classes."""
    kind = torch.promote_types(x.dtype, torch.float32)
    zeros = x[:, :0].sum(1, dtype=kind) + linear_weight.sum(dtype=kind)
    return sum((v.sum(dtype=kind) for v in (linear_bias, up) if v is not None), zeros)
