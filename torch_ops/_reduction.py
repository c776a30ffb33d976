"""From the rows' numbers to the loss: class and token weights, smoothing, z-loss, reduction, statistics.

Plain differentiable framework code: what autograd does here is exact and costs O(N).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softmax_ext.contract import LossOptions
from torch_ops._rows import IGNORED, INVALID


def reduce(
    rows: dict[str, Tensor],
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: LossOptions,
    classes: int,
) -> Tensor:
    """The loss from per-row nll, lse and (with smoothing) smooth; targets canonical or soft."""
    nll, s = rows["nll"], options.label_smoothing
    soft = target.is_floating_point()
    kept = torch.ones_like(nll, dtype=torch.bool) if soft else target != IGNORED
    share = kept.to(nll.dtype)  # the row's part of the mean's denominator
    if not soft and weight is not None and classes:
        # Ignored rows read no weight, not even through 0 * inf; one more dimension spares 0-d indices a look.
        of_row = weight.to(nll.dtype)[target.clamp(0, classes - 1).unsqueeze(0)].squeeze(0)
        share = torch.where(kept, of_row, 0.0)
        nll = nll * share
    loss = nll
    if s > 0.0:
        smooth = rows["smooth"] * (s / max(classes, 1))
        loss = smooth if s == 1.0 else (1.0 - s) * nll + smooth
        if not soft:
            loss = loss.masked_fill(target == INVALID, torch.nan)
    if options.z_loss > 0.0:
        loss = loss + options.z_loss * rows["lse"].square()
    if token_weight is not None:
        t = torch.where(kept, token_weight.to(nll.dtype), 0.0)
        share = t if soft else share * t
        loss = loss * t
    if options.reduction == "none":
        return loss
    total = loss.sum()
    if options.reduction == "sum":
        return total
    # The denominator is exchanged before dividing, not the quotient after: a gradient through an unused 0/0
    # would be NaN.
    count, zero = share.sum(), options.on_all_ignored == "zero"
    some = count != 0 if zero else kept.any()
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
            if (logits := z()).shape[dim]:
                out[name] = logits.argmax(dim)
            else:
                out[name] = torch.full_like(rows["nll"], -1, dtype=torch.int64)
            if not target.is_floating_point():
                out[name] = out[name].masked_fill(target == IGNORED, -1)
        else:
            out[name] = rows[name]
    return out
