"""What surrounds the rows of a divergence: shift, leading dimensions, scales, rows that do not count, the reduction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from softmax_ext import contract
from torch_ops._head.columns import apart, in_parts
from torch_ops._head.divergence import divergence_rows, divergence_sum
from torch_ops._modes import can_look, is_none
from torch_ops._rows.divergence import Pair

# What a divergence of two heads is of, in the order that everything below takes.
ARRAYS = (
    "input",
    "linear_weight",
    "linear_bias",
    "teacher_input",
    "teacher_weight",
    "teacher_bias",
    "token_weight",
    "keep",
    "logit_scale",
)


def pair_of(options: contract.DivergenceOptions, dim: int, dtype: torch.dtype) -> Pair:
    """The static part of the rows, of logits of a type."""
    kind = torch.finfo(torch.promote_types(dtype, torch.float32))
    return Pair(dim, options.kind, options.beta, *options.fitted(kind.tiny, kind.max))


def of_heads(
    arrays: Sequence[Any],
    options: contract.DivergenceOptions,
    *,
    shift: int,
    memory: str,
    chunk_size: int | None,
    rows: Callable[..., Tensor] = divergence_rows,
    total: Callable[..., Tensor] = divergence_sum,
    over: Callable[[Tensor], Tensor] = lambda own: own,
) -> Tensor:
    """The divergence of two heads' checked arrays; `over` sums what several devices have of rows."""
    x, lw, lb, tx, tw, tb, token_weight, keep, scale = arrays
    kind = torch.promote_types(x.dtype, tx.dtype)
    pair = pair_of(options, 1, kind)
    if scale is not None and scale.dim() and shift:
        scale = scale[..., : max(x.shape[-2] - shift, 0)]
    x, tx, token_weight, keep, shape = _laid_out(x, tx, token_weight, keep, shift)
    if scale is not None:
        x, lw, lb = _scaled(x, lw, lb, scale.reshape(-1) if scale.dim() else scale, keep)
    some, index = keep, None
    if keep is not None and can_look(keep) and not keep.all():  # rows that do not count never reach a matmul
        index, some = keep.nonzero().squeeze(1), None
        x, tx = x.index_select(0, index), tx.index_select(0, index)
    ones = x.new_ones((), dtype=torch.promote_types(kind, torch.float32)).expand(math.prod(shape))
    weight = weight_of(ones, token_weight, keep)
    given = (x, lw, lb, tx, tw, tb, some)
    if options.reduction != "none" and memory == "fast":
        a = weight if index is None else weight.index_select(0, index)
        return reduced(total(*given, a, chunk_size, *pair), weight, keep, options.reduction, over)
    values = rows(*given, memory == "lean", chunk_size, *pair)
    if index is not None:
        values = values.new_zeros(math.prod(shape)).index_copy(0, index, values)
    losses = values if token_weight is None else weight * values
    if options.reduction == "none":
        return losses.reshape(shape)
    return reduced(losses.sum(), weight, keep, options.reduction, over)


def weight_of(like: Tensor, token_weight: Tensor | None, keep: Tensor | None) -> Tensor:
    """What each row's divergence is multiplied by: 0 where it is not kept."""
    weight = torch.ones_like(like) if token_weight is None else token_weight.to(like.dtype)
    return weight if keep is None else torch.where(keep, weight, 0.0)


def reduced(
    total: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    reduction: str,
    over: Callable[[Tensor], Tensor] = lambda own: own,
) -> Tensor:
    """The sum or mean from the summed divergence."""
    if keep is None and reduction == "mean" and (is_compiling() or is_none(weight.numel())):
        # Of no row at all the share is 0, and infinite what comes back: 0 times it would be NaN.
        total = total.masked_fill(~torch.ones_like(weight, dtype=torch.bool).any(), 0.0)
    total = over(total)
    if reduction == "sum":
        return total
    share = over(weight.sum())
    if keep is None:
        return total / share
    some = over(keep.any().to(total.dtype)) > 0  # exchanged before dividing: a gradient through an unused 0 / 0 is NaN
    return torch.where(some, total / torch.where(some, share, 1.0), torch.nan)


def _scaled(x: Tensor, lw: Tensor, lb: Any, scale: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Any]:
    """(s x, W) of rows, or with a bias (s x, s) and (W, b); s in two parts, and b twice, where one would be rounded."""
    if keep is not None:  # such a row reaches no result, not even through 0 * NaN
        x = x.masked_fill(~keep.unsqueeze(-1), 0.0)
        scale = scale.masked_fill(~keep, 1.0) if scale.dim() else scale
    columns = [] if lb is None else in_parts(scale, x)
    if lb is not None:
        finite, lb = apart(lb)
        lw = torch.cat([lw, *[finite.unsqueeze(1)] * len(columns)], 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    x = (x.to(wide) * (scale.unsqueeze(-1) if scale.dim() else scale)).to(x.dtype)
    return torch.cat([x, *columns], 1), lw, lb


def _laid_out(
    x: Tensor, tx: Tensor, token_weight: Tensor | None, keep: Tensor | None, shift: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, ...]]:
    """(both heads' rows (N, D) and (N, E), token_weight and keep (N,), the rows' shape)."""
    if shift:
        count = max(x.shape[-2] - shift, 0)
        x, tx = x[..., :count, :], tx[..., :count, :]
        token_weight, keep = (v if v is None else v[..., shift:] for v in (token_weight, keep))
    shape, n = tuple(x.shape[:-1]), math.prod(x.shape[:-1])
    token_weight, keep = (v if v is None else v.reshape(n) for v in (token_weight, keep))
    return x.reshape(n, x.shape[-1]), tx.reshape(n, tx.shape[-1]), token_weight, keep, shape
