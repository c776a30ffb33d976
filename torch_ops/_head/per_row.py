"""The linear head as autograd.Functions: first derivatives by hand-written loops, all others by chunks of rows.

legend:  z = X WT + b (N, V), never whole; G = dL/dz, from the row functions; of low rank rows (x, u), z has u upT too
formula: dX = G W,  dW = GT X,  db = sum_i G_i,  d_up = GT U
source:  document 3's chain rule dE/dw = dE/da da/dz dz/dw, document 4's G; docs/derivation.md
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torch_ops._head import ops
from torch_ops._head.chunks import that_fit
from torch_ops._head.row_map import DERIVED, RowMap, batched, pulled_back, pushed_forward, run
from torch_ops._modes import is_constant, may_write
from torch_ops._rows import dispatch as rows
from torch_ops._rules.cross_entropy import row
from torch_ops._rules.function import forward_rule, in_graph
from torch_ops._rules.kept import given_back, kept
from torch_ops._rules.plan import Plan


def derived_size(plan: Plan, x: Tensor, linear_weight: Tensor) -> int:
    """Rows in a chunk where a derivative is derived in plain ops."""
    n, v = x.shape[0], linear_weight.shape[0]
    if plan.chunk_size is None:
        return that_fit(None, v * DERIVED, x.itemsize)
    return max(1, n * plan.chunk_size // max(1, v)) if plan.lean else plan.chunk_size


def as_row_map(plan: Plan) -> RowMap:
    """(x, linear_weight, linear_bias, up, target, weight) -> (nll, lse, [smooth], [entropy], m, rest, [argmax])."""
    scale, softcap, smooth, entropy, argmax, *_ = plan

    def call(x: Tensor, lw: Tensor, lb: Any, up: Any, target: Tensor, w: Tensor | None) -> tuple[Tensor, ...]:
        if not target.is_floating_point():  # an ignored row reaches no result, not even through 0 * NaN
            x = x.masked_fill((rows.of_rows(target, 2, 1) == rows.IGNORED).unsqueeze(1), 0.0)
        z = logits(x, lw, lb, up)
        out = row(z, target, w, 1, scale, softcap, smooth, entropy, False)
        return (*out, rows.capped(z.detach(), scale, softcap).argmax(1)) if argmax else out

    return RowMap(call, (True, False, False, False, True, False), (True,) * (plan.values + 2 + argmax))


def logits(x: Tensor, lw: Tensor, lb: Tensor | None, up: Tensor | None) -> Tensor:
    """All of some rows, in plain functional ops."""
    if up is None:
        return F.linear(x, lw, lb)
    return F.linear(x[:, : lw.shape[1]], lw, lb) + F.linear(x[:, lw.shape[1] :], up)


@in_graph
def per_row(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    up: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    *plan: Any,
) -> tuple[Tensor, ...]:
    """(nll, lse, [smooth], [entropy], m, rest, [argmax]) of each row."""
    arrays = (x, linear_weight, linear_bias, up, target, weight)
    if is_constant(*arrays):
        return _rows_fwd(*arrays, Plan(*plan))
    return LinearRows.apply(*arrays, Plan(*plan))  # pyright: ignore[reportReturnType]


class LinearRows(Function):
    """(nll, lse, [smooth], [entropy], m, rest, [argmax]) of each row. Saves its inputs and some row numbers."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _rows_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *arrays, ctx.plan = inputs
        m, rest = output[ctx.plan.values : ctx.plan.values + 2]
        h = output[ctx.plan.values - 1] if ctx.plan.entropy else None
        ctx.mark_non_differentiable(*output[ctx.plan.values :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, m, kept(ctx, rest), None if h is None else h.detach())
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ups = ctx.plan.upstream(grads)
        needs = tuple(ctx.needs_input_grad[:6])
        out: list[Tensor | None] = [None] * 7
        if any(u is not None for u in ups):
            *arrays, m, rest, h = ctx.saved_tensors
            found: Any = LinearBwd.apply(*arrays, m, given_back(ctx, rest), h, *ups, ctx.plan, needs)
            for i, g in zip((i for i in range(6) if needs[i]), found, strict=True):
                out[i] = g
        return tuple(out)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        plan, along = ctx.plan, range(ctx.plan.values)
        size = derived_size(plan, *saved[:2])
        out = pushed_forward(as_row_map(plan), size, saved, tangents[:6], along)
        return *out, None, None, *[None] * plan.argmax

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, lw: Any, lb: Any, up: Any, target: Any, w: Any, plan: Plan) -> Any:
        if all(in_dims[i] is None for i in (1, 2, 3, 5)):  # one head: examples are rows
            x, target = (
                a.expand(info.batch_size, *a.shape) if at is None else a.movedim(at, 0)
                for a, at in ((x, in_dims[0]), (target, in_dims[4]))
            )
            out = LinearRows.apply(x.flatten(0, 1), lw, lb, up, target.flatten(0, 1), w, plan)
            out = tuple(v.unflatten(0, x.shape[:2]) for v in out)  # pyright: ignore[reportGeneralTypeIssues]
            return out, (0,) * len(out)
        args = (x, lw, lb, up, target, w)
        return batched(info, in_dims[:6], as_row_map(plan), _size_of_one(plan, args, in_dims), args)


