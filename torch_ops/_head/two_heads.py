"""The rows of two heads of the same classes: by chunks of rows (fast), or slices of the classes (lean).

legend:  s = X WT + b, t = Y UT + c (N, V), never whole; G = dL/ds from the row functions, a the rows' upstream
formula: dX = G W,  dW = GT X,  db = sum_i G_i; the teacher's Y, U, c are constants
lean:    a slice's rows are a part of whole rows. forward_kl's and reverse_kl's follow from each part's; jsd and tv are
         summed in a second visit, given the state of whole rows. The backward pass is told that state.
`ranks` joins what the ranks of a group have of the classes; None where all are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torch_ops._head.chunks import join, spans, that_fit
from torch_ops._head.linear import PIECE_OF_WEIGHT, Gradients, Linear, formed_in
from torch_ops._head.rounding import levelled, scaled
from torch_ops._rows import divergence_parts as parts
from torch_ops._rows.divergence import Pair, divergence_bwd, divergence_fwd, divergence_fwd_bwd

MIXED = ("jsd", "tv")  # kinds whose parts know nothing of whole rows
_TOGETHER = 16  # slices whose rows' numbers wait to become one part's


class Plan(NamedTuple):
    """The static part of two heads' rows."""

    pair: Pair
    lean: bool
    chunk_size: int | None

    @classmethod
    def of(cls, *flat: Any) -> Plan:
        """From what an op of a graph takes: all but the classes' dimension, which stands second."""
        *pair, lean, chunk_size = flat
        return cls(Pair(1, *pair), lean, chunk_size)


