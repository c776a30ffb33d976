"""softmax and log_softmax for PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from softmax_ext import contract
from torch_ops._arguments import autocast_dtype, describe, enter_graph
from torch_ops._modes import is_wanted
from torch_ops._rows import native
from torch_ops._rules import softmax as rule


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
        return rule.Softmax.recorded(input, at) if is_wanted(input) else native.softmax_fwd(input, at)
    enter_graph()  # before the compiler of PyTorch 2.11 meets the rule
    return _along(rule.softmax, "softmax", input, dim, dtype)


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
        return rule.LogSoftmax.recorded(input, at)[0] if is_wanted(input) else native.log_softmax_alone(input, at)
    enter_graph()
    return _along(rule.log_softmax, "log_softmax", input, dim, dtype)


def _along(op: Any, name: str, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    contract.floating(name, "input", describe(input), converted=dtype is not None)
    if dtype is None:
        dtype = autocast_dtype(getattr(torch, name), input)
    elif not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        contract.fail_type(name, "dtype", "be a floating torch.dtype or None", repr(dtype))
    at = contract.dimension(name, "dim", dim, input.dim())
    x = input if dtype is None else input.to(dtype)
    return op(x, at) if x.dim() else op(x.unsqueeze(0), 0).squeeze(0)
