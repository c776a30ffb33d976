"""Two linear heads and the divergence between their rows, by chunks of rows: no array of all logits of either.

legend:  s = X WT + b, t = Y UT + c (N, V), never whole; G = dL/ds from the row functions, a the rows' upstream
formula: dX = G W,  dW = GT X,  db = sum_i G_i; the teacher's Y, U, c are constants
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torch_ops._head.chunks import join, spans, that_fit
from torch_ops._head.linear import Gradients, Linear, formed_in
from torch_ops._head.rounding import levelled, scaled
from torch_ops._head.row_map import DERIVED, RowMap, batched, pulled_back, pushed_forward, run
from torch_ops._modes import is_constant, is_traced, is_transforming, may_write
from torch_ops._rows.divergence import Pair, divergence_fwd, divergence_fwd_bwd
from torch_ops._rules.divergence import divergence_row
from torch_ops._rules.function import forward_rule, in_graph


class Plan(NamedTuple):
    """The static part of two heads' rows."""

    pair: Pair
    chunk_size: int | None


@in_graph
def divergence_rows(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    chunk_size: int | None,
    *pair: Any,
) -> Tensor:
    """The divergence of each row."""
    arrays = (x, linear_weight, linear_bias, teacher_x, teacher_weight, teacher_bias, keep)
    plan = Plan(Pair(*pair), chunk_size)
    if is_constant(*arrays):
        return _fwd(*arrays, plan)
    return LinearDivergence.apply(*arrays, plan)  # pyright: ignore[reportReturnType]


@in_graph
def divergence_sum(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    a: Tensor,
    chunk_size: int | None,
    *pair: Any,
) -> Tensor:
    """sum_i a_i divergence_i, the gradients of the student's head formed in the forward pass where they are wanted."""
    arrays = (x, linear_weight, linear_bias, teacher_x, teacher_weight, teacher_bias, keep)
    wanted = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in arrays[:3])
    if wanted and not is_transforming() and not is_traced() and may_write(*arrays, a):
        return LinearDivergenceSum.apply(*arrays, a, Plan(Pair(*pair), chunk_size))  # pyright: ignore[reportReturnType]
    return (a * divergence_rows(*arrays, chunk_size, *pair)).sum()


