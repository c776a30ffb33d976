"""Class indices of any integer type in one canonical form: a class, IGNORED or INVALID, as int64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softmax_ext import contract
from torch_ops import _modes as modes
from torch_ops._rows import triton
from torch_ops._rows.dispatch import IGNORED, INVALID


def canonical(
    op: str, target: Tensor, classes: int, ignored: int, *, along: int | None = None, name: str = "target"
) -> Tensor:
    """int64 targets in [0, classes), IGNORED or INVALID; IndexError where eager CPU code can afford to look.

    `along`: the dimension that holds K of them a row.
    The comparison with `ignored` is made in a wide signed type: uint8 156 is not -100.
    """
    if isinstance(classes, int) and modes.is_eager(target) and triton.serves_indices(target):  # a group's V is a tensor
        return triton.ops.canonical(target, classes, ignored)
    t = target.to(torch.int64)
    if modes.can_look(target) and t.numel():
        low, high = (int(v) for v in t.aminmax())
        if low >= 0 and high < classes and not low <= ignored <= high:
            return t  # the usual case, in one pass
    kept = t != ignored
    if target.dtype == torch.uint64:  # values from 2**63 on turn negative: they name no class and no marker
        kept = kept | (t < 0)
    valid = (t >= 0) & (t < classes)
    if modes.can_look(target):
        bad = kept & ~valid
        if bad.any():
            by_row = (a.unsqueeze(-1) if along is None else a.movedim(along, -1) for a in (bad, target))
            bad, given = (a.reshape(-1, a.shape[-1]) for a in by_row)
            row, k = bad.nonzero()[0].tolist()
            value = int(given[row, k].item())  # not int(tensor): that refuses uint64 from 2**63 on
            raise contract.target_out_of_range(op, classes, ignored, value, row, name)
    return t.masked_fill(~valid, INVALID).masked_fill(~kept, IGNORED)


def canonical_parts(
    op: str, target: Any, classes: int, ignored: int, *, soft: bool, along: int
) -> tuple[Tensor, Tensor | None]:
    """(canonical class indices or soft targets, the probabilities of K classes a row held `along` a dimension)."""
    if isinstance(target, tuple | list):
        ids, probabilities = target
        return canonical(op, ids, classes, ignored, along=along), probabilities
    return target if soft else canonical(op, target, classes, ignored), None
