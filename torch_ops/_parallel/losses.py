"""The losses on more than one device: classes sharded over a group, rows over others; DTensor or plain tensors.

The same steps as in cross_entropy.py and linear_cross_entropy.py, with a message to the other ranks where a step needs
numbers that are theirs. Arguments have passed the contract.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softmax_ext import contract
from softmax_ext.contract import LossOptions
from torch_ops import _modes as modes
from torch_ops._head.layout import each_row, lay_out, total
from torch_ops._head.per_row import per_row
from torch_ops._head.statistics import head_statistics
from torch_ops._head.sum import weighted_sum
from torch_ops._parallel.call import place_of, shard_here, together
from torch_ops._parallel.collectives import maximum, shared, summed
from torch_ops._parallel.head import HeadShard
from torch_ops._parallel.logits import LogitsShard
from torch_ops._parallel.mesh import Place, head_place, logits_place
from torch_ops._parallel.rules import sharded_rows
from torch_ops._parallel.sampled import sampled_shards
from torch_ops._parallel.shard import Shard
from torch_ops._parallel.statistics import of_head, of_logits
from torch_ops._reduction import Coefficients, coefficients, finish, reduce
from torch_ops._rows import dispatch as rows
from torch_ops._rows.targets import canonical
from torch_ops._rules.cross_entropy import row
from torch_ops._rules.plan import Plan
from torch_ops._rules.scaled import ignored, times
from torch_ops._rules.statistics import MORE, statistics_of


def cross_entropy(
    arrays: dict[str, Any], options: LossOptions, group: Any, *, axis: int, soft: bool, inplace: bool
) -> Any:
    """The loss of logits with class dimension `axis`."""
    op, shape = "cross_entropy", arrays["input"].shape
    place, found = place_of(op, arrays, group), [*arrays.values()]
    x = arrays["input"]
    inplace = inplace and place is not None and modes.may_overwrite(x)
    if place is None:
        place, found = logits_place(op, arrays, axis=axis, soft=soft)
    x, target, weight, token_weight, scale, probabilities = found
    along = axis if probabilities is not None else None
    shape = (*shape[:axis], *shape[axis + 1 :])
    here = shard_here(
        op, place, x.shape[axis], math.prod(x.shape[:axis] + x.shape[axis + 1 :]), target, arrays["input"].shape[axis]
    )
    classes = x.shape[axis] if here is None else here.classes
    if not soft:
        target = _canonical(op, target, classes, options.ignored, place, along)
    kind = torch.promote_types(x.dtype, torch.float32)
    given, by_scale = x, None
    if scale is not None:  # each rank multiplies its own classes
        own = scale if here is None else shared(scale, place.group)
        by_scale = lambda x: times(x, own, axis, ignored(x, target, axis))  # noqa: E731
        x = by_scale(x)
    plan = Plan.of(options, kind)
    w = plan.class_weight(weight, kind, soft=soft)
    if here is not None:
        per_row = sharded_rows(LogitsShard(plan, here, axis, inplace), x, target, w)
    else:
        values = row(x, target, w, axis, *plan[:4], False)
        per_row = dict(zip(plan.names, values, strict=False))
    names = [n for n in options.stats if n in MORE]
    if here is None:
        per_row |= statistics_of(names, given, target, axis, plan.scale, plan.softcap, by_scale)
    else:
        per_row |= of_logits(names, given, target, axis, plan, here, by_scale)
    by = _coefficients(per_row["lse"], target, weight, token_weight, options, classes, here, probabilities, axis)
    capped = lambda: rows.capped(x.detach(), plan.scale, plan.softcap)  # noqa: E731
    loss, stats = finish(per_row, capped, target, by, options, axis, partial(_reduce, place))
    return _results(loss, stats, options, place, here, shape, along)


def linear_cross_entropy(
    arrays: dict[str, Any],
    options: LossOptions,
    group: Any,
    *,
    soft: bool,
    shift: int,
    memory: str,
    chunk_size: int | None,
    sampled: tuple[int, Any] | None = None,
) -> Any:
    """The loss of a linear layer's logits."""
    op, lead, inner = "linear_cross_entropy", arrays["input"].shape[:-1], arrays["linear_weight"].shape[1:-1]
    place, found = place_of(op, arrays, group), [*arrays.values()]
    if place is None:
        place, found = head_place(op, arrays, axis=1 if inner else len(lead), soft=soft, shift=shift)
    x, lw, target, lb, weight, token_weight, scale, *low_rank, probabilities = found
    shape = (*lead[:-1], max(lead[-1] - shift, 0)) if shift else (*lead, *inner)
    here = shard_here(op, place, lw.shape[0], math.prod(x.shape[:-1]), target, arrays["linear_weight"].shape[0])
    classes = lw.shape[0] if here is None else here.classes
    if not soft:
        along = None if probabilities is None else 1 if inner else -1
        target = _canonical(op, target, classes, options.ignored, place, along)
    kind = torch.promote_types(x.dtype, torch.float32)
    plan = Plan.of(options, kind, memory == "lean", chunk_size)
    laid: Any = {"scale": scale, "low_rank": None if low_rank[0] is None else low_rank, "probabilities": probabilities}
    of = lay_out(x, lw, lb, target, token_weight, soft=soft, shift=shift, **laid)
    w = plan.class_weight(weight, kind, soft=soft)
    ones = torch.ones((), dtype=kind, device=x.device).expand(of.n, math.prod(inner))
    by = _coefficients(ones, of.target, weight, of.token_weight, options, classes, here, of.probabilities)
    source = None if here is None else HeadShard(plan, here)
    in_step = here is None or here.widest is not None or chunk_size is not None  # the ranks' chunks are the same rows
    if sampled is None and options.reduction != "none" and not options.stats and memory == "fast" and in_step:
        loss = _reduce(place, total(of, w, by, plan, weighted_sum if source is None else source.sum), by, options)
        return _results(loss, {}, options, place, here, shape)
    names = [n for n in options.stats if n in MORE]
    found = partial(head_statistics, names, plan) if here is None else partial(of_head, names, plan, here)
    each = per_row if source is None else source.rows
    if sampled is not None:
        each = sampled_shards(*sampled, place, here)
    numbers = each_row(of, w, plan, each, (names, found) if names else None)
    loss, stats = finish(numbers, lambda: numbers["argmax"], of.target, by, options, 1, partial(_reduce, place))
    loss = loss.reshape(of.shape) if options.reduction == "none" else loss
    stats = {name: of.as_given(value) for name, value in stats.items()}
    along = None if probabilities is None else len(shape) - len(inner)
    return _results(loss, stats, options, place, here, shape, along)


