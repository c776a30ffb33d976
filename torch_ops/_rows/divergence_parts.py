"""Rows of two softmaxes whose classes come in parts: slices of a head, or shards of a group, one a rank.

legend:  part k of a row has a state of its own (divergence_fwd's); P_k and Q_k are its shares of the sums of p and q,
         D_k = log P_k - log Q_k = shift_k - shift, the shift that of the whole row
shift:   sum_k (P_k - Q_k) is 0: what it comes out as is the shift's error, as it is for the classes of one row
value:   forward_kl  sum_k Q_k KL_k + sum_k Q_k (expm1(D_k) - D_k)          reverse_kl  the same with p and q exchanged
         jsd and tv of a part know nothing of the whole row's: their terms are summed again, given its state (`sums`)
No term is negative and none cancels. A part whose logits are all -inf has a share of 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_ops._rows.arithmetic import shifted
from torch_ops._rows.divergence import (
    Pair,
    difference,
    divergence_fwd,
    less,
    logits,
    probabilities,
    serving,
    terms,
    weighed,
)


def part(student: Tensor, teacher: Tensor, keep: Tensor | None, *, pair: Pair) -> tuple[Tensor, Tensor]:
    """divergence_fwd of some classes; the maxima tell logits that are all -inf from those that also hold NaN."""
    value, state = divergence_fwd(student, teacher, keep, pair=pair)
    if not student.shape[pair.dim]:
        state[..., 0] = state[..., 2] = -math.inf
    elif student.device.type == "cpu":
        # The native kernels' maximum passes over NaN. A look costs nothing here; elsewhere the plain maximum is NaN.
        for at, x in ((0, student), (2, teacher)):
            if (m := state[..., at]).isinf().any():
                state[..., at] = m.masked_fill(m.isinf() & x.isnan().any(pair.dim), math.nan)
    return value, state


def merged(values: Tensor, states: Tensor, *, pair: Pair) -> tuple[Tensor, Tensor]:
    """(the divergences, the state) of whole rows from those of their parts, (K, ...) and (K, ..., 7).

    For jsd and tv the value and the state's last number are still to come.
    """
    m_s, rest_s, m_t, rest_t, hi_k, lo_k, _ = states.unbind(-1)
    top_s, all_s, p = _shares(m_s, rest_s)
    top_t, all_t, q = _shares(m_t, rest_t)
    no_s, no_t = m_s == -math.inf, m_t == -math.inf
    unit = pair.scale if pair.alike else 1.0

    def ratio(hi: Tensor, lo: Tensor) -> Tensor:
        d = ((hi_k - hi) + (lo_k - lo)) * unit
        d = d.masked_fill(no_s, -math.inf).masked_fill(no_t, math.inf)
        return d.masked_fill(no_s & no_t, 0.0)

    hi = ((top_s - top_t) + (torch.log1p(all_s) - torch.log1p(all_t))) / unit
    lo = torch.zeros_like(hi)
    for _ in range(2):
        off = torch.log1p(less(ratio(hi, lo), p, q).sum(0).clamp(min=-0.5)) / unit
        total = hi + (lo + off)
        hi, lo = total, (hi - total) + (lo + off)
    value = mean = torch.zeros_like(hi)
    if pair.kind in ("forward_kl", "reverse_kl"):
        share = q if pair.kind == "forward_kl" else p
        of_parts = torch.where((share == 0) | no_s | no_t, 0.0, share * values)
        value = (of_parts + terms(ratio(hi, lo), p, q, pair)).sum(0)
        mean = value if pair.kind == "reverse_kl" else mean
    return value, torch.stack([top_s, all_s, top_t, all_t, hi, lo, mean], -1)


def sums(student: Tensor, teacher: Tensor, keep: Tensor | None, state: Tensor, *, pair: Pair) -> Tensor:
    """(2, ...): what some classes add to a jsd or tv and to the state's last number, given whole rows' state."""
    if (ops := serving(student, pair.dim)) is not None:
        found = ops.divergence_sums(student, teacher, keep, state, *pair.of_native())
        return torch.stack([found[..., 0], found[..., 2]])
    m_s, rest_s, m_t, rest_t, hi, lo, _ = (x.unsqueeze(pair.dim) for x in state.unbind(-1))
    s, t = logits(student, teacher, pair)
    p, q = probabilities(s, m_s, rest_s), probabilities(t, m_t, rest_t)
    d = difference(student, teacher, s, t, hi, lo, pair)
    found = torch.stack([terms(d, p, q, pair).sum(pair.dim), weighed(d, p, q, pair).sum(pair.dim)])
    return found if keep is None else found.masked_fill(~keep, 0.0)


def whole(value: Tensor, state: Tensor, found: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the divergences, the state) with the sums of all classes put in, and nothing in rows that are not kept."""
    if found is not None:
        lost = (state[..., 4] * 0.0).nan_to_num(math.nan, math.nan, math.nan)  # a row without a distribution
        value, mean = (v + lost for v in found)
        state = torch.cat([state[..., :-1], mean.unsqueeze(-1)], -1)
    if keep is not None:
        value, state = value.masked_fill(~keep, 0.0), state.masked_fill(~keep.unsqueeze(-1), 0.0)
    return value, state


def _shares(m: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the maximum, rest, each part's share) of whole rows."""
    top, holder = m.amax(0), m.argmax(0, keepdim=True)
    e = shifted(m, torch.where(top.isfinite(), top, 0.0))[1] * (1.0 + rest)
    e = torch.where(m == -math.inf, 0.0, e)
    # one holder of the maximum adds its rest: nothing is subtracted from a sum that holds 1
    all_rest = e.scatter(0, holder, rest.gather(0, holder)).sum(0)
    all_rest = all_rest.masked_fill(~top.isfinite(), math.nan)
    return top, all_rest, e / (1.0 + all_rest)
