"""The linear head's rows by chunks of tokens: one reused buffer of logits, matmuls around the row functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_ops._head.chunks import join, spans, that_fit
from torch_ops._head.linear import (
    PIECE_OF_WEIGHT,
    ClassGradient,
    MassGradient,
    first_maximum,
    formed_in,
    ignored_rows,
    logits,
    products,
    without,
)
from torch_ops._rows import dispatch as rows


def head_fwd(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    smooth: bool,
    entropy: bool,
    argmax: bool,
    chunk_size: int | None,
) -> list[Tensor]:
    """[nll, lse, [smooth], [entropy], m, rest, [argmax]] of each row."""
    buffer = _Buffer(x, linear_weight, target, chunk_size)
    parts = []
    for i, j in buffer.spans:
        z = logits(x[i:j], linear_weight, linear_bias, buffer.rows(j - i))
        t, layout = target[i:j], {"dim": 1, "scale": scale, "softcap": softcap}
        values = [*rows.cross_entropy_fwd(z, t, weight, **layout, smooth=smooth, entropy=entropy)]
        if argmax:
            values.append(first_maximum(z, scale, softcap)[1])
        parts.append(values)
    return join(parts)


def head_bwd(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    m: Tensor,
    rest: Tensor,
    _h: Tensor | None,
    upstream: list[Tensor | None],
    *,
    scale: float,
    softcap: float | None,
    needs: tuple[bool, ...],
    chunk_size: int | None,
) -> list[Tensor | None]:
    """[dX, dW, db, d_target, d_weight], those needed, from the rows' upstream gradients."""
    buffer = _Buffer(x, linear_weight, target, chunk_size)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    shared = ClassGradient(linear_weight, linear_bias, needs[1], needs[2], len(buffer.spans) > 1)
    mass = MassGradient(target, weight, *needs[3:5])
    ignored = ignored_rows(target)
    for i, j in buffer.spans:
        xi = without(x[i:j], ignored, i, j).to(buffer.data.dtype)
        z = logits(xi, linear_weight, linear_bias, buffer.rows(j - i))
        ups: list[Any] = [u if u is None else u[i:j] for u in upstream]
        mass.add(z, m[i:j], rest[i:j], ups, scale, softcap, slice(i, j), slice(None))
        if any(needs[:3]):
            args = (z, target[i:j], weight, m[i:j], rest[i:j], *ups)
            rows.cross_entropy_bwd(*args, dim=1, scale=scale, softcap=softcap, out=z)
            products(z, xi, linear_weight, dx, shared, ignored, i, j)
    return [dx, *shared.rounded(), *mass.done()]


def head_fwd_bwd(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    a: Tensor | None,
    s: Tensor | None,
    c: Tensor | None,
    index: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    needs: tuple[bool, ...],
    chunk_size: int | None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """([nll, lse, [smooth]], [dX, dW, db]) of sum_i a_i nll_i + s_i smooth_i + c_i lse_i^2, as they were summed.

    `index` names the rows of x that are judged; each chunk gathers its own.
    """
    n = x.shape[0] if index is None else index.shape[0]
    buffer = _Buffer(x, linear_weight, target, chunk_size, n)
    make = torch.empty_like if index is None else torch.zeros_like
    dx = make(x, dtype=buffer.data.dtype, memory_format=torch.contiguous_format) if needs[0] else None
    summed = len(buffer.spans) > 1 or buffer.data.dtype != x.dtype
    shared = ClassGradient(linear_weight, linear_bias, needs[1], needs[2], summed)
    ignored = ignored_rows(target)
    parts = []
    for i, j in buffer.spans:
        at = None if index is None else index[i:j]
        xi = without(x[i:j] if at is None else x.index_select(0, at), ignored, i, j).to(buffer.data.dtype)
        z = logits(xi, linear_weight, linear_bias, buffer.rows(j - i))
        ai, si, ci = (v if v is None else v[i:j] for v in (a, s, c))
        t, layout, kinds = target[i:j], {"dim": 1, "scale": scale, "softcap": softcap}, {"smooth": s is not None}
        if ci is None:
            values = rows.cross_entropy_fwd_bwd(z, t, weight, ai, None, si, None, **layout, **kinds, entropy=False)
        else:
            # d(c lse^2) = 2 c lse dlse: lse comes first, so the chunk is visited twice.
            values = rows.cross_entropy_fwd(z, t, weight, **layout, **kinds, entropy=False)
            m, rest = values[-2:]
            rows.cross_entropy_bwd(z, t, weight, m, rest, ai, 2.0 * ci * values[1], si, None, **layout, out=z)
        parts.append(values[:-2])
        products(z, xi, linear_weight, dx, shared, ignored, i, j, at)
    return join(parts), [dx, *shared.unrounded()]


def rows_that_fit(x: Tensor, classes: int, kind: torch.dtype, chunk_size: int | None) -> int:
    """The chunk size asked for, or how many rows of logits of the type `kind` fit the workspace."""
    # Two pieces at most: W's before it is multiplied, dW's before it is added. Of the chunk's rows, x and dX in
    # another type than theirs.
    beside = 0 if x.dtype in (torch.float32, torch.float64) else 2 * PIECE_OF_WEIGHT * kind.itemsize
    features = 0 if kind == x.dtype else 2 * x.shape[1]
    return that_fit(chunk_size, classes + features, kind.itemsize, beside, x.device)


class _Buffer:
    """The chunk's logits, in memory that every chunk writes over."""

    def __init__(
        self, x: Tensor, linear_weight: Tensor, target: Tensor, chunk_size: int | None, n: int | None = None
    ) -> None:
        n, classes, kind = x.shape[0] if n is None else n, linear_weight.shape[0], formed_in(x, target)
        self.spans = spans(n, rows_that_fit(x, classes, kind, chunk_size))
        self.data = x.new_empty(max(j - i for i, j in self.spans), classes, dtype=kind)

    def rows(self, count: int) -> Tensor:
        return self.data[:count]
