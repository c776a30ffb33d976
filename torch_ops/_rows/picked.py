"""x . W[id] for K classes a row, and the two products that are its derivatives: kernels, or plain PyTorch ops.

legend:  x (N, D), W (V, D), ids (N, K): a class, IGNORED (no class at all) or INVALID (a row of NaN that takes nothing)
formula: z_ik = x_i . W[id_ik];  dX_i = sum_k c_ik W[id_ik];  dW[v] = sum of c_ik x_i over id_ik = v
c is (N, K), or has fewer columns: its first number is then that of all leading ids. An outer product may be begun with:
by_i of_all for dX, by_v of_all for dW. Half-precision rows are summed in float32; `wide` results are not rounded back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_ops._modes import is_plain
from torch_ops._rows import native, triton
from torch_ops._rows.arithmetic import compute
from torch_ops._rows.classes import IGNORED

# Bytes of rows of W that stand side by side where no kernel serves.
_WORKSPACE = 1 << 26


def picked_fwd(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """z (N, K), in the compute type: 0 at IGNORED, NaN at INVALID."""
    if (ops := _serving(x, w, ids)) is not None:
        return ops.picked_fwd(x, w, ids)
    out = []
    for i, j, rows, some in _pieces(w, ids):
        z = torch.bmm(rows, compute(_cut(x, i, j)).unsqueeze(-1)).squeeze(-1)
        out.append(z.masked_fill(some == IGNORED, 0.0).masked_fill(some < IGNORED, math.nan))
    return _joined(out, ids)


def picked_input_bwd(
    c: Tensor,
    w: Tensor,
    ids: Tensor,
    *,
    by: Tensor | None = None,
    of_all: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    """dX (N, D), in W's type or the compute type."""
    if (ops := _serving(w, c, ids, by, of_all)) is not None:
        return ops.picked_input_bwd(c, w, ids, by, of_all, wide)
    c = _each(c, ids.shape[1]).masked_fill(ids < 0, 0.0)
    dx = c.new_zeros(ids.shape[0], w.shape[1]) if by is None or of_all is None else torch.outer(by, of_all)
    parts: dict[tuple[int, int], Tensor] = {}
    for i, j, rows, some, at in _pieces(w, ids, places=True):
        part = torch.bmm(_cut(c, i, j, at, at + some.shape[1]).unsqueeze(1), rows).squeeze(1)
        parts[i, j] = parts[i, j] + part if (i, j) in parts else part
    dx = dx + torch.cat([*parts.values()]) if parts else dx
    dx = dx.masked_fill((ids < IGNORED).any(1, keepdim=True), math.nan)
    return dx if wide else dx.to(w.dtype)


def picked_weight_bwd(
    c: Tensor,
    x: Tensor,
    ids: Tensor,
    classes: int,
    *,
    by: Tensor | None = None,
    of_all: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    """dW (V, D), in x's type or the compute type: the same bits for any number of threads."""
    if (ops := _serving(x, c, ids, by, of_all)) is not None:
        return ops.picked_weight_bwd(c, x, ids, classes, by, of_all, wide)
    c = _each(c, ids.shape[1]).masked_fill(ids < 0, 0.0)
    dw = c.new_zeros(classes, x.shape[1]) if by is None or of_all is None else torch.outer(by, of_all)
    if classes:
        for i, j, k, m in _spans(ids, x.shape[1], c.itemsize):
            # a class that is not named takes 0 times the row, NaN included: nothing
            some = _cut(ids, i, j, k, m)
            row = torch.where((some < 0).unsqueeze(-1), 0.0, compute(_cut(x, i, j)).unsqueeze(1))
            terms = _cut(c, i, j, k, m).unsqueeze(-1) * row
            dw = dw.index_add(0, some.clamp(min=0).reshape(-1), terms.reshape(-1, x.shape[1]))
    return dw if wide else dw.to(x.dtype)


def _serving(x: Tensor, *more: Tensor | None) -> Any:
    """The ops whose kernels take these matrices, or None."""
    if not all(a is None or is_plain(a) for a in more):
        return None
    return native.ops if native.serves_matrix(x) else triton.ops if triton.serves_matrix(x) else None


def _each(c: Tensor, k: int) -> Tensor:
    """One coefficient an id."""
    lead = k - c.shape[1]
    return c if lead <= 0 else torch.cat([c[:, :1].expand(-1, lead), c], 1)


def _cut(a: Tensor, i: int, j: int, k: int = 0, m: int | None = None) -> Tensor:
    """a[i:j, k:m]; a itself where that is all of it, which the oldest of PyTorch's batching rules can map."""
    a = a if (i, j) == (0, a.shape[0]) else a[i:j]
    return a if m is None or (k, m) == (0, a.shape[1]) else a[:, k:m]


def _spans(ids: Tensor, features: int, itemsize: int) -> Iterator[tuple[int, int, int, int]]:
    """(begin, end) of rows and of their ids, so that the pieces' rows of W fit the workspace."""
    n, k = ids.shape
    fit = max(1, _WORKSPACE // max(1, features * itemsize))
    if not isinstance(n, int) or n * k <= fit:  # a graph's number of rows is a symbol
        yield 0, n, 0, k
        return
    width = max(1, min(k, fit))
    step = max(1, fit // width)
    for i in range(0, n, step):
        for m in range(0, k, width):
            yield i, min(n, i + step), m, min(k, m + width)


def _pieces(w: Tensor, ids: Tensor, *, places: bool = False) -> Iterator[Any]:
    """(begin, end, W[ids] of these rows in the compute type, the ids, [where they begin]); rows of no class are 0."""
    kind = torch.promote_types(w.dtype, torch.float32)
    for i, j, k, m in _spans(ids, w.shape[1], kind.itemsize):
        some = _cut(ids, i, j, k, m)
        if w.shape[0]:
            rows = compute(w[some.clamp(min=0)]).masked_fill((some < 0).unsqueeze(-1), 0.0)
        else:
            rows = w.new_zeros(*some.shape, w.shape[1], dtype=kind)
        yield (i, j, rows, some, k) if places else (i, j, rows, some)


def _joined(parts: list[Tensor], ids: Tensor) -> Tensor:
    """The pieces of _spans, side by side and below one another."""
    if len(parts) == 1:
        return parts[0]
    across = [p for p in parts if p.shape[0]]
    count = next(i for i in range(1, len(across) + 1) if sum(p.shape[1] for p in across[:i]) == ids.shape[1])
    return torch.cat([torch.cat(across[i : i + count], 1) for i in range(0, len(across), count)])
