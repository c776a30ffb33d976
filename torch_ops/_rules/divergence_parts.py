"""The gradient of a divergence at some of a row's classes, in plain differentiable ops: what its derivatives are of.

legend:  as in divergence.py; lse and <u> are of whole rows, arguments beside the logits of some of their classes
formula: ds_j = p_j u_j - p_j <u>, with p_j = exp(s_j - lse) and d_j = s_j - lse - log q_j, so that both move with s_j
         and with lse; <u> = sum_k p_k u_k moves with what made it
Values come from the state of whole rows, which is more exact than lse: x - x is 0 and has x's derivatives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_ops._rows import dispatch as rows
from torch_ops._rows.divergence import Pair, difference, logits, probabilities
from torch_ops._rules.divergence import weighed


def lse_of_part(student: Tensor, keep: Tensor | None, pair: Pair) -> Tensor:
    """The lse of some classes; -inf, with no derivative, where their logits are."""
    s = rows.capped(_kept(student, keep, pair.dim), pair.scale, pair.softcap)
    dead = (s == -math.inf).all(pair.dim)
    return s.masked_fill(dead.unsqueeze(pair.dim), 0.0).logsumexp(pair.dim).masked_fill(dead, -math.inf)


def weighed_part(
    student: Tensor, teacher: Tensor, keep: Tensor | None, state: Tensor, lse: Tensor, pair: Pair
) -> tuple[Tensor, Tensor]:
    """(p u of some classes, p)."""
    student, teacher = (_kept(x, keep, pair.dim) for x in (student, teacher))
    m_s, rest_s, m_t, rest_t, hi, lo, _ = (x.unsqueeze(pair.dim) for x in state.unbind(-1))
    fixed = student.detach()
    s0, t = logits(fixed, teacher, pair)
    p, q = probabilities(s0, m_s, rest_s), probabilities(t, m_t, rest_t)
    d = difference(fixed, teacher, s0, t, hi, lo, pair)
    s = rows.capped(student, pair.scale, pair.softcap)
    log_p = s - lse.unsqueeze(pair.dim)
    along = torch.where(s.isfinite(), log_p - log_p.detach(), 0.0)
    p = p * along.exp()
    d = torch.where(d.isfinite(), d, 0.0) + along
    return weighed(d, p, q, pair), p


def gradient_of_part(
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    state: Tensor,
    lse: Tensor,
    mean: Tensor | None,
    up: Tensor,
    pair: Pair,
) -> Tensor:
    """dL/d(student) of some classes; `mean` is <u>, None for forward_kl."""
    g, p = weighed_part(student, teacher, keep, state, lse, pair)
    if mean is not None:
        g = g - p * mean.unsqueeze(pair.dim)
    broken = ~(state[..., 4] + state[..., 6]).isfinite()
    g = g.masked_fill(broken.unsqueeze(pair.dim), math.nan)
    slope = rows.slope(_kept(student, keep, pair.dim), pair.scale, pair.softcap)
    dx = slope * g * up.unsqueeze(pair.dim)
    return (dx if keep is None else dx.masked_fill(~keep.unsqueeze(pair.dim), 0.0)).to(student.dtype)


def _kept(x: Tensor, keep: Tensor | None, dim: int) -> Tensor:
    """x with zeros in rows that are not kept, which reach no result, not even through 0 * NaN."""
    return x if keep is None else x.masked_fill(~keep.unsqueeze(dim), 0.0)
