"""The rows' numbers of all shards of a vocabulary together, one shard a rank.

legend:  shard k has maximum m_k, rest_k (as in plain.py) and row numbers nll_k, smooth_k, H_k of its own softmax;
         M = max m_k, L_k = (m_k - M) + log1p(rest_k) = lse_k - M, a_k its mass of targets, w_k of weights
rest:    sum of exp(L_k), where one holder of M adds rest_k instead: nothing is subtracted from a sum that holds 1
merge:   nll_k - a_k L_k = sum_j a_j (M - z_j) over the shard, so all shards' sum + a log1p(rest) is nll; smooth alike
entropy: exp(L_k) (H_k - L_k) = sum_j exp(z_j - M) (M - z_j), so their sum / (1 + rest) + log1p(rest) is H
away:    of the shards but k, the one that holds M: the sum of a_j of shards that do not. All less a_k would leave the
         roundings of a_k, of which a target that agrees with a confident row has nearly all
All terms are >= 0: no cancellation. Each row is told by one maximum and one sum over the ranks, whatever V is.
A shard whose logits are all -inf takes no part.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_ops._parallel.collectives import maximum, summed
from torch_ops._parallel.shard import Shard
from torch_ops._rows.arithmetic import shifted
from torch_ops._rows.dispatch import IGNORED, INVALID, MASKED, of_rows


class ShardRows(NamedTuple):
    """The rows of one shard: values of cross_entropy_fwd, and what they do not say."""

    values: dict[str, Tensor]  # nll, lse, [smooth], [entropy]
    m: Tensor
    rest: Tensor
    dead: Tensor  # the shard's logits are all -inf
    target: Tensor  # class indices of the whole vocabulary, or the shard's probabilities
    mass: Tensor | None  # sum_j w_j y_j of probabilities
    of_row: Tensor | None  # sum_j w_j, where smoothing asks for it
    weighted: bool  # whether the classes have weights
    dim: int  # along which a row has K class indices, if it has

    @property
    def many(self) -> bool:
        """Whether a row has K class indices; nll has their shape then."""
        return not self.target.is_floating_point() and self.target.dim() > self.m.dim()

    def each(self, of_row: Tensor) -> Tensor:
        """A row's number beside nll."""
        return of_row.unsqueeze(self.dim) if self.many else of_row


class Merged(NamedTuple):
    """The rows of all shards, and what the others add to this one's."""

    values: dict[str, Tensor]  # nll, lse, [smooth], [entropy]
    m: Tensor
    rest: Tensor
    elsewhere: dict[str, Tensor]  # target mass, weights and entropy of the other shards


