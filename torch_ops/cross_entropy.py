"""Fused softmax cross-entropy for PyTorch: an autograd.Function with analytic derivatives of every order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext import contract
from torch_ops import _rows as rows
from torch_ops._arrays import batch_first, describe, enter_graph, forward_rule, in_graph
from torch_ops._curvature import Curvature
from torch_ops._reduction import reduce, statistics
from torch_ops._targets import canonical


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    on_all_ignored: str = "nan",
    stats: tuple[()] = (),
    inplace_backward: bool = False,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    on_all_ignored: str = "nan",
    stats: Sequence[Literal["lse", "logprob", "entropy", "argmax"]],
    inplace_backward: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    on_all_ignored: str = "nan",
    stats: Sequence[str] = (),
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""Cross-entropy between softmax(input) and targets, in nats.

    $L = \log \sum_j \exp(z_j) - z_t$ for class t, $-\sum_j y_j \log p_j$ for probabilities y.
    Gradient: $dz_j = p_j \sum_k y_k - y_j$ (y one-hot for a class index).

    Args:
        input: logits (N, V), (N, V, d1, ...) or (V,); float16, bfloat16, float32 or float64.
        target: class indices, the input's shape without its class dimension, any integer type; or
            probabilities, the input's shape, any floating type (their sum need not be 1).
        weight: one weight per class (V,), any floating type.
        ignore_index: class index of rows that reach no result; None means -100.
        reduction: "mean" (weighted by class and token weights), "sum" or "none".
        label_smoothing: s in [0, 1]; targets become (1 - s) * target + s / V.
        logit_scale: finite number > 0 the logits are multiplied by first (1 / temperature).
        softcap: finite number > 0 or None; then logits become softcap * tanh(logits / softcap).
        z_loss: number >= 0; adds z_loss * lse^2 to each kept row, not multiplied by class weights.
        token_weight: one weight per row, the shape of the class indices.
        on_all_ignored: what a mean over nothing gives: "nan", or "zero" (with zero gradients).
        stats: names among "lse", "logprob", "entropy", "argmax" to return for each row as well.
        inplace_backward: let the backward pass write the gradient over `input` (dense, not a leaf), so that
            no second (N, V) buffer exists.

    Returns:
        The loss, float32 for half-precision logits: a scalar, or row-shaped with reduction "none". With `stats`
        a pair (loss, {name: tensor}), the statistics of the scaled and capped logits in nats (argmax: int64).

    Raises:
        TypeError: an argument of the wrong type; options are Python values, never tensors.
        ValueError: a shape or value outside its rule.
        IndexError: eager code on the CPU finds a class index outside [0, V) that is not ignore_index
            (elsewhere that row's loss and gradient are NaN).

    Memory:
        The backward pass keeps the logits, the targets and two numbers per row.

    Source:
        Kurbiel 2021, "Derivative of the Softmax Function and the Categorical Cross-Entropy Loss".

    Example:
        >>> import torch, torch_ops
        >>> logits = torch.tensor([[1.1, 2.2, 0.2, -1.7]])
        >>> round(torch_ops.cross_entropy(logits, torch.tensor([1])).item(), 4)
        0.3978
    """
    options = contract.LossOptions(
        ignore_index,
        reduction,
        label_smoothing,
        logit_scale,
        softcap,
        z_loss,
        on_all_ignored,
        stats,
    )
    arrays = (input, target, weight, token_weight)
    if has_torch_function(arrays):
        return handle_torch_function(
            cross_entropy,
            arrays,
            input,
            target,
            weight,
            token_weight=token_weight,
            inplace_backward=inplace_backward,
            **vars(options),
        )
    enter_graph()
    facts = [None if a is None else describe(a) for a in arrays]
    contract.at_least_1d("cross_entropy", "input", facts[0])
    dim = 1 if input.dim() > 1 else 0
    soft = contract.loss("cross_entropy", *facts, options, axis=dim)
    contract.flag("cross_entropy", "inplace_backward", inplace_backward)

    classes = input.shape[dim]
    if not soft:
        target = canonical("cross_entropy", target, classes, options.ignored)
    values = _row(
        input,
        target,
        None if weight is None else weight.to(torch.promote_types(input.dtype, torch.float32)),
        dim,
        float(logit_scale),
        None if softcap is None else float(softcap),
        label_smoothing > 0.0,
        "entropy" in stats,
        inplace_backward and _may_overwrite(input),
    )
    names = [
        "nll",
        "lse",
        *["smooth"] * (label_smoothing > 0.0),
        *["entropy"] * ("entropy" in stats),
    ]
    per_row = dict(zip(names, values, strict=False))
    loss = reduce(per_row, target, weight, token_weight, options, classes)
    if not stats:
        return loss
    z = rows.capped(input.detach(), logit_scale, softcap) if "argmax" in stats else input
    return loss, statistics(per_row, z, target, options, dim)


@in_graph
def _row(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dim: int,
    scale: float,
    softcap: float | None,
    smooth: bool,
    entropy: bool,
    inplace: bool,
) -> tuple[Tensor, ...]:
    return _Row.apply(logits, target, weight, dim, scale, softcap, smooth, entropy, inplace)  # pyright: ignore


