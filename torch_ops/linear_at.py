"""Logits of K classes a row for PyTorch: a linear layer's outputs at the ids named, and no others."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext import contract
from torch_ops._arguments import autocast, describe, enter_graph
from torch_ops._rows.classes import IGNORED
from torch_ops._rows.targets import canonical


def linear_at(
    input: Tensor,
    linear_weight: Tensor,
    ids: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
) -> Tensor:
    """Logits of K classes a row, input . linear_weight[id] + linear_bias[id], no unit.

    Formula: `sum(x * w[i])` for each id i of a row x.
    Gradient: `c * w[i]` at x and `c * x` at w[i], for the gradient c of one logit.

    Args:
        input: (..., D), any leading dimensions or none; float16, bfloat16, float32 or float64.
        linear_weight: (V, D), of the input's type.
        ids: classes (..., K), K of them a row, any integer type.
        linear_bias: (V,), of the input's type.
        ignore_index: the id of slots that name no class: their logit is -inf, and they reach no gradient, so that
            `log_softmax(linear_at(...))` is the log-probability within a row's own set; None means -100.

    Returns:
        The shape of ids; float32 for half-precision inputs.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a shape or value outside its rule.
        IndexError: eager code on the CPU finds an id outside [0, V) that is not ignore_index (elsewhere that slot and
            its row of the input's gradient are NaN, and it adds nothing to those of linear_weight and linear_bias).

    Memory:
        The backward pass keeps the arguments. Nothing of (N, K, D) exists: kernels read the rows of linear_weight in
        place, other devices gather at most 64 MiB of them at a time. The weight's gradient is the same, bit for bit,
        for any number of threads.

    Source:
        Bengio and Senecal 2003, "Quick Training of Probabilistic Neural Nets by Importance Sampling": a softmax's
        terms at a few classes.

    Example:
        >>> import torch, torch_ops
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> torch_ops.linear_at(x, weight, torch.tensor([[2, 0, -100]]))
        tensor([[3., 1., -inf]])
    """
    arrays = (input, linear_weight, ids, linear_bias)
    if has_torch_function(arrays):
        more = {"linear_bias": linear_bias, "ignore_index": ignore_index}
        return handle_torch_function(linear_at, arrays, input, linear_weight, ids, **more)
    enter_graph()
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    facts = [None if a is None else describe(a) for a in (input, linear_weight, ids, linear_bias)]
    contract.linear_at("linear_at", *facts, ignored=ignore_index)
    ignored = contract.LossOptions(ignore_index).ignored
    at = canonical("linear_at", ids, linear_weight.shape[0], ignored, along=-1, name="ids")
    from torch_ops._rules.picked import picked

    n = math.prod(input.shape[:-1])
    flat = at.reshape(n, at.shape[-1])
    z = picked(input.reshape(n, input.shape[-1]), linear_weight, flat)
    if linear_bias is not None:
        z = z + picked(input.new_ones(n, 1), linear_bias.unsqueeze(1), flat)
    return z.reshape(at.shape).masked_fill(at == IGNORED, -torch.inf)
