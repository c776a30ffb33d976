"""A head's rows by chunks of rows: one reused buffer of logits, matmuls around the row functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ops._head.chunks import join, spans, that_fit
from torch_ops._head.linear import (
    PIECE_OF_WEIGHT,
    Gradients,
    Linear,
    MassGradient,
    first_maximum,
    formed_in,
    ignored_rows,
    without,
)
from torch_ops._rows import dispatch as rows
from torch_ops._rules.plan import Plan


def fwd(x: Tensor, head: Linear, target: Tensor, weight: Tensor | None, plan: Plan) -> list[Tensor]:
    """[nll, lse, [smooth], [entropy], m, rest, [argmax]] of each row."""
    buffer = Buffer(x, head, target, plan.chunk_size)
    parts = []
    for i, j in buffer.spans:
        z = head.logits(x[i:j], buffer.rows(j - i))
        values = [*rows.cross_entropy_fwd(z, target[i:j], weight, **plan.wanted)]
        if plan.argmax:
            values.append(first_maximum(z, plan.scale, plan.softcap)[1])
        parts.append(values)
    return join(parts)


def bwd(
    x: Tensor,
    head: Linear,
    target: Tensor,
    weight: Tensor | None,
    m: Tensor,
    rest: Tensor,
    _h: Tensor | None,
    upstream: list[Tensor | None],
    needs: Sequence[bool],
    plan: Plan,
) -> list[Tensor | None]:
    """[dX, dW, db, d_up, d_target, d_weight], those needed, from the rows' upstream gradients."""
    buffer = Buffer(x, head, target, plan.chunk_size)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    ignored = ignored_rows(target)
    grads = Gradients(head, dx, head.gradient(*needs[1:4], summed=len(buffer.spans) > 1), ignored)
    mass = MassGradient(target, weight, *needs[4:6])
    for i, j in buffer.spans:
        xi = without(x[i:j], ignored, i, j).to(buffer.data.dtype)
        z = head.logits(xi, buffer.rows(j - i))
        ups: list[Any] = [u if u is None else u[i:j] for u in upstream]
        mass.add(z, m[i:j], rest[i:j], ups, plan.row, slice(i, j))
        if any(needs[:4]):
            rows.cross_entropy_bwd(z, target[i:j], weight, m[i:j], rest[i:j], *ups, **plan.row, out=z)
            grads.add(z, xi, i, j)
    return [*grads.rounded(), *mass.done()]


def fwd_bwd(
    x: Tensor,
    head: Linear,
    target: Tensor,
    weight: Tensor | None,
    a: Tensor | None,
    s: Tensor | None,
    c: Tensor | None,
    index: Tensor | None,
    needs: Sequence[bool],
    plan: Plan,
    visit: Callable[..., Sequence[Tensor]],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """([nll, lse, [smooth]], [dX, dW, db, d_up]) of sum_i a_i nll_i + s_i smooth_i + c_i lse_i^2, as they were summed.

    `index` names the rows of x that are judged; each chunk gathers its own. `visit` is that of a chunk's rows.
    """
    n = x.shape[0] if index is None else index.shape[0]
    buffer = Buffer(x, head, target, plan.chunk_size, n)
    make = torch.empty_like if index is None else torch.zeros_like
    dx = make(x, dtype=buffer.data.dtype, memory_format=torch.contiguous_format) if needs[0] else None
    summed = len(buffer.spans) > 1 or buffer.data.dtype != x.dtype
    ignored = ignored_rows(target)
    grads = Gradients(head, dx, head.gradient(*needs[1:4], summed=summed), ignored)
    parts = []
    for i, j in buffer.spans:
        at = None if index is None else index[i:j]
        xi = without(x[i:j] if at is None else x.index_select(0, at), ignored, i, j).to(buffer.data.dtype)
        z = head.logits(xi, buffer.rows(j - i))
        parts.append(visit(z, target[i:j], weight, *(v if v is None else v[i:j] for v in (a, s, c)), plan.row))
        grads.add(z, xi, i, j, at)
    return join(parts), grads.unrounded()


def visit(z: Tensor, target: Tensor, weight: Any, a: Any, s: Any, c: Any, row: dict[str, Any]) -> Sequence[Tensor]:
    """[nll, lse, [smooth]] of a chunk's rows, and over their logits the gradient of their sum."""
    wanted: dict[str, Any] = {**row, "smooth": s is not None, "entropy": False}
    if c is None:
        return rows.cross_entropy_fwd_bwd(z, target, weight, a, None, s, None, **wanted)[:-2]
    # d(c lse^2) = 2 c lse dlse: lse comes first, so the chunk is visited twice.
    *values, m, rest = rows.cross_entropy_fwd(z, target, weight, **wanted)
    rows.cross_entropy_bwd(z, target, weight, m, rest, a, 2.0 * c * values[1], s, None, **row, out=z)
    return values


def rows_that_fit(x: Tensor, classes: int, kind: torch.dtype, chunk_size: int | None) -> int:
    """The chunk size asked for, or how many rows of logits of the type `kind` fit the workspace."""
    # Two pieces at most: W's before it is multiplied, dW's before it is added. Of the chunk's rows, x and dX in
    # another type than theirs.
    beside = 0 if x.dtype in (torch.float32, torch.float64) else 2 * PIECE_OF_WEIGHT * kind.itemsize
    features = 0 if kind == x.dtype else 2 * x.shape[1]
    return that_fit(chunk_size, classes + features, kind.itemsize, beside, x.device)


class Buffer:
    """The chunk's logits, in memory that every chunk writes over."""

    def __init__(self, x: Tensor, head: Linear, target: Tensor, chunk_size: int | None, n: int | None = None) -> None:
        n, kind = x.shape[0] if n is None else n, formed_in(x, target)
        self.spans = spans(n, rows_that_fit(x, head.classes, kind, chunk_size))
        self.data = x.new_empty(max(j - i for i, j in self.spans), head.classes, dtype=kind)

    def rows(self, count: int) -> Tensor:
        return self.data[:count]
