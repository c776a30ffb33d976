"""The head's exact rows with a sampled gradient: one matmul, then K classes a row.

legend:  S a row's targets, q its mass off S, r_j = p_j / q there (sums to 1), A all that multiplies p_j,
         a_j the upstream mass at class j, K points j_k stratified on the cumulative sum of r
formula: dz_j = A p_j - a_j; on S exact, as (A - a_j) p_j - a_j q_j: nothing cancels; off S  A q r^_j  with
         r^ = 1/K sum_k e_(j_k), so E[r^] = r and its sum is 1: a row's sum is that of the exact gradient
         -d_entropy p_j (log p_j + H) is taken on S and at the same points; -d_smooth w_j is an outer product
source:  Bengio and Senecal 2003; stratified points: Gerber, Chopin and Whiteley 2019
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from softmax_ext import contract
from torch_ops import _modes as modes
from torch_ops._head.chunks import join
from torch_ops._head.draws import uniform
from torch_ops._head.fast import Buffer, rows_that_fit
from torch_ops._head.linear import Linear, first_maximum, formed_in
from torch_ops._head.per_row import as_row_map, derived_size
from torch_ops._head.row_map import pushed_forward
from torch_ops._head.smoothed import Ranks, smoothed
from torch_ops._rows import dispatch as rows
from torch_ops._rows.picked import picked_fwd, picked_input_bwd, picked_weight_bwd
from torch_ops._rows.points import points
from torch_ops._rows.sparse import by_class
from torch_ops._rules.function import forward_rule, in_graph
from torch_ops._rules.plan import Plan

# Bytes of a chunk's logits in half precision on a CPU, where no dW is read and written once a chunk: 2048x576@49152 in
# bfloat16 takes 265 ms in one chunk, whose fresh pages cost more than its rows, 222 in four; float32 is slower in four.
HALVES = 1 << 26


class Shard(Ranks, Protocol):
    """The classes of one rank, where a head's lie on several: m, rest, q and points are then of whole rows."""

    chunk_size: int | None

    def chunk(self, z: Tensor, target: Tensor, weight: Tensor | None, u: Tensor) -> list[Tensor]:
        """_chunk of whole rows; ids of this rank's classes, IGNORED where a point is another's."""
        ...

    def over_ranks(self, own: Tensor) -> Tensor:
        """The ranks' sum."""
        ...


def sampled_rows(samples: int, generator: torch.Generator | None, x: Tensor, *args: Any) -> Any:
    """per_row's results, their gradient sampled at K points a row, which are drawn here."""
    u = uniform(x.shape[0], samples, device=x.device, generator=generator)
    lw, lb, _, target, weight, *plan = args
    return sampled(x, lw, lb, target, weight, u, *plan)[:-2]


@in_graph
def sampled(
    x: Tensor, lw: Tensor, lb: Tensor | None, target: Tensor, weight: Tensor | None, u: Tensor, *plan: Any
) -> tuple[Tensor, ...]:
    return Sampled.apply(x, lw, lb, target, weight, u, Plan(*plan), None)  # pyright: ignore[reportReturnType]


