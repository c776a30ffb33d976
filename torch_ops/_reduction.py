"""From the rows' numbers to the loss: class and token weights, smoothing, z-loss, reduction, statistics.

Plain differentiable framework code: what autograd does here is exact and costs O(N).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softmax_ext.contract import LossOptions
from torch_ops._modes import can_look, is_none
from torch_ops._rows.classes import IGNORED, INVALID, mass_sum, of_rows


class Coefficients(NamedTuple):
    """A row's loss is nll * its nll + smooth * its smooth + square * its lse^2; None where a term is not asked for."""

    nll: Tensor | float | None
    smooth: Tensor | float | None
    square: Tensor | float | None
    share: Tensor  # the row's part of the mean's denominator
    kept: Tensor  # whether the row counts at all
    count: int | None = None  # of the rows, where it is known that each has a share of 1


def coefficients(
    ones: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: LossOptions,
    classes: int,
    probabilities: Tensor | None = None,
    dim: int = 1,
) -> Coefficients:
    """What each row's numbers are multiplied by; `ones` has the rows' shape and type, targets are canonical or soft.

    Ignored rows have numbers of 0, so a coefficient is one number where no weights are given. With K classes a row,
    along `dim`, each has its own: its probability, weighted by class.
    """
    s, soft = options.label_smoothing, target.is_floating_point()
    # of K classes a row, where a look is free: the usual ones name a class each, and there is nothing to mark or mask
    whole = probabilities is not None and can_look(target) and target.numel() > 0 and bool(target.amin() >= 0)
    all_kept = soft or whole
    marks = target if all_kept else of_rows(target, ones.dim() + 1, dim)
    kept = torch.ones_like(ones, dtype=torch.bool) if all_kept else marks != IGNORED
    share = kept.to(ones.dtype)
    tokens: Any = 1.0
    nll: Any = 1.0
    if probabilities is not None:
        nll = probabilities.to(ones.dtype)
        if not whole:  # what an ignored slot holds is not read, NaN included
            nll = nll.masked_fill(target == IGNORED, 0.0)
        if weight is not None and not is_none(classes):
            nll = nll * weight.to(ones.dtype)[target.clamp(0, classes - 1)].masked_fill(target == IGNORED, 0.0)
    elif not soft and weight is not None and not is_none(classes):
        # Ignored rows read no weight, not even through 0 * inf; one more dimension spares 0-d indices a look.
        of_row = weight.to(ones.dtype)[target.clamp(0, classes - 1).unsqueeze(0)].squeeze(0)
        nll = share = of_row.masked_fill(~kept, 0.0)
    if token_weight is not None:
        tokens = token_weight.to(ones.dtype).masked_fill(~kept, 0.0)
        nll, share = nll * (tokens if probabilities is None else tokens.unsqueeze(dim)), share * tokens
    return Coefficients(
        nll=None if s == 1.0 else nll if s == 0.0 else nll * (1.0 - s),
        smooth=tokens * (s / max(classes, 1)) if s > 0.0 else None,
        square=tokens * options.z_loss if options.z_loss > 0.0 else None,
        share=share,
        kept=kept,
        count=ones.numel() if all_kept and token_weight is None else None,
    )


def combine(rows: dict[str, Tensor], target: Tensor, by: Coefficients, dim: int = 1) -> Tensor:
    """The rows' losses from their nll, smooth and lse; `dim`: where nll has K a row."""
    terms: list[Tensor] = []
    if by.nll is not None and rows["nll"].dim() > rows["lse"].dim():
        terms.append(mass_sum(by.nll, rows["nll"], dim))  # pyright: ignore[reportArgumentType]
    elif by.nll is not None:
        one = isinstance(by.nll, float) and by.nll == 1.0  # no launch, no node of the graph
        terms.append(rows["nll"] if one else by.nll * rows["nll"])
    if by.smooth is not None:
        terms.append(by.smooth * rows["smooth"])
        if not target.is_floating_point():
            marks = of_rows(target, rows["lse"].dim() + 1, dim)
            terms[-1] = terms[-1].masked_fill(marks == INVALID, torch.nan)
    if by.square is not None:
        terms.append(by.square * rows["lse"].square())
    loss = terms[0]
    for term in terms[1:]:
        loss = loss + term
    return loss


def reduce(total: Tensor, by: Coefficients, options: LossOptions) -> Tensor:
    """The sum or mean from the summed loss."""
    if options.reduction == "sum":
        return total
    if type(by.count) is int and by.count > 0:
        return total / by.count  # a sum of ones is more than work: the compiler of PyTorch 2.11 fails on it on a GPU
    # The denominator is exchanged before dividing, not the quotient after: a gradient through an unused 0/0
    # would be NaN.
    count, zero = by.share.sum(), options.on_all_ignored == "zero"
    # Not torch.where, which makes a tensor of a number: fake tensors met outside their mode take no other.
    empty = count == 0 if zero else ~by.kept.any()
    return (total / count.masked_fill(empty, 1.0)).masked_fill(empty, 0.0 if zero else torch.nan)


def finish(
    rows: dict[str, Tensor],
    z: Callable[[], Tensor],
    target: Tensor,
    by: Coefficients,
    options: LossOptions,
    dim: int,
    reduced: Callable[..., Tensor] = reduce,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, statistics) from the rows' numbers; `z()` are the logits scaled and capped, where no row says argmax."""
    loss = combine(rows, target, by, dim)
    if options.reduction != "none":
        loss = reduced(loss.sum(), by, options)
    return loss, statistics(rows, z, target, options, dim)


def statistics(
    rows: dict[str, Tensor], z: Callable[[], Tensor], target: Tensor, options: LossOptions, dim: int
) -> dict[str, Tensor]:
    """The statistics asked for, of the target's row shape; ignored rows hold 0 (argmax -1).

    Of K classes a row "logprob" has the shape of their ids.
    """
    out: dict[str, Tensor] = {}
    for name in options.stats:
        if name == "logprob" and rows["nll"].dim() > rows["lse"].dim():
            masked = rows["nll"] < 0
            out[name] = 0.0 - (rows["nll"] + masked) - torch.zeros_like(rows["nll"]).masked_fill(masked, torch.inf)
        elif name == "logprob":
            out[name] = 0.0 - rows["nll"]
        elif name == "argmax":
            if "argmax" in rows:
                out[name] = rows[name]
            elif not is_none((logits := z()).shape[dim]):
                out[name] = logits.argmax(dim)
            else:
                out[name] = torch.full_like(rows["lse"], -1, dtype=torch.int64)
            if not target.is_floating_point():
                marks = of_rows(target, rows["lse"].dim() + 1, dim)
                out[name] = out[name].masked_fill(marks == IGNORED, -1)
        elif name == "rank":
            out[name] = rows[name].masked_fill(target < 0, -1)
        else:
            out[name] = rows[name]
    return out
