"""A linear loss laid out as rows: shift, leading dimensions, K-dimensional weights and ignored rows are seen to here.

n judged rows of x (those that `index` names, in their order), P positions of a K-dimensional weight (1 without).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_ops import _modes as modes
from torch_ops._head.columns import apart, in_parts
from torch_ops._head.per_row import per_row
from torch_ops._head.sum import weighted_sum
from torch_ops._reduction import Coefficients
from torch_ops._rows.classes import IGNORED, INVALID, of_rows
from torch_ops._rules.plan import Plan


class Layout(NamedTuple):
    """What a linear loss is the loss of."""

    x: Tensor  # (rows, D)
    index: Tensor | None  # (n,): the rows judged; None: all
    linear_weight: Tensor
    linear_bias: Tensor | None
    up: Tensor | None  # (V, r) or (V, d1, .., dK, r): of rows (x, u) it multiplies u
    target: Tensor  # (n, P) class indices, canonical, (n, V, P) probabilities, or (n, K, P) class indices
    probabilities: Tensor | None  # (n, K, P), of those
    token_weight: Tensor | None  # (n, P)
    scale: Tensor | None  # (n, P), of x's rows, where they differ by position
    shape: tuple[int, ...]  # of the losses

    @property
    def n(self) -> int:
        """How many rows are judged."""
        return self.target.shape[0]

    def as_given(self, value: Tensor) -> Tensor:
        """(n, P) in the losses' shape; (n, K, P) with K where the target had it."""
        if value.dim() == 2:
            return value.reshape(self.shape)
        lead = len(self.shape) - max(self.linear_weight.dim() - 2, 0)
        return value.reshape(*self.shape[:lead], value.shape[1], *self.shape[lead:])


def lay_out(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    *,
    soft: bool,
    shift: int,
    probabilities: Tensor | None = None,
    scale: Tensor | None = None,
    low_rank: Sequence[Tensor] | None = None,
    beside: Sequence[Tensor] | None = None,
) -> Layout:
    """The layout of checked arguments with canonical targets; `probabilities`: of K classes a row."""
    full = soft or probabilities is not None
    *lead, features = x.shape
    inner, index = linear_weight.shape[1:-1], None
    if shift:
        kept = max(lead[-1] - shift, 0)
        target = target[..., shift:, :] if full else target[..., shift:]
        probabilities = None if probabilities is None else probabilities[..., shift:, :]
        token_weight = None if token_weight is None else token_weight[..., shift:]
        scale = scale[..., :kept] if scale is not None and scale.dim() else scale
        if math.prod(lead[:-1]) == 1:
            x = x[..., :kept, :]
        else:  # the rows judged are no slice: each chunk gathers its own, x is not copied
            index = torch.arange(math.prod(lead), device=x.device).reshape(lead)[..., :kept].reshape(-1)
        x, lead = x.reshape(-1, features) if features else x.reshape(math.prod(x.shape[:-1]), 0), [*lead[:-1], kept]
    else:
        x = x.reshape(math.prod(lead), features)
    n, positions = math.prod(lead), math.prod(inner)
    if full:  # V or K
        shape = (n, target.shape[len(lead)], positions)
        target = target.reshape(shape)
        probabilities = None if probabilities is None else probabilities.reshape(shape)
    else:
        target = target.reshape(n, positions)
    token_weight = None if token_weight is None else token_weight.reshape(n, positions)
    scale = scale.reshape(n, positions) if scale is not None and scale.dim() else scale
    rest = (target, probabilities, token_weight, None, (*lead, *inner))
    of = Layout(x, index, linear_weight, linear_bias, None, *rest)
    if scale is None is low_rank is beside:
        return of
    return _side_by_side(of, scale, low_rank, beside if beside is None else (beside[0].reshape(n, -1), beside[1]))


def _side_by_side(of: Layout, scale: Tensor | None, low_rank: Any, beside: Any) -> Layout:
    """The same head over rows (x, u) that hold the scale and what A makes of x: its gradients are plain products.

    s (x WT + (x AT) BT + b) = (s x) WT + (s x AT) BT + s bT, so x grows by r numbers a row, or two for the bias, and
    neither W nor the logits are touched: dL/ds is <dL/d(x, u), (x, u)>, from the gradient that there is anyway.
    """
    x = of.x if of.index is None else of.x.index_select(0, of.index)
    nothing = None if of.target.is_floating_point() else of_rows(of.target, 3, 1) == IGNORED
    if nothing is not None and (not modes.can_look(nothing) or nothing.any()):
        # such a row reaches no result, not even through 0 * NaN in what multiplies its gradient
        unjudged = nothing.all(1, keepdim=True)
        x = x.masked_fill(unjudged, 0.0)
        beside = beside if beside is None else (beside[0].masked_fill(unjudged, 0.0), beside[1])
        scale = scale.masked_fill(nothing, 1.0) if scale is not None and scale.dim() else scale
    more, ups = ([], []) if beside is None else ([beside[0]], [beside[1]])
    if low_rank is not None:
        more.append(F.linear(x, low_rank[0]))
        ups.append(low_rank[1])
    by_position = scale is not None and scale.dim() > 0 and of.linear_weight.dim() > 2
    columns: list[Tensor] = []
    if scale is not None and of.linear_bias is not None:
        columns = [x.new_ones(x.shape[0], 1)] if by_position else in_parts(scale.reshape(-1), x)
        finite, masked = apart(of.linear_bias)
        ups += [finite.unsqueeze(-1)] * len(columns)
        of = of._replace(linear_bias=masked)
    x = torch.cat([x, *more], 1) if more else x
    if scale is not None and not by_position:
        x, scale = _times(x, scale.reshape(-1)), None
    x = torch.cat([x, *columns], 1) if columns else x
    return of._replace(x=x, index=None, up=torch.cat(ups, -1) if len(ups) > 1 else ups[0] if ups else None, scale=scale)


