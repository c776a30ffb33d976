"""Fused softmax cross-entropy for PyTorch: an autograd.Function with analytic derivatives of every order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext import contract
from torch_ops._arguments import (
    Rule,
    batch_first,
    describe,
    enter_graph,
    forward_rule,
    in_graph,
    is_transformed,
    is_untracked,
)
from torch_ops._parallel.mesh import is_on_mesh
from torch_ops._reduction import coefficients, combine, reduce, statistics
from torch_ops._rows import dispatch as rows
from torch_ops._rows import native, triton
from torch_ops._rows.targets import canonical
from torch_ops._rules.curvature import Curvature, RowBwd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    group: ProcessGroup | None = None,
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
    group: ProcessGroup | None = None,
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
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy between softmax(input) and targets, in nats.

    Formula: `sum(y) * log(sum(exp(x))) - sum(y * x)` for probabilities y, one-hot for a class index.
    Gradient: `exp(x) / sum(exp(x)) * sum(y) - y`

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
        inplace_backward: let the backward pass write the gradient over `input` (dense, not a leaf, no DTensor), so
            that no second (N, V) buffer exists.
        group: the ranks that `input`, `weight` and soft targets are sharded over by class, in rank order, any
            number of classes each; class indices are those of the whole vocabulary, rows and results the same on
            every rank. DTensor arguments need no group: their mesh has it.

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
        0.3977
    """
    given: tuple[Any, ...] = (
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
            group=group,
            **dict(zip(_NAMES, given, strict=True)),
        )
    alone = weight is None and token_weight is None and group is None
    if alone and type(inplace_backward) is bool and _is_default(given):
        loss = _mean(input, target, inplace_backward)
        if loss is not None:
            return loss
    options = contract.LossOptions(*given)
    enter_graph()
    if isinstance(input, Tensor) and isinstance(target, Tensor) and input.dim() == 1 and target.shape == (1,):
        whole = input.shape == (1,) and group is None
        target = target if target.is_floating_point() or whole else target[0]  # as F.cross_entropy
    facts, target_facts, *weights = [None if a is None else describe(a) for a in (input, target, weight, token_weight)]
    facts = contract.at_least_1d("cross_entropy", "input", facts)
    dim = 1 if input.dim() > 1 else 0
    soft = contract.loss("cross_entropy", facts, target_facts, *weights, options=options, axis=dim)
    contract.flag("cross_entropy", "inplace_backward", inplace_backward)
    if group is not None or is_on_mesh(*arrays):
        from torch_ops._parallel import losses

        named = {"input": input, "target": target, "weight": weight, "token_weight": token_weight}
        return losses.cross_entropy(named, options, group, axis=dim, soft=soft, inplace=inplace_backward)

    kind = torch.promote_types(input.dtype, torch.float32)
    scale, cap = options.fitted(torch.finfo(kind).tiny, torch.finfo(kind).max)
    classes, smooth, entropy = input.shape[dim], options.label_smoothing > 0.0, "entropy" in stats
    if not soft:
        target = canonical("cross_entropy", target, classes, options.ignored)
    values = _row(
        input,
        target,
        weight.to(kind) if weight is not None and (soft or smooth) else None,  # nothing else of a row needs it
        dim,
        scale,
        cap,
        smooth,
        entropy,
        inplace_backward and _may_overwrite(input),
    )
    names = ["nll", "lse", *["smooth"] * smooth, *["entropy"] * entropy]
    per_row = dict(zip(names, values, strict=False))
    by = coefficients(per_row["nll"], target, weight, token_weight, options, classes)
    loss = combine(per_row, target, by)
    if reduction != "none":
        loss = reduce(loss.sum(), by, options)
    if not stats:
        return loss
    return loss, statistics(per_row, lambda: rows.capped(input.detach(), scale, cap), target, options, dim)


_NAMES, _DEFAULTS = zip(*vars(contract.LossOptions()).items(), strict=True)
_TYPES, _IGNORED = [*map(type, _DEFAULTS)], contract.LossOptions().ignored


def _is_default(given: tuple[Any, ...]) -> bool:
    # Types first: True == 1 == 1.0, and a tensor's == is no answer.
    return [*map(type, given)] == _TYPES and given == _DEFAULTS


