"""A cross-entropy row whose scale is an array: its product with the logits exists by the piece.

legend:  s the row's scale, u = s x its logits, z = C(u), g = dL/du, H the entropy, M the target's mass, W that of
         smoothing's weights
formula: dL/dx = s g;  dL/ds = sum_j g_j x_j
numbers: without a cap  sum_j p_j x_j = (lse - H) / s, and x_t = (lse - nll) / s, so of a row's own numbers
         d nll/ds = (nll - M H) / s,  d lse/ds = (lse - H) / s,  d smooth/ds = (smooth - W H) / s
Elsewhere the sum is taken of the piece on its way. Derivatives of derivatives are those of the plain product and the
row: every rule there has every order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_ops import _modes as modes
from torch_ops._rows import dispatch as rows
from torch_ops._rules.cross_entropy import row
from torch_ops._rules.kept import given_back, kept
from torch_ops._rules.plan import Plan
from torch_ops._rules.scaled_pieces import along, beside, cut_along, number, pieces, place

# Where logits nearly agree nll - H cancels: both go to log V, what is left of them to s (x_t - mean x). So each row's H
# must lie this far below log V: half the variance of logits that are spread evenly.
_SPREAD = 0.03125


def scaled_row(
    scale: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dim: int,
    _one: float,
    softcap: float | None,
    smooth: bool,
    entropy: bool,
    inplace: bool,
) -> tuple[Tensor, ...]:
    """(nll, lse, [smooth], [entropy]) of each row of logits times its scale, with every derivative."""
    arrays = (logits, scale, target, weight)
    if not modes.is_transforming() and modes.is_eager(logits) and modes.may_write(*arrays):
        return ScaledRow.apply(*arrays, dim, softcap, smooth, entropy, inplace)  # pyright: ignore
    return _by_product(logits, scale, target, weight, dim, softcap, smooth, entropy)


def times(logits: Tensor, scale: Tensor, dim: int, nothing: Tensor | None = None) -> Tensor:
    """Logits times a row's number or one number, in the compute type; a -inf logit stays -inf.

    Of the rows that `nothing` marks the product is 0: they reach no result, not even through 0 * NaN.
    """
    x, s = rows.compute(logits), scale.to(torch.promote_types(logits.dtype, torch.float32))
    s = s.unsqueeze(dim) if s.dim() else s
    if nothing is not None:
        nothing = nothing.unsqueeze(dim)
        x, s = x.masked_fill(nothing, 0.0), s.masked_fill(nothing, 1.0) if scale.dim() else s
    lost = x == -math.inf
    # A masked logit has the gradient s g that its mass gives it, but says nothing of s, not even 0 * inf.
    masked = x * s.detach().abs().clamp(min=torch.finfo(s.dtype).tiny)
    return torch.where(lost, masked, x.masked_fill(lost, 0.0) * s)


def ignored(logits: Tensor, target: Tensor, dim: int) -> Tensor | None:
    """The rows that a target says nothing of; None for soft ones."""
    return None if target.is_floating_point() else rows.of_rows(target, logits.dim(), dim) == rows.IGNORED


def _by_product(
    logits: Tensor,
    scale: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dim: int,
    softcap: float | None,
    smooth: bool,
    entropy: bool,
) -> tuple[Tensor, ...]:
    """scaled_row in plain differentiable steps."""
    z = times(logits, scale, dim, ignored(logits, target, dim))
    return row(z, target, weight, dim, 1.0, softcap, smooth, entropy, False)[:-2]


class ScaledRow(Function):
    """(nll, lse, [smooth], [entropy]) of each row. Saves its inputs and some row numbers."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        logits, scale, target, weight, dim, softcap, smooth, entropy, ctx.inplace = args
        ctx.plan, ctx.dim = Plan(1.0, softcap, smooth, entropy), dim
        ctx.by_numbers = softcap is None and modes.can_look(scale) and bool((scale > 0).all())
        learns = ctx.by_numbers and scale.requires_grad
        wanted = ctx.plan._replace(entropy=entropy or learns)
        *found, m, rest = _values(logits, scale, target, weight, dim, wanted)
        numbers = [v.detach() for v in found] if learns else []
        ctx.save_for_backward(logits, scale, target, weight, m, kept(ctx, rest), *numbers)
        ctx.set_materialize_grads(False)
        return tuple(found[: ctx.plan.values])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, scale, target, weight, m, rest, *numbers = ctx.saved_tensors
        arrays, ups, plan, dim = (logits, scale, target, weight), ctx.plan.upstream(grads), ctx.plan, ctx.dim
        of_logits, of_scale, of_target, of_weight = needs = ctx.needs_input_grad[:4]
        if all(u is None for u in ups):
            return (None,) * 9
        again = torch.is_grad_enabled()
        # to be differentiated again, the rarer of the derivatives, or upstreams that somebody maps over
        if again or of_target or of_weight or not modes.may_write(*ups) or modes.is_transforming():
            return *_of_product(arrays, ups, plan, dim, needs, again), *(None,) * 5
        d_logits = d_scale = None
        if of_scale and ctx.by_numbers and ups[3] is None and _are_known(numbers, target, plan, logits.shape[dim]):
            d_scale, of_scale = _of_numbers(numbers, arrays, ups, dim), False
        if of_logits or of_scale:
            over = ctx.inplace and modes.is_untracked(logits, scale, *ups) and modes.is_sole(logits)
            state = (m, given_back(ctx, rest))
            d_logits, summed = _gradients(arrays, state, ups, plan, dim, (of_logits, of_scale), over)
            d_scale = summed if of_scale else d_scale
        if d_scale is not None:
            d_scale = (d_scale if scale.dim() else d_scale.sum()).to(scale.dtype)
        return d_logits, d_scale, *(None,) * 7


