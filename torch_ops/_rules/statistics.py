"""Statistics of a row that the loss itself has no use for: log_sum_sq, mean_logit and rank.

legend:  z the logits scaled and capped, p = softmax(z), V classes
formula: log_sum_sq = log sum_j p_j^2 (`log_sum_sq.py`);  mean_logit = sum_j z_j / V
         rank = how many z_j > z_target, NaN the largest
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_ops._modes import is_none
from torch_ops._rows import dispatch as rows
from torch_ops._rules.log_sum_sq import log_sum_sq

Product = Callable[[Tensor], Tensor]

MORE = ("log_sum_sq", "mean_logit", "rank")  # the names of a call's statistics that are formed here


def statistics_of(
    names: Sequence[str],
    logits: Tensor,
    target: Tensor,
    dim: int,
    scale: float,
    softcap: float | None,
    by: Product | None = None,
) -> dict[str, Tensor]:
    """Those named of each row; of a row that `target` ignores 0, its rank -1. `by`: the product with an array scale."""
    nothing = None if target.is_floating_point() else rows.of_rows(target, logits.dim(), dim) == rows.IGNORED
    if nothing is not None:  # such a row reaches no result, not even through 0 * NaN
        logits = logits.masked_fill(nothing.unsqueeze(dim), 0.0)
    logits, found = rows.compute(logits), {}  # what is made of them twice is summed before it is rounded
    for name in names:
        if name == "rank":
            found[name] = ranks(rows.capped(scaled(logits.detach(), by), scale, softcap), target, dim)
        else:
            make = _log_sum_sq if name == "log_sum_sq" else _mean
            value = make(logits, dim, scale, softcap, by)
            found[name] = value if nothing is None else value.masked_fill(nothing, 0.0)
    return found


def _log_sum_sq(logits: Tensor, dim: int, scale: float, softcap: float | None, by: Product | None) -> Tensor:
    if is_none(logits.shape[dim]):
        return logits.sum(dim) + math.nan
    if is_shifted(scale, softcap, by):
        logits = below(logits, logits.detach().amax(dim, keepdim=True))
    return log_sum_sq(bounded(scaled(logits, by), scale, softcap), dim)


def _mean(logits: Tensor, dim: int, scale: float, softcap: float | None, by: Product | None) -> Tensor:
    return bounded(scaled(logits, by), scale, softcap).mean(dim)


def scaled(logits: Tensor, by: Product | None) -> Tensor:
    """The product with an array scale, where there is one."""
    return logits if by is None else by(logits)


def is_shifted(scale: float, softcap: float | None, by: Product | None) -> bool:
    """Whether logits are to be taken from their row's largest first: their product with a scale is rounded.

    What they have in common it would round too, of which log sum p^2 is no function.
    """
    return softcap is None and (scale != 1.0 or by is not None)


def below(logits: Tensor, largest: Tensor) -> Tensor:
    """Logits less their row's largest, which is held constant."""
    return logits - largest.masked_fill(~largest.isfinite(), 0.0)


def bounded(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The logits scaled and capped, with a derivative that keeps its digits where the cap is nearly flat."""
    if softcap is None:
        return rows.capped(logits, scale, None)
    lost = logits == -math.inf  # the cap is flat there
    u = logits.masked_fill(lost, 0.0) * scale / softcap
    near = (u > -0.5) & (u < 0.5)
    far = torch.where(near, 1.0, u)
    # tanh u = 1 - 2 sigmoid(-2 u): the derivative of tanh as torch forms it, 1 - tanh^2, would be 0 from 9 on
    of_far = torch.where(far > 0, 1.0 - 2.0 * torch.sigmoid(-2.0 * far), 2.0 * torch.sigmoid(2.0 * far) - 1.0)
    tanh = torch.where(near, torch.tanh(torch.where(near, u, 0.0)), of_far)
    return (softcap * tanh).masked_fill(lost, -math.inf)


def ranks(z: Tensor, target: Tensor, dim: int) -> Tensor:
    """How many are larger than the target's, or each of K targets'; -1 where there is no such class."""
    each = target if target.dim() == z.dim() else target.unsqueeze(dim)
    if is_none(z.shape[dim]):
        found = torch.full_like(each, -1)
    else:
        at = each.clamp(0, z.shape[dim] - 1)
        mine = z.gather(dim, at)
        counts = [larger(z, v, dim) for v in mine.split(1, dim)]
        found = torch.cat(counts, dim) if counts else torch.zeros_like(each)
    found = found.masked_fill(each < 0, -1)
    return found if target.dim() == z.dim() else found.squeeze(dim)


def larger(z: Tensor, than: Tensor, dim: int) -> Tensor:
    """How many of each row are larger than one number of it, keeping `dim`."""
    return ((z > than) | (z.isnan() & ~than.isnan())).sum(dim, keepdim=True)
