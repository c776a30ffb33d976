"""Divergences of rows whose classes lie on the ranks of a group: two sources of a shard's rows, and their Functions.

A shard's rows are a part of whole rows (_rows/divergence_parts.py): the ranks gather each other's states once, and for
jsd and tv sum what their classes add. The first derivative is then a row function's, given the state of whole rows, and
as exact as that of one device. A derivative of it is taken of the same gradient in plain ops (_rules/divergence_parts),
whose lse and mean are differentiable sums over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torch_ops._head import two_heads
from torch_ops._head.chunks import that_fit
from torch_ops._head.divergence import LinearDivergenceSum, one_pass
from torch_ops._head.row_map import DERIVED, Chunked, RowMap
from torch_ops._head.two_heads import Plan
from torch_ops._parallel.collectives import gathered, shared, summed
from torch_ops._parallel.shard import Shard
from torch_ops._rows import divergence_parts as parts
from torch_ops._rows.divergence import Pair, divergence_bwd
from torch_ops._rules.divergence_parts import gradient_of_part, lse_of_part, weighed_part

# Rows of a chunk where no rank can know the most classes of any without a look, which would be a sync.
_ROWS = 512


class Ranks:
    """What the ranks of a shard's group tell each other about rows."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def merged(self, value: Tensor, state: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
        """The numbers of whole rows from the ranks' parts: the same on every rank, to the last bit."""
        if not value.numel():
            return value, state
        each = gathered(torch.cat([value.unsqueeze(-1), state], -1), self.shard.group)
        return parts.merged(each[..., 0], each[..., 1:], pair=pair)

    def total(self, own: Tensor) -> Tensor:
        """The ranks' sum."""
        return summed(own, self.shard.group)

    def size(self, x: Tensor, kind: torch.dtype, chunk_size: int | None) -> int:
        """All ranks' chunks are those of the rank with the most classes."""
        if chunk_size is None and self.shard.widest is None:
            return _ROWS
        return that_fit(chunk_size, 2 * (self.shard.widest or 0), kind.itemsize, 0, x.device)


class Source(Protocol):
    """How a shard's rows of both sides come about; the arrays' last is `keep`."""

    pair: Pair
    shard: Shard

    def forward(self, *arrays: Any) -> tuple[Tensor, Tensor]:
        """(the divergences, the state) of whole rows."""
        ...

    def backward(self, arrays: Any, state: Tensor, up: Tensor, needs: Sequence[bool]) -> list[Any]:
        """Those needed of the student's gradients, from the state."""
        ...

    def lse(self, *arrays: Any) -> Tensor:
        """The lse of the shard's classes, differentiable."""
        ...

    def weighed(self, arrays: Any, state: Tensor, lse: Tensor) -> Tensor:
        """sum p u over the shard's classes, differentiable."""
        ...

    def gradients(self, arrays: Any, state: Tensor, lse: Tensor, mean: Any, up: Tensor) -> list[Any]:
        """The student's gradients, differentiable; None of what is None."""
        ...


class LogitsPair:
    """Rows of logits; arrays: student, teacher, keep."""

    def __init__(self, pair: Pair, shard: Shard) -> None:
        self.pair, self.shard = pair, shard

    def forward(self, *arrays: Any) -> tuple[Tensor, Tensor]:
        student, teacher, keep = arrays
        return two_heads.met(student, teacher, keep, self.pair, Ranks(self.shard))

    def backward(self, arrays: Any, state: Tensor, up: Tensor, needs: Sequence[bool]) -> list[Any]:
        student, teacher, keep = arrays
        return [divergence_bwd(student, teacher, keep, state, up, pair=self.pair)] if needs[0] else []

    def lse(self, *arrays: Any) -> Tensor:
        return lse_of_part(arrays[0], arrays[2], self.pair)

    def weighed(self, arrays: Any, state: Tensor, lse: Tensor) -> Tensor:
        student, teacher, keep = arrays
        return weighed_part(student, teacher, keep, state, lse, self.pair)[0].sum(self.pair.dim)

    def gradients(self, arrays: Any, state: Tensor, lse: Tensor, mean: Any, up: Tensor) -> list[Any]:
        student, teacher, keep = arrays
        return [gradient_of_part(student, teacher, keep, state, lse, mean, up, self.pair), None, None]