def _values(logits: Tensor, scale: Tensor, target: Tensor, weight: Any, dim: int, plan: Plan) -> list[Tensor]:
    """cross_entropy_fwd's, by pieces of the product."""
    layout: dict[str, Any] = {"dim": dim, "softcap": plan.softcap, "smooth": plan.smooth, "entropy": plan.entropy}
    factor = number(scale, logits)
    if factor is not None:
        return [*rows.cross_entropy_fwd(logits, target, weight, scale=factor, **layout)]
    parts = []
    for take, z in pieces(logits, beside(scale, logits, ignored(logits, target, dim), dim), dim):
        parts.append(rows.cross_entropy_fwd(z, take(target), weight, scale=1.0, **layout))
    at = cut_along(logits, dim)
    return (
        list(parts[0])
        if len(parts) == 1
        else [torch.cat(v, place(at, v[0], logits, dim)) for v in zip(*parts, strict=True)]
    )


def _gradients(
    arrays: Any, state: Any, ups: list[Any], plan: Plan, dim: int, wanted: tuple[bool, bool], over: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dL/dx, dL/ds of each row), those wanted, by pieces; dL/dx over the logits where `over` says so."""
    logits, scale, target, weight = arrays
    layout: dict[str, Any] = {"dim": dim, "softcap": plan.softcap}
    of_logits, of_scale = wanted
    out = logits.detach() if over else None
    factor = None if of_scale else number(scale, logits)
    if factor is not None:
        return rows.cross_entropy_bwd(logits, target, weight, *state, *ups, scale=factor, **layout, out=out), None
    s = beside(scale, logits, ignored(logits, target, dim), dim)
    if out is None and of_logits:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    sums = []
    for take, z in pieces(logits, s, dim):
        few: list[Any] = [None if u is None else take(u) for u in (*state, *ups)]
        rows.cross_entropy_bwd(z, take(target), weight, *few, scale=1.0, **layout, out=z)
        by = take(s) if s.dim() else s
        if of_scale:
            sums.append(along(take(logits), z, by, few[0], few[3], plan.softcap, dim))
        if out is not None:
            torch.mul(z, by, out=z)
            take(out).copy_(z)
    if not of_scale:
        return out, None
    d_scale = sums[0] if len(sums) == 1 else torch.cat(sums, place(cut_along(logits, dim), sums[0], logits, dim))
    nothing = ignored(logits, target, dim)
    return out, d_scale if nothing is None else d_scale.masked_fill(nothing, 0.0)


def _are_known(numbers: list[Tensor], target: Tensor, plan: Plan, classes: int) -> bool:
    """Whether the sums over classes are finite and differ: mass on a masked class hides what the others add."""
    if not numbers:
        return False
    sums = [numbers[0]] * target.is_floating_point() + [numbers[2]] * plan.smooth
    return all(bool(v.isfinite().all()) for v in sums) and bool(
        (numbers[-1] < math.log(max(classes, 1)) - _SPREAD).all()
    )


def _of_numbers(numbers: list[Tensor], arrays: Any, ups: list[Any], dim: int) -> Tensor:
    """dL/ds of each row from nll, lse, smooth and H."""
    logits, scale, target, weight = arrays
    nll, lse, *more = numbers
    h, out = more[-1], torch.zeros_like(lse)
    if ups[0] is not None and nll.dim() > lse.dim():  # K a row; a masked one, marked below 0, has no derivative
        each = torch.where(nll < 0, lse.unsqueeze(dim), nll) - h.unsqueeze(dim)
        out = out + (ups[0] * each).masked_fill(target < 0, 0.0).sum(dim)
    elif ups[0] is not None:
        mass: Any = 1.0
        if target.is_floating_point():
            w = rows.class_row(weight, logits, dim)
            mass = (target.to(lse.dtype) if w is None else target.to(lse.dtype) * w).sum(dim)
        out = out + ups[0] * (torch.where(nll == math.inf, mass * lse, nll) - mass * h)
    if ups[1] is not None:
        out = out + ups[1] * (lse - h)
    if ups[2] is not None:
        out = out + ups[2] * (more[0] - (logits.shape[dim] if weight is None else weight.sum()) * h)
    out = out / scale.to(out.dtype)
    nothing = ignored(logits, target, dim)
    return out if nothing is None else out.masked_fill(nothing, 0.0)


def _of_product(arrays: Any, ups: list[Any], plan: Plan, dim: int, needs: Any, again: bool) -> list[Tensor | None]:
    """The gradients of the plain product, which can be differentiated."""
    with torch.enable_grad():
        # Under names of their own: where one is made from another, the way between is the outer gradient's to go.
        given: list[Any] = [v if v is None else v.view_as(v) if again else v.detach() for v in arrays]
        for v, need in zip(given, needs, strict=True):
            if need and not v.requires_grad:
                v.requires_grad_()
        values = _by_product(given[0], given[1], given[2], given[3], dim, plan.softcap, plan.smooth, plan.entropy)
        up = (u for u, on in zip(ups, (True, True, plan.smooth, plan.entropy), strict=True) if on)
        ends = [(v, u) for v, u in zip(values, up, strict=True) if u is not None]
        wrt = [v for v, need in zip(given, needs, strict=True) if need]
        ways = [v for v, _ in ends], wrt, [u for _, u in ends]
        found = iter(torch.autograd.grad(*ways, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needs]
