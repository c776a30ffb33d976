"""Functions computed over chunks of rows, and every derivative of them likewise: memory is bounded by the chunk.

A `RowMap` takes some arguments by the row (cut into chunks) and shares the rest; results by the row are joined,
the others summed. Its pullback and its pushforward are row maps again, so one autograd.Function serves every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from torch_ops._head.chunks import join, spans
from torch_ops._rules.function import forward_rule

# A derivative of a derivative holds about this many arrays of the chunk's size.
DERIVED = 16


class RowMap(NamedTuple):
    """A function with a mark for each argument and result: by the row, or shared."""

    call: Callable[..., Sequence[Tensor]]
    rows: tuple[bool, ...]
    out_rows: tuple[bool, ...]

    def pullback(self, wrt: Sequence[int], along: Sequence[int]) -> RowMap:
        """(arguments, cotangents of the results `along`) -> cotangents of the arguments `wrt`."""
        count = len(self.rows)

        def call(*values: Any) -> Sequence[Tensor]:
            args, cotangents = values[:count], values[count:]
            moved = self._moved(args, wrt)
            pull: Any = torch.func.vjp(lambda *m: tuple(moved(m)[k] for k in along), *(args[i] for i in wrt))[1]
            return pull(tuple(cotangents))

        rows = (*self.rows, *(self.out_rows[k] for k in along))
        return RowMap(call, rows, tuple(self.rows[i] for i in wrt))

    def pushforward(self, wrt: Sequence[int], along: Sequence[int]) -> RowMap:
        """(arguments, tangents of the arguments `wrt`) -> tangents of the results `along`."""
        count = len(self.rows)

        def call(*values: Any) -> Sequence[Tensor]:
            args, tangents = values[:count], values[count:]
            moved = self._moved(args, wrt)
            # The pullback is linear in the cotangents, and its own pullback is the pushforward: forward mode
            # itself would not work here, inside a forward mode that is under way.
            out, pull, *_ = torch.func.vjp(lambda *m: tuple(moved(m)[k] for k in along), *(args[i] for i in wrt))
            push: Any = torch.func.vjp(lambda *c: pull(c), *(torch.zeros_like(v) for v in out))[1]
            return push(tuple(tangents))

        return RowMap(call, (*self.rows, *(self.rows[i] for i in wrt)), tuple(self.out_rows[k] for k in along))

    def _moved(self, args: Sequence[Any], wrt: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Tensor]]:
        def at(moving: Sequence[Any]) -> Sequence[Tensor]:
            full = list(args)
            for i, value in zip(wrt, moving, strict=True):
                full[i] = value
            return self.call(*full)

        return at


def run(fn: RowMap, size: int, *args: Any) -> tuple[Tensor, ...]:
    """The results of a row map, in plain functional ops: nothing is written over."""
    n = next(a.shape[0] for a, by_row in zip(args, fn.rows, strict=True) if by_row and a is not None)
    parts: list[Sequence[Tensor]] = []
    sums: list[Any] = [None] * len(fn.out_rows)
    pieces = spans(n, size)
    for i, j in pieces:
        cut = (a[i:j] if by_row and a is not None else a for a, by_row in zip(args, fn.rows, strict=True))
        piece = fn.call(*args) if len(pieces) == 1 else fn.call(*cut)
        parts.append([p for p, by_row in zip(piece, fn.out_rows, strict=True) if by_row])
        for k, by_row in enumerate(fn.out_rows):
            if not by_row:  # summed in the compute type, rounded once
                wide = piece[k].to(torch.promote_types(piece[k].dtype, torch.float32))
                sums[k] = wide if sums[k] is None else sums[k] + wide
        dtypes = [p.dtype for p in piece]
    joined = iter(join(parts))
    return tuple(next(joined) if by_row else sums[k].to(dtypes[k]) for k, by_row in enumerate(fn.out_rows))


class Chunked(Function):
    """`run` with derivatives: apply(fn, size, *args)."""

    @staticmethod
    def forward(fn: RowMap, size: int, *args: Any) -> tuple[Tensor, ...]:
        return run(fn, size, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.fn, ctx.size, *args = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args)
        ctx.save_for_forward(*args)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        return None, None, *pulled_back(ctx.fn, ctx.size, ctx.saved_tensors, cotangents, ctx.needs_input_grad[2:])

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, saved: Any, _fn: Any, _size: Any, *tangents: Tensor | None) -> Any:
        return pushed_forward(ctx.fn, ctx.size, saved, tangents, range(len(ctx.fn.out_rows)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, fn: RowMap, size: int, *args: Any) -> Any:
        return batched(info, in_dims[2:], fn, size, args)


def pulled_back(
    fn: RowMap, size: int, args: Sequence[Any], cotangents: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The cotangent of each argument that needs one, None elsewhere."""
    wrt = [i for i, need in enumerate(needs) if need]
    along = [k for k, c in enumerate(cotangents) if c is not None]
    out: list[Tensor | None] = [None] * len(args)
    if wrt and along:
        given = (cotangents[k] for k in along)
        values: Any = Chunked.apply(fn.pullback(wrt, along), size, *args, *given)
        for i, value in zip(wrt, values, strict=True):
            out[i] = value
    return out


def pushed_forward(
    fn: RowMap, size: int, args: Sequence[Any], tangents: Sequence[Tensor | None], along: Sequence[int]
) -> tuple[Tensor, ...]:
    """The tangents of the results `along`."""
    wrt = [i for i, t in enumerate(tangents) if t is not None]
    given = (tangents[i] for i in wrt)
    return Chunked.apply(fn.pushforward(wrt, along), size, *args, *given)  # pyright: ignore


def batched(info: Any, in_dims: Sequence[Any], fn: RowMap, size: int, args: Sequence[Any]) -> Any:
    """The vmap rule of a row map: a row is then that row of every example; what examples share is not repeated."""
    # The examples stand second in what comes by the row, first in the rest: rows are still cut along the first.
    dims = tuple(
        None if at is None or a is None else int(by_row) for a, at, by_row in zip(args, in_dims, fn.rows, strict=True)
    )
    given = (a if d is None else a.movedim(at, d) for a, at, d in zip(args, in_dims, dims, strict=True))
    out_dims = tuple(int(by_row) for by_row in fn.out_rows)

    def call(*values: Any) -> Sequence[Tensor]:
        return torch.func.vmap(lambda *one: tuple(fn.call(*one)), in_dims=dims, out_dims=out_dims)(*values)

    return Chunked.apply(fn._replace(call=call), max(1, size // info.batch_size), *given), out_dims
