"""Divergences of a student from a teacher for PyTorch: between two arrays of logits, or the logits of two heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext import contract
from torch_ops._arguments import autocast, describe, enter_graph
from torch_ops._head import two_heads_ops  # noqa: F401  # saved graphs name its ops
from torch_ops._modes import is_on_mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def divergence(
    input: Tensor,
    teacher: Tensor,
    *,
    kind: Literal["forward_kl", "reverse_kl", "jsd", "tv"] = "forward_kl",
    beta: float = 0.5,
    logit_scale: float | Tensor = 1.0,
    teacher_scale: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,
    keep: Tensor | None = None,
    reduction: str = "mean",
    dim: int = -1,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Divergence of the student's softmax p from the teacher's softmax q along one dimension, in nats.

    Formula: `sum(q * (log(q) - log(p)))` for kind "forward_kl"; "reverse_kl" exchanges p and q, "jsd" is
    beta KL(q, m) + (1 - beta) KL(p, m) with m = beta q + (1 - beta) p, "tv" is sum |p - q| / 2.
    Gradient: `p - q` for "forward_kl", at the student's logits; the teacher is a constant.
    A student equal to its teacher has 0 and a gradient of 0; one next to it loses no digits. Nothing is multiplied by a
    temperature squared.

    Args:
        input: the student's logits, of any shape; float16, bfloat16, float32 or float64.
        teacher: logits of the input's shape, any floating type, without a gradient.
        kind: "forward_kl", "reverse_kl", "jsd" or "tv".
        beta: number in (0, 1), the teacher's share of the mixture of "jsd".
        logit_scale: finite number > 0 the student's logits are multiplied by first (1 / temperature); or a tensor () or
            of the rows' shape, differentiable.
        teacher_scale: the same for the teacher's logits.
        softcap: finite number > 0 or None; then the student's logits become softcap * tanh(logits / softcap).
        teacher_softcap: the same for the teacher's logits.
        token_weight: one weight per row, any floating type.
        keep: booleans, one per row: other rows reach no result, even when they are NaN.
        reduction: "mean" (over the kept rows, weighted by token_weight), "sum" or "none".
        dim: the classes' dimension.
        group: the ranks that both arrays are sharded over by class, alike, in rank order, any number of classes each;
            the result is the same on every rank. DTensor arguments need no group: their mesh has it.

    Returns:
        The divergence, float32 for half-precision logits: a scalar, or row-shaped with reduction "none". The mean of
        no kept row is NaN.

    Raises:
        TypeError: an argument of the wrong type, or a teacher that has a gradient.
        ValueError: a shape or value outside its rule.

    Memory:
        The backward pass keeps both arrays of logits and seven numbers per row. A logit_scale that is an array
        multiplies a piece of the logits at a time.

    Source:
        Csiszar 1963 for the divergences; Agarwal et al. 2024, "On-Policy Distillation of Language Models", for "jsd".

    Example:
        >>> import torch, torch_ops
        >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> round(torch_ops.divergence(student, teacher).item(), 4)
        0.2662
    """
    scale, factor = (logit_scale, 1.0) if isinstance(logit_scale, Tensor) else (None, logit_scale)
    options = contract.DivergenceOptions(kind, beta, factor, teacher_scale, softcap, teacher_softcap, reduction)
    arrays = (input, teacher, token_weight, keep, scale)
    if has_torch_function(arrays):
        named = {"token_weight": token_weight, "keep": keep, "dim": dim, "group": group}
        return handle_torch_function(
            divergence, arrays, input, teacher, **named, **{**vars(options), "logit_scale": logit_scale}
        )
    enter_graph()
    facts, *more, of_scale = [None if a is None else describe(a) for a in arrays]
    facts = contract.at_least_1d("divergence", "input", facts)
    at = contract.dimension("divergence", "dim", dim, len(facts.shape))
    contract.divergence("divergence", facts, *more, options=options, axis=at, logit_scale=of_scale)
    _constant("divergence", teacher=teacher)
    if group is not None or is_on_mesh(*arrays):
        from torch_ops._parallel import divergences

        given: dict[str, Any] = dict(
            zip(("input", "teacher", "token_weight", "keep", "logit_scale"), arrays, strict=True)
        )
        return divergences.divergence(given, options, group, axis=at)
    from torch_ops._head.divergence_loss import pair_of, reduced, weight_of
    from torch_ops._rules.divergence import divergence_row

    dtype = torch.promote_types(input.dtype, teacher.dtype)
    pair = pair_of(options, at, dtype)
    if scale is None:
        values = divergence_row(input.to(dtype), teacher.to(dtype), keep, *pair)
    else:
        from torch_ops._rules.scaled_divergence import scaled_divergence

        values = scaled_divergence(scale, input, teacher, keep, *pair)
    weight = weight_of(values, token_weight, keep)
    losses = values if token_weight is None else weight * values
    return losses if reduction == "none" else reduced(losses.sum(), weight, keep, reduction)


