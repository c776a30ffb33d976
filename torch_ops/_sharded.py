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

    def backward(
        self, arrays: Any, upstream: dict[str, Any], whole: Any, needs: Sequence[bool], alone: bool
    ) -> list[Tensor]:
        """Those needed of the arrays' gradients; `alone`: nothing else is made of the arrays."""
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
        needs, out = ctx.needs_input_grad[1:], [None] * len(ctx.needs_input_grad)
        upstream = grads[: ctx.door.plan.values]
        if any(u is not None for u in upstream):
            alone = not torch.is_grad_enabled()
            found: Any = ShardedBwd.apply(ctx.door, needs, alone, *ctx.saved_tensors, *upstream)
            for i, g in zip((i for i, need in enumerate(needs) if need), found, strict=True):
                out[i + 1] = g
        return tuple(out)


class ShardedBwd(Function):
    """Those needed of the arrays' gradients as a function of everything: linear in the upstreams."""

    @staticmethod
    def forward(ctx: Any, door: Door, needs: Sequence[bool], alone: bool, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.door, ctx.needs = door, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        names, count = _names(door.plan), len(needs)
        arrays, (_, m, rest, h, *others) = tensors[:count], tensors[count : -len(names)]
        elsewhere = {n: v for n, v in zip(names, others, strict=True) if v is not None}
        upstream = dict(zip(names, tensors[-len(names) :], strict=True))
        own = own_upstream(upstream, arrays[-2], elsewhere, door.extent)
        if h is not None:
            h = h - elsewhere["entropy"]
        return tuple(door.backward(arrays, own, (m, rest, h), needs, alone))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        door, count, names = ctx.door, len(ctx.needs), _names(ctx.door.plan)
        out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        dead, m = ctx.saved_tensors[count : count + 2]
        again = torch.is_grad_enabled()
        places = [*range(count), *range(len(ctx.saved_tensors) - len(names), len(ctx.saved_tensors))]
        with torch.enable_grad():
            # Under names of their own: where one is made from another, the way between is the outer gradient's to go.
            given: list[Any] = [ctx.saved_tensors[i] for i in places]
            given = [v if v is None else v.view_as(v) if again else v.detach() for v in given]
            differentiable = [ctx.needs_input_grad[i + 3] for i in places]
            for v, need in zip(given, [*ctx.needs, *differentiable[count:]], strict=True):
                if need and not v.requires_grad:
                    v.requires_grad_()
            arrays, upstream = given[:count], dict(zip(names, given[count:], strict=True))
            values = _merged(door, door.again(dead & (m != -math.inf), *arrays), dead & (m != -math.inf), arrays).values
            ends = [n for n, u in upstream.items() if u is not None]
            wrt = [v for v, need in zip(arrays, ctx.needs, strict=True) if need]
            first = torch.autograd.grad(
                [values[n] for n in ends], wrt, [upstream[n] for n in ends], create_graph=True, allow_unused=True
            )
            moved = [(g, c) for g, c in zip(first, cotangents, strict=True) if g is not None and c is not None]
            wrt = [(i, v) for i, v, need in zip(places, given, differentiable, strict=True) if need]
            if moved and wrt:
                ways = [g for g, _ in moved], [v for _, v in wrt], [c for _, c in moved]
                found = torch.autograd.grad(*ways, create_graph=again, allow_unused=True)
                for (i, _), g in zip(wrt, found, strict=True):
                    out[i + 3] = g
        return tuple(out)


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
            args = (logits, self._target(target), weight, *whole[:2], *ups)
            found = [rows.cross_entropy_bwd(*args, **self.layout, out=out), *found]
        return found

    def _by_mass(self, arrays: Any, upstream: dict[str, Any], whole: Any, needs: Sequence[bool]) -> list[Tensor]:
        """dL/dy and dL/dw: -log p times what multiplies y_j and w_j in the loss."""
        logits, target, weight = arrays
        m, rest, d_nll, d_smooth = (
            v if v is None else v.unsqueeze(self.dim) for v in (*whole[:2], upstream["nll"], upstream.get("smooth"))
        )
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
            found.append(terms.movedim(self.dim, -1).flatten(0, -2).sum(0))
        return found

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

    def backward(
        self, arrays: Any, upstream: dict[str, Any], whole: Any, needs: Sequence[bool], alone: bool
    ) -> list[Tensor]:
        """The head's loops', told m, rest and the shard's entropy of whole rows; dX is summed over the ranks."""
        x, lw, lb, target, weight = arrays
        if self.extent.count:
            ups = [upstream.get(name) for name in ("nll", "lse", "smooth", "entropy")]
            found = head_bwd((x, lw, lb, self._target(target), weight, *whole, *ups), needs, self.plan)
        else:
            found = [torch.zeros_like(a) for a, need in zip(arrays, needs, strict=True) if need]
        return [summed(found[0], self.extent.group), *found[1:]] if needs[0] else found

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
