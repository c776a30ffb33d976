"""Derivatives of the gradient of rows whose classes lie on the ranks of a group, in plain differentiable ops.

legend:  as in `_rules/curvature.py`: z logits after scale and cap, p = softmax(z), l = log p, H = -sum p l, w class
         weights, Y one-hot target or w * soft target y, <a> = sum_j p_j a_j, sums over the classes of all ranks
along:   for directions u of z, dY of Y and dw of w, with d = u - <u>:  nll -sum Y d - sum dY l,  lse <u>,
         smooth -sum w d - sum dw l,  entropy -sum p d (l + H)
second:  <v, dL/dx> is the derivative of L along v, a sum of these times the rows' upstream gradients; what autograd
         makes of it is Hess v, formed from d as one device's: `distribution.py` has each step's derivative
Each rank differentiates the same sum by its own arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torch_ops._parallel.collectives import summed
from torch_ops._parallel.distribution import Centred, Softmax, Whole, whole_of
from torch_ops._parallel.shard import Shard
from torch_ops._rows import dispatch as rows
from torch_ops._rules.plan import Plan
from torch_ops._rules.statistics import bounded

Tangents = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Sequence[Tensor]]


class Directed(NamedTuple):
    """Rows of a shard, after scale and cap, and a direction of each of their arrays."""

    z: Tensor
    u: Tensor | None
    target: Tensor
    weight: Tensor | None
    d_target: Tensor | None
    d_weight: Tensor | None


class Curved(Protocol):
    """How the rows of one shard come about, differentiably."""

    plan: Plan
    shard: Shard
    by_row: tuple[bool, ...]  # which of the arrays have a line for each row

    @property
    def dim(self) -> int:
        """The class dimension."""
        ...

    def pieces(self, *arrays: Any) -> list[tuple[int, int]]:
        """The rows at a time, the same on every rank."""
        ...

    def directed(self, arrays: Sequence[Any], along: Sequence[Any]) -> Directed:
        """Its rows, with directions of the arrays."""
        ...


def directed(
    plan: Plan, logits: Tensor, v: Tensor | None, target: Tensor, weight: Any, d_target: Any, d_weight: Any
) -> Directed:
    """Logits and their direction v after scale and cap."""
    z = bounded(rows.compute(logits), plan.scale, plan.softcap)
    slope: Any = plan.scale
    if plan.softcap is not None:  # 1 - tanh^2 where it has its digits, and their derivative where that has
        square = (z.masked_fill(z == -math.inf, 0.0) / plan.softcap).square()
        slope = rows.slope(logits.detach(), plan.scale, plan.softcap) - plan.scale * (square - square.detach())
    return Directed(z, None if v is None else slope * rows.compute(v), target, weight, d_target, d_weight)


def second(
    source: Curved,
    arrays: Sequence[Any],
    along: Sequence[Any],
    upstream: Sequence[Any],
    wanted: Sequence[bool],
    again: bool,
    tangents: Tangents,
) -> list[Tensor | None]:
    """Derivatives of <along, the arrays' gradients> by arrays and upstreams; `again`: they will be differentiated.

    `tangents(arrays, along, upstream)` are those of the rows' numbers, replicated, that have an upstream gradient.
    """
    # Under names of their own: where one is made from another, the way between is the outer gradient's to go.
    all_of = [v if v is None else v.view_as(v) if again else v.detach() for v in (*arrays, *upstream)]
    along = [v if v is None or again else v.detach() for v in along]
    for v, need in zip(all_of, wanted, strict=True):
        if need and not again and v is not None:
            v.requires_grad_()
    pieces, by_row = source.pieces(*arrays), (*source.by_row, *[True] * len(upstream))
    parts: list[Sequence[Any]] = []
    with torch.enable_grad():
        for piece in pieces:
            given = [cut(v, row, piece, len(pieces)) for v, row in zip(all_of, by_row, strict=True)]
            moved = [cut(v, row, piece, len(pieces)) for v, row in zip(along, source.by_row, strict=True)]
            ups = given[len(arrays) :]
            found = tangents(given[: len(arrays)], moved, ups)
            total = sum((up * t).sum() for up, t in zip((u for u in ups if u is not None), found, strict=True))
            if not isinstance(total, Tensor) or not total.requires_grad:
                return [None] * len(wanted)
            wrt = [v for v, need in zip(given, wanted, strict=True) if need]
            parts.append(torch.autograd.grad(total, wrt, create_graph=again, allow_unused=True))
    which = (row for row, need in zip(by_row, wanted, strict=True) if need)
    each = iter([joined(values, row) for values, row in zip(zip(*parts, strict=True), which, strict=True)])
    return [next(each) if need else None for need in wanted]


def cut(v: Any, by_row: bool, piece: tuple[int, int], pieces: int) -> Any:
    """An array's part of one of several pieces."""
    return v[piece[0] : piece[1]] if by_row and v is not None and pieces > 1 else v


