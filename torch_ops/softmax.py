"""softmax and log_softmax for PyTorch, each an autograd.Function with its analytic derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from softmax_ext import contract
from torch_ops._arguments import (
    Rule,
    autocast_dtype,
    batch_first,
    describe,
    enter_graph,
    forward_rule,
    in_graph,
)
from torch_ops._rows import dispatch as rows
from torch_ops._rows import native


def softmax(input: Tensor, dim: int = -1, *, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax probabilities along one dimension (no unit).

    Formula: `exp(x) / sum(exp(x))`
    Gradient: `y * (dy - sum(y * dy))` for the output y and its upstream gradient dy.

    Args:
        input: logits of any shape; float16, bfloat16, float32 or float64 (any type if `dtype` is given).
        dim: the dimension whose entries sum to 1, in [-ndim, ndim - 1].
        dtype: floating type to convert `input` to first, and of the result.

    Returns:
        Tensor of the input's shape, in the input's type or `dtype`, within a few ulp of the true value.

    Raises:
        TypeError: input is not a floating tensor, or dim is not an integer (None included).
        IndexError: dim is out of range.

    Memory:
        The backward pass keeps the output only.

    Source:
        Purcell 2021, eq. (5); Bridle 1990, "Probabilistic interpretation of feedforward
        classification network outputs".

    Example:
        >>> import torch, torch_ops
        >>> p = torch_ops.softmax(torch.tensor([1.1, 2.2, 0.2, -1.7]))
        >>> [round(v, 3) for v in p.tolist()]
        [0.224, 0.672, 0.091, 0.014]
    """
    if has_torch_function_unary(input):
        return handle_torch_function(softmax, (input,), input, dim, dtype=dtype)
    if dtype is None and type(dim) is int and native.serves_directly(input) and -input.ndim <= dim < input.ndim:
        at = dim % input.ndim
        return _Softmax.apply(input, at) if input.requires_grad else native.softmax_fwd(input, at)
    enter_graph()  # before the compiler of PyTorch 2.11 meets _softmax
    return _along(_softmax, "softmax", input, dim, dtype)


def log_softmax(input: Tensor, dim: int = -1, *, dtype: torch.dtype | None = None) -> Tensor:
    """Log-probabilities of the softmax along one dimension, in nats.

    Formula: `x - log(sum(exp(x)))`
    Gradient: `dy - exp(y) * sum(dy)` for the output y and its upstream gradient dy.

    Args:
        input: logits of any shape; float16, bfloat16, float32 or float64 (any type if `dtype` is given).
        dim: the dimension to normalise, in [-ndim, ndim - 1].
        dtype: floating type to convert `input` to first, and of the result.

    Returns:
        Tensor of the input's shape, in the input's type or `dtype`; a confident row's largest entry is
        -log1p(rest), not 0.

    Raises:
        TypeError: input is not a floating tensor, or dim is not an integer (None included).
        IndexError: dim is out of range.

    Memory:
        The backward pass keeps the input and two numbers per row: from them the probabilities are exact to
        rounding, which they are not from a half-precision output.

    Source:
        Kurbiel 2021, "Derivative of the Softmax Function and the Categorical Cross-Entropy Loss".

    Example:
        >>> import torch, torch_ops
        >>> torch_ops.log_softmax(torch.tensor([20.0, 0.0]))[0].item()
        -2.06115369216775e-09
    """
    if has_torch_function_unary(input):
        return handle_torch_function(log_softmax, (input,), input, dim, dtype=dtype)
    if dtype is None and type(dim) is int and native.serves_directly(input) and -input.ndim <= dim < input.ndim:
        at = dim % input.ndim
        return _LogSoftmax.apply(input, at)[0] if input.requires_grad else native.log_softmax_alone(input, at)
    enter_graph()
    return _along(_log_softmax, "log_softmax", input, dim, dtype)


def _along(op: Any, name: str, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    contract.floating(name, "input", describe(input), converted=dtype is not None)
    if dtype is None:
        dtype = autocast_dtype(getattr(torch, name), input)
    elif not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        contract.fail_type(name, "dtype", "be a floating torch.dtype or None", repr(dtype))
    at = contract.dimension(name, "dim", dim, input.dim())
    x = input if dtype is None else input.to(dtype)
    return op(x, at) if x.dim() else op(x.unsqueeze(0), 0).squeeze(0)


@in_graph
def _softmax(x: Tensor, dim: int) -> Tensor:
    return _Softmax.apply(x, dim)  # pyright: ignore[reportReturnType]


@in_graph
def _log_softmax(x: Tensor, dim: int) -> Tensor:
    return _LogSoftmax.apply(x, dim)[0]  # pyright: ignore[reportOptionalSubscript]


class _Softmax(Rule):
    """y = softmax(x). Saves y."""

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return rows.softmax_fwd(x, dim=dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return _SoftmaxBwd.apply(dy, y, ctx.dim), None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Tensor, _: None) -> Any:
        # The Jacobian diag(y) - y yT is symmetric: tangents and cotangents take the same product.
        (y,) = saved
        return _SoftmaxBwd.apply(dx, y, ctx.dim)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, dim: int) -> Any:
        (x,) = batch_first(info, in_dims, x)
        return _Softmax.apply(x, dim + 1), 0


