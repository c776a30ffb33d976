"""The linear head's weighted sum over rows, its gradients formed in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_ops._head import ops
from torch_ops._head.per_row import per_row
from torch_ops._head.rounding import scaled
from torch_ops._modes import is_transforming, may_write
from torch_ops._rows.classes import mass_sum
from torch_ops._rules.function import in_graph
from torch_ops._rules.plan import Plan


@in_graph
def weighted_sum(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    up: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    a: Tensor | None,
    s: Tensor | None,
    c: Tensor | None,
    index: Tensor | None,
    *plan: Any,
) -> Tensor:
    """sum_i a_i nll_i + s_i smooth_i + c_i lse_i^2 over the rows of x that `index` names (None: all)."""
    arrays = (x, linear_weight, linear_bias, up, target, weight)
    if one_pass(*arrays, a, s, c):
        return LinearSum.apply(*arrays, a, s, c, index, Plan(*plan), None)  # pyright: ignore[reportReturnType]
    x = x if index is None else x.index_select(0, index)
    return weighted(per_row(x, *arrays[1:], *plan), a, s, c)


def weighted(values: Any, a: Tensor | None, s: Tensor | None, c: Tensor | None) -> Tensor:
    """The sum of weighted_sum from the values of each row."""
    terms: list[Any] = [] if a is None else [a * values[0] if a.dim() == 1 else mass_sum(a, values[0], 1)]
    if s is not None:
        terms.append(s * values[2])
    if c is not None:
        terms.append(c * values[1].square())
    return sum(terms[1:], terms[0]).sum()  # pyright: ignore[reportAttributeAccessIssue]


class LinearSum(Function):
    """weighted_sum with its gradients formed in the forward pass: three matmuls, and G in the logits' memory.

    A shard of the classes has its own `rows` and `forward_backward` in the place of per_row and ops.fwd_bwd (None).
    Saves dX, dW (unrounded), db and d_up beside its inputs; the backward pass scales them: in half precision a factor
    of 1/N on G itself would flush most of it to 0.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *arrays, plan, shard = args
        a, s, c = arrays[6:9]
        needs = tuple(x is not None and x.requires_grad for x in arrays[:4])
        values, grads = ops.fwd_bwd(arrays, needs, plan) if shard is None else shard.forward_backward(arrays, needs)
        ctx.plan, ctx.shard = plan, shard
        ctx.save_for_backward(*arrays, *grads, *values)
        return weighted(values, a, s, c)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (g,) = upstream
        x, lw, lb, up, target, w, a, s, c, index, *found, nll, lse, smooth = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated: once more, as a function of everything
            # Under names of its own: where x is made from the weight (tied embeddings), the way from x to the weight
            # is the outer gradient's to go, and would be gone twice.
            inputs: Any = (v if v is None else v.view_as(v) for v in (x, lw, lb, up, a, s, c))
            x, lw, lb, up, a, s, c = inputs
            arrays = [v for v in (x, lw, lb, up, a, s, c) if v is not None and v.requires_grad]
            with_index = x if index is None else x.index_select(0, index)
            rows = per_row if ctx.shard is None else ctx.shard.rows
            total = weighted(rows(with_index, lw, lb, up, target, w, *ctx.plan), a, s, c)
            found = iter(torch.autograd.grad(total, arrays, g, create_graph=True))
            grads = [next(found) if v is not None and v.requires_grad else None for v in (x, lw, lb, up, a, s, c)]
            return *grads[:4], None, None, *grads[4:], None, None, None
        d_head = (d if d is None else scaled(d, g, like.dtype) for d, like in zip(found, (x, lw, lb, up), strict=True))
        nll = nll if nll.dim() == 1 else nll + (nll < 0)  # of a masked class 0, as in mass_sum
        d_a, d_s, d_c = (
            g * value if need else None
            for value, need in zip(
                (nll, smooth, lse if c is None else lse.square()), ctx.needs_input_grad[6:9], strict=True
            )
        )
        return *d_head, None, None, d_a, d_s, d_c, None, None, None


def one_pass(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    up: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    *coefficients: Tensor | None,
) -> bool:
    """Whether a first derivative is wanted that the forward pass can form."""
    head = (x, linear_weight, linear_bias, up)
    return (
        torch.is_grad_enabled()
        and any(v is not None and v.requires_grad for v in head)
        and not any(v is not None and v.requires_grad for v in (target, weight))
        and not is_transforming()
        and may_write(*head, target, weight, *coefficients)
    )
