"""The rows of one shard of logits, for `sharded_rows`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ops._parallel.rules import told_from_nan, without_classes
from torch_ops._parallel.shard import Extent
from torch_ops._rows import dispatch as rows
from torch_ops._rules.cross_entropy import row
from torch_ops._rules.plan import Plan


class LogitsDoor:
    """Rows of logits, class dimension `dim`; arrays: logits, target, weight."""

    def __init__(self, plan: Plan, extent: Extent, dim: int, overwrite: bool) -> None:
        self.plan, self.extent, self.dim, self.overwrite = plan, extent, dim, overwrite
        self.layout: dict[str, Any] = {"dim": dim, "scale": plan.scale, "softcap": plan.softcap}

    def forward(self, *arrays: Any) -> tuple[list[Tensor], Tensor]:
        """The shard's rows as cross_entropy_fwd has them."""
        (logits, target, weight), plan = arrays, self.plan
        options = {"smooth": plan.smooth, "entropy": plan.entropy}
        if not self.extent.count:
            return without_classes(logits.sum(self.dim), plan)
        values = [*rows.cross_entropy_fwd(logits, self._target(target), weight, **self.layout, **options)]
        m = values[plan.values] = told_from_nan(logits, values[plan.values], self.dim)
        if plan.argmax:
            values.append(rows.capped(logits, plan.scale, plan.softcap).argmax(self.dim))
        return values, m == -math.inf

    def again(self, dead: Tensor, *arrays: Any) -> Sequence[Tensor]:
        """The shard's rows as cross_entropy has them."""
        (logits, target, weight), plan = arrays, self.plan
        if not self.extent.count:
            return without_classes(logits.sum(self.dim), plan)[0]
        logits = logits.masked_fill(dead.unsqueeze(self.dim), 0.0)
        args = (self.dim, plan.scale, plan.softcap, plan.smooth, plan.entropy, False)
        return row(logits, self._target(target), weight, *args)

    def backward(
        self, arrays: Any, upstream: dict[str, Any], whole: Any, needs: Sequence[bool], alone: bool
    ) -> list[Tensor]:
        """cross_entropy_bwd's, told m and rest of whole rows."""
        logits, target, weight = arrays
        found = []
        if needs[1] or needs[2]:  # before the logits are overwritten
            found = self._by_mass(arrays, upstream, whole, needs)
        if needs[0] and not self.extent.count:
            return [torch.zeros_like(logits), *found]
        if needs[0]:
            ups = [upstream.get(name) for name in ("nll", "lse", "smooth", "entropy")]
            out = logits.detach() if self.overwrite and alone else None
            args: Any = (logits, self._target(target), weight, *whole[:2], *ups)
            found = [rows.cross_entropy_bwd(*args, **self.layout, out=out), *found]
        return found

    def _by_mass(self, arrays: Any, upstream: dict[str, Any], whole: Any, needs: Sequence[bool]) -> list[Tensor]:
        """dL/dy and dL/dw: -log p times what multiplies y_j and w_j in the loss."""
        logits, target, weight = arrays
        numbers = (*whole[:2], upstream["nll"], upstream.get("smooth"))
        each: list[Any] = [v if v is None else v.unsqueeze(self.dim) for v in numbers]
        m, rest, d_nll, d_smooth = each
        minus_log_p = torch.log1p(rest) - (rows.capped(logits, self.plan.scale, self.plan.softcap) - m)
        minus_log_p = minus_log_p.masked_fill(minus_log_p == math.inf, 0.0)  # as in the derivative in plain ops
        soft, w, found = target.is_floating_point(), rows.class_row(weight, logits, self.dim), []
        if needs[1]:
            by = torch.zeros_like(m) if d_nll is None else d_nll
            found.append(((by if w is None else by * w) * minus_log_p).to(target.dtype))
        if needs[2]:
            by = torch.zeros_like(m) if d_smooth is None else d_smooth
            terms = (by + d_nll * target.to(m.dtype) if soft and d_nll is not None else by) * minus_log_p
            if not soft:
                terms = terms.masked_fill((target == rows.IGNORED).unsqueeze(self.dim), 0.0)
            terms = terms.movedim(self.dim, -1)
            found.append(terms.flatten(0, -2).sum(0) if terms.dim() > 1 else terms)
        return found

    def _target(self, target: Tensor) -> Tensor:
        return target if target.is_floating_point() else self.extent.local(target)[1]
