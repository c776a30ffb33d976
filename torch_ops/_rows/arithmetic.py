"""What the plain rows are made of: the logits' exponentials about their maximum, and sums that do not cancel.

A row's m is its largest logit z, rest the sum of exp(z - m) over every position but one of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_ops._modes import is_none
from torch_ops._rows.classes import MASKED


def compute(x: Tensor) -> Tensor:
    """x in the type the arithmetic is done in."""
    return x if x.dtype == torch.float64 else x.float()


def capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """z = softcap tanh(scale logits / softcap), or scale logits; a -inf logit stays -inf."""
    z = compute(logits)
    if scale != 1.0:
        z = z * scale
    if softcap is None:
        return z
    return torch.where(logits == -math.inf, z, softcap * torch.tanh(z / softcap))


def slope(logits: Tensor, scale: float, softcap: float | None) -> Tensor | float:
    """dz/dlogits = scale (1 - tanh^2), written 4q / (1 + q)^2 with q = exp(-2|.|): no cancellation."""
    if softcap is None:
        return scale
    u = compute(logits) * scale / softcap
    # Not abs: its derivative at 0 is 0, which is right once but not twice.
    q = torch.exp(2.0 * torch.where(u > 0, -u, u))
    return scale * (4.0 * q / (1.0 + q).square())


def class_row(weight: Tensor | None, like: Tensor, dim: int) -> Tensor | None:
    """Class weights (V,) shaped to broadcast along `dim`."""
    if weight is None:
        return None
    return weight.reshape([-1 if i == dim else 1 for i in range(like.dim())])


def weight_sums(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the sum of class weights, that of all but the largest, which may hold nearly all of it, the largest)."""
    if is_none(weight.shape[0]):
        return weight.sum(), weight.sum(), weight.sum()
    largest, at = weight.max(0)
    aside = weight.index_fill(0, at, 0.0).sum()
    return aside + largest, aside, largest


def exponentials(z: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z - m, exp(z - m), m, rest); rest is NaN where m is not finite, and so is then the whole row."""
    if is_none(z.shape[dim]):
        m = z.sum(dim, keepdim=True) + math.nan
        return z, z, m, m
    m, top = z.max(dim, keepdim=True)
    d, e = shifted(z, m)
    rest = e.scatter(dim, top, 0.0).sum(dim, keepdim=True)
    return d, e, m, rest.masked_fill(~m.isfinite(), math.nan)


def shifted(z: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """(z - m, exp(z - m)), the exponential with the rounding error of the difference put back."""
    d = z - m
    back = d - z
    error = (z - (d - back)) - (m + back)  # exact (Knuth's TwoSum); NaN where z or d is infinite
    e = torch.exp(d)
    return d, e + e * torch.nan_to_num(error, 0.0, 0.0, 0.0)


def nll_gradient(mass: Tensor, p: Tensor, q: Tensor, confident: Tensor, dim: int) -> Tensor:
    """S p - mass for S = sum(mass), in the form that does not cancel: S - mass at a confident maximum by the others."""
    others = mass.masked_fill(confident, 0.0).sum(dim, keepdim=True)
    s = others + torch.where(confident, mass, 0.0).sum(dim, keepdim=True)
    return torch.where(confident, others - s * q, s * p - mass)


def entropy_of(d: Tensor, e: Tensor, rest: Tensor, dim: int) -> Tensor:
    """log(total) - sum p (z - m), keeping `dim`: both terms are >= 0."""
    weighted = (e * d).masked_fill(~(e > 0), 0.0).sum(dim, keepdim=True)
    return torch.log1p(rest) - weighted / (1.0 + rest)


def dot(mass: Tensor, minus_log_p: Tensor, dim: int) -> Tensor:
    """sum_j mass_j (-log p_j), where a mass of 0 on a -log p of +inf counts 0."""
    free = (mass == 0) & (minus_log_p == math.inf)
    return (mass * minus_log_p.masked_fill(free, 0.0)).sum(dim)


def pick(d: Tensor, target: Tensor, dim: int) -> Tensor:
    """d at the target, NaN where the target names no class (keeping `dim`)."""
    t = target.unsqueeze(dim)
    if is_none(d.shape[dim]):
        return torch.full_like(t, math.nan, dtype=d.dtype)
    picked = d.gather(dim, t.clamp(0, d.shape[dim] - 1))
    return picked.masked_fill((t < 0) | (t >= d.shape[dim]), math.nan)


def each_nll(d: Tensor, log_total: Tensor, target: Tensor, dim: int) -> Tensor:
    """-log p at K classes a row."""
    if d.shape[dim] == 0:
        return torch.full_like(target, math.nan, dtype=d.dtype)
    picked = d.gather(dim, target.clamp(0, d.shape[dim] - 1))
    masked = (picked == -math.inf) & log_total.isfinite()
    nll = (log_total - picked).masked_fill(masked, MASKED)
    return nll.masked_fill((target < 0) | (target >= d.shape[dim]), math.nan)
