"""Statistics of a head's rows that its loss has no use for, by chunks of rows, every derivative likewise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_ops._head.chunks import that_fit
from torch_ops._head.linear import formed_in
from torch_ops._head.per_row import derived_size, logits
from torch_ops._head.row_map import Chunked, RowMap, run
from torch_ops._modes import is_constant
from torch_ops._rules.function import in_graph
from torch_ops._rules.plan import Plan
from torch_ops._rules.statistics import statistics_of


def head_statistics(
    names: Sequence[str], plan: Plan, x: Tensor, lw: Tensor, lb: Tensor | None, up: Tensor | None, target: Tensor
) -> list[Tensor]:
    """Those named of each row, in their order; their logits are formed once more."""
    floats = tuple(n for n in names if n != "rank")
    of = dict(zip(floats, _moving(floats, plan, x, lw, lb, up, target), strict=True)) if floats else {}
    if "rank" in names:
        with torch.no_grad():
            (of["rank"],) = _constant(("rank",), plan, x, lw, lb, up, target)
    return [of[n] for n in names]


def _moving(names: tuple[str, ...], plan: Plan, *arrays: Any) -> tuple[Tensor, ...]:
    if is_constant(*arrays):
        return _constant(names, plan, *arrays)
    return _differentiated(names, *arrays, *plan)


@in_graph
def _differentiated(
    names: tuple[str, ...], x: Tensor, lw: Tensor, lb: Tensor | None, up: Tensor | None, target: Tensor, *plan: Any
) -> tuple[Tensor, ...]:
    made = Plan(*plan)
    return Chunked.apply(_map(names, made), derived_size(made, x, lw), x, lw, lb, up, target)  # pyright: ignore


def _constant(names: tuple[str, ...], plan: Plan, *arrays: Any) -> tuple[Tensor, ...]:
    x, lw = arrays[:2]
    return run(_map(names, plan), that_fit(None, 4 * lw.shape[0], max(4, x.itemsize), 0, x.device), *arrays)


def _map(names: tuple[str, ...], plan: Plan) -> RowMap:
    """(x, linear_weight, linear_bias, up, target) -> the statistics."""
    return RowMap(partial(_call, names, plan), (True, False, False, False, True), (True,) * len(names))


def _call(
    names: tuple[str, ...], plan: Plan, x: Tensor, lw: Tensor, lb: Tensor | None, up: Tensor | None, target: Tensor
) -> list[Tensor]:
    kind = formed_in(x, target)  # that of the loss: rank and argmax are of one row
    z = logits(x.to(kind), lw.to(kind), *(a if a is None else a.to(kind) for a in (lb, up)))
    return [*statistics_of(names, z, target, 1, plan.scale, plan.softcap).values()]
