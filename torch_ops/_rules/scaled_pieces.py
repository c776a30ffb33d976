"""Logits times their rows' numbers, a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torch_ops import _modes as modes
from torch_ops._rows.arithmetic import compute

# Elements of logits that are multiplied at a time: 4 MiB of float32, which a CPU's cache holds.
_PIECE, _PIECE_ON_DEVICE = 1 << 20, 1 << 26


def along(x: Tensor, g: Tensor, s: Tensor, m: Tensor, d_lse: Tensor | None, softcap: float | None, dim: int) -> Tensor:
    """sum_j g_j x_j of each row; a -inf logit has no derivative."""
    lost = x == -math.inf
    if softcap is not None:
        return (g * compute(x).masked_fill(lost, 0.0)).sum(dim)
    # What all x of a row have in common meets sum_j g_j, which is d_lse: it is taken from the sum before that rounds.
    c = torch.nan_to_num(m.unsqueeze(dim) / s, 0.0, 0.0, 0.0)
    total = (g * (compute(x) - c).masked_fill(lost, 0.0)).sum(dim) - c.squeeze(dim) * (g * lost).sum(dim)
    return total if d_lse is None else total + c.squeeze(dim) * d_lse


def number(scale: Tensor, logits: Tensor) -> float | None:
    """One scale for all rows as the kernels take it, where a look at it is free."""
    if scale.dim() or not modes.can_look(scale):
        return None
    kind = torch.finfo(torch.promote_types(logits.dtype, torch.float32))
    value = scale.item()
    return value if kind.tiny <= value <= kind.max else None


def beside(scale: Tensor, logits: Tensor, nothing: Tensor | None, dim: int) -> Tensor:
    """The scales beside the logits, in the compute type; 1 in rows marked `nothing`."""
    s = scale.to(torch.promote_types(logits.dtype, torch.float32))
    if not s.dim():
        return s
    return (s if nothing is None else s.masked_fill(nothing, 1.0)).unsqueeze(dim)


def pieces(logits: Tensor, s: Tensor, dim: int) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """(what takes its part of an array of rows, s x) of each piece, one product at a time."""
    at, room = cut_along(logits, dim), _PIECE if logits.device.type == "cpu" else _PIECE_ON_DEVICE
    count = 1 if at is None else logits.shape[at]
    size = max(1, room * count // max(1, logits.numel()))
    turned = not modes.can_look(s) or not bool((s > 0).all())  # -inf times such a number is none
    for start in range(0, max(count, 1), size):
        length = min(size, count - start)

        def take(x: Tensor, start: int = start, length: int = length) -> Tensor:
            return x if at is None else x.narrow(place(at, x, logits, dim), start, length)

        x = take(logits)
        z = compute(x) * (take(s) if s.dim() else s)
        yield take, (z.masked_fill_(x == -math.inf, -math.inf) if turned else z).contiguous()


def cut_along(logits: Tensor, dim: int) -> int | None:
    """The dimension that pieces are cut along: the longest that is not the classes'."""
    others = [i for i in range(logits.dim()) if i != dim]
    return max(others, key=lambda i: logits.shape[i]) if others else None


def place(at: int | None, x: Tensor, logits: Tensor, dim: int) -> int:
    """That dimension among those of x, which may lack the classes'."""
    return (at or 0) if x.dim() == logits.dim() or (at or 0) < dim else (at or 0) - 1
