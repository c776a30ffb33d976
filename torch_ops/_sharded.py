"""Rows whose classes lie on the ranks of a group: the first derivative by hand, others through differentiable sums.

The first derivative is a row function's, given m and rest of whole rows: as exact as that of one device. A derivative
of it is taken of the same numbers made from each shard's own rows (which have every order) and sums over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from torch_ops import _rows as rows
from torch_ops._collectives import shared, summed
from torch_ops._linear import head_rows
from torch_ops._linear_ops import Plan, head_bwd, head_fwd
from torch_ops._linear_slices import _Slices
from torch_ops._shards import Extent, Merged, Shard, first_of_all, merge, own_upstream
from torch_ops.cross_entropy import _row


class Door(Protocol):
    """How the rows of one shard come about: from logits, or from a linear head."""

    plan: Plan
    extent: Extent

    def forward(self, *arrays: Any) -> tuple[list[Tensor], Tensor]:
        """([nll, lse, [smooth], [entropy], m, rest, [argmax]], which rows are all -inf), of the shard alone."""
        ...

    def again(self, dead: Tensor, *arrays: Any) -> Sequence[Tensor]:
        """The same but for argmax, to be differentiated; of `dead` rows nothing is used."""
        ...

    def backward(self, arrays: Any, upstream: dict[str, Any], whole: Any, needs: Sequence[bool]) -> list[Any] | None:
        """The arrays' gradients from those of the shard's rows; None where `again` has to tell them."""
        ...


def sharded_rows(door: Door, *arrays: Any) -> dict[str, Tensor]:
    """nll, lse, [smooth], [entropy], [argmax] of whole rows by name, replicated."""
    names = [*_names(door.plan), *["argmax"] * door.plan.argmax]
    return dict(zip(names, ShardedRows.apply(door, *arrays), strict=True))  # pyright: ignore


class ShardedRows(Function):
    """(nll, lse, [smooth], [entropy], [argmax]) of each row. Saves its inputs and some row numbers."""

    @staticmethod
    def forward(ctx: Any, door: Door, *arrays: Any) -> tuple[Tensor, ...]:
        local, dead = door.forward(*arrays)
        merged = _merged(door, local, dead, arrays)
        found = [*merged.values.values()]
        if door.plan.argmax:
            m, rest = local[door.plan.values :][:2]
            value = m.masked_fill(rest.isnan() & ~dead, math.nan)
            found.append(first_of_all(value, local[-1], door.extent))
            ctx.mark_non_differentiable(found[-1])
        ctx.set_materialize_grads(False)
        ctx.door = door
        h = merged.values.get("entropy")
        numbers = (merged.m, merged.rest, h, *(merged.elsewhere.get(n) for n in _names(door.plan)))
        ctx.save_for_backward(*arrays, dead, *numbers)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        door, names = ctx.door, _names(ctx.door.plan)
        count = len(ctx.needs_input_grad) - 1
        arrays, (dead, m, rest, h, *elsewhere) = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needs = ctx.needs_input_grad[1:]
        upstream = dict(zip(names, grads, strict=False))
        if all(u is None for u in upstream.values()):
            return (None,) * (count + 1)
        if not torch.is_grad_enabled():
            of_others = {n: v for n, v in zip(names, elsewhere, strict=True) if v is not None}
            own = own_upstream(upstream, arrays[-2], of_others, door.extent)
            if h is not None and "entropy" in of_others:
                h = h - of_others["entropy"]
            found = door.backward(arrays, own, (m, rest, h), needs)
            if found is not None:
                return None, *found
        return None, *_derived(door, arrays, upstream, dead & (m != -math.inf), needs)


def _derived(
    door: Door, arrays: Sequence[Any], upstream: dict[str, Any], dead: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients as autograd finds them, which can be differentiated."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Under names of their own: where one is made from another, the way between them is the outer gradient's to go.
        given = [v if v is None else v.view_as(v) if again else v.detach() for v in arrays]
        for v, need in zip(given, needs, strict=True):
            if need and not again:
                v.requires_grad_()
        values = _merged(door, door.again(dead, *given), dead, given).values
        ends = [n for n, u in upstream.items() if u is not None]
        wrt = [v for v, need in zip(given, needs, strict=True) if need]
        ups = [upstream[n] for n in ends]
        found = torch.autograd.grad([values[n] for n in ends], wrt, ups, create_graph=again, allow_unused=True)
    each = iter(found)
    return [next(each) if need else None for need in needs]


def _merged(door: Door, local: Sequence[Tensor], dead: Tensor, arrays: Sequence[Any]) -> Merged:
    target, weight, plan = arrays[-2], arrays[-1], door.plan
    m, rest = local[plan.values : plan.values + 2]
    dim = getattr(door, "dim", 1)
    mass = _mass(target, weight, dim, m.dtype) if target.is_floating_point() else None
    of_row = None
    if plan.smooth:
        of_row = m.new_full((), door.extent.count) if weight is None else weight.sum()
    shard = Shard(dict(zip(_names(plan), local, strict=False)), m, rest, dead, target, mass, of_row)
    return merge(shard, door.extent)


def _names(plan: Plan) -> list[str]:
    return ["nll", "lse", *["smooth"] * plan.smooth, *["entropy"] * plan.entropy]


def _mass(target: Tensor, weight: Tensor | None, dim: int, kind: torch.dtype) -> Tensor:
    """sum_j w_j y_j of each row."""
    if weight is None:
        return target.sum(dim, dtype=kind)
    return target.movedim(dim, -1).to(kind) @ weight


class LogitsDoor:
    """Rows of logits, class dimension `dim`; arrays: logits, target, weight."""

    def __init__(self, plan: Plan, extent: Extent, dim: int, overwrite: bool) -> None:
        self.plan, self.extent, self.dim, self.overwrite = plan, extent, dim, overwrite
        self.layout: dict[str, Any] = {"dim": dim, "scale": plan.scale, "softcap": plan.softcap}

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """The shard's rows as cross_entropy_fwd has them."""
        plan, options = self.plan, {"smooth": self.plan.smooth, "entropy": self.plan.entropy}
        if not self.extent.count:
            return _without_classes(logits.sum(self.dim), plan)
        values = [*rows.cross_entropy_fwd(logits, self._target(target), weight, **self.layout, **options)]
        dead = values[plan.values] == -math.inf
        # As in _linear_slices: the native kernels' maximum passes over NaN, and on the CPU a look costs nothing.
        if logits.device.type == "cpu" and dead.any():
            dead &= ~logits.isnan().any(self.dim)
        if plan.argmax:
            values.append(rows.capped(logits, plan.scale, plan.softcap).argmax(self.dim))
        return values, dead

    def again(self, dead: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None) -> Sequence[Tensor]:
        """The shard's rows as cross_entropy has them."""
        plan = self.plan
        if not self.extent.count:
            return _without_classes(logits.sum(self.dim), plan)[0]
        logits = logits.masked_fill(dead.unsqueeze(self.dim), 0.0)
        args = (self.dim, plan.scale, plan.softcap, plan.smooth, plan.entropy, False)
        return _row(logits, self._target(target), weight, *args)

    def backward(self, arrays: Any, upstream: dict[str, Any], whole: Any, needs: Sequence[bool]) -> list[Any] | None:
        """cross_entropy_bwd, told m and rest of whole rows."""
        logits, target, weight = arrays
        if needs[1] or needs[2]:
            return None
        if not self.extent.count:
            return [torch.zeros_like(logits), None, None]
        ups = [upstream.get(name) for name in ("nll", "lse", "smooth", "entropy")]
        out = logits.detach() if self.overwrite else None
        args = (logits, self._target(target), weight, *whole[:2], *ups)
        return [rows.cross_entropy_bwd(*args, **self.layout, out=out), None, None]

    def _target(self, target: Tensor) -> Tensor:
        return target if target.is_floating_point() else self.extent.local(target)[1]


