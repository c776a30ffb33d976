"""Two linear heads and the divergence between their rows as autograd.Functions: no array of all logits of either.

The loops are those of two_heads.py, one node where somebody looks on (compilers, selective checkpoints). In exported
programs, mapped, and for derivatives of derivatives the same rows are computed by chunks in plain functional ops, whose
derivatives are derived likewise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torch_ops._head import two_heads_ops as ops
from torch_ops._head.chunks import that_fit
from torch_ops._head.rounding import scaled
from torch_ops._head.row_map import DERIVED, RowMap, batched, pulled_back, pushed_forward, run
from torch_ops._head.two_heads import Plan
from torch_ops._modes import is_constant, is_transforming, may_write
from torch_ops._rows.divergence import Pair
from torch_ops._rules.divergence import divergence_row
from torch_ops._rules.function import forward_rule, in_graph


@in_graph
def divergence_rows(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    lean: bool,
    chunk_size: int | None,
    *pair: Any,
) -> Tensor:
    """The divergence of each row."""
    arrays = (x, linear_weight, linear_bias, teacher_x, teacher_weight, teacher_bias, keep)
    plan = Plan(Pair(*pair), lean, chunk_size)
    if is_constant(*arrays):
        return _fwd(*arrays, plan)[0]
    return LinearDivergence.apply(*arrays, plan)[0]  # pyright: ignore


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
    if one_pass(*arrays, a):
        return LinearDivergenceSum.apply(*arrays, a, Plan(Pair(*pair), False, chunk_size), None)  # pyright: ignore
    return (a * divergence_rows(*arrays, False, chunk_size, *pair)).sum()


def one_pass(*arrays: Any) -> bool:
    """Whether a first derivative of the student's head is wanted that the forward pass can form."""
    wanted = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in arrays[:3])
    return wanted and not is_transforming() and may_write(*arrays)


class LinearDivergence(Function):
    """(divergence, state) of each row. Saves its inputs and the state, which plain ops do without (no numbers)."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *arrays, ctx.plan = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, output[1])
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs, out = tuple(ctx.needs_input_grad[:3]), [None] * 8
        if grads[0] is None:
            return tuple(out)
        found: Any = LinearDivergenceBwd.apply(*ctx.saved_tensors, grads[0], ctx.plan, needs)
        for i, g in zip((i for i in range(3) if needs[i]), found, strict=True):
            out[i] = g
        return tuple(out)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        fn, size = _row_map(ctx.plan), _derived_size(ctx.plan, *saved[:2])
        return pushed_forward(fn, size, saved, tangents[:7], [0])[0], None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, plan = args
        size = _size_of_one(plan, arrays, in_dims)
        (value,), (dim,) = batched(info, in_dims[:7], _row_map(plan), size, arrays)
        return (value, _no_state(value)), (dim, dim)


class LinearDivergenceBwd(Function):
    """Those needed of (dX, dW, db) as a function of everything: linear in the upstream gradient."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *arrays, state, up, plan, needs = args
        if may_write(*arrays, state, up) and state.shape[-1]:
            return tuple(ops.bwd(arrays, state, up, needs, plan))
        fn, size, given = _as_map((*arrays, up), plan, needs)
        return run(fn, size, *given)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *arrays, _, up, ctx.plan, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, up)
        ctx.save_for_forward(*arrays, up)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        fn, size, args = _as_map(ctx.saved_tensors, ctx.plan, ctx.needs)
        wanted = (*ctx.needs_input_grad[:7], ctx.needs_input_grad[8])
        *of_arrays, of_up = pulled_back(fn, size, args, cotangents, wanted)
        return *of_arrays, None, of_up, None, None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        fn, size, args = _as_map(saved, ctx.plan, ctx.needs)
        return pushed_forward(fn, size, args, (*tangents[:7], tangents[8]), range(len(fn.out_rows)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, _, up, plan, needs = args
        fn, _, given = _as_map((*arrays, up), plan, needs)
        return batched(info, (*in_dims[:7], in_dims[8]), fn, _size_of_one(plan, arrays, in_dims), given)


class LinearDivergenceSum(Function):
    """divergence_sum with its gradients formed in the forward pass: four matmuls, and G in the logits' memory.

    A shard of the classes has its own `rows` and `forward_backward` in the place of divergence_rows and the loop.
    Saves dX, dW (unrounded) and db beside its inputs; the backward pass scales them.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *arrays, a, plan, shard = args
        needs = tuple(x is not None and x.requires_grad for x in arrays[:3])
        found = ops.fwd_bwd if shard is None else shard.forward_backward
        values, grads = found(arrays, a, needs, plan)
        ctx.plan, ctx.shard = plan, shard
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
            pair, *how = ctx.plan
            of_rows = divergence_rows if ctx.shard is None else ctx.shard.rows
            rows = of_rows(*moving[:3], *arrays[3:], *how, *pair)
            found = iter(torch.autograd.grad((moving[3] * rows).sum(), wrt, g, create_graph=True))
            grads = [next(found) if v is not None and v.requires_grad else None for v in moving]
            return *grads[:3], None, None, None, None, grads[3], None, None
        given = zip((dx, dw, db), arrays[:3], strict=True)
        d_x, d_w, d_b = (d if d is None else scaled(d, g, like.dtype) for d, like in given)
        return d_x, d_w, d_b, None, None, None, None, g * values if ctx.needs_input_grad[7] else None, None, None


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
    return that_fit(None if plan.lean else plan.chunk_size, 2 * linear_weight.shape[0] * DERIVED, x.itemsize)


def _size_of_one(plan: Plan, arrays: Any, in_dims: Any) -> int:
    """The chunk of one example."""
    x, lw = (a if at is None else a.select(at, 0) for a, at in zip(arrays[:2], in_dims[:2], strict=True))
    return _derived_size(plan, x, lw)


def _fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *arrays, plan = args
    if may_write(*arrays):
        return ops.fwd(arrays, plan)
    # A program for any number of rows, which it can only ask whether they are few, has all that fit the workspace.
    known = type(arrays[0].shape[0]) is int and not plan.lean
    size = that_fit(plan.chunk_size if known else None, 2 * arrays[1].shape[0], arrays[0].itemsize)
    (value,) = run(_row_map(plan), size, *arrays)
    return value, _no_state(value)


def _no_state(value: Tensor) -> Tensor:
    return value.new_empty([*value.shape, 0])
