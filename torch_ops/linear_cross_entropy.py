"""Cross-entropy of a linear layer's logits for PyTorch: the classifier head and its loss without the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext import contract
from torch_ops._arguments import alike, autocast, describe, describe_target, enter_graph, no_pair, one_row, parts_of
from torch_ops._head.layout import each_row, lay_out, total
from torch_ops._head.sampled import sampled_rows
from torch_ops._parallel.mesh import is_on_mesh
from torch_ops._reduction import coefficients, finish, reduce
from torch_ops._rows.targets import canonical_parts
from torch_ops._rules.plan import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    on_all_ignored: str = "nan",
    stats: tuple[()] = (),
    shift: int = 0,
    memory: Literal["fast", "lean"] = "fast",
    chunk_size: int | None = None,
    grad_samples: int | None = None,
    generator: torch.Generator | None = None,
    group: ProcessGroup | None = None,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    on_all_ignored: str = "nan",
    stats: Sequence[Literal["lse", "logprob", "entropy", "argmax"]],
    shift: int = 0,
    memory: Literal["fast", "lean"] = "fast",
    chunk_size: int | None = None,
    grad_samples: int | None = None,
    generator: torch.Generator | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]: ...
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    on_all_ignored: str = "nan",
    stats: Sequence[str] = (),
    shift: int = 0,
    memory: Literal["fast", "lean"] = "fast",
    chunk_size: int | None = None,
    grad_samples: int | None = None,
    generator: torch.Generator | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy between softmax(input @ linear_weight.T + linear_bias) and targets, in nats.

    Formula: `sum(y) * log(sum(exp(x @ w.T))) - sum(y * (x @ w.T))` for probabilities y, one-hot for a class index.
    Gradient: `(exp(x @ w.T) / sum(exp(x @ w.T)) * sum(y) - y) @ w`

    Args:
        input: (..., D), any leading dimensions or none; float16, bfloat16, float32 or float64.
        linear_weight: (V, D), of the input's type; or (V, d1, .., dK, D) with input (N, D).
        target: class indices (...), any integer type, or probabilities (..., V), any floating type;
            (N, d1, .., dK) or (N, V, d1, .., dK) for the K-dimensional form; or a pair of both with K classes a row,
            (ids, probabilities), where probabilities have V.
        linear_bias: linear_weight's shape without D, of the input's type.
        weight: one weight per class (V,), any floating type.
        ignore_index: class index of rows, or of a pair's slots, that reach no result; None means -100.
        reduction: "mean" (weighted by class and token weights), "sum" or "none".
        label_smoothing: share of the target spread over all classes, in [0, 1].
        logit_scale: the logits are multiplied by this first.
        softcap: then bounded to softcap * tanh(logits / softcap).
        z_loss: adds z_loss * lse^2 to each row.
        token_weight: one weight per row, the shape of the integer target.
        on_all_ignored: what a mean over nothing gives: "nan" or "zero" (with zero gradients).
        stats: names among "lse", "logprob", "entropy", "argmax" to return for each row as well.
        shift: k judges input[..., :-k, :] by target[..., k:], and by token_weight likewise: 1 for the next token.
        memory: "fast" works by chunks of rows, "lean" by slices of the vocabulary; see Memory.
        chunk_size: rows (fast) or classes (lean) at a time; None takes the most that fit the workspace.
        grad_samples: K, or None for the exact gradient. Loss and statistics stay exact; off its targets a row's
            gradient is taken at K points drawn from the model's own distribution: unbiased, its variance in any
            direction at most 1/K of that of a label drawn from the model, and one matmul in the place of three.
        generator: draws the points; None is the default generator of the input's device.
        group: the ranks that `linear_weight`, `linear_bias`, `weight` and soft targets are sharded over by class, in
            rank order, any number of classes each; class indices are those of the whole vocabulary; input, results
            and the input's gradient are the same on every rank. DTensor arguments need no group: their mesh has it.

    Returns:
        The loss, float32 for half-precision inputs: a scalar, or row-shaped with reduction "none". With `stats`
        a pair (loss, {name: tensor}), the statistics of the scaled and capped logits in nats (argmax: int64;
        logprob of a pair: at every id).

    Raises:
        TypeError: an argument of the wrong type; options are Python values, never tensors.
        ValueError: a shape or value outside its rule.
        IndexError: eager code on the CPU finds a class index outside [0, V) that is not ignore_index
            (elsewhere that row's loss and gradient are NaN, and so are those of linear_weight and linear_bias).

    Memory:
        At most 256 MiB of logits exist at a time (fast on a GPU: 1 GiB). fast with "mean" or "sum" forms the gradients
        in the forward pass (three matmuls) and keeps them, the weight's in float32. With reduction "none", with
        `stats`, with gradients for soft targets or class weights, under torch.func and forward mode, and in every case
        where memory is "lean", two numbers per row are kept and the backward pass recomputes the logits (four matmuls).
        Derivatives of derivatives recompute too. On an x86 CPU without AMX half-precision arguments with class indices
        are multiplied in float32, by pieces of linear_weight: in half the time, with unrounded logits; fast then keeps
        the input's gradient in float32 too.

        grad_samples: one matmul, and K ids a row are kept.

    Source:
        Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models"; Kurbiel 2021 for the rows.

    Example:
        >>> import torch, torch_ops
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> round(torch_ops.linear_cross_entropy(x, weight, torch.tensor([2])).item(), 4)
        0.4076
    """
    options = contract.LossOptions(
        ignore_index, reduction, label_smoothing, logit_scale, softcap, z_loss, on_all_ignored, stats
    )
    arrays = (input, linear_weight, *parts_of(target), linear_bias, weight, token_weight)
    if has_torch_function(arrays):
        found = handle_torch_function(
            linear_cross_entropy,
            arrays,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            token_weight=token_weight,
            shift=shift,
            memory=memory,
            chunk_size=chunk_size,
            grad_samples=grad_samples,
            generator=generator,
            group=group,
            **vars(options),
        )
        return alike(found)
    enter_graph()
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    target = one_row(input, linear_weight, target, group)
    arrays = (input, linear_weight, *parts_of(target), linear_bias, weight, token_weight)
    x, lw, *more = [
        None if a is None else describe(a) for a in (input, linear_weight, linear_bias, weight, token_weight)
    ]
    facts = (x, lw, describe_target(target), *more)
    static = {"shift": shift, "memory": memory, "chunk_size": chunk_size}
    soft = contract.linear_loss("linear_cross_entropy", *facts, options=options, **static, grad_samples=grad_samples)
    if grad_samples is not None:
        _check_sampling(input, weight, options, generator, alone=group is None and not is_on_mesh(*arrays))
    if group is not None or is_on_mesh(*arrays):
        from torch_ops._parallel import losses

        no_pair("linear_cross_entropy", target)
        given = (input, linear_weight, target, linear_bias, weight, token_weight)
        named: dict[str, Any] = dict(zip(_ARRAYS, given, strict=True))
        return losses.linear_cross_entropy(named, options, group, soft=soft, **static)

    classes, kind = linear_weight.shape[0], torch.promote_types(input.dtype, torch.float32)
    plan = Plan.of(options, kind, memory == "lean", chunk_size)
    along, laid = 1 if linear_weight.dim() > 2 else -1, {"soft": soft, "shift": int(shift)}
    target, pairs = canonical_parts("linear_cross_entropy", target, classes, options.ignored, soft=soft, along=along)
    of = lay_out(input, linear_weight, linear_bias, target, token_weight, **laid, probabilities=pairs)
    w = plan.class_weight(weight, kind, soft=soft)
    ones = torch.ones((), dtype=kind, device=input.device).expand(of.n, math.prod(linear_weight.shape[1:-1]))
    by = coefficients(ones, of.target, weight, of.token_weight, options, classes, of.probabilities)
    if grad_samples is not None:
        rows = each_row(of, w, plan, partial(sampled_rows, int(grad_samples), generator))
    elif reduction != "none" and not stats and memory == "fast":
        return reduce(total(of, w, by, plan), by, options)
    else:
        rows = each_row(of, w, plan)
    loss, found = finish(rows, lambda: rows["argmax"], of.target, by, options, 1)
    loss = loss.reshape(of.shape) if reduction == "none" else loss
    return (loss, {name: of.as_given(value) for name, value in found.items()}) if stats else loss


def _check_sampling(x: Tensor, weight: Any, options: contract.LossOptions, generator: Any, *, alone: bool) -> None:
    op = "linear_cross_entropy"
    if generator is not None and not isinstance(generator, torch.Generator):
        contract.fail_type(op, "generator", "be a torch.Generator or None", f"{type(generator).__name__} object")
    if generator is not None and generator.device.type != x.device.type:
        contract.fail_value(op, "generator", f"be on the input's device ({x.device})", str(generator.device))
    if not alone:
        contract.fail_value(op, "grad_samples", "be None with group or DTensor arguments", "a number")
    if options.label_smoothing and options.softcap is not None:
        # under a cap the smoothing's part of the gradient is no outer product
        contract.fail_value(op, "grad_samples", "be None with label_smoothing and softcap together", "a number")
    if options.label_smoothing and weight is not None and weight.requires_grad:
        rule = "be None with label_smoothing and a weight whose gradient is wanted"
        contract.fail_value(op, "grad_samples", rule, "a number")


_ARRAYS = ("input", "linear_weight", "target", "linear_bias", "weight", "token_weight")