class _SoftmaxBwd(Rule):
    """dx = y (dy - s), s = sum(y dy): linear in dy, quadratic in y."""

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
        # <ddx, dx> = sum ddx y dy - sum(ddx y) s, differentiated by dy (again the Jacobian) and by y.
        dy, y = ctx.saved_tensors
        to_dy = _SoftmaxBwd.apply(ddx, y, ctx.dim) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_dy, None, None
        g, h, a = rows.compute(ddx), rows.compute(dy), rows.compute(y)
        s, r = (a * h).sum(ctx.dim, keepdim=True), (a * g).sum(ctx.dim, keepdim=True)
        return to_dy, (g * (h - s) - h * r).to(y.dtype), None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, ddy: Tensor | None, dy_: Tensor | None, _: None) -> Any:
        dy, y = saved
        out = torch.zeros_like(y) if ddy is None else _SoftmaxBwd.apply(ddy, y, ctx.dim)
        if dy_ is None:
            return out
        t, h, a = rows.compute(dy_), rows.compute(dy), rows.compute(y)
        s, r = (a * h).sum(ctx.dim, keepdim=True), (t * h).sum(ctx.dim, keepdim=True)
        return out + (t * (h - s) - a * r).to(y.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: Any, dy: Tensor, y: Tensor, dim: int) -> Any:
        dy, y = batch_first(info, in_dims, dy, y)
        return _SoftmaxBwd.apply(dy, y, dim + 1), 0


class _LogSoftmax(Rule):
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
        ctx.save_for_backward(x, m, rest)
        ctx.save_for_forward(x, m, rest)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> Any:
        if dy is None:
            return None, None
        return _LogSoftmaxBwd.apply(dy, *ctx.saved_tensors, ctx.dim), None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Tensor, _: None) -> Any:
        # d log p = dx - sum(p dx): the transpose of the pullback.
        x = saved[0]
        t = rows.compute(dx)
        mean = (rows.compute(_softmax(x, ctx.dim)) * t).sum(ctx.dim, keepdim=True)
        return (t - mean).to(x.dtype), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, dim: int) -> Any:
        (x,) = batch_first(info, in_dims, x)
        return _LogSoftmax.apply(x, dim + 1), (0, 0, 0)


class _LogSoftmaxBwd(Rule):
    """dx = dy - p sum(dy): linear in dy; its derivative by x is that of the softmax p."""

    @staticmethod
    def forward(dy: Tensor, x: Tensor, m: Tensor, rest: Tensor, dim: int) -> Tensor:
        return rows.log_softmax_bwd(dy, x, m, rest, dim=dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        dy, x, _, _, ctx.dim = inputs
        ctx.save_for_backward(dy, x)
        ctx.save_for_forward(dy, x)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> Any:
        # <ddx, dx> = sum ddx dy - sum(p ddx) sum(dy)
        dy, x = ctx.saved_tensors
        p = _softmax(x, ctx.dim)
        g, a = rows.compute(ddx), rows.compute(p)
        to_dy = (g - (a * g).sum(ctx.dim, keepdim=True)).to(dy.dtype)
        return to_dy, -_by_sum(_SoftmaxBwd.apply(ddx, p, ctx.dim), dy, ctx.dim), None, None, None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, ddy: Tensor | None, dx_: Tensor | None, *_: None) -> Any:
        dy, x = saved
        p = _softmax(x, ctx.dim)
        out = torch.zeros_like(x)
        if ddy is not None:
            out = out + ddy - _by_sum(p, ddy, ctx.dim)
        if dx_ is not None:
            out = out - _by_sum(_SoftmaxBwd.apply(dx_, p, ctx.dim), dy, ctx.dim)
        return out

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, dim = args
        arrays = batch_first(info, in_dims, *arrays)
        return _LogSoftmaxBwd.apply(*arrays, dim + 1), 0


def _by_sum(x: Any, dy: Tensor, dim: int) -> Tensor:
    """x sum(dy), summed in the compute type: a float16 sum over 2^17 classes overflows."""
    return (rows.compute(x) * rows.compute(dy).sum(dim, keepdim=True)).to(x.dtype)