def merge(here: ShardRows, shard: Shard) -> Merged:
    """The numbers of whole rows, without a derivative."""
    soft, names = here.target.is_floating_point(), list(here.values)
    dead, m, rest = here.dead, here.m, here.rest
    if not soft:  # an ignored row reaches no result, not even through 0 * NaN
        ignored = of_rows(here.target, m.dim() + 1, here.dim) == IGNORED
        m, rest, dead = m.masked_fill(ignored, 0.0), rest.masked_fill(ignored, 0.0), dead & ~ignored
    top = maximum(m.masked_fill(dead | m.isnan(), -math.inf), shard.group)
    d, share = shifted(m, top.where(top.isfinite(), 0.0))
    log_e = (d + torch.log1p(rest)).masked_fill(dead, 0.0)
    e = (share * (1.0 + rest)).masked_fill(dead, 0.0)
    held = (m == top) & ~dead
    own = {"rest": rest.where(held, e), "held": held.to(e.dtype)}

    none, lost = torch.zeros_like(e), torch.full_like(e, math.inf)
    if soft:
        mass: Any = here.mass
        nll = (here.values["nll"] - mass * log_e).where(~dead, lost.where(mass != 0, none))
        own |= {"nll": nll, "mass": mass, "mass away": mass.masked_fill(held, 0.0)}
    else:
        inside, _ = shard.local(here.target)
        own_nll, gone = here.values["nll"], inside & here.each(dead)
        if own_nll.dim() < inside.dim():  # of a shard without classes
            own_nll = here.each(own_nll).expand(inside.shape)
        nll = own_nll - here.each(log_e)
        if here.many:
            gone = gone | (inside & (own_nll < 0))  # MASKED, and by no rounding is anything else
            nll = nll.clamp(min=0.0)
        own["nll"] = nll.where(inside & ~gone, torch.zeros_like(nll).masked_fill(gone, math.inf))
    if "smooth" in names:
        of_row = here.of_row.expand_as(e)  # pyright: ignore[reportOptionalMemberAccess]
        smooth = (here.values["smooth"] - of_row * log_e).where(~dead, lost.where(of_row != 0, none))
        own |= {"smooth": smooth, "of_row": of_row}
        own |= {"of_row away": of_row.masked_fill(held, 0.0)} if here.weighted else {}
    if "entropy" in names:
        own["entropy"] = (e * (here.values["entropy"] - log_e)).masked_fill(dead, 0.0)

    total = _summed(own, here, shard.group)
    rest = (total["rest"] + (total["held"] - 1.0)).masked_fill(~top.isfinite(), math.nan)
    log_total, elsewhere = torch.log1p(rest), {}
    nll = total["nll"] + (total["mass"] * log_total if soft else here.each(log_total))
    found = {"nll": nll, "lse": top + log_total}
    if soft:
        elsewhere["nll"] = _of_others("mass", total, own, held)
    if "smooth" in names:
        found["smooth"] = total["smooth"] + total["of_row"] * log_total
        elsewhere["smooth"] = _of_others("of_row", total, own, held)
    if "entropy" in names:
        found["entropy"] = total["entropy"] / (1.0 + rest) + log_total
        elsewhere["entropy"] = (total["entropy"] - own["entropy"]) / (1.0 + rest)
    if not soft:
        if here.many:
            found["nll"] = nll.masked_fill(nll == math.inf, MASKED)
        found = {n: v.masked_fill(here.target == IGNORED if n == "nll" else ignored, 0.0) for n, v in found.items()}
        found["nll"] = found["nll"].masked_fill(here.target == INVALID, math.nan)
    return Merged(found, top, rest, elsewhere)


def _of_others(name: str, total: dict[str, Tensor], own: dict[str, Tensor], held: Tensor) -> Tensor:
    """What the other shards add to a sum, told apart where this one alone holds the maximum."""
    found = total[name] - own[name]
    away = total.get(f"{name} away")  # counts of classes are exact
    return found if away is None else away.where(held & (total["held"] == 1.0), found)


def _summed(own: dict[str, Tensor], here: ShardRows, group: Any) -> dict[str, Tensor]:
    """All shards' sums of a row's numbers, in one message."""
    if not here.many:
        return dict(zip(own, summed(torch.stack([*own.values()]), group).unbind(), strict=True))
    nll = own["nll"].movedim(here.dim, 0)
    others = {name: v for name, v in own.items() if name != "nll"}
    whole = summed(torch.cat([nll, torch.stack([*others.values()])]), group)
    found = dict(zip(others, whole[len(nll) :].unbind(), strict=True))
    return {**found, "nll": whole[: len(nll)].movedim(0, here.dim)}


def own_upstream(
    upstream: dict[str, Tensor | None], target: Tensor, elsewhere: dict[str, Tensor], shard: Shard, m: Tensor, dim: int
) -> dict[str, Any]:
    """The upstream gradients for a row function that sees one shard, and m and rest of whole rows."""
    # It forms A p_j - a_j with A, the mass, summed over the shard, and an entropy summed over the shard. What the
    # other shards add to A, and what they take from -d_entropy H, multiplies p_j: it belongs to d_lse.
    own: dict[str, Any] = dict(upstream)
    moved = [] if own["lse"] is None else [own["lse"]]
    d_nll = own["nll"]
    if d_nll is not None and target.is_floating_point():
        moved.append(d_nll * elsewhere["nll"])
    elif d_nll is not None:
        inside, _ = shard.local(target)
        own["nll"] = d_nll.where(inside, 0.0)
        away = d_nll.where(~inside & (target != IGNORED), 0.0)
        moved.append(away.sum(dim) if target.dim() > m.dim() else away)
    if own.get("smooth") is not None:
        moved.append(own["smooth"] * elsewhere["smooth"])
    if own.get("entropy") is not None:
        moved.append(-own["entropy"] * elsewhere["entropy"])
    own["lse"] = sum(moved[1:], moved[0]) if moved else None
    return own
