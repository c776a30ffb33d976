"""The rows of one shard of logits, for `sharded_rows`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ops._parallel.curvature import Directed, directed
from torch_ops._parallel.rules import told_from_nan, without_classes
from torch_ops._parallel.shard import Shard
from torch_ops._rows import dispatch as rows
from torch_ops._rules.plan import Plan


class LogitsShard:
    """Rows of logits, class dimension `dim`; arrays: logits, target, weight."""

    by_row = (True, True, False)

    def __init__(self, plan: Plan, shard: Shard, dim: int, overwrite: bool) -> None:
        self.plan, self.shard, self.dim, self.overwrite = plan, shard, dim, overwrite
        self.layout: dict[str, Any] = {"dim": dim, "scale": plan.scale, "softcap": plan.softcap}

    def forward(self, *arrays: Any) -> tuple[list[Tensor], Tensor]:
        """The shard's rows as cross_entropy_fwd has them."""
        (logits, target, weight), plan = arrays, self.plan
        options = {"smooth": plan.smooth, "entropy": plan.entropy}
        if not self.shard.count:
            return without_classes(logits.sum(self.dim), plan)
        values = [*rows.cross_entropy_fwd(logits, self._target(target), weight, **self.layout, **options)]
        m = values[plan.values] = told_from_nan(logits, values[plan.values], self.dim)
        if plan.argmax:
            values.append(rows.capped(logits, plan.scale, plan.softcap).argmax(self.dim))
        return values, m == -math.inf

    def pieces(self, *arrays: Any) -> list[tuple[int, int]]:
        """All at once: the logits are there."""
        return [(0, 0)]

    def directed(self, arrays: Sequence[Any], along: Sequence[Any]) -> Directed:
        """The logits after scale and cap."""
        (x, target, weight), (v, *others) = arrays, along
        if not target.is_floating_point():  # an ignored row reaches no result, not even through 0 * NaN
            nothing = (rows.of_rows(target, x.dim(), self.dim) == rows.IGNORED).unsqueeze(self.dim)
            x, v = (a if a is None else a.masked_fill(nothing, 0.0) for a in (x, v))
        return directed(self.plan, x, v, target, weight, *others)  # pyright: ignore[reportArgumentType]

    def backward(
        self, arrays: Any, upstream: dict[str, Any], whole: Any, needs: Sequence[bool], alone: bool
    ) -> list[Tensor]:
        """cross_entropy_bwd's, told m and rest of whole rows."""
        logits, target, weight = arrays
        found = []
        if needs[1] or needs[2]:  # before the logits are overwritten
            ups = upstream["nll"], upstream.get("smooth")
            given: Any = (logits, self._target(target), weight, *whole[:2], *ups)
            masses = rows.cross_entropy_mass_bwd(*given, **self.layout)
            like = zip((target, weight), masses, needs[1:3], strict=True)
            found = [torch.zeros_like(a) if g is None else g for a, g, need in like if need]
        if needs[0] and not self.shard.count:
            return [torch.zeros_like(logits), *found]
        if needs[0]:
            ups = [upstream.get(name) for name in ("nll", "lse", "smooth", "entropy")]
            out = logits.detach() if self.overwrite and alone else None
            args: Any = (logits, self._target(target), weight, *whole[:2], *ups)
            found = [rows.cross_entropy_bwd(*args, **self.layout, out=out), *found]
        return found

    def _target(self, target: Tensor) -> Tensor:
        return target if target.is_floating_point() else self.shard.local(target)[1]