class HeadPair:
    """Rows of two heads; arrays: x, linear_weight, linear_bias, the teacher's three, keep. Inputs are replicated."""

    def __init__(self, plan: Plan, shard: Shard) -> None:
        self.plan, self.pair, self.shard = plan, plan.pair, shard

    def forward(self, *arrays: Any) -> tuple[Tensor, Tensor]:
        return two_heads.fwd(arrays, self.plan, Ranks(self.shard))

    def backward(self, arrays: Any, state: Tensor, up: Tensor, needs: Sequence[bool]) -> list[Any]:
        dx, *found = two_heads.bwd(arrays, state, up, needs, self.plan)
        return [g for g in (dx if dx is None else summed(dx, self.shard.group), *found) if g is not None]

    def lse(self, *arrays: Any) -> Tensor:
        def call(x: Tensor, lw: Tensor, lb: Any, keep: Any) -> tuple[Tensor]:
            return (lse_of_part(F.linear(x, lw, lb), keep, self.pair),)

        x, lw, lb, *_, keep = arrays
        return self._run(call, (True, False, False, True), (True,), shared(x, self.shard.group), lw, lb, keep)[0]

    def weighed(self, arrays: Any, state: Tensor, lse: Tensor) -> Tensor:
        def call(x: Any, lw: Any, lb: Any, tx: Any, tw: Any, tb: Any, keep: Any, state: Any, lse: Any) -> tuple[Tensor]:
            student, teacher = _logits(x, lw, lb, tx, tw, tb, keep)
            return (weighed_part(student, teacher, keep, state, lse, self.pair)[0].sum(1),)

        given = (shared(arrays[0], self.shard.group), *arrays[1:], state, lse)
        return self._run(call, (*_BY_ROW, True, True), (True,), *given)[0]

    def gradients(self, arrays: Any, state: Tensor, lse: Tensor, mean: Any, up: Tensor) -> list[Any]:
        def call(*args: Any) -> list[Tensor]:
            x, lw, lb, tx, tw, tb, keep, *numbers = args
            x = x if keep is None else x.masked_fill(~keep.unsqueeze(1), 0.0)
            given: Any = (*_logits(x, lw, lb, tx, tw, tb, keep), keep, *numbers, self.pair)
            g = gradient_of_part(*given).to(x.dtype)
            return [g @ lw, g.t() @ x, *([] if lb is None else [g.sum(0)])]

        marks = (True, False, *([] if arrays[2] is None else [False]))
        given = (shared(arrays[0], self.shard.group), *arrays[1:], state, lse, mean, up)
        dx, *found = self._run(call, (*_BY_ROW, *[True] * 4), marks, *given)
        return [summed(dx, self.shard.group), *found, *[None] * (6 - len(found))]

    def _run(self, call: Any, by_row: tuple[bool, ...], out: tuple[bool, ...], *arrays: Any) -> Any:
        x, lw = arrays[:2]
        size = that_fit(None if self.plan.lean else self.plan.chunk_size, 2 * DERIVED * lw.shape[0], x.itemsize)
        return Chunked.apply(RowMap(call, by_row, out), size, *arrays)

    def rows(self, *args: Any) -> Tensor:
        """As divergence_rows."""
        return sharded(self, *args[:7])

    def sum(self, *args: Any) -> Tensor:
        """As divergence_sum."""
        *arrays, a = args[:8]
        if one_pass(*arrays, a):
            return LinearDivergenceSum.apply(*arrays, a, self.plan, self)  # pyright: ignore[reportReturnType]
        return (a * self.rows(*arrays)).sum()

    def forward_backward(
        self, arrays: Any, a: Tensor, needs: Sequence[bool], plan: Plan
    ) -> tuple[Tensor, list[Tensor | None]]:
        """As two_heads.fwd_bwd: the ranks go by the same chunks of rows, and tell each other each chunk's numbers."""
        values, grads = two_heads.fwd_bwd(arrays, a, needs, plan, Ranks(self.shard))
        if grads[0] is not None:
            grads[0] = summed(grads[0], self.shard.group)
        return values, grads