def joined(values: Sequence[Any], by_row: bool) -> Tensor | None:
    """Of all pieces: one after the other, or their sum, which is rounded once."""
    if len(values) == 1 or values[0] is None:
        return values[0]
    if by_row:
        return torch.cat([*values])
    return sum((rows.compute(v) for v in values[1:]), rows.compute(values[0])).to(values[0].dtype)


def tangents_of(source: Curved) -> Tangents:
    """What directions make of a row's nll, lse, smooth and entropy."""

    def call(arrays: Sequence[Any], along: Sequence[Any], upstream: Sequence[Any]) -> Sequence[Tensor]:
        ups = dict(zip(source.plan.names, upstream, strict=True))
        return [*_tangents(source.directed(arrays, along), source, ups).values()]

    return call


def _tangents(at: Directed, source: Curved, ups: dict[str, Any]) -> dict[str, Tensor]:
    """What the directions make of each of the rows' numbers that has an upstream gradient, replicated."""
    dim, shard, target = source.dim, source.shard, at.target
    whole = whole_of(at.z, dim, shard.group)
    p, log_p = Softmax.apply(at.z, whole)  # pyright: ignore[reportGeneralTypeIssues]
    log_p = log_p.masked_fill(log_p == -math.inf, 0.0)  # such a class takes no part, not even through 0 * inf
    u = torch.zeros_like(p) if at.u is None else at.u
    d: Any = Centred.apply(u, p, whole)
    w, dw = (rows.class_row(v, p, dim) for v in (at.weight, at.d_weight))
    out: dict[str, Tensor] = {}
    if ups["nll"] is not None:
        out["nll"] = _of_nll(at, d, log_p, w, dw, shard, dim)
    if ups["lse"] is not None:
        out["lse"] = (p * u).sum(dim)
    if ups.get("smooth") is not None:
        moved = (d if w is None else w * d).sum(dim)
        out["smooth"] = -moved if dw is None else -moved - (dw * log_p).sum(dim)
    if ups.get("entropy") is not None:
        out["entropy"] = -(p * d * _centred(log_p, p, whole)).sum(dim)
    out = {name: summed(v, shard.group) for name, v in out.items()}
    if target.is_floating_point():
        return out
    marks = rows.of_rows(target, at.z.dim(), dim)
    return {n: _marked(v, target if n == "nll" else marks) for n, v in out.items()}


def _of_nll(at: Directed, d: Tensor, log_p: Tensor, w: Any, dw: Any, shard: Shard, dim: int) -> Tensor:
    """What the rank's classes add to it."""
    if at.target.is_floating_point():
        y = at.target.to(d.dtype)
        out = -((y if w is None else y * w) * d).sum(dim)
        if at.d_target is not None:
            dy = at.d_target.to(d.dtype)
            out = out - ((dy if w is None else dy * w) * log_p).sum(dim)
        return out if dw is None else out - (y * dw * log_p).sum(dim)
    inside, place = shard.local(at.target)
    several = at.target.dim() == d.dim()
    if not shard.count:  # nothing, but the ranks' messages stay in step
        nothing = d.sum(dim, keepdim=True)
        return nothing.expand(at.target.shape) if several else nothing.squeeze(dim)
    place = place.clamp(min=0)
    own = d.gather(dim, place) if several else d.gather(dim, place.unsqueeze(dim)).squeeze(dim)
    return -own.where(inside, 0.0)


def _centred(u: Tensor, p: Tensor, whole: Whole) -> Tensor:
    return Centred.apply(u, p, whole)  # pyright: ignore[reportReturnType]


def _marked(x: Tensor, target: Tensor) -> Tensor:
    return x.masked_fill(target == rows.INVALID, math.nan).masked_fill(target == rows.IGNORED, 0.0)