class Ranks(Protocol):
    """Who has which of the classes."""

    def merged(self, value: Tensor, state: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
        """divergence_parts.merged of all ranks' parts."""
        ...

    def total(self, own: Tensor) -> Tensor:
        """The ranks' sum."""
        ...

    def size(self, x: Tensor, kind: torch.dtype, chunk_size: int | None) -> int:
        """How many rows all ranks' chunks have."""
        ...


def met(
    student: Tensor, teacher: Tensor, keep: Tensor | None, pair: Pair, ranks: Ranks | None
) -> tuple[Tensor, Tensor]:
    """divergence_fwd of whole rows, whoever has their classes."""
    if ranks is None:
        return divergence_fwd(student, teacher, keep, pair=pair)
    value, state = ranks.merged(*parts.part(student, teacher, keep, pair=pair), pair)
    found = ranks.total(parts.sums(student, teacher, keep, state, pair=pair)) if pair.kind in MIXED else None
    return parts.whole(value, state, found, keep)


def fwd(arrays: Any, plan: Plan, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """(the divergences, the state of each row) of x, linear_weight, linear_bias, the teacher's three, keep."""
    if not plan.lean:
        found = [met(s, t, keep, plan.pair, ranks) for *_, s, t, keep in _Chunks(arrays, plan, ranks)]
        value, state = join(found)
        return value, state
    pair, keep, slices = plan.pair, arrays[-1], _Slices(arrays, plan)
    each: list[tuple[Tensor, Tensor]] = []
    for _, _, s, t in slices:
        each.append(parts.part(s, t, keep, pair=pair))
        if len(each) == _TOGETHER:
            each = [_joined(each, pair)]
    if len(slices.spans) == 1 and ranks is None:
        return parts.whole(*each[0], None, keep)
    value, state = _joined(each, pair)
    if ranks is not None:
        value, state = ranks.merged(value, state, pair)
    found = None
    if pair.kind in MIXED:
        found = torch.zeros_like(torch.stack([value, value]))
        for _, _, s, t in slices:
            found += parts.sums(s, t, keep, state, pair=pair)
        found = found if ranks is None else ranks.total(found)
    return parts.whole(value, state, found, keep)


def _joined(each: list[tuple[Tensor, Tensor]], pair: Pair) -> tuple[Tensor, Tensor]:
    """Parts of rows as one part."""
    return each[0] if len(each) == 1 else parts.merged(*map(torch.stack, zip(*each, strict=True)), pair=pair)


def bwd(arrays: Any, state: Tensor, up: Tensor, needs: Sequence[bool], plan: Plan) -> list[Tensor | None]:
    """Those needed of [dX, dW, db] from the state of whole rows; a shard's dX is to be summed over the ranks."""
    x = arrays[0]
    peak, up = _levelled(arrays[0], arrays[1], up)
    if plan.lean:
        return [g if g is None else scaled(g, peak, x.dtype) for g in _by_classes(arrays, state, up, needs, plan)]

    def visit(s: Tensor, t: Tensor, keep: Tensor | None, i: int, j: int) -> None:
        divergence_bwd(s, t, keep, state[i:j], up[i:j], pair=plan.pair, out=s)

    return [g if g is None else scaled(g, peak, x.dtype) for g in _by_rows(arrays, needs, plan, None, visit)]


def fwd_bwd(
    arrays: Any, up: Tensor, needs: Sequence[bool], plan: Plan, ranks: Ranks | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """(the divergences, [dX, dW, db] from the rows' upstream gradients as they were summed), by chunks of rows."""
    values: list[Sequence[Tensor]] = []
    peak, up = _levelled(arrays[0], arrays[1], up)

    def visit(s: Tensor, t: Tensor, keep: Tensor | None, i: int, j: int) -> None:
        if ranks is None:
            values.append([divergence_fwd_bwd(s, t, keep, up[i:j].contiguous(), pair=plan.pair)])
            return
        value, state = met(s, t, keep, plan.pair, ranks)
        divergence_bwd(s, t, keep, state, up[i:j], pair=plan.pair, out=s)
        values.append([value])

    found = _by_rows(arrays, needs, plan, ranks, visit)
    return join(values)[0], [g if g is None or peak is None else scaled(g, peak, peak.dtype) for g in found]


def _by_rows(
    arrays: Any, needs: Sequence[bool], plan: Plan, ranks: Ranks | None, visit: Callable[..., None]
) -> list[Tensor | None]:
    """[dX, dW, db] as they were summed, where a visit writes a chunk's gradient over the student's logits."""
    x, chunks = arrays[0], _Chunks(arrays, plan, ranks)
    dx = torch.empty_like(x, dtype=chunks.kind, memory_format=torch.contiguous_format) if needs[0] else None
    head, summed = chunks.heads[0], len(chunks.spans) > 1 or chunks.kind != x.dtype
    grads = Gradients(head, dx, head.gradient(needs[1], needs[2], False, summed=summed), None)
    for i, j, xi, s, t, keep in chunks:
        visit(s, t, keep, i, j)
        grads.add(s, xi, i, j)
    return grads.unrounded()[:3]


def _by_classes(arrays: Any, state: Tensor, up: Tensor, needs: Sequence[bool], plan: Plan) -> list[Tensor | None]:
    """The same slice by slice: each has its own part of dW, and adds to dX."""
    slices = _Slices(arrays, plan)
    x, wide = slices.rows[0], torch.promote_types(slices.kind, torch.float32)
    dx = torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) if needs[0] else None
    shared = slices.heads[0].gradient(needs[1], needs[2], False, summed=False)
    for i, j, s, t in slices:
        divergence_bwd(s, t, arrays[-1], state, up, pair=plan.pair, out=s)
        if dx is not None and j > i:
            slices.heads[0].part(i, j).add_input_gradient(dx, s)
        shared.part(i, j).add(s, x)
    return [dx, *shared.unrounded()[:2]]


def _levelled(x: Tensor, linear_weight: Tensor, up: Tensor) -> tuple[Tensor | None, Tensor]:
    """Upstream gradients that float16 holds: a factor of 1/N would flush most of G to 0."""
    indices = x.new_zeros(0, dtype=torch.int64)
    peak, (up, *_) = levelled((x, linear_weight, None, None, indices, None), [up, None, None, None])
    return peak, up


def formed_in_both(x: Tensor, teacher_x: Tensor) -> torch.dtype:
    """The type both heads' logits are formed in."""
    indices = x.new_zeros(0, dtype=torch.int64)
    return torch.promote_types(formed_in(x, indices), formed_in(teacher_x, indices))


class _Chunks:
    """Both heads' logits of a chunk of rows, in memory that every chunk writes over."""

    def __init__(self, arrays: Any, plan: Plan, ranks: Ranks | None) -> None:
        x, lw, lb, tx, tw, tb, self.keep = arrays
        self.kind = formed_in_both(x, tx)
        self.rows, self.heads = (x, tx), (Linear(lw, lb), Linear(tw, tb))
        if ranks is None:
            size = that_fit(plan.chunk_size, 2 * lw.shape[0], self.kind.itemsize, 0, x.device)
        else:
            size = ranks.size(x, self.kind, plan.chunk_size)
        self.spans = spans(x.shape[0], size)
        self.data = x.new_empty(2, max(j - i for i, j in self.spans), lw.shape[0], dtype=self.kind)

    def __iter__(self) -> Iterator[Any]:
        """(begin, end, the student's rows, its logits, the teacher's logits, keep)."""
        for i, j in self.spans:
            kept = None if self.keep is None else self.keep[i:j]
            rows = [x[i:j].to(self.kind) for x in self.rows]
            if kept is not None:  # 0 * NaN would reach dW
                rows = [x.masked_fill(~kept.unsqueeze(1), 0.0) for x in rows]
            logits = (h.logits(x, out[: j - i]) for h, x, out in zip(self.heads, rows, self.data, strict=True))
            yield i, j, rows[0], *logits, kept


class _Slices:
    """Both heads' logits of a slice of the classes, all rows at once, in memory that every slice writes over."""

    def __init__(self, arrays: Any, plan: Plan) -> None:
        x, lw, lb, tx, tw, tb, keep = arrays
        self.kind = formed_in_both(x, tx)
        rows = [v.to(self.kind) for v in (x, tx)]
        if keep is not None:  # 0 * NaN would reach dW
            rows = [v.masked_fill(~keep.unsqueeze(1), 0.0) for v in rows]
        self.rows, self.heads = rows, (Linear(lw, lb), Linear(tw, tb))
        # As in lean.py: in half precision dX is summed in float32, and pieces of the weights in another type.
        half = x.dtype not in (torch.float32, torch.float64)
        beside = x.numel() * (4 + self.kind.itemsize) if half else 0
        if self.kind != x.dtype:
            beside += 2 * PIECE_OF_WEIGHT * self.kind.itemsize
        n = x.shape[0]
        self.spans = spans(lw.shape[0], that_fit(plan.chunk_size, 2 * n, self.kind.itemsize, beside))
        self.data = x.new_empty(2, n * max(j - i for i, j in self.spans), dtype=self.kind)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(begin, end, the student's logits, the teacher's logits)."""
        n = self.rows[0].shape[0]
        for i, j in self.spans:
            heads = (h.part(i, j) for h in self.heads)
            room = (d[: n * (j - i)].view(n, j - i) for d in self.data)
            student, teacher = (h.logits(x, z) for h, x, z in zip(heads, self.rows, room, strict=True))
            yield i, j, student, teacher