_BY_ROW = (True, False, False, True, False, False, True)


def _logits(x: Any, lw: Any, lb: Any, tx: Any, tw: Any, tb: Any, keep: Any) -> tuple[Tensor, Tensor]:
    if keep is not None:  # such a row reaches no result, not even through 0 * NaN
        x, tx = (v.masked_fill(~keep.unsqueeze(1), 0.0) for v in (x, tx))
    student, teacher = F.linear(x, lw, lb), F.linear(tx, tw, tb)
    kind = torch.promote_types(student.dtype, teacher.dtype)
    return student.to(kind), teacher.to(kind)


def sharded(source: Source, *arrays: Any) -> Tensor:
    """The divergence of each row, replicated."""
    return ShardedDivergence.apply(source, *arrays)  # pyright: ignore[reportReturnType]


class ShardedDivergence(Function):
    """The divergence of each row. Saves its inputs and the state of whole rows."""

    @staticmethod
    def forward(ctx: Any, source: Source, *arrays: Any) -> Tensor:
        value, state = source.forward(*arrays)
        ctx.source = source
        ctx.save_for_backward(*arrays, state)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs, out = ctx.needs_input_grad[1:], [None] * len(ctx.needs_input_grad)
        found: Any = ShardedDivergenceBwd.apply(ctx.source, needs, *ctx.saved_tensors, grads[0])
        for i, g in zip((i for i, need in enumerate(needs) if need), found, strict=True):
            out[i + 1] = g
        return tuple(out)


class ShardedDivergenceBwd(Function):
    """Those needed of the student's gradients as a function of everything: linear in the upstream."""

    @staticmethod
    def forward(ctx: Any, source: Source, needs: Sequence[bool], *tensors: Any) -> tuple[Tensor, ...]:
        ctx.source, ctx.needs = source, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        *arrays, state, up = tensors
        return tuple(source.backward(arrays, state, up, needs))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        source, again = ctx.source, torch.is_grad_enabled()
        out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        with torch.enable_grad():
            # Under names of their own: where one is made from another, the way between is the outer gradient's to go.
            given: list[Any] = [v if v is None else v.view_as(v) if again else v.detach() for v in ctx.saved_tensors]
            wanted = ctx.needs_input_grad[2:]
            for v, need in zip(given, wanted, strict=True):
                if need and not v.requires_grad:
                    v.requires_grad_()
            *arrays, state, up = given
            found = _gradients(source, arrays, state, up)
            needed = [g for g, need in zip(found, ctx.needs, strict=True) if need]
            moved = [(g, c) for g, c in zip(needed, cotangents, strict=True) if c is not None]
            wrt = [(i, v) for i, (v, need) in enumerate(zip(given, wanted, strict=True)) if need]
            if moved and wrt:
                ways = [g for g, _ in moved], [v for _, v in wrt], [c for _, c in moved]
                grads = torch.autograd.grad(*ways, create_graph=again, allow_unused=True)
                for (i, _), g in zip(wrt, grads, strict=True):
                    out[i + 2] = g
        return tuple(out)


def _gradients(source: Source, arrays: Any, state: Tensor, up: Tensor) -> list[Any]:
    """The student's gradients, made of what the ranks' classes have in common."""
    group, top = source.shard.group, state[..., 0]
    total = summed(torch.exp(source.lse(*arrays) - top), group)
    lse = shared(top + torch.log(total), group)
    mean = None
    if source.pair.kind != "forward_kl":
        mean = shared(summed(source.weighed(arrays, state, lse), group), group)
    return source.gradients(arrays, state, lse, mean, shared(up, group))
