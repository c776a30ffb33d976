"""Softmaxes of rows whose classes lie on the ranks of a group, and what lies about their means, to every order.

legend:  p a row's softmax over all ranks, of which each holds its own classes; <u> = sum_j p_j u_j over all ranks
         q = 1 - p of a class that holds more than half, the sum of the others; k, w cotangents
softmax: dp = p (dz - <dz>), d log p = dz - <dz>
pulled:  k - p sum(k), what log p makes of a cotangent; where p > 1/2 it is k q - p (the others' sum)
centred: u - <u>, the transpose of `pulled`; as u - c about c of its own where p > 1/2, else about <u> as it was rounded
tilted:  p (g - <g>), its own transpose
Each is linear in one argument; by p, of which the sum is always 1, their derivatives are -sum(k) (u - <u>) of the first
two and (g - <g>) (w - <w>) of the last. No difference of numbers of all ranks is formed that leaves nothing but their
roundings: the rank that holds nearly all of a row gives its number before anything is summed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from torch_ops._parallel.collectives import maximum, shared, summed
from torch_ops._rows.arithmetic import shifted


class Whole(NamedTuple):
    """What a rank knows of whole rows of logits, `dim` the class dimension; row numbers keep it."""

    dim: int
    group: Any
    p: Tensor
    log_p: Tensor
    top: Tensor  # whether the class holds more than half
    q: Tensor  # 1 - p of such a class
    some: Tensor  # whether one of the row's classes is such

    def sums(self, *own: Tensor) -> tuple[Tensor, ...]:
        """Over all classes, in one message."""
        return summed(torch.stack([v.sum(self.dim, keepdim=True) for v in own]), self.group).unbind()

    def total(self, own: Tensor) -> Tensor:
        """The sum over all classes, for each rank's own use."""
        return shared(summed(own.sum(self.dim, keepdim=True), self.group), self.group)

    def about(self, u: Tensor, p: Tensor) -> Tensor:
        """u - <u>."""
        mean, own = self.sums(p * u, u.masked_fill(~self.top, 0.0))
        c = torch.where(self.some, own, mean)
        g = u - c.masked_fill(~c.isfinite(), 0.0)
        return g - self.sums(p * g)[0]


def largest_of(z: Tensor, dim: int) -> Tensor:
    """Each row's largest on this rank, -inf where it has none or NaN; that a row's sums tell of."""
    if not z.shape[dim]:
        return torch.full_like(z.sum(dim, keepdim=True), -math.inf)
    own = z.amax(dim, keepdim=True)
    return own.masked_fill(own.isnan(), -math.inf)


def whole_of(z: Tensor, dim: int, group: Any) -> Whole:
    """Of a rank's logits in the compute type."""
    z = z.detach()
    own = largest_of(z, dim)
    m = maximum(own, group)
    held, top = own == m, torch.zeros_like(z, dtype=torch.bool)
    if z.shape[dim]:
        top = top.scatter(dim, z.argmax(dim, keepdim=True), held)
    d, e = shifted(z, m.where(m.isfinite(), 0.0))
    parts = torch.stack([e.masked_fill(top, 0.0).sum(dim, keepdim=True), held.to(e.dtype)])
    rest, holders = summed(parts, group).unbind()
    rest = (rest + (holders - 1.0)).masked_fill(~m.isfinite(), math.nan)
    some = rest < 1.0
    return Whole(dim, group, e / (1.0 + rest), d - torch.log1p(rest), top & some, rest / (1.0 + rest), some)


class Softmax(Function):
    """(p, log p) of logits z as `whole_of` has found them."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, whole: Whole) -> tuple[Tensor, Tensor]:
        ctx.whole = whole
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z)
        return whole.p.detach(), whole.log_p.detach()

    @staticmethod
    def backward(ctx: Any, dp: Tensor | None, dl: Tensor | None) -> Any:
        (z,), whole = ctx.saved_tensors, ctx.whole
        p: Any = Softmax.apply(z, whole)[0]  # pyright: ignore[reportOptionalSubscript]
        found: list[Any] = [] if dp is None else [Tilted.apply(dp, p, whole)]
        found += [] if dl is None else [Pulled.apply(dl, p, whole)]
        return (sum(found[1:], found[0]) if found else None), None


class Centred(Function):
    """u - <u>."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, p: Tensor, whole: Whole) -> Tensor:
        ctx.whole = whole
        ctx.save_for_backward(u, p)
        return whole.about(u, p)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (k,), (u, p), whole = cotangents, ctx.saved_tensors, ctx.whole
        by_p = -whole.total(k) * Centred.apply(u, p, whole) if ctx.needs_input_grad[1] else None
        return (Pulled.apply(k, p, whole) if ctx.needs_input_grad[0] else None), by_p, None


class Pulled(Function):
    """k - p sum(k)."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, p: Tensor, whole: Whole) -> Tensor:
        ctx.whole = whole
        ctx.save_for_backward(k, p)
        others, own = whole.sums(k.masked_fill(whole.top, 0.0), k.masked_fill(~whole.top, 0.0))
        return torch.where(whole.top, k * whole.q - p * others, k - p * (others + own))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (w,), (k, p), whole = cotangents, ctx.saved_tensors, ctx.whole
        to_k: Any = Centred.apply(w, p, whole)
        by_p = -whole.total(k) * to_k if ctx.needs_input_grad[1] else None
        return to_k, by_p, None


class Tilted(Function):
    """p (g - <g>)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, p: Tensor, whole: Whole) -> Tensor:
        ctx.whole = whole
        ctx.save_for_backward(g, p)
        return p * whole.about(g, p)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (w,), (g, p), whole = cotangents, ctx.saved_tensors, ctx.whole
        to_g = Tilted.apply(w, p, whole) if ctx.needs_input_grad[0] else None
        by_p: Any = None
        if ctx.needs_input_grad[1]:
            by_p = Centred.apply(g, p, whole) * Centred.apply(w, p, whole)  # pyright: ignore
        return to_g, by_p, None
