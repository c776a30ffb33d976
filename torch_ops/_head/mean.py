"""The mean loss of a head without options whose logits are one chunk, by a short way.

The ordinary way asks what this one has no use for: options, ignored rows, positions, several chunks. What is left are
the same steps, so the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from torch_ops._head.fast import rows_that_fit
from torch_ops._head.linear import formed_in
from torch_ops._head.sum import LinearSum
from torch_ops._rows import native
from torch_ops._rules.plan import Plan

_PLAN = Plan(1.0, None, False, False)


def mean(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> Tensor | None:
    """The loss; None where that is not for these arguments."""
    if not _is_short(x, linear_weight, linear_bias, target):
        return None
    low, high = (int(v) for v in target.aminmax())
    if low < 0 or high >= linear_weight.shape[0]:
        return None
    n = target.numel()
    if x.dim() > 2:
        x, target = x.reshape(n, x.shape[-1]), target.reshape(n)
    arrays = (x, linear_weight, linear_bias)
    if not (torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in arrays)):
        found = native.cross_entropy_mean(F.linear(x, linear_weight, linear_bias), target, False)
        return found[0]
    ones = x.new_ones(n, dtype=torch.promote_types(x.dtype, torch.float32))
    total = LinearSum.apply(*arrays, None, target, None, ones, None, None, None, _PLAN, None)
    return total / n  # pyright: ignore[reportOptionalOperand]


def _is_short(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> bool:
    """Whether the arguments are plain tensors of one head, and its logits one chunk in the input's type."""
    if type(target) is not Tensor or target.is_nested or not native.serves_directly(x):
        return False
    if not _is_beside(x, linear_weight) or linear_weight.dim() != 2:
        return False
    (classes, features), kind = linear_weight.shape, x.dtype
    if linear_bias is not None and not (_is_beside(x, linear_bias) and linear_bias.shape == (classes,)):
        return False
    return (
        target.dtype is torch.int64
        and target.is_cpu
        and target.layout is torch.strided
        and x.dim() > 1
        and x.shape == (*target.shape, features)
        and classes * target.numel() > 0
        and kind is not torch.float16  # its gradients are levelled
        and formed_in(x, target) == kind
        and target.numel() <= min(rows_that_fit(x, classes, kind, None), 1 << 24)  # a float32 count is exact
    )


def _is_beside(x: Tensor, other: Any) -> bool:
    """Whether a parameter is a plain tensor of x's type and device."""
    if type(other) not in (Tensor, Parameter) or other.is_nested:
        return False
    return other.dtype is x.dtype and other.is_cpu and other.layout is torch.strided