def _canonical(op: str, target: Tensor, classes: int, ignored: int, place: Place, along: int | None = None) -> Tensor:
    elsewhere = partial(contract.target_out_of_range_elsewhere, op, classes, ignored)
    return together(place, target, partial(canonical, op, target, classes, ignored, along=along), elsewhere)


def _coefficients(
    ones: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: LossOptions,
    classes: Any,
    here: Shard | None,
    probabilities: Tensor | None = None,
    dim: int = 1,
) -> Coefficients:
    """What each row's numbers are multiplied by; the weight of a target's class comes from the rank that has it."""
    if here is None:
        return coefficients(ones, target, weight, token_weight, options, classes, probabilities, dim)
    by = coefficients(ones, target, None, token_weight, options, 1, probabilities, dim)
    if by.smooth is not None:  # a tensor V is no Python number: of the rows' shape and type
        v = max(classes, 1) if isinstance(classes, int) else classes.clamp(min=1).to(ones.dtype).expand_as(ones)
        by = by._replace(smooth=by.smooth / v)
    if weight is None or target.is_floating_point():
        return by
    inside, at = here.local(target)
    w = weight.to(ones.dtype)
    own = w[at.clamp(min=0).unsqueeze(0)].squeeze(0) if here.count else w.sum().expand(at.shape)
    of_row = summed(own.where(inside, 0.0), here.group)
    if probabilities is not None:
        return by._replace(nll=None if by.nll is None else by.nll * of_row)
    return by._replace(nll=None if by.nll is None else by.nll * of_row, share=by.share * of_row, count=None)


def _reduce(place: Place, loss: Tensor, by: Coefficients, options: LossOptions) -> Tensor:
    """The sum or mean over the rows of all ranks."""
    loss = summed(loss, *place.row_groups)
    if options.reduction == "mean" and place.row_groups:
        kept = by.kept.any().to(loss.dtype)
        for group in place.row_groups:
            kept = maximum(kept, group)
        by = by._replace(share=summed(by.share.sum(), *place.row_groups), kept=kept > 0, count=None)
    return reduce(loss, by, options)


def _results(
    loss: Tensor,
    stats: dict[str, Tensor],
    options: LossOptions,
    place: Place,
    here: Shard | None,
    shape: Any,
    along: int | None = None,
) -> Any:
    """The loss, or (loss, statistics); `along`: where "logprob" has K numbers a row."""
    if here is not None and here.agreed is not None:
        loss = loss.where(here.agreed, math.nan)
    loss = place.result(loss, shape if options.reduction == "none" else ())
    each: dict[str, Any] = {}
    if along is not None and "logprob" in stats:
        each["logprob"] = (*shape[:along], stats["logprob"].shape[along], *shape[along:]), along
    found = {name: place.result(v, *each.get(name, (shape,))) for name, v in stats.items()}
    return (loss, found) if options.stats else loss