class HeadDoor:
    """Rows of a linear head; arrays: x, linear_weight, linear_bias, target, weight. x is replicated."""

    dim = 1

    def __init__(self, plan: Plan, extent: Extent) -> None:
        self.plan, self.extent = plan, extent

    def forward(self, *arrays: Any) -> tuple[list[Tensor], Tensor]:
        """The shard's rows as the head's loops have them."""
        x, lw, lb, target, weight = arrays
        if not self.extent.count:
            return _without_classes(_nothing(x, lw, lb), self.plan)
        values = head_fwd((x, lw, lb, self._target(target), weight), self.plan)
        dead = values[self.plan.values] == -math.inf
        if x.device.type == "cpu" and dead.any():  # told from rows that hold NaN
            found = torch.zeros_like(dead[dead])
            for _, _, z in _Slices(x[dead], lw, lb, None):
                found |= z.isnan().any(1)
            dead[dead.clone()] = ~found
        return values, dead

    def again(self, dead: Tensor, *arrays: Any) -> Sequence[Tensor]:
        """The shard's rows as the head has them."""
        x, lw, lb, target, weight = arrays
        plan, x = self.plan._replace(argmax=False), shared(x, self.extent.group)
        if not self.extent.count:
            return _without_classes(_nothing(x, lw, lb), plan)[0]
        if not target.is_floating_point():
            return head_rows(x, lw, lb, self._target(target).masked_fill(dead, rows.IGNORED), weight, *plan)
        if x.device.type != "cpu" or not dead.any():
            return head_rows(x, lw, lb, target, weight, *plan)
        live = (~dead).nonzero().squeeze(1)
        few = head_rows(x.index_select(0, live), lw, lb, target.index_select(0, live), weight, *plan)
        return [v.new_zeros(dead.shape).index_copy(0, live, v) for v in few]

    def backward(self, arrays: Any, upstream: dict[str, Any], whole: Any, needs: Sequence[bool]) -> list[Any] | None:
        """The head's loops, told m, rest and the shard's entropy of whole rows; dX is summed over the ranks."""
        x, lw, lb, target, weight = arrays
        out: list[Any] = [None] * 5
        if not self.extent.count:
            out = [torch.zeros_like(a) if need else None for a, need in zip(arrays, needs, strict=True)]
        else:
            ups = [upstream.get(name) for name in ("nll", "lse", "smooth", "entropy")]
            given = (x, lw, lb, self._target(target), weight, *whole, *ups)
            found = iter(head_bwd(given, needs, self.plan))
            out = [next(found) if need else None for need in needs]
        if needs[0]:
            out[0] = summed(out[0], self.extent.group)
        return out

    def _target(self, target: Tensor) -> Tensor:
        return target if target.is_floating_point() else self.extent.local(target)[1]


def _nothing(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """Zeros (n,), connected to a head of no classes."""
    kind = torch.promote_types(x.dtype, torch.float32)
    zeros = x[:, :0].sum(1, dtype=kind) + linear_weight.sum(dtype=kind)
    return zeros if linear_bias is None else zeros + linear_bias.sum(dtype=kind)


def _without_classes(zeros: Tensor, plan: Plan) -> tuple[list[Tensor], Tensor]:
    """The rows of a shard without classes: nothing of them is used, but the ranks' messages stay in step."""
    zeros = zeros.to(torch.promote_types(zeros.dtype, torch.float32))
    m, rest = torch.full_like(zeros, -math.inf), torch.full_like(zeros, math.nan)
    values = [zeros] * plan.values + [m, rest] + [torch.zeros_like(zeros, dtype=torch.int64)] * plan.argmax
    return values, torch.ones_like(zeros, dtype=torch.bool)