def _times(x: Tensor, scale: Tensor) -> Tensor:
    """Rows times their numbers, or one number, formed in the compute type and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * scale.to(wide).unsqueeze(-1)).to(x.dtype)


def total(
    of: Layout,
    weight: Tensor | None,
    by: Coefficients,
    plan: Plan,
    sum_of: Callable[..., Tensor] = weighted_sum,
) -> Tensor:
    """The sum of the rows' losses over rows and positions."""
    parts = []
    for p, (x, lw, lb, up, target) in enumerate(_heads(of)):
        nll, smooth, square = (_column(c, p, by.share) for c in by[:3])
        if smooth is not None and not target.is_floating_point():
            invalid = of_rows(target, 2, 1) == INVALID
            smooth = smooth.masked_fill(invalid, torch.nan)  # nothing else may tell, as in `combine`
        index, of_row = of.index, [nll, smooth, square]
        kept = _kept(target)
        if kept is not None:
            target, index = target.index_select(0, kept), _both(index, kept)
            of_row = [c if c is None else c.index_select(0, kept) for c in of_row]
        parts.append(sum_of(x, lw, lb, up, target, weight, *of_row, index, *plan))
    if not parts:
        return _nothing(of, by.share.dtype)
    return torch.stack(parts).sum() if len(parts) != 1 else parts[0]


def each_row(
    of: Layout,
    weight: Tensor | None,
    plan: Plan,
    rows: Callable[..., Sequence[Tensor]] = per_row,
    more: tuple[Sequence[str], Callable[..., Sequence[Tensor]]] | None = None,
) -> dict[str, Tensor]:
    """The rows' numbers by name, (n, P); nll of K classes a row (n, K, P). `more`: names and the function of others."""
    names, columns = plan.names, []
    others = () if more is None else more[0]
    for x, lw, lb, up, target in _heads(of):
        kept = _kept(target)
        index = _both(of.index, kept)
        x = x if index is None else x.index_select(0, index)
        target = target if kept is None else target.index_select(0, kept)
        values = rows(x, lw, lb, up, target, weight, *plan)
        values = [v for i, v in enumerate(values) if i < len(names) or i == len(names) + 2]  # all but m and rest
        if more is not None:
            values = [*values, *more[1](x, lw, lb, up, target)]
        if kept is not None:
            values = [v.new_zeros(of.n, *v.shape[1:]).index_copy(0, kept, v) for v in values]
        columns.append(values)
    if not columns:
        empty = _nothing(of, torch.promote_types(of.x.dtype, torch.float32)).expand(of.n, 0)
        found = {**dict.fromkeys((*names, *others), empty), **dict.fromkeys(("argmax", "rank"), empty.detach().long())}
        if of.probabilities is None:
            return found
        each = empty.unsqueeze(1).expand(of.target.shape)
        return {**found, "nll": each, "rank": each.detach().long()}
    joined = (v[0].unsqueeze(-1) if len(v) == 1 else torch.stack(v, -1) for v in zip(*columns, strict=True))
    return dict(zip([*names, *["argmax"] * plan.argmax, *others], joined, strict=True))


def _nothing(of: Layout, dtype: torch.dtype) -> Tensor:
    """0, connected to everything: the sum over no positions."""
    arrays = [of.x[:0], of.linear_weight, *(v for v in (of.linear_bias, of.up) if v is not None)]
    return torch.stack([v.sum(dtype=dtype) for v in arrays]).sum()


def _heads(of: Layout) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]]:
    """(x, linear_weight (V, D), linear_bias (V,), up (V, r), target (n,) or (n, V)) of each position."""
    if of.linear_weight.dim() == 2:  # unbound, the weight's gradient would be copied
        return iter([(of.x, of.linear_weight, of.linear_bias, of.up, of.target.squeeze(-1))])
    weights = of.linear_weight.flatten(1, -2).unbind(1)
    biases = [None] * len(weights) if of.linear_bias is None else of.linear_bias.flatten(1).unbind(1)
    ups = [None] * len(weights) if of.up is None else of.up.flatten(1, -2).unbind(1)
    targets = of.target.unbind(-1)
    xs = [of.x] * len(weights)
    if of.scale is not None:
        marks = [torch.zeros_like(t[:, 0]) if t.is_floating_point() else of_rows(t, 2, 1) for t in targets]
        without = (of.x.masked_fill((m == IGNORED).unsqueeze(1), 0.0) for m in marks)
        xs = [_times(x, s) for x, s in zip(without, of.scale.unbind(1), strict=True)]
    return zip(xs, weights, biases, ups, targets, strict=True)


def _column(c: Tensor | float | None, p: int, like: Tensor) -> Tensor | None:
    """One position's coefficients, (n,)."""
    return c if c is None else c[..., p] if isinstance(c, Tensor) else torch.full_like(like[:, p], c)


def _kept(target: Tensor) -> Tensor | None:
    """The rows that are not ignored, where eager CPU code finds any that are: they never reach a matmul."""
    if (
        target.is_floating_point()
        or not modes.can_look(target)
        or not (ignored := of_rows(target, 2, 1) == IGNORED).any()
    ):
        return None
    return (~ignored).nonzero().squeeze(1)


def _both(index: Tensor | None, kept: Tensor | None) -> Tensor | None:
    return kept if index is None else index if kept is None else index.index_select(0, kept)
