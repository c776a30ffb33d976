"""What a scaled head's bias and its scale are as columns of the head and of its rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_ops import _modes as modes


def apart(bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """(the bias without its -inf, those alone or None): as a column, 0 * -inf would reach the scale's gradient."""
    lost = bias == -math.inf
    if modes.can_look(lost) and not lost.any():
        return bias, None
    return bias.masked_fill(lost, 0.0), torch.zeros_like(bias.detach()).masked_fill(lost, -math.inf)


def in_parts(scale: Tensor, x: Tensor) -> list[Tensor]:
    """The scale of each row of x as columns of its type: two whose sum it is, where one would be rounded."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s = scale.to(wide).expand(x.shape[0]).unsqueeze(1)
    if wide == x.dtype:
        return [s]
    high = s.detach().to(x.dtype)
    return [high, (s - high).to(x.dtype)]  # the second has the scale's derivative
