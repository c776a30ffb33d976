"""From the rows' numbers to the loss: class and token weights, smoothing, z-loss, reduction, statistics.

Plain differentiable framework code: what autograd does here is exact and costs O(N).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from softmax_ext.contract import LossOptions
from torch_ops._rows import IGNORED, INVALID


class Coefficients(NamedTuple):
    """loss_i = a_i nll_i + s_i smooth_i + c_i lse_i^2, None for what has no part; share of the mean's denominator."""

    a: Tensor | None
    s: Tensor | None
    c: Tensor | None
    share: Tensor
    kept: Tensor


def coefficients(
    target: Tensor,
    like: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: LossOptions,
    classes: int,
) -> Coefficients:
    """What multiplies the rows' numbers, from targets canonical or soft, in the row shape and type of `like`."""
    s, z = options.label_smoothing, options.z_loss
    soft = target.is_floating_point()
    kept = torch.ones_like(like, dtype=torch.bool) if soft else target != IGNORED
    share = kept.to(like.dtype)
    of_nll = torch.ones_like(like) if soft else share
    if not soft and weight is not None and classes:
        # Ignored rows read no weight, not even through 0 * inf; one more dimension spares 0-d indices a look.
        of_row = weight.to(like.dtype)[target.clamp(0, classes - 1).unsqueeze(0)].squeeze(0)
        of_nll = share = torch.where(kept, of_row, 0.0)
    of_rest = torch.ones_like(like) if soft else kept.to(like.dtype)
    if token_weight is not None:
        t = torch.where(kept, token_weight.to(like.dtype), 0.0)
        share = t if soft else share * t
        of_nll, of_rest = of_nll * t, of_rest * t
    of_smooth = None
    if s > 0.0:
        of_smooth = of_rest * (s / max(classes, 1))
        if not soft:  # where nll has no part, nothing else would tell that the target names no class
            of_smooth = of_smooth.masked_fill(target == INVALID, torch.nan)
    return Coefficients(
        None if s == 1.0 else of_nll if s == 0.0 else of_nll * (1.0 - s),
        of_smooth,
        of_rest * z if z > 0.0 else None,
        share,
        kept,
    )


def reduce(
    rows: dict[str, Tensor],
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: LossOptions,
    classes: int,
) -> Tensor:
    """The loss from per-row nll, lse and (with smoothing) smooth; targets canonical or soft."""
    k = coefficients(target, rows["nll"], weight, token_weight, options, classes)
    terms = [] if k.a is None else [k.a * rows["nll"]]
    if k.s is not None:
        terms.append(k.s * rows["smooth"])
    if k.c is not None:
        terms.append(k.c * rows["lse"].square())
    loss = sum(terms[1:], terms[0])
    return loss if options.reduction == "none" else over(loss.sum(), k, options)


def over(total: Tensor, k: Coefficients, options: LossOptions) -> Tensor:
    """The reduced loss from the sum over rows."""
    if options.reduction == "sum":
        return total
    # The denominator is exchanged before dividing, not the quotient after: a gradient through an unused 0/0
    # would be NaN.
    count, zero = k.share.sum(), options.on_all_ignored == "zero"
    some = count != 0 if zero else k.kept.any()
    return torch.where(some, total / torch.where(some, count, 1.0), 0.0 if zero else torch.nan)


def statistics(
    rows: dict[str, Tensor], z: Callable[[], Tensor], target: Tensor, options: LossOptions, dim: int
) -> dict[str, Tensor]:
    """The statistics asked for, of the target's row shape; ignored rows hold 0 (argmax -1)."""
    out: dict[str, Tensor] = {}
    for name in options.stats:
        if name == "logprob":
            out[name] = 0.0 - rows["nll"]
        elif name == "argmax":
            if "argmax" in rows:
                out[name] = rows[name]
            elif (logits := z()).shape[dim]:
                out[name] = logits.argmax(dim)
            else:
                out[name] = torch.full_like(rows["nll"], -1, dtype=torch.int64)
            if not target.is_floating_point():
                out[name] = out[name].masked_fill(target == IGNORED, -1)
        else:
            out[name] = rows[name]
    return out
