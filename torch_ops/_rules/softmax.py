"""softmax and log_softmax as autograd.Functions with their analytic derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_ops._modes import is_traced, is_transforming
from torch_ops._rows import dispatch as rows
from torch_ops._rows import native
from torch_ops._rules.function import Rule, batch_first, forward_rule, in_graph
from torch_ops._rules.kept import given_back, kept


@in_graph
def softmax(x: Tensor, dim: int) -> Tensor:
    """Probabilities, with every derivative."""
    return Softmax.apply(x, dim)  # pyright: ignore[reportReturnType]


@in_graph
def log_softmax(x: Tensor, dim: int) -> Tensor:
    """Log-probabilities, with every derivative."""
    return LogSoftmax.apply(x, dim)[0]  # pyright: ignore[reportOptionalSubscript]


class Softmax(Rule):
    """y = softmax(x). Saves y."""

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return rows.softmax_fwd(x, dim=dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(output)
        # Only where a tangent may come: a recompute that is stopped early (checkpoints) leaves these tensors on ctx,
        # which the output owns, for the collector of circles to find.
        if is_transforming() or is_traced():
            ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        if _is_last(dy, y):
            return native.softmax_bwd(dy, y, ctx.dim), None
        return SoftmaxBwd.apply(dy, y, ctx.dim), None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Tensor, _: None) -> Any:
        # The Jacobian diag(y) - y yT is symmetric: tangents and cotangents take the same product.
        (y,) = saved
        return SoftmaxBwd.apply(dx, y, ctx.dim)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, dim: int) -> Any:
        (x,) = batch_first(info, in_dims, x)
        return Softmax.apply(x, dim + 1), 0


class SoftmaxBwd(Rule):
    """dx = y (dy - s), s = sum(y dy) / sum(y): linear in dy."""

    @staticmethod
    def forward(dy: Tensor, y: Tensor, dim: int) -> Tensor:
        return rows.softmax_bwd(dy, y, dim=dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        dy, y, ctx.dim = inputs
        ctx.save_for_backward(dy, y)
        ctx.save_for_forward(dy, y)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> Any:
        # <ddx, dx> = sum ddx y (dy - s), differentiated by dy (again the Jacobian) and by y: the product of both about
        # their means, where ddx (dy - s) - dy sum(ddx y) of the bare y dy would add a number that all have in common,
        # for the Jacobian of y to take away again.
        dy, y = ctx.saved_tensors
        to_dy = SoftmaxBwd.apply(ddx, y, ctx.dim) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_dy, None, None
        g, h, a = rows.compute(ddx), rows.compute(dy), rows.compute(y)
        return to_dy, (rows.centred(g, a, ctx.dim) * rows.centred(h, a, ctx.dim)).to(y.dtype), None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, ddy: Tensor | None, dy_: Tensor | None, _: None) -> Any:
        dy, y = saved
        out = torch.zeros_like(y) if ddy is None else SoftmaxBwd.apply(ddy, y, ctx.dim)
        if dy_ is None:
            return out
        a = rows.compute(y)
        t = rows.compute(dy_) * rows.centred(rows.compute(dy), a, ctx.dim)
        return out + (t - a * t.sum(ctx.dim, keepdim=True)).to(y.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: Any, dy: Tensor, y: Tensor, dim: int) -> Any:
        dy, y = batch_first(info, in_dims, dy, y)
        return SoftmaxBwd.apply(dy, y, dim + 1), 0


class LogSoftmax(Rule):
    """(log p, m, rest). Saves x and the row statistics m, rest."""

    @staticmethod
    def forward(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        return rows.log_softmax_fwd(x, dim=dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.dim = inputs
        _, m, rest = output
        ctx.mark_non_differentiable(m, rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, m, kept(ctx, rest))
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> Any:
        if dy is None:
            return None, None
        x, m, rest = ctx.saved_tensors
        rest = given_back(ctx, rest)
        if _is_last(dy, x):
            return native.log_softmax_bwd(dy, x, m, rest, ctx.dim), None
        return LogSoftmaxBwd.apply(dy, x, m, rest, ctx.dim), None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Tensor, _: None) -> Any:
        # d log p = dx - sum(p dx): the transpose of the pullback.
        x = rows.compute(saved[0])
        return rows.centred(rows.compute(dx), softmax(x, ctx.dim), ctx.dim).to(saved[0].dtype), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, dim: int) -> Any:
        (x,) = batch_first(info, in_dims, x)
        return LogSoftmax.apply(x, dim + 1), (0, 0, 0)


class LogSoftmaxBwd(Rule):
    """dx = dy - p sum(dy): linear in dy; its derivative by x is that of the softmax p."""

    @staticmethod
    def forward(dy: Tensor, x: Tensor, m: Tensor, rest: Tensor, dim: int) -> Tensor:
        return rows.log_softmax_bwd(dy, x, m, rest, dim=dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        *arrays, ctx.dim = inputs
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> Any:
        # <ddx, dx> = sum ddx dy - sum(p ddx) sum(dy)
        dy, x, _, _ = ctx.saved_tensors
        g, p = rows.compute(ddx), softmax(rows.compute(x), ctx.dim)
        to_dy = rows.centred(g, p, ctx.dim).to(dy.dtype)
        return to_dy, _by_sum(-SoftmaxBwd.apply(g, p, ctx.dim), dy, ctx.dim).to(x.dtype), None, None, None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, ddy: Tensor | None, dx_: Tensor | None, *_: None) -> Any:
        dy, x, m, rest = saved
        out = torch.zeros_like(x) if ddy is None else LogSoftmaxBwd.apply(ddy, x, m, rest, ctx.dim)
        if dx_ is not None:
            p = softmax(rows.compute(x), ctx.dim)
            out = out - _by_sum(SoftmaxBwd.apply(rows.compute(dx_), p, ctx.dim), dy, ctx.dim).to(x.dtype)
        return out

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, dim = args
        arrays = batch_first(info, in_dims, *arrays)
        return LogSoftmaxBwd.apply(*arrays, dim + 1), 0


def _is_last(dy: Tensor, like: Tensor) -> bool:
    """Whether a gradient may go to a native op as it is, because nobody differentiates it."""
    alike = type(dy) is Tensor and dy.dtype is like.dtype
    return alike and not torch.is_grad_enabled() and native.serves_directly(like)


def _by_sum(x: Any, dy: Tensor, dim: int) -> Tensor:
    """x sum(dy), summed in the compute type: a float16 sum over 2^17 classes overflows."""
    return x * rows.compute(dy).sum(dim, keepdim=True)
