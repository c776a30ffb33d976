"""The rows of one shard of a linear head, for `sharded_rows`, and their weighted sum with its gradients on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_ops._head import loops, ops
from torch_ops._head.chunks import spans, that_fit
from torch_ops._head.fast import rows_that_fit
from torch_ops._head.lean import Slices
from torch_ops._head.linear import Linear
from torch_ops._head.per_row import logits as head_logits
from torch_ops._head.row_map import DERIVED
from torch_ops._head.sum import LinearSum, one_pass, weighted
from torch_ops._parallel.collectives import shared, summed
from torch_ops._parallel.curvature import Directed, directed
from torch_ops._parallel.merge import own_upstream
from torch_ops._parallel.rules import merged, sharded_rows, told_from_nan, without_classes
from torch_ops._parallel.shard import Shard
from torch_ops._rows import dispatch as rows
from torch_ops._rules.plan import Plan

# Rows of a chunk where no rank can know the most classes of any without a look, which would be a sync.
ROWS = 512


class HeadShard:
    """Rows of a linear head; arrays: x, linear_weight, linear_bias, target, weight. x is replicated."""

    dim = 1
    by_row = (True, False, False, False, True, False)

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

    def pieces(self, x: Tensor, *_: Any) -> list[tuple[int, int]]:
        """Chunks of rows, of which every rank has the same."""
        n, widest = x.shape[0], self.shard.widest
        size = self.plan.chunk_size
        if widest is None:
            size = ROWS if size is None or self.plan.lean else size
        elif size is None:
            size = that_fit(None, max(widest, 1) * DERIVED, x.itemsize)
        elif self.plan.lean:
            size = max(1, n * size // max(1, widest))
        return spans(n, size)

    def directed(self, arrays: Sequence[Any], along: Sequence[Any]) -> Directed:
        """The head's logits after scale and cap, in plain ops."""
        (x, lw, lb, up, target, weight), (dx, dlw, dlb, dup, *others) = arrays, along
        nothing = None if target.is_floating_point() else (rows.of_rows(target, 2, 1) == rows.IGNORED).unsqueeze(1)

        def own(a: Tensor) -> Tensor:
            a = shared(a, self.shard.group)  # an ignored row reaches no result, not even through 0 * NaN
            return a if nothing is None else a.masked_fill(nothing, 0.0)

        x, width = own(x), lw.shape[1]
        z = head_logits(x, lw, lb, up)
        moved = [] if dx is None else [head_logits(own(dx), lw, None, up)]
        moved += [] if dlw is None else [F.linear(x[:, :width], dlw)]
        moved += [] if dup is None else [F.linear(x[:, width:], dup)]
        moved += [] if dlb is None else [dlb.expand(z.shape)]
        v = sum((rows.compute(a) for a in moved[1:]), rows.compute(moved[0])) if moved else None
        return directed(self.plan, z, v, target, weight, *others)

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