class LinearDivergence(Function):
    """The divergence of each row. Saves its inputs only."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *arrays, ctx.plan = inputs
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs, out = tuple(ctx.needs_input_grad[:3]), [None] * 8
        found: Any = LinearDivergenceBwd.apply(*ctx.saved_tensors, grads[0], ctx.plan, needs)
        for i, g in zip((i for i in range(3) if needs[i]), found, strict=True):
            out[i] = g
        return tuple(out)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        return pushed_forward(_row_map(ctx.plan), _derived_size(ctx.plan, *saved[:2]), saved, tangents[:7], [0])[0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, plan = args
        size = _size_of_one(plan, arrays, in_dims)
        out, dims = batched(info, in_dims[:7], _row_map(plan), size, arrays)
        return out[0], dims[0]


class LinearDivergenceBwd(Function):
    """Those needed of (dX, dW, db) as a function of everything: linear in the upstream gradient."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *arrays, up, plan, needs = args
        if may_write(*arrays, up) and not is_traced():
            return tuple(g for g in _fwd_bwd(arrays, up, needs, plan)[1] if g is not None)
        fn, size, given = _as_map((*arrays, up), plan, needs)
        return run(fn, size, *given)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *arrays, ctx.plan, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        fn, size, args = _as_map(ctx.saved_tensors, ctx.plan, ctx.needs)
        return *pulled_back(fn, size, args, cotangents, ctx.needs_input_grad[:8]), None, None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        fn, size, args = _as_map(saved, ctx.plan, ctx.needs)
        return pushed_forward(fn, size, args, tangents[:8], range(len(fn.out_rows)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, plan, needs = args
        fn, _, given = _as_map(arrays, plan, needs)
        return batched(info, in_dims[:8], fn, _size_of_one(plan, arrays, in_dims), given)


class LinearDivergenceSum(Function):
    """divergence_sum with its gradients formed in the forward pass: four matmuls, and G in the logits' memory.

    Saves dX, dW (unrounded) and db beside its inputs; the backward pass scales them.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *arrays, a, plan = args
        needs = tuple(x is not None and x.requires_grad for x in arrays[:3])
        values, grads = _fwd_bwd(arrays, a, needs, plan, rounded=False)
        ctx.plan = plan
        ctx.save_for_backward(*arrays, a, *grads, values)
        return (a * values).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (g,) = upstream
        *arrays, a, dx, dw, db, values = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated: once more, as a function of everything
            # Under names of its own, as in LinearSum.
            moving: Any = [v if v is None else v.view_as(v) for v in (*arrays[:3], a)]
            wrt = [v for v in moving if v is not None and v.requires_grad]
            plan = ctx.plan
            rows = divergence_rows(*moving[:3], *arrays[3:], plan.chunk_size, *plan.pair)
            found = iter(torch.autograd.grad((moving[3] * rows).sum(), wrt, g, create_graph=True))
            grads = [next(found) if v is not None and v.requires_grad else None for v in moving]
            return *grads[:3], None, None, None, None, grads[3], None
        given = zip((dx, dw, db), arrays[:3], strict=True)
        d_x, d_w, d_b = (d if d is None else scaled(d, g, like.dtype) for d, like in given)
        return d_x, d_w, d_b, None, None, None, None, g * values if ctx.needs_input_grad[7] else None, None


def _row_map(plan: Plan) -> RowMap:
    """(x, linear_weight, linear_bias, teacher's three, keep) -> the divergence."""

    def call(x: Any, lw: Any, lb: Any, tx: Any, tw: Any, tb: Any, keep: Any) -> tuple[Tensor]:
        if keep is not None:  # such a row reaches no result, not even through 0 * NaN
            x, tx = (v.masked_fill(~keep.unsqueeze(1), 0.0) for v in (x, tx))
        student, teacher = F.linear(x, lw, lb), F.linear(tx, tw, tb)
        kind = torch.promote_types(student.dtype, teacher.dtype)
        return (divergence_row(student.to(kind), teacher.to(kind), keep, *plan.pair),)

    return RowMap(call, (True, False, False, True, False, False, True), (True,))


def _as_map(arrays: Any, plan: Plan, needs: tuple[bool, ...]) -> tuple[RowMap, int, Any]:
    """(the gradient as a row map, its chunk, its arguments)."""
    wrt = [i for i, need in enumerate(needs) if need]
    return _row_map(plan).pullback(wrt, [0]), _derived_size(plan, *arrays[:2]), arrays


def _derived_size(plan: Plan, x: Tensor, linear_weight: Tensor) -> int:
    """Rows in a chunk where a derivative is derived in plain ops."""
    return that_fit(plan.chunk_size, 2 * linear_weight.shape[0] * DERIVED, x.itemsize)


def _size_of_one(plan: Plan, arrays: Any, in_dims: Any) -> int:
    """The chunk of one example."""
    x, lw = (a if at is None else a.select(at, 0) for a, at in zip(arrays[:2], in_dims[:2], strict=True))
    return _derived_size(plan, x, lw)


class _Chunks:
    """Both heads' logits of a chunk of rows, in memory that every chunk writes over."""

    def __init__(self, arrays: Any, plan: Plan) -> None:
        x, lw, lb, tx, tw, tb, self.keep = arrays
        whole = x.new_zeros(0, dtype=torch.int64)
        self.kind = torch.promote_types(formed_in(x, whole), formed_in(tx, whole))
        self.rows, self.heads = (x, tx), (Linear(lw, lb), Linear(tw, tb))
        self.spans = spans(x.shape[0], that_fit(plan.chunk_size, 2 * lw.shape[0], self.kind.itemsize, 0, x.device))
        self.data = x.new_empty(2, max(j - i for i, j in self.spans), lw.shape[0], dtype=self.kind)

    def __iter__(self) -> Any:
        """(begin, end, the student's rows, its logits, the teacher's logits, keep)."""
        for i, j in self.spans:
            kept = None if self.keep is None else self.keep[i:j]
            rows = [x[i:j].to(self.kind) for x in self.rows]
            if kept is not None:  # 0 * NaN would reach dW
                rows = [x.masked_fill(~kept.unsqueeze(1), 0.0) for x in rows]
            logits = (h.logits(x, out[: j - i]) for h, x, out in zip(self.heads, rows, self.data, strict=True))
            yield i, j, rows[0], *logits, kept


def _fwd(*args: Any) -> Tensor:
    *arrays, plan = args
    if not may_write(*arrays) or is_traced():
        size = that_fit(plan.chunk_size, 2 * arrays[1].shape[0], arrays[0].itemsize)
        return run(_row_map(plan), size, *arrays)[0]
    parts = [[divergence_fwd(s, t, keep, pair=plan.pair)[0]] for *_, s, t, keep in _Chunks(arrays, plan)]
    return join(parts)[0]


def _fwd_bwd(
    arrays: Any, up: Tensor, needs: tuple[bool, ...], plan: Plan, *, rounded: bool = True
) -> tuple[Tensor, list[Tensor | None]]:
    """(the divergences, [dX, dW, db] from the rows' upstream gradients, as they were summed or rounded)."""
    x, lw = arrays[:2]
    chunks = _Chunks(arrays, plan)
    # a factor of 1/N would flush most of G to 0 in float16
    whole = x.new_zeros(0, dtype=torch.int64)
    peak, (up, *_) = levelled((x, lw, None, None, whole, None), [up, None, None, None])
    dx = torch.empty_like(x, dtype=chunks.kind, memory_format=torch.contiguous_format) if needs[0] else None
    head, summed = chunks.heads[0], len(chunks.spans) > 1 or chunks.kind != x.dtype
    grads, parts = Gradients(head, dx, head.gradient(needs[1], needs[2], False, summed=summed), None), []
    for i, j, xi, s, t, keep in chunks:
        parts.append([divergence_fwd_bwd(s, t, keep, up[i:j].contiguous(), pair=plan.pair)])
        grads.add(s, xi, i, j)
    found = grads.unrounded()[:3]
    if rounded:
        found = [g if g is None else scaled(g, peak, x.dtype) for g in found]
    elif peak is not None:
        found = [g if g is None else scaled(g, peak, peak.dtype) for g in found]
    return join(parts)[0], found