class Sampled(Function):
    """(nll, lse, [smooth], [entropy], m, rest, [argmax], ids, q) of each row. Saves its inputs and row numbers."""

    @staticmethod
    def forward(x: Any, lw: Any, lb: Any, target: Any, weight: Any, u: Any, *more: Any) -> tuple[Tensor, ...]:
        return _forward(x, Linear(lw, lb), target, weight, u, *more)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, lw, lb, target, weight, _, ctx.plan, ctx.shard = inputs
        values, (ids, q) = output[: ctx.plan.values], output[-2:]
        h = values[-1].detach() if ctx.plan.entropy else None
        ctx.mark_non_differentiable(*output[ctx.plan.values :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, lw, lb, target, weight, values[0].detach(), values[1].detach(), h, ids, q)
        ctx.save_for_forward(x, lw, lb, target, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ups, needs = ctx.plan.upstream(grads[: ctx.plan.values]), tuple(ctx.needs_input_grad[:3])
        out: list[Any] = [None] * 8
        if any(u is not None for u in ups) and any(needs):
            found: Any = SampledBwd.apply(*ctx.saved_tensors, *ups, ctx.plan, needs, ctx.shard)
            for i, g in zip((i for i in range(3) if needs[i]), found, strict=True):
                out[i] = g
        return tuple(out)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Any, dw: Any, db: Any, *_: Any) -> Any:
        plan = ctx.plan
        size, given = derived_size(plan, *saved[:2]), (*saved[:3], None, *saved[3:])
        out = pushed_forward(as_row_map(plan), size, given, (dx, dw, db, None, None, None), range(plan.values))
        return *out, None, None, *[None] * plan.argmax, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, plan, shard = args
        if all(in_dims[i] is None for i in (1, 2, 4)):  # one head: examples are rows
            x, target, u = (
                a.expand(info.batch_size, *a.shape) if at is None else a.movedim(at, 0)
                for a, at in ((arrays[i], in_dims[i]) for i in (0, 3, 5))
            )
            flat = (x.flatten(0, 1), *arrays[1:3], target.flatten(0, 1), arrays[4], u.flatten(0, 1))
            out: Any = Sampled.apply(*flat, plan, shard)
            return tuple(v.unflatten(0, x.shape[:2]) for v in out), (0,) * len(out)
        each: list[Any] = [Sampled.apply(*_select(arrays, in_dims, i), plan, shard) for i in range(info.batch_size)]
        return tuple(torch.stack(v) for v in zip(*each, strict=True)), (0,) * len(each[0])


class SampledBwd(Function):
    """Those needed of (dX, dW, db): linear in the upstreams, and of no derivative beyond."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise contract.second_derivative_of_samples("linear_cross_entropy")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise contract.second_derivative_of_samples("linear_cross_entropy")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, plan, needs, shard = args
        each: list[Any] = [
            SampledBwd.apply(*_select(arrays, in_dims, i), plan, needs, shard) for i in range(info.batch_size)
        ]
        return tuple(torch.stack(v) for v in zip(*each, strict=True)), (0,) * len(each[0])


def _select(arrays: Any, in_dims: Any, i: int) -> Iterator[Any]:
    """The arrays of one example."""
    return (a if at is None else a.select(at, i) for a, at in zip(arrays, in_dims, strict=False))


def _forward(
    x: Tensor, head: Linear, target: Tensor, weight: Tensor | None, u: Tensor, plan: Plan, shard: Shard | None
) -> tuple[Tensor, ...]:
    size = plan.chunk_size if shard is None else shard.chunk_size
    kind = formed_in(x, target)
    if size is None and kind.itemsize < 4 and x.device.type == "cpu":
        size = min(rows_that_fit(x, head.classes, kind, None), max(1, HALVES // max(1, 2 * head.classes)))
    buffer, parts = Buffer(x, head, target, size), []
    for i, j in buffer.spans:
        z = head.logits(x[i:j], buffer.rows(j - i))
        given = z, target[i:j], weight, u[i:j]
        parts.append(_chunk(*given, plan) if shard is None else shard.chunk(*given))
    return tuple(join(parts))


def _chunk(z: Tensor, target: Tensor, weight: Tensor | None, u: Tensor, plan: Plan) -> list[Tensor]:
    """A chunk's [nll, lse, [smooth], [entropy], m, rest, [argmax], ids, q]."""
    values = [*rows.cross_entropy_fwd(z, target, weight, **plan.wanted)]
    m, rest = values[-2:]
    found = points(z, m, rest, target.reshape(z.shape[0], -1), u, scale=plan.scale, softcap=plan.softcap)
    if plan.argmax:
        values.append(first_maximum(z, plan.scale, plan.softcap)[1])
    return [*values, *found]


def _backward(
    x: Tensor,
    lw: Tensor,
    lb: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    nll: Tensor,
    lse: Tensor,
    h: Tensor | None,
    ids: Tensor,
    q: Tensor,
    *more: Any,
) -> tuple[Tensor, ...]:
    d_nll, d_lse, d_smooth, d_entropy, plan, needs, shard = more
    n, samples = ids.shape
    targets, nll = target.reshape(n, -1), nll.reshape(n, -1)
    kept = rows.of_rows(targets, 2, 1) != rows.IGNORED
    d_nll = torch.zeros_like(nll) if d_nll is None else d_nll.reshape(n, -1).masked_fill(targets < 0, 0.0)
    a = torch.zeros_like(q) if d_lse is None else d_lse
    w, beside = None, [targets[:, :0], a.unsqueeze(1)[:, :0]]  # ids and entries
    if d_smooth is not None:
        if weight is None:
            w = lse.new_ones(lw.shape[0])
            added = d_smooth * (w.sum() if shard is None else shard.over_ranks(w.sum()))
        else:
            d_nll, added, w, *beside = smoothed(targets, d_nll, d_smooth, weight, shard)
        a, d_smooth = a + added, (d_smooth * plan.scale).masked_fill(~kept, 0.0)
    invalid = rows.of_rows(targets, 2, 1) == rows.INVALID
    at, on, surprise = _on_targets(targets, nll, d_nll, a, q)
    off = ((d_nll.sum(1) + a) * (q / samples)).unsqueeze(1)
    ids = torch.cat([ids, (at if shard is None else shard.here(at)).to(torch.int32), beside[0].to(torch.int32)], 1)
    if d_entropy is not None or plan.softcap is not None:
        raw = _logits_at(x, lw, lb, ids)
        if d_entropy is not None and h is not None:
            log_p = rows.capped(raw[:, :samples], plan.scale, plan.softcap) - lse.unsqueeze(1)
            c = -d_entropy.unsqueeze(1)
            off = off + c * (q / samples).unsqueeze(1) * (log_p + h.unsqueeze(1))
            shown = nll.masked_fill((at < 0) | (nll == torch.inf), 0.0)  # there p is 0
            on = on + c * surprise * (h.unsqueeze(1) - shown.clamp(min=0.0))
        slope = rows.slope(raw, plan.scale, plan.softcap)
        c = torch.cat([off.expand(n, samples), on, beside[1]], 1) * slope
    else:
        c = torch.cat([off, on, beside[1]], 1) * plan.scale
    c = c.masked_fill(invalid.unsqueeze(1), torch.nan).masked_fill(~kept.unsqueeze(1), 0.0)
    return _products(x, lw, lb, ids, c, w, d_smooth, kept, needs, shard)


def _on_targets(targets: Tensor, nll: Tensor, d_nll: Tensor, a: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(each class of S once, its exact dz without entropy's part, its p), (n, E); elsewhere IGNORED, 0, 0."""
    if targets.shape[1] == 1:
        p = torch.exp(-nll).masked_fill((nll < 0) | (targets < 0), 0.0)
        dz = a.unsqueeze(1) * p - d_nll * q.unsqueeze(1)
        return targets.clamp(min=rows.IGNORED), dz.masked_fill(targets < 0, 0.0), p
    own, others, first = by_class(targets, d_nll)
    p = torch.exp(-nll).masked_fill((nll < 0) | ~first, 0.0)
    dz = (others + a.unsqueeze(1)) * p - own * (q.unsqueeze(1) + by_class(targets, p)[1])
    return targets.masked_fill(~first, rows.IGNORED), dz.to(p.dtype).masked_fill(~first, 0.0), p


def _logits_at(x: Tensor, lw: Tensor, lb: Tensor | None, ids: Tensor) -> Tensor:
    z = picked_fwd(x, lw, ids)
    return z if lb is None else z + picked_fwd(x.new_ones(x.shape[0], 1), lb.unsqueeze(1), ids)


def _products(
    x: Tensor,
    lw: Tensor,
    lb: Tensor | None,
    ids: Tensor,
    c: Tensor,
    w: Tensor | None,
    d_smooth: Tensor | None,
    kept: Tensor,
    needs: Any,
    shard: Shard | None,
) -> tuple[Tensor, ...]:
    """dX, dW and db, those needed, of dz_i = sum_k c_ik e_(id_ik) - d_smooth_i w."""
    out, classes = [], lw.shape[0]
    by_row = by_class = to_x = to_w = to_b = None
    # A row that is NaN makes a NaN of every class.
    poison = torch.where(c.isnan().any(), torch.nan, 0.0).to(c.dtype)
    if w is not None and d_smooth is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        by_row, to_x = -d_smooth, torch.mv(lw.t().to(wide), w)
        by_class = w
        to_w = -torch.mv(x.masked_fill(~kept.unsqueeze(1), 0.0).t().to(wide), d_smooth) + poison
        to_b = (-d_smooth.sum() + poison).reshape(1)
    elif not modes.can_look(c) or poison.isnan():
        by_class = c.new_ones(classes)
        to_w, to_b = poison.expand(x.shape[1]).contiguous(), poison.reshape(1)
    if needs[0]:
        dx = picked_input_bwd(c, lw, ids, by=by_row, of_all=to_x, wide=shard is not None)
        out.append(dx if shard is None else shard.over_ranks(dx).to(x.dtype))
    x = x.masked_fill(~kept.unsqueeze(1), 0.0) if not modes.can_look(kept) or not kept.all() else x
    if needs[1]:
        out.append(picked_weight_bwd(c, x, ids, classes, by=by_class, of_all=to_w))
    if needs[2] and lb is not None:
        ones = x.new_ones(x.shape[0], 1)
        out.append(picked_weight_bwd(c, ones, ids, classes, by=by_class, of_all=to_b).squeeze(1))
    return tuple(out)
