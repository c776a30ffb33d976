"""A divergence's rows whose student's scale is an array: its product with the logits exists by the piece.

legend:  s the row's scale, u = s x the student's logits, g = dL/du
formula: dL/dx = s g;  dL/ds = sum_j g_j x_j
Derivatives of derivatives are those of the plain product and the row: every rule there has every order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_ops import _modes as modes
from torch_ops._rows.divergence import Pair, divergence_bwd, divergence_fwd
from torch_ops._rules.divergence import divergence_row
from torch_ops._rules.scaled import times
from torch_ops._rules.scaled_pieces import along, beside, cut_along, number, pieces, place


def scaled_divergence(scale: Tensor, student: Tensor, teacher: Tensor, keep: Tensor | None, *pair: Any) -> Tensor:
    """The divergence of each row of the student's logits times its scale, with every derivative."""
    arrays = (student, scale, teacher, keep)
    if not modes.is_transforming() and modes.is_eager(student) and modes.may_write(*arrays):
        return ScaledDivergence.apply(*arrays, Pair(*pair))  # pyright: ignore
    return _by_product(*arrays, Pair(*pair))


def _by_product(student: Tensor, scale: Tensor, teacher: Tensor, keep: Tensor | None, pair: Pair) -> Tensor:
    """scaled_divergence in plain differentiable steps."""
    z = times(student, scale, pair.dim, None if keep is None else ~keep)
    kind = torch.promote_types(z.dtype, teacher.dtype)
    return divergence_row(z.to(kind), teacher.to(kind), keep, *pair)


class ScaledDivergence(Function):
    """The divergence of each row. Saves its inputs and the state."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        student, scale, teacher, keep, ctx.pair = args
        # One number that nobody learns goes into the kernels; a state is told in units of theirs.
        ctx.factor = None if scale.requires_grad or student.dtype != teacher.dtype else number(scale, student)
        value, state = _values(student, scale, teacher, keep, ctx.pair, ctx.factor)
        ctx.save_for_backward(student, scale, teacher, keep, state)
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (up,) = upstream
        student, scale, teacher, keep, state = ctx.saved_tensors
        needs, again = ctx.needs_input_grad[:2], torch.is_grad_enabled()
        # to be differentiated again, or upstreams that somebody maps over
        if again or not modes.may_write(up) or modes.is_transforming():
            return *_of_product((student, scale, teacher, keep), up, ctx.pair, needs, again), None, None, None
        if ctx.factor is not None:
            pair = ctx.pair._replace(scale=ctx.factor)
            return divergence_bwd(student, teacher, keep, state, up, pair=pair), *(None,) * 4
        d_student, d_scale = _gradients(student, scale, teacher, keep, state, up, ctx.pair, needs)
        if d_scale is not None:
            d_scale = (d_scale if scale.dim() else d_scale.sum()).to(scale.dtype)
        return d_student, d_scale, None, None, None


def _values(
    student: Tensor, scale: Tensor, teacher: Tensor, keep: Any, pair: Pair, factor: float | None
) -> tuple[Tensor, Tensor]:
    """divergence_fwd's, by pieces of the product."""
    if factor is not None:
        return divergence_fwd(student, teacher, keep, pair=pair._replace(scale=factor))
    parts, s = [], beside(scale, student, None if keep is None else ~keep, pair.dim)
    for take, z in pieces(student, s, pair.dim):
        kind = torch.promote_types(z.dtype, teacher.dtype)
        some = None if keep is None else take(keep)
        parts.append(divergence_fwd(z.to(kind), take(teacher).to(kind), some, pair=pair))
    if len(parts) == 1:
        return parts[0]
    at = place(cut_along(student, pair.dim), parts[0][0], student, pair.dim)
    value, state = (torch.cat(v, at) for v in zip(*parts, strict=True))
    return value, state


def _gradients(
    student: Tensor,
    scale: Tensor,
    teacher: Tensor,
    keep: Any,
    state: Tensor,
    up: Tensor,
    pair: Pair,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """(dL/dx, dL/ds of each row), those wanted, by pieces."""
    of_student, of_scale = wanted
    s = beside(scale, student, None if keep is None else ~keep, pair.dim)
    out = torch.empty_like(student, memory_format=torch.contiguous_format) if of_student else None
    sums = []
    for take, z in pieces(student, s, pair.dim):
        kind = torch.promote_types(z.dtype, teacher.dtype)
        some, by = None if keep is None else take(keep), take(s) if s.dim() else s
        known = torch.stack([take(v) for v in state.unbind(-1)], -1)
        g = divergence_bwd(z.to(kind), take(teacher).to(kind), some, known, take(up), pair=pair)
        if of_scale:
            sums.append(along(take(student), g, by, known[..., 0], None, pair.softcap, pair.dim))
        if out is not None:
            take(out).copy_(g * by)
    if not of_scale:
        return out, None
    at = cut_along(student, pair.dim)
    d_scale = sums[0] if len(sums) == 1 else torch.cat(sums, place(at, sums[0], student, pair.dim))
    return out, d_scale if keep is None else d_scale.masked_fill(~keep, 0.0)


def _of_product(arrays: Any, up: Tensor, pair: Pair, needs: Any, again: bool) -> list[Tensor | None]:
    """The gradients of the plain product, which can be differentiated."""
    with torch.enable_grad():
        # Under names of their own: where one is made from another, the way between is the outer gradient's to go.
        given: list[Any] = [v if v is None else v.view_as(v) if again else v.detach() for v in arrays]
        for v, need in zip(given, needs, strict=False):
            if need and not v.requires_grad:
                v.requires_grad_()
        wrt = [v for v, need in zip(given, needs, strict=False) if need]
        found = iter(
            torch.autograd.grad(_by_product(given[0], given[1], given[2], given[3], pair), wrt, up, create_graph=again)
        )
    return [next(found) if need else None for need in needs]
