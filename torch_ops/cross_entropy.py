"""Fused softmax cross-entropy for PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext import contract
from torch_ops._arguments import alike, describe, describe_target, enter_graph, halves, is_default, parts_of
from torch_ops._modes import is_on_mesh, may_overwrite
from torch_ops._reduction import coefficients, finish
from torch_ops._rows.dispatch import capped
from torch_ops._rows.targets import canonical_parts
from torch_ops._rules.cross_entropy import mean, row
from torch_ops._rules.plan import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor = 1.0,
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
    target: Tensor | tuple[Tensor, Tensor],
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    on_all_ignored: str = "nan",
    stats: Sequence[Literal["lse", "logprob", "entropy", "argmax", "log_sum_sq", "mean_logit", "rank"]],
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]: ...
def cross_entropy(
    input: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor = 1.0,
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
            probabilities, the input's shape, any floating type (their sum need not be 1); or a pair of both with K
            classes a row, (ids, probabilities), where the input has V: the probabilities that add up at the ids.
        weight: one weight per class (V,), any floating type.
        ignore_index: class index of rows that reach no result; None means -100. In a pair, of slots that count
            nothing; a row of such slots reaches no result.
        reduction: "mean" (weighted by class and token weights), "sum" or "none".
        label_smoothing: s in [0, 1]; targets become (1 - s) * target + s / V.
        logit_scale: finite number > 0 the logits are multiplied by first (1 / temperature); or a tensor () or of the
            class indices' shape, any floating type, differentiable, its values not looked at.
        softcap: finite number > 0 or None; then logits become softcap * tanh(logits / softcap).
        z_loss: number >= 0; adds z_loss * lse^2 to each kept row, not multiplied by class weights.
        token_weight: one weight per row, the shape of the class indices.
        on_all_ignored: what a mean over nothing gives: "nan", or "zero" (with zero gradients).
        stats: names among "lse", "logprob", "entropy", "argmax", "log_sum_sq" (log sum p^2), "mean_logit" (over the
            classes) and "rank" (how many logits are larger than the target's) to return for each row as well.
        inplace_backward: let the backward pass write the gradient over `input` (dense, not a leaf, no DTensor), so
            that no second (N, V) buffer exists. Not where saved-tensor hooks that hand back what they are given
            stand round another reader of `input` alone, or a hook or Function of yours holds `input` itself:
            autograd checks no version for them, and they would see the gradient.
        group: the ranks that `input`, `weight` and soft targets are sharded over by class, in rank order, any
            number of classes each; class indices are those of the whole vocabulary, rows and results the same on
            every rank. DTensor arguments need no group: their mesh has it.

    Returns:
        The loss, float32 for half-precision logits: a scalar, or row-shaped with reduction "none". With `stats`
        a pair (loss, {name: tensor}), the statistics of the scaled and capped logits in nats (argmax, rank:
        int64; logprob and rank of a pair: at every id).

    Raises:
        TypeError: an argument of the wrong type; options but logit_scale are Python values, never tensors.
        ValueError: a shape or value outside its rule.
        IndexError: eager code on the CPU finds a class index outside [0, V) that is not ignore_index
            (elsewhere that row's loss and gradient are NaN).

    Memory:
        The backward pass keeps the logits, the targets and two numbers per row; of a pair nothing of the logits' size.

    Source:
        Kurbiel 2021, "Derivative of the Softmax Function and the Categorical Cross-Entropy Loss".

    Example:
        >>> import torch, torch_ops
        >>> logits = torch.tensor([[1.1, 2.2, 0.2, -1.7]])
        >>> round(torch_ops.cross_entropy(logits, torch.tensor([1])).item(), 4)
        0.3977
    """
    scale, factor = (logit_scale, 1.0) if isinstance(logit_scale, Tensor) else (None, logit_scale)
    given: tuple[Any, ...] = (
        ignore_index,
        reduction,
        label_smoothing,
        factor,
        softcap,
        z_loss,
        on_all_ignored,
        stats,
    )
    arrays = (input, *parts_of(target), weight, token_weight, scale)
    if has_torch_function(arrays):
        found = handle_torch_function(
            cross_entropy,
            arrays,
            input,
            target,
            weight,
            token_weight=token_weight,
            inplace_backward=inplace_backward,
            group=group,
            **{**vars(contract.LossOptions(*given)), "logit_scale": logit_scale},
        )
        return alike(found)
    alone = weight is None and token_weight is None and group is None and scale is None
    if alone and type(inplace_backward) is bool and is_default(given):
        loss = mean(input, target, inplace_backward)
        if loss is not None:
            return loss
    options = contract.LossOptions(*given)
    enter_graph()
    if isinstance(input, Tensor) and isinstance(target, Tensor) and input.dim() == 1 and target.shape == (1,):
        whole = input.shape == (1,) and group is None
        target = target if target.is_floating_point() or whole else target[0]  # as F.cross_entropy
    facts, *weights, of_scale = [None if a is None else describe(a) for a in (input, weight, token_weight, scale)]
    facts = contract.at_least_1d("cross_entropy", "input", facts)
    dim = 1 if input.dim() > 1 else 0
    static: Any = {"options": options, "axis": dim}
    soft = contract.loss("cross_entropy", facts, describe_target(target), *weights, **static, logit_scale=of_scale)
    contract.flag("cross_entropy", "inplace_backward", inplace_backward)
    if group is not None or is_on_mesh(*arrays):
        from torch_ops._parallel import losses

        named = {"input": input, "target": target, "weight": weight, "token_weight": token_weight, "logit_scale": scale}
        named["target"], named["probabilities"] = halves(target)
        return losses.cross_entropy(named, options, group, axis=dim, soft=soft, inplace=inplace_backward)

    kind = torch.promote_types(input.dtype, torch.float32)
    plan, classes = Plan.of(options, kind), input.shape[dim]
    target, probabilities = canonical_parts("cross_entropy", target, classes, options.ignored, soft=soft, along=dim)
    of_class = plan.class_weight(weight, kind, soft=soft)
    over = inplace_backward and may_overwrite(input)
    values = _row_by(scale)(input, target, of_class, dim, *plan[:4], over)
    per_row = dict(zip(plan.names, values, strict=False))
    if stats:
        per_row |= _more(stats, input, scale, target, plan, dim)
    by = coefficients(per_row["lse"], target, weight, token_weight, options, classes, probabilities, dim)
    loss, found = finish(per_row, partial(_z, input, scale, target, plan, dim), target, by, options, dim)
    return (loss, found) if stats else loss


def _row_by(scale: Tensor | None) -> Any:
    """The rule of a row, whose scale may be an array."""
    if scale is None:
        return row
    from torch_ops._rules.scaled import scaled_row

    return partial(scaled_row, scale)


def _more(names: Any, input: Tensor, scale: Any, target: Tensor, plan: Plan, dim: int) -> dict[str, Tensor]:
    """The statistics that the loss has no use for."""
    from torch_ops._rules.statistics import MORE, statistics_of

    wanted = [n for n in names if n in MORE]
    if not wanted:
        return {}
    by = None if scale is None else lambda x: _times(x, scale, target, dim)
    return statistics_of(wanted, input, target, dim, plan.scale, plan.softcap, by)


def _z(input: Tensor, scale: Tensor | None, target: Tensor, plan: Plan, dim: int) -> Tensor:
    """The logits scaled and capped, without a derivative."""
    return capped(_times(input, scale, target, dim).detach(), plan.scale, plan.softcap)


def _times(input: Tensor, scale: Tensor | None, target: Tensor, dim: int) -> Tensor:
    """The logits by their scale, where it is an array."""
    if scale is None:
        return input
    from torch_ops._rules.scaled import ignored, times

    return times(input, scale, dim, ignored(input, target, dim))
