"""log sum_j p_j^2 of rows whose classes lie on the ranks of a group, to every order.

legend:  as in `_rules/log_sum_sq.py`: L = log S' - 2 log S, c = m + log(S' / S), a = exp(z - c), f = expm1(z - c),
         A = sum a, F = sum a f, r = p^2 / sum p^2; all sums are over the classes of all ranks
first:   dL/dz_j = 2 a_j (f_j A - F) / (A (A + F)): no difference of r and p, which agree where all logits nearly do
second:  4 r (v - <v>_r) - 2 p (v - <v>_p), each as `distribution.py` has it
Logits without a cap are scaled after their row's largest has been taken from them (`_rules/statistics.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_ops._parallel.collectives import maximum, summed
from torch_ops._parallel.curvature import Curved, Directed, cut, joined, second
from torch_ops._parallel.distribution import Softmax, Tilted, largest_of, whole_of
from torch_ops._rows.arithmetic import shifted
from torch_ops._rules.log_sum_sq import about
from torch_ops._rules.statistics import below


def log_sum_sq(source: Curved, scale: float, *arrays: Any) -> Tensor:
    """L of each row of a source whose plan has no scale where it has no cap: that is `scale`."""
    return LogSumSq.apply(source, scale, *arrays)  # pyright: ignore[reportReturnType]


class LogSumSq(Function):
    """L of each row. Saves its inputs."""

    @staticmethod
    def forward(ctx: Any, source: Curved, scale: float, *arrays: Any) -> Tensor:
        ctx.source, ctx.scale = source, scale
        ctx.save_for_backward(*arrays)
        values = [_values(_rows(source, scale, part)[0], source)[0] for part in _parts(source, arrays)]
        return torch.cat(values) if len(values) > 1 else values[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs, found = ctx.needs_input_grad[2:], iter(())
        if any(needs):
            given: Any = LogSumSqBwd.apply(ctx.source, ctx.scale, needs, *ctx.saved_tensors, grads[0])
            found = iter(given)
        return None, None, *(next(found) if need else None for need in needs)


class LogSumSqBwd(Function):
    """Those needed of the arrays' gradients as a function of arrays and upstream: linear in it."""

    @staticmethod
    def forward(ctx: Any, source: Curved, scale: float, needs: Sequence[bool], *tensors: Any) -> tuple[Tensor, ...]:
        ctx.source, ctx.scale, ctx.needs = source, scale, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        parts = []
        for *arrays, up in _parts(source, tensors):
            arrays = [
                a if a is None else a.detach().requires_grad_(need) for a, need in zip(arrays, needs, strict=True)
            ]
            with torch.enable_grad():
                z = _rows(source, scale, arrays)[0]
            dz = up.unsqueeze(source.dim) * Slanted.apply(z.detach(), _values(z.detach(), source)[1], source)
            wrt: Any = [a for a, need in zip(arrays, needs, strict=True) if need]
            parts.append(torch.autograd.grad(z, wrt, dz))
        by_row = (row for row, need in zip(source.by_row, needs, strict=True) if need)
        return tuple(joined(v, row) for v, row in zip(zip(*parts, strict=True), by_row, strict=True))  # pyright: ignore

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        again, given = torch.is_grad_enabled(), iter(cotangents)
        along = [next(given) if need else None for need in ctx.needs]
        wanted, out = ctx.needs_input_grad[3:], [None] * len(ctx.saved_tensors)
        if any(v is not None for v in along) and any(wanted):

            def tangents(arrays: Sequence[Any], moved: Sequence[Any], _: Any) -> list[Tensor]:
                z, at = _rows(ctx.source, ctx.scale, arrays, moved)
                g: Any = Slanted.apply(z, _values(z.detach(), ctx.source)[1], ctx.source)
                return [summed((g * at.u).sum(ctx.source.dim), ctx.source.shard.group)]

            *arrays, up = ctx.saved_tensors
            out = second(ctx.source, arrays, along, [up], wanted, again, tangents)
        return None, None, None, *out


class Slanted(Function):
    """dL/dz of each row."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, c: Tensor, source: Curved) -> Tensor:
        ctx.source = source
        ctx.save_for_backward(z, c)
        a, f = about(z, c)
        sums = torch.stack([v.sum(source.dim, keepdim=True) for v in (a, a * f)])
        total, over = summed(sums, source.shard.group).unbind()
        return 2.0 * a * (f * total - over) / (total * (total + over))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (z, c), (v,) = ctx.saved_tensors, cotangents
        dim, group = ctx.source.dim, ctx.source.shard.group
        twice = 2.0 * (z - c)  # a doubled logit would overflow
        found: list[Any] = []
        for x in (twice, z):
            whole = whole_of(x, dim, group)
            found.append(Tilted.apply(v, Softmax.apply(x, whole)[0], whole))  # pyright: ignore[reportOptionalSubscript]
        return 4.0 * found[0] - 2.0 * found[1], None, None


def _parts(source: Curved, tensors: Sequence[Any]) -> list[list[Any]]:
    """The arrays, and numbers of the rows behind them, by the source's pieces."""
    pieces = source.pieces(*tensors)
    by_row = (*source.by_row, *[True] * (len(tensors) - len(source.by_row)))
    return [[cut(v, row, piece, len(pieces)) for v, row in zip(tensors, by_row, strict=True)] for piece in pieces]


def _rows(
    source: Curved, scale: float, arrays: Sequence[Any], along: Sequence[Any] | None = None
) -> tuple[Tensor, Directed]:
    """The logits, scaled and capped, and their direction."""
    at = source.directed(arrays, [None] * len(arrays) if along is None else along)
    if source.plan.softcap is not None:
        return at.z, at
    top = maximum(largest_of(at.z.detach(), source.dim), source.shard.group)
    return scale * below(at.z, top), at._replace(u=None if at.u is None else scale * at.u)


def _values(z: Tensor, source: Curved) -> tuple[Tensor, Tensor]:
    """(L, c), c beside the logits."""
    dim, group = source.dim, source.shard.group
    m = maximum(largest_of(z, dim), group)
    e, top = shifted(z, m.masked_fill(~m.isfinite(), 0.0))[1], torch.zeros_like(z, dtype=torch.bool)
    held = z == m
    if z.shape[dim]:
        top = top.scatter(dim, z.argmax(dim, keepdim=True), True) & held
    others = e.masked_fill(top, 0.0)
    parts = [v.sum(dim, keepdim=True) for v in (others, others.square(), top.to(e.dtype))]
    rest, rest_sq, holders = summed(torch.stack(parts), group).unbind()
    log, log_sq = torch.log1p(rest + (holders - 1.0)), torch.log1p(rest_sq + (holders - 1.0))
    value = (log_sq - 2.0 * log).masked_fill(~m.isfinite(), math.nan)
    return value.squeeze(dim), m + (log_sq - log)
