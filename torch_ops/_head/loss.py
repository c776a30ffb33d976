"""The loss of a linear layer whose arguments have passed the contract, on one device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softmax_ext.contract import LossOptions
from torch_ops._head.layout import each_row, lay_out, total
from torch_ops._head.sampled import sampled_rows
from torch_ops._head.statistics import head_statistics
from torch_ops._reduction import coefficients, finish, reduce
from torch_ops._rows.targets import canonical_parts
from torch_ops._rules.plan import Plan
from torch_ops._rules.statistics import MORE

OP = "linear_cross_entropy"
ARRAYS = ("input", "linear_weight", "target", "linear_bias", "weight", "token_weight", "logit_scale", "A", "B")


def loss_of(
    arrays: dict[str, Any],
    options: LossOptions,
    *,
    soft: bool,
    shift: int,
    memory: str,
    chunk_size: int | None,
    sampled: tuple[int, Any] | None = None,
    beside: Sequence[Tensor] | None = None,
) -> Any:
    """The loss, with `stats` a pair.

    `sampled`: (K, the generator) of a sampled gradient. `beside`: (u, B), where (input AT) is given as u.
    """
    x, lw, target, lb, weight, token_weight, scale, down, up = arrays.values()
    classes, kind = lw.shape[0], torch.promote_types(x.dtype, torch.float32)
    plan = Plan.of(options, kind, memory == "lean", chunk_size)
    along, low_rank = 1 if lw.dim() > 2 else -1, None if up is None else (down, up)
    target, pairs = canonical_parts(OP, target, classes, options.ignored, soft=soft, along=along)
    laid: dict[str, Any] = {"soft": soft, "shift": int(shift), "probabilities": pairs, "scale": scale}
    of = lay_out(x, lw, lb, target, token_weight, **laid, low_rank=low_rank, beside=beside)
    w = plan.class_weight(weight, kind, soft=soft)
    ones = torch.ones((), dtype=kind, device=x.device).expand(of.n, math.prod(lw.shape[1:-1]))
    by = coefficients(ones, of.target, weight, of.token_weight, options, classes, of.probabilities)
    names = [n for n in options.stats if n in MORE]
    more = (names, partial(head_statistics, names, plan)) if names else None
    if sampled is not None:
        rows = each_row(of, w, plan, partial(sampled_rows, *sampled), more)
    elif options.reduction != "none" and not options.stats and memory == "fast":
        return reduce(total(of, w, by, plan), by, options)
    else:
        rows = each_row(of, w, plan, more=more)
    loss, found = finish(rows, lambda: rows["argmax"], of.target, by, options, 1)
    loss = loss.reshape(of.shape) if options.reduction == "none" else loss
    return (loss, {name: of.as_given(value) for name, value in found.items()}) if options.stats else loss
