"""The rows' numbers of all shards of a vocabulary together, one shard a rank.

legend:  shard k has maximum m_k, rest_k (as in plain.py) and row numbers nll_k, smooth_k, H_k of its own softmax;
         M = max m_k, L_k = (m_k - M) + log1p(rest_k) = lse_k - M, a_k its mass of targets, w_k of weights
rest:    sum of exp(L_k), where one holder of M adds rest_k instead: nothing is subtracted from a sum that holds 1
merge:   nll_k - a_k L_k = sum_j a_j (M - z_j) over the shard, so all shards' sum + a log1p(rest) is nll; smooth alike
entropy: exp(L_k) (H_k - L_k) = sum_j exp(z_j - M) (M - z_j), so their sum / (1 + rest) + log1p(rest) is H
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
from torch_ops._rows.dispatch import IGNORED, INVALID


class ShardRows(NamedTuple):
    """The rows of one shard: values of cross_entropy_fwd, and what they do not say."""

    values: dict[str, Tensor]  # nll, lse, [smooth], [entropy]
    m: Tensor
    rest: Tensor
    dead: Tensor  # the shard's logits are all -inf
    target: Tensor  # class indices of the whole vocabulary, or the shard's probabilities
    mass: Tensor | None  # sum_j w_j y_j of probabilities
    of_row: Tensor | None  # sum_j w_j, where smoothing asks for it


class Merged(NamedTuple):
    """The rows of all shards, and what the others add to this one's."""

    values: dict[str, Tensor]  # nll, lse, [smooth], [entropy]
    m: Tensor
    rest: Tensor
    elsewhere: dict[str, Tensor]  # target mass, weights and entropy of the other shards


def merge(here: ShardRows, shard: Shard) -> Merged:
    """The numbers of whole rows. They move as the shard's lse, nll, smooth and entropy do, to any order."""
    soft, names = here.target.is_floating_point(), list(here.values)
    dead, m, rest, lse = here.dead, here.m, here.rest, here.values["lse"]
    if not soft:  # an ignored row reaches no result, not even through 0 * NaN
        ignored = here.target == IGNORED
        m, rest, dead = m.masked_fill(ignored, 0.0), rest.masked_fill(ignored, 0.0), dead & ~ignored
    top = maximum(m.masked_fill(dead | m.isnan(), -math.inf), shard.group)
    # Values come from m and rest, which are more exact than lse; lse - lse is 0 and has lse's derivatives.
    along = lse - lse.detach()
    d, share = shifted(m, top.where(top.isfinite(), 0.0))
    log_e = (d + torch.log1p(rest) + along).masked_fill(dead, 0.0)
    e = (share * (1.0 + rest) * along.exp()).masked_fill(dead, 0.0)
    held = (m == top) & ~dead
    own = {"rest": (rest + (e - e.detach())).where(held, e), "held": held.to(e.dtype)}

    none, lost = torch.zeros_like(e), torch.full_like(e, math.inf)
    if soft:
        mass: Any = here.mass
        nll = (here.values["nll"] - mass * log_e).where(~dead, lost.where(mass != 0, none))
        own |= {"nll": nll, "mass": mass}
    else:
        inside, _ = shard.local(here.target)
        own["nll"] = (here.values["nll"] - log_e).where(inside & ~dead, lost.where(inside & dead, none))
    if "smooth" in names:
        of_row = here.of_row.expand_as(e)  # pyright: ignore[reportOptionalMemberAccess]
        smooth = (here.values["smooth"] - of_row * log_e).where(~dead, lost.where(of_row != 0, none))
        own |= {"smooth": smooth, "of_row": of_row}
    if "entropy" in names:
        own["entropy"] = (e * (here.values["entropy"] - log_e)).masked_fill(dead, 0.0)

    total = dict(zip(own, summed(torch.stack([*own.values()]), shard.group).unbind(), strict=True))
    # Added, not chosen: in a row without a distribution the derivatives are NaN too.
    rest = total["rest"] + (total["held"] - 1.0) + none.masked_fill(~top.isfinite(), math.nan)
    log_total, elsewhere = torch.log1p(rest), {}
    found = {"nll": total["nll"] + (total["mass"] if soft else 1.0) * log_total, "lse": top + log_total}
    if soft:
        elsewhere["nll"] = total["mass"] - own["mass"]
    if "smooth" in names:
        found["smooth"] = total["smooth"] + total["of_row"] * log_total
        elsewhere["smooth"] = total["of_row"] - own["of_row"]
    if "entropy" in names:
        found["entropy"] = total["entropy"] / (1.0 + rest) + log_total
        elsewhere["entropy"] = (total["entropy"] - own["entropy"]) / (1.0 + rest)
    if not soft:
        found = {name: v.masked_fill(here.target == IGNORED, 0.0) for name, v in found.items()}
        found["nll"] = found["nll"].masked_fill(here.target == INVALID, math.nan)
    return Merged(found, top, rest, elsewhere)


def own_upstream(
    upstream: dict[str, Tensor | None], target: Tensor, elsewhere: dict[str, Tensor], shard: Shard
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
        moved.append(d_nll.where(~inside, 0.0))
    if own.get("smooth") is not None:
        moved.append(own["smooth"] * elsewhere["smooth"])
    if own.get("entropy") is not None:
        moved.append(-own["entropy"] * elsewhere["entropy"])
    own["lse"] = sum(moved[1:], moved[0]) if moved else None
    return own
