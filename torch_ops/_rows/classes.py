"""K classes a row: how ids without a class are marked, what they make of their row, and sums over them."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_ops._modes import can_look

IGNORED = -1  # canonical target of a row, or a slot, that reaches no result
INVALID = -2  # canonical target of a row whose class index names no class
MASKED = -1.0  # what nll says of one of K classes that has no probability, whose nll is infinite: none is negative


def of_rows(target: Tensor, ndim: int, dim: int) -> Tensor:
    """One class index a row of logits of `ndim` dimensions: of K along `dim`, IGNORED if all are, INVALID if any is."""
    if target.dim() < ndim:
        return target
    if not target.shape[dim]:
        return target.sum(dim) + IGNORED
    return target.amax(dim).where(target.amin(dim) != INVALID, INVALID)


def mass_sum(mass: Tensor, nll: Tensor, dim: int) -> Tensor:
    """sum_k mass_k nll_k over K classes a row: of an infinite nll (MASKED) infinite, but nothing where no mass is."""
    if can_look(nll) and nll.numel() and bool(nll.detach().amin() >= 0):
        return (mass * nll).sum(dim)  # the usual case, where a look is free: all below would add zeros
    masked = nll < 0
    lost = (mass.detach() * torch.inf).masked_fill(~masked | (mass == 0), 0.0)
    # Added, not chosen: 0 in value, a masked class still takes its part of the gradient, as a dense target's.
    return (mass * (nll + masked) + lost).sum(dim)