def _mean(input: Any, target: Any, inplace: bool) -> Tensor | None:
    """The loss without options, by a short way; None where that is not for these arguments."""
    if type(target) is not Tensor or target.is_nested:
        return None
    if native.serves_directly(input):
        if not input.requires_grad:
            found = native.cross_entropy_mean(input, target, False)
            return found[0] if found else None
    elif triton.serves_directly(input) and triton.serves_indices(target):
        if (input.dim(), input.shape[:1], input.device) != (2, target.shape, target.device):
            return None
        target = triton.ops.canonical(target, input.shape[1], _IGNORED)
    else:
        return None
    return _Mean.apply(input, target, inplace and _may_overwrite(input))[0]


class _Mean(Rule):
    """(loss, m, rest, kept), or nothing but None: `_Row` and the reduction in one. Saves these, logits and target."""

    @staticmethod
    def forward(logits: Tensor, target: Tensor, inplace: bool) -> tuple[Tensor | None, ...]:
        if triton.serves(logits, 1):
            return triton.cross_entropy_mean(logits, target)
        # there all rows are kept, or it is not for these targets
        return *(native.cross_entropy_mean(logits, target, True) or [None] * 3), None

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        if output[0] is not None:
            ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:2], *output[1:])
            ctx.inplace = inputs[2]

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> Any:
        if d_loss is None:
            return None, None, None
        logits, target, m, rest, kept = ctx.saved_tensors
        count = len(target) if kept is None else kept.clamp(min=1)  # of a mean over nothing the gradient is 0
        args = (logits, target, None, m, rest, (d_loss / count).expand(len(target)), None, None, None)
        return _input_bwd(args, (1, 1.0, None), inplace=ctx.inplace), None, None


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


class _Row(Rule):
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
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:  # before the logits are overwritten
            curve = Curvature(logits, target, weight, *ctx.layout)
            d_target, d_weight = curve.mass_gradient(upstream, *ctx.needs_input_grad[1:3])
        if ctx.needs_input_grad[0]:
            d_logits = _input_bwd((logits, target, weight, m, rest, *upstream), ctx.layout, inplace=ctx.inplace)
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
        rest = (*rest[:-1], False)  # the batch may be an expanded view: nothing to write over
        if in_dims[2] is None:
            out = _Row.apply(logits, target, weight, dim + 1, *rest)
        else:  # class weights that differ by example: one at a time, the kernels share one vector
            each = zip(logits, target, weight.movedim(in_dims[2], 0), strict=True)
            outs = [_Row.apply(x, t, w, dim, *rest) for x, t, w in each]
            out = tuple(torch.stack(values) for values in zip(*outs, strict=True))  # pyright: ignore
        return out, (0,) * len(out)  # pyright: ignore[reportArgumentType]


def _input_bwd(args: tuple[Any, ...], layout: Sequence[Any], *, inplace: bool) -> Any:
    """dL/d(logits), over the logits where `inplace` says so and no derivative of it is asked for."""
    if not (inplace and is_untracked(*args)):
        return RowBwd.apply(*args, *layout)
    dim, scale, softcap = layout
    return rows.cross_entropy_bwd(*args, dim=dim, scale=scale, softcap=softcap, out=args[0].detach())


def _by_name(ctx: Any, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """[d_nll, d_lse, d_smooth, d_entropy] from the gradients of the outputs that exist."""
    found = iter(grads)
    return [
        next(found),
        next(found),
        *(next(found) if on else None for on in (ctx.smooth, ctx.entropy)),
    ]


def _may_overwrite(x: Tensor) -> bool:
    """Whether a gradient may be written over x: not over a parameter, not where elements share memory.

    Nor over a part of a larger tensor: its other parts share the version counter, and would be refused theirs.
    """
    if torch.compiler.is_compiling() or is_transformed(x):
        return False
    owner = x if x._base is None else x._base
    dense = torch.ops.aten.is_non_overlapping_and_dense.default(x)
    return x.requires_grad and not x.is_leaf and not owner.is_leaf and dense and owner.numel() == x.numel()