class LinearBwd(Function):
    """Those needed of (dX, dW, db, d_up, d_target, d_weight) as a function of everything: linear in the upstreams."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _rows_bwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *arrays, ctx.plan, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        fn, size, args, places = _as_map(ctx.saved_tensors, ctx.plan, ctx.needs)
        out: list[Tensor | None] = [None] * 15
        found = pulled_back(fn, size, args, cotangents, [ctx.needs_input_grad[i] for i in places])
        for i, g in zip(places, found, strict=True):
            out[i] = g
        return tuple(out)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        fn, size, args, places = _as_map(saved, ctx.plan, ctx.needs)
        return pushed_forward(fn, size, args, [tangents[i] for i in places], range(len(fn.out_rows)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, plan, needs = args
        fn, _, given, places = _as_map(arrays, plan, needs)
        size = _size_of_one(plan, arrays, in_dims)
        return batched(info, [in_dims[i] for i in places], fn, size, given)


def _as_map(arrays: Any, plan: Plan, needs: tuple[bool, ...]) -> tuple[RowMap, int, list[Any], list[int]]:
    """(the gradient as a row map, its chunk, its arguments, their places among LinearBwd's)."""
    ups = [i for i, u in enumerate(arrays[9:13]) if u is not None]
    # Results exist without gaps: smooth and entropy stand where the plan has them.
    names = [0, 1, *[2] * plan.smooth, *[3] * plan.entropy]
    wrt = [i for i, need in enumerate(needs) if need]
    fn = as_row_map(plan).pullback(wrt, [names.index(i) for i in ups])
    places = [*range(6), *(9 + i for i in ups)]
    return fn, derived_size(plan, *arrays[:2]), [arrays[i] for i in places], places


def _size_of_one(plan: Plan, arrays: Any, in_dims: Any) -> int:
    """The chunk of one example."""
    x, lw = (a if at is None else a.select(at, 0) for a, at in zip(arrays[:2], in_dims[:2], strict=True))
    return derived_size(plan, x, lw)


def _rows_fwd(*args: Any) -> Any:
    *arrays, plan = args
    if may_write(*arrays):
        return tuple(ops.fwd(arrays, plan))
    return run(as_row_map(plan), that_fit(None, arrays[1].shape[0], arrays[0].itemsize), *arrays)


def _rows_bwd(*args: Any) -> Any:
    *arrays, plan, needs = args
    if may_write(*arrays):
        return tuple(ops.bwd(arrays, needs, plan))
    fn, size, given, _ = _as_map(arrays, plan, needs)
    return run(fn, size, *given)
