"""Cross-entropy of a linear layer's logits for PyTorch: the classifier head and its loss without the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext import contract
from torch_ops._arguments import (
    alike,
    autocast,
    describe,
    describe_target,
    enter_graph,
    halves,
    is_default,
    one_row,
    parts_of,
)
from torch_ops._head import ops  # noqa: F401  # saved graphs name its ops
from torch_ops._modes import is_on_mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "linear_cross_entropy"
_HOW = (0, "fast", None, None, None)
_TYPES = [*map(type, _HOW)]


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    linear_bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor = 1.0,
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
    low_rank: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    on_all_ignored: str = "nan",
    stats: Sequence[Literal["lse", "logprob", "entropy", "argmax", "log_sum_sq", "mean_logit", "rank"]],
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
    low_rank: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor = 1.0,
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
        low_rank: a pair (A, B) of shapes (r, D) and (V, r), of the input's type: (input @ A.T) @ B.T is added to the
            logits, and nothing of size (V, D) is copied.
        weight: one weight per class (V,), any floating type.
        ignore_index: class index of rows, or of a pair's slots, that reach no result; None means -100.
        reduction: "mean" (weighted by class and token weights), "sum" or "none".
        label_smoothing: share of the target spread over all classes, in [0, 1].
        logit_scale: the logits are multiplied by this first: a number, or a tensor () or of the rows' shape (...),
            differentiable. In half precision it multiplies the input, which is rounded once more.
        softcap: then bounded to softcap * tanh(logits / softcap).
        z_loss: adds z_loss * lse^2 to each row.
        token_weight: one weight per row, the shape of the integer target.
        on_all_ignored: what a mean over nothing gives: "nan" or "zero" (with zero gradients).
        stats: names among "lse", "logprob", "entropy", "argmax", "log_sum_sq" (log sum p^2), "mean_logit" (over the
            classes) and "rank" (how many logits are larger than the target's) to return for each row as well.
        shift: k judges input[..., :-k, :] by target[..., k:], and by token_weight likewise: 1 for the next token. A
            logit_scale of the rows' shape goes with the input.
        memory: "fast" works by chunks of rows, "lean" by slices of the vocabulary; see Memory.
        chunk_size: rows (fast) or classes (lean) at a time; None takes the most that fit the workspace, with
            `grad_samples` in half precision on a CPU 64 MiB of logits.
        grad_samples: K, or None for the exact gradient. Loss and statistics stay exact; off its targets a row's
            gradient is taken at K points drawn from the model's own distribution: unbiased, its variance in any
            direction at most 1/K of that of a label drawn from the model, and one matmul in the place of three.
        generator: draws the points; None is the default generator of the input's device. A checkpoint takes the same
            points again (a reentrant one only of the default generator).
        group: the ranks that `linear_weight`, `linear_bias`, B, `weight` and soft targets are sharded over by class, in
            rank order, any number of classes each; class indices are those of the whole vocabulary; input, results
            and the input's gradient are the same on every rank. DTensor arguments need no group: their mesh has it.

    Returns:
        The loss, float32 for half-precision inputs: a scalar, or row-shaped with reduction "none". With `stats`
        a pair (loss, {name: tensor}), the statistics of the scaled and capped logits in nats (argmax, rank:
        int64; logprob and rank of a pair: at every id).

    Raises:
        TypeError: an argument of the wrong type; options but logit_scale are Python values, never tensors.
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
    scale, factor = (logit_scale, 1.0) if isinstance(logit_scale, Tensor) else (None, logit_scale)
    given = (ignore_index, reduction, label_smoothing, factor, softcap, z_loss, on_all_ignored, stats)
    arrays = (input, linear_weight, *parts_of(target), linear_bias, weight, token_weight, scale, *parts_of(low_rank))
    if has_torch_function(arrays):
        found = handle_torch_function(
            linear_cross_entropy,
            arrays,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            low_rank=low_rank,
            weight=weight,
            token_weight=token_weight,
            shift=shift,
            memory=memory,
            chunk_size=chunk_size,
            grad_samples=grad_samples,
            generator=generator,
            group=group,
            **{**vars(contract.LossOptions(*given)), "logit_scale": logit_scale},
        )
        return alike(found)
    alone = weight is None and token_weight is None and group is None and scale is None and low_rank is None
    how = (shift, memory, chunk_size, grad_samples, generator)
    if alone and is_default(given) and [*map(type, how)] == _TYPES and how == _HOW:
        from torch_ops._head.mean import mean

        loss = mean(input, linear_weight, linear_bias, target)  # pyright: ignore[reportArgumentType]
        if loss is not None:
            return loss
    options = contract.LossOptions(*given)
    enter_graph()
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    low_rank = autocast(*low_rank) if isinstance(low_rank, tuple | list) and low_rank else low_rank  # pyright: ignore
    target = one_row(input, linear_weight, target, group)
    x, lw, *rest = [
        None if a is None else describe(a) for a in (input, linear_weight, linear_bias, weight, token_weight)
    ]
    facts = (x, lw, describe_target(target), *rest)
    static: Any = {"shift": shift, "memory": memory, "chunk_size": chunk_size}
    more: Any = {"logit_scale": None if scale is None else describe(scale), "low_rank": low_rank}
    if isinstance(low_rank, tuple | list):
        more["low_rank"] = tuple(None if a is None else describe(a) for a in low_rank)
    soft = contract.linear_loss(OP, *facts, options=options, **static, grad_samples=grad_samples, **more)
    from torch_ops._head.loss import ARRAYS, loss_of  # and with it the head's other files

    each = (input, linear_weight, target, linear_bias, weight, token_weight, scale, *(low_rank or (None, None)))
    if grad_samples is not None:
        _check_sampling(input, weight, options, generator)
        static["sampled"] = (int(grad_samples), generator)
    named: dict[str, Any] = dict(zip(ARRAYS, each, strict=True))
    if group is not None or is_on_mesh(*each[:2], *parts_of(target), *each[3:]):
        from torch_ops._parallel import losses

        named["target"], named["probabilities"] = halves(target)
        return losses.linear_cross_entropy(named, options, group, soft=soft, **static)
    return loss_of(named, options, soft=soft, **static)


def _check_sampling(x: Tensor, weight: Any, options: contract.LossOptions, generator: Any) -> None:
    op = OP
    if generator is not None and not isinstance(generator, torch.Generator):
        contract.fail_type(op, "generator", "be a torch.Generator or None", f"{type(generator).__name__} object")
    if generator is not None and generator.device.type != x.device.type:
        contract.fail_value(op, "generator", f"be on the input's device ({x.device})", str(generator.device))
    if options.label_smoothing and options.softcap is not None:
        # under a cap the smoothing's part of the gradient is no outer product
        contract.fail_value(op, "grad_samples", "be None with label_smoothing and softcap together", "a number")
    if options.label_smoothing and weight is not None and weight.requires_grad:
        rule = "be None with label_smoothing and a weight whose gradient is wanted"
        contract.fail_value(op, "grad_samples", rule, "a number")