def linear_divergence(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kind: Literal["forward_kl", "reverse_kl", "jsd", "tv"] = "forward_kl",
    beta: float = 0.5,
    logit_scale: float | Tensor = 1.0,
    teacher_scale: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,
    keep: Tensor | None = None,
    reduction: str = "mean",
    shift: int = 0,
    memory: Literal["fast", "lean"] = "fast",
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Divergence of softmax(input @ linear_weight.T) from the teacher head's softmax, in nats.

    Formula: `sum(q * (log(q) - log(p)))` for kind "forward_kl", with p = softmax(input @ linear_weight.T + linear_bias)
    and q = softmax(teacher_input @ teacher_weight.T + teacher_bias); the other kinds as in `divergence`.
    Gradient: `(p - q) @ w` for "forward_kl", at the input; the teacher's four are constants.

    Args:
        input: the student's (..., D), any leading dimensions or none; float16, bfloat16, float32 or float64.
        linear_weight: (V, D), of the input's type.
        teacher_input: (..., E), with the input's leading dimensions; any floating type, without a gradient.
        teacher_weight: (V, E), of teacher_input's type, without a gradient.
        linear_bias: (V,), of the input's type.
        teacher_bias: (V,), of teacher_input's type, without a gradient.
        kind: "forward_kl", "reverse_kl", "jsd" or "tv".
        beta: number in (0, 1), the teacher's share of the mixture of "jsd".
        logit_scale: the student's logits are multiplied by this first: a number, or a tensor () or of the rows' shape
            (...), differentiable. It multiplies the input; beside a linear_bias the weight is copied with it.
        teacher_scale: the teacher's logits are multiplied by this first.
        softcap: then the student's are bounded to softcap * tanh(logits / softcap).
        teacher_softcap: the same for the teacher's logits.
        token_weight: one weight per row (...).
        keep: booleans (...): other rows reach no result, even when they are NaN.
        reduction: "mean" (over the kept rows, weighted by token_weight), "sum" or "none".
        shift: k compares positions [..., :-k, :], by token_weight and keep of [..., k:]. A logit_scale of the rows'
            shape goes with the input.
        memory: "fast" or "lean"; see Memory.
        chunk_size: rows (fast) or classes (lean) at a time; None takes the most whose logits, of both heads, fit the
            workspace.
        group: the ranks that both weights and biases are sharded over by class, alike, in rank order, any number of
            classes each; both inputs, the result and the input's gradient are the same on every rank. DTensor
            arguments need no group: their mesh has it.

    Returns:
        The divergence, float32 for half-precision inputs: a scalar, or row-shaped with reduction "none". The mean of
        no kept row is NaN.

    Raises:
        TypeError: an argument of the wrong type, or a teacher's that has a gradient.
        ValueError: a shape or value outside its rule.

    Memory:
        At most 256 MiB of logits, of both heads together, exist at a time. fast with "mean" or "sum" forms the
        gradients in the forward pass (four matmuls) and keeps them, the weight's in float32. With reduction "none",
        and in every case where memory is "lean", seven numbers per row are kept and the backward pass recomputes both
        heads' logits (six matmuls; lean visits the classes twice for "jsd" and "tv", eight). All of it holds compiled,
        too. Mapped by torch.func and exported, the arguments alone are kept.

    Source:
        Csiszar 1963 for the divergences; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models".

    Example:
        >>> import torch, torch_ops
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> round(torch_ops.linear_divergence(x, weight, 2.0 * x, weight).item(), 4)
        0.1156
    """
    scale, factor = (logit_scale, 1.0) if isinstance(logit_scale, Tensor) else (None, logit_scale)
    options = contract.DivergenceOptions(kind, beta, factor, teacher_scale, softcap, teacher_softcap, reduction)
    heads: Any = {"linear_bias": linear_bias, "teacher_bias": teacher_bias}
    of_rows: Any = {"token_weight": token_weight, "keep": keep}
    static: Any = {"shift": shift, "memory": memory, "chunk_size": chunk_size}
    arrays: Any = (input, linear_weight, teacher_input, teacher_weight, *heads.values(), *of_rows.values(), scale)
    if has_torch_function(arrays):
        named = {**heads, **of_rows, **static, **vars(options), "logit_scale": logit_scale, "group": group}
        return handle_torch_function(linear_divergence, arrays, *arrays[:4], **named)
    enter_graph()
    x, lw, lb = autocast(input, linear_weight, linear_bias)
    tx, tw, tb = autocast(teacher_input, teacher_weight, teacher_bias)
    facts = [None if a is None else describe(a) for a in (x, lw, tx, tw, lb, tb, token_weight, keep)]
    of_scale = None if scale is None else describe(scale)
    contract.linear_divergence("linear_divergence", *facts, options=options, **static, logit_scale=of_scale)
    _constant("linear_divergence", teacher_input=tx, teacher_weight=tw, teacher_bias=tb)
    from torch_ops._head.divergence_loss import ARRAYS, of_heads  # and with it what a pair of heads needs

    named: dict[str, Any] = dict(zip(ARRAYS, (x, lw, lb, tx, tw, tb, token_weight, keep, scale), strict=True))
    static["shift"] = int(shift)
    if group is not None or is_on_mesh(*named.values()):
        from torch_ops._parallel import divergences

        return divergences.linear_divergence(named, options, group, **static)
    return of_heads([*named.values()], options, **static)


def _constant(op: str, **teacher: Tensor | None) -> None:
    """Raise where a derivative by the teacher is asked for."""
    for name, x in teacher.items():
        if x is None:
            continue
        wanted = torch.is_grad_enabled() and x.requires_grad
        if not wanted and not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            wanted = forward_ad.unpack_dual(x).tangent is not None
        if wanted:
            raise contract.teacher_has_no_gradient(op, name)
