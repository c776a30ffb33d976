"""Rows whose classes lie on the ranks of a group: the first derivative by hand, others in differentiable ops.

The first derivative is a row function's, given m and rest of whole rows: as exact as that of one device. So is a
derivative of it, of the rows' softmax over all ranks (`curvature.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from torch_ops._modes import is_untracked
from torch_ops._parallel.curvature import Curved, second, tangents_of
from torch_ops._parallel.merge import Merged, ShardRows, merge, own_upstream
from torch_ops._parallel.shard import first_of_all
from torch_ops._rules.plan import Plan


class Source(Curved, Protocol):
    """How the rows of one shard come about: from logits, or from a linear head."""

    def forward(self, *arrays: Any) -> tuple[list[Tensor], Tensor]:
        """([nll, lse, [smooth], [entropy], m, rest, [argmax]], which rows are all -inf), of the shard alone."""
        ...

    def backward(
        self, arrays: Any, upstream: dict[str, Any], whole: Any, needs: Sequence[bool], alone: bool
    ) -> list[Tensor]:
        """Those needed of the arrays' gradients; `alone`: nothing else is made of the arrays."""
        ...


def sharded_rows(source: Source, *arrays: Any) -> dict[str, Tensor]:
    """nll, lse, [smooth], [entropy], [argmax] of whole rows by name, replicated."""
    names = [*source.plan.names, *["argmax"] * source.plan.argmax]
    return dict(zip(names, ShardedRows.apply(source, *arrays), strict=True))  # pyright: ignore


class ShardedRows(Function):
    """(nll, lse, [smooth], [entropy], [argmax]) of each row. Saves its inputs and some row numbers."""

    @staticmethod
    def forward(ctx: Any, source: Source, *arrays: Any) -> tuple[Tensor, ...]:
        local, dead = source.forward(*arrays)
        whole = merged(source, local, dead, arrays)
        found = [*whole.values.values()]
        if source.plan.argmax:
            m, rest = local[source.plan.values :][:2]
            # An infinite maximum has no rest either, but is no NaN: that comes first, wherever it is.
            value = m.masked_fill(rest.isnan() & ~dead & (m != math.inf), math.nan)
            found.append(first_of_all(value, local[-1], source.shard))
            ctx.mark_non_differentiable(found[-1])
        ctx.set_materialize_grads(False)
        ctx.source = source
        h = whole.values.get("entropy")
        numbers = (whole.m, whole.rest, h, *(whole.elsewhere.get(n) for n in source.plan.names))
        ctx.save_for_backward(*arrays, *numbers)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs, out = ctx.needs_input_grad[1:], [None] * len(ctx.needs_input_grad)
        upstream = grads[: ctx.source.plan.values]
        if any(u is not None for u in upstream):
            alone = is_untracked(*ctx.saved_tensors, *upstream)
            found: Any = ShardedBwd.apply(ctx.source, needs, alone, *ctx.saved_tensors, *upstream)
            for i, g in zip((i for i, need in enumerate(needs) if need), found, strict=True):
                out[i + 1] = g
        return tuple(out)


class ShardedBwd(Function):
    """Those needed of the arrays' gradients as a function of everything: linear in the upstreams."""

    @staticmethod
    def forward(ctx: Any, source: Source, needs: Sequence[bool], alone: bool, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.source, ctx.needs = source, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        names, count = source.plan.names, len(needs)
        arrays, (m, rest, h, *others) = tensors[:count], tensors[count : -len(names)]
        elsewhere = {n: v for n, v in zip(names, others, strict=True) if v is not None}
        upstream = dict(zip(names, tensors[-len(names) :], strict=True))
        own = own_upstream(upstream, arrays[-2], elsewhere, source.shard, m, source.dim)
        if h is not None:
            h = h - elsewhere["entropy"]
        return tuple(source.backward(arrays, own, (m, rest, h), needs, alone))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        source, count, names = ctx.source, len(ctx.needs), ctx.source.plan.names
        out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        again = torch.is_grad_enabled()
        places = [*range(count), *range(len(ctx.saved_tensors) - len(names), len(ctx.saved_tensors))]
        wanted = [ctx.needs_input_grad[i + 3] for i in places]
        given = iter(cotangents)
        along = [next(given) if need else None for need in ctx.needs]
        if any(v is not None for v in along) and any(wanted):
            own = [ctx.saved_tensors[i] for i in places]
            found = second(source, own[:count], along, own[count:], wanted, again, tangents_of(source))
            for i, g in zip(places, found, strict=True):
                out[i + 3] = g
        return tuple(out)


def merged(source: Source, local: Sequence[Tensor], dead: Tensor, arrays: Sequence[Any]) -> Merged:
    target, weight, plan = arrays[-2], arrays[-1], source.plan
    m, rest = local[plan.values : plan.values + 2]
    mass = _mass(target, weight, source.dim, m.dtype) if target.is_floating_point() else None
    of_row = None
    if plan.smooth:
        of_row = m.new_full((), source.shard.count) if weight is None else weight.sum()
    values, weighted = dict(zip(plan.names, local, strict=False)), weight is not None
    here = ShardRows(values, m, rest, dead, target, mass, of_row, weighted, source.dim)
    return merge(here, source.shard)


def _mass(target: Tensor, weight: Tensor | None, dim: int, kind: torch.dtype) -> Tensor:
    """sum_j w_j y_j of each row."""
    if weight is None:
        return target.sum(dim, dtype=kind)
    return target.movedim(dim, -1).to(kind) @ weight


def without_classes(zeros: Tensor, plan: Plan) -> tuple[list[Tensor], Tensor]:
    """The rows of a shard without classes: nothing of them is used, but the ranks' messages stay in step."""
    zeros = zeros.to(torch.promote_types(zeros.dtype, torch.float32))
    m, rest = torch.full_like(zeros, -math.inf), torch.full_like(zeros, math.nan)
    values = [zeros] * plan.values + [m, rest] + [torch.zeros_like(zeros, dtype=torch.int64)] * plan.argmax
    return values, torch.ones_like(zeros, dtype=torch.bool)


def told_from_nan(logits: Tensor, m: Tensor, dim: int) -> Tensor:
    """The rows' maxima, NaN where a row holds NaN beside an infinite one."""
    # The native kernels' maximum passes over NaN. A look costs nothing here; elsewhere the plain maximum is NaN.
    if logits.device.type == "cpu" and (infinite := m.isinf()).any():
        return m.masked_fill(infinite & logits.isnan().any(dim), math.nan)
    return m