class _Row(Function):
    """(nll, lse, [smooth], [entropy], m, rest) of each row. Saves logits, target, weight, m and rest."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        dim: int,
        scale: float,
        softcap: float | None,
        smooth: bool,
        entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        return rows.cross_entropy_fwd(
            logits,
            target,
            weight,
            dim=dim,
            scale=scale,
            softcap=softcap,
            smooth=smooth,
            entropy=entropy,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, target, weight, *ctx.layout, ctx.smooth, ctx.entropy, ctx.inplace = inputs
        m, rest = output[-2:]
        ctx.mark_non_differentiable(m, rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, m, rest)
        ctx.save_for_forward(logits, target, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        logits, target, weight, m, rest = ctx.saved_tensors
        upstream = _by_name(ctx, grads)
        d_logits = d_target = d_weight = None
        if all(g is None for g in upstream):
            return (None,) * 9
        if ctx.needs_input_grad[0]:
            args = (logits, target, weight, m, rest, *upstream)
            if ctx.inplace and not torch.is_grad_enabled():
                dim, scale, softcap = ctx.layout
                over = logits.detach()
                d_logits = rows.cross_entropy_bwd(*args, dim=dim, scale=scale, softcap=softcap, out=over)
            else:
                d_logits = _RowBwd.apply(*args, *ctx.layout)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            curve = Curvature(logits, target, weight, *ctx.layout)
            d_target, d_weight = curve.mass_gradient(upstream, *ctx.needs_input_grad[1:3])
        return d_logits, d_target, d_weight, *(None,) * 6

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Tensor | None, dy: Any, dw: Tensor | None, *_: None) -> Any:
        curve = Curvature(*saved, *ctx.layout)
        nll, lse, smooth, entropy = curve.tangents(dx, dy, dw, smooth=ctx.smooth, entropy=ctx.entropy)
        return nll, lse, *[smooth] * ctx.smooth, *[entropy] * ctx.entropy, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, logits: Any, target: Any, weight: Any, dim: int, *rest: Any) -> Any:
        logits, target = batch_first(info, in_dims, logits, target)
        if in_dims[2] is None:
            out = _Row.apply(logits, target, weight, dim + 1, *rest)
        else:  # class weights that differ by example: one at a time, the kernels share one vector
            each = zip(logits, target, weight.movedim(in_dims[2], 0), strict=True)
            outs = [_Row.apply(x, t, w, dim, *rest) for x, t, w in each]
            out = tuple(torch.stack(values) for values in zip(*outs, strict=True))  # pyright: ignore
        return out, (0,) * len(out)  # pyright: ignore[reportArgumentType]


class _RowBwd(Function):
    """dL/dlogits as a function of logits, targets, weights and upstream gradients: linear in the last."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        m: Tensor,
        rest: Tensor,
        d_nll: Tensor | None,
        d_lse: Tensor | None,
        d_smooth: Tensor | None,
        d_entropy: Tensor | None,
        dim: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        upstream = (d_nll, d_lse, d_smooth, d_entropy)
        return rows.cross_entropy_bwd(logits, target, weight, m, rest, *upstream, dim=dim, scale=scale, softcap=softcap)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        *arrays, dim, scale, softcap = inputs
        ctx.layout = (dim, scale, softcap)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return (None,) * 12
        logits, target, weight, _, _, *upstream = ctx.saved_tensors
        curve = Curvature(logits, target, weight, *ctx.layout)
        needs = ctx.needs_input_grad
        d_logits = curve.hessian_vector(v, upstream) if needs[0] else None
        d_target, d_weight = curve.mass_hessian_vector(v, upstream, *needs[1:3])
        tangents = curve.tangents(v, None, None, smooth=needs[7], entropy=needs[8])
        d_upstream = [t if need else None for t, need in zip(tangents, needs[5:9], strict=True)]
        return d_logits, d_target, d_weight, None, None, *d_upstream, None, None, None

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, dx: Any, dy: Any, dw: Any, _m: Any, _rest: Any, *tangents: Any) -> Any:
        logits, target, weight, m, rest, *upstream = saved
        curve = Curvature(logits, target, weight, *ctx.layout)
        out = torch.zeros_like(logits)
        if dx is not None:
            out = out + curve.hessian_vector(dx, upstream)
        if dy is not None or dw is not None:
            out = out + curve.gradient_by_mass(dy, dw, upstream)
        along = tangents[:4]
        if any(t is not None for t in along):
            out = out + _RowBwd.apply(logits, target, weight, m, rest, *along, *ctx.layout)
        return out

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *arrays, dim, scale, softcap = args
        logits, target, _, *per_row = batch_first(info, in_dims, *arrays)
        weight = arrays[2]
        if in_dims[2] is None:
            return _RowBwd.apply(logits, target, weight, *per_row, dim + 1, scale, softcap), 0
        weights = weight.movedim(in_dims[2], 0)
        outs = [
            _RowBwd.apply(
                logits[i],
                target[i],
                weights[i],
                *(r if r is None else r[i] for r in per_row),
                dim,
                scale,
                softcap,
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(outs), 0  # pyright: ignore[reportArgumentType]


def _by_name(ctx: Any, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """[d_nll, d_lse, d_smooth, d_entropy] from the gradients of the outputs that exist."""
    found = iter(grads)
    return [
        next(found),
        next(found),
        *(next(found) if on else None for on in (ctx.smooth, ctx.entropy)),
    ]


def _may_overwrite(x: Tensor) -> bool:
    """Whether a gradient may be written over x: not over a parameter, not where elements share memory."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    owner = x if x._base is None else x._base
    dense = torch.ops.aten.is_non_overlapping_and_dense.default(x)
    return x.requires_grad and not x.is_leaf and not owner.is_leaf and dense
