"""What label smoothing adds to a sampled gradient of weighted classes: an outer product, but for the heaviest class.

legend:  h the class of the largest weight, W the sum of the weights, p, q = 1 - p a row's probability of h
formula: dz_h = d_smooth (W p - w_h) = d_smooth ((W - w_h) p - w_h q), W - w_h the sum of the others: where h is a
         target its weight is one more mass of that target, exact as the others are; else it is an entry of its own
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torch_ops._modes import is_none
from torch_ops._rows.arithmetic import weight_sums
from torch_ops._rows.classes import IGNORED


class Ranks(Protocol):
    """The classes of one rank, where a head's lie on several."""

    def here(self, ids: Tensor) -> Tensor:
        """Ids of the whole vocabulary as this rank's, IGNORED where they are another's."""
        ...

    def over_others(self, own: Tensor) -> Tensor:
        """The other ranks' sum."""
        ...


class Smoothed(NamedTuple):
    """Of a rank's classes; of other ranks' targets it says nothing."""

    d_nll: Tensor  # the targets' masses (n, E), with that of the heaviest class where it is one of them
    a: Tensor  # what smoothing adds to all p_j of a row
    weight: Tensor  # (V,), of the outer product
    ids: Tensor  # (n, 1): the heaviest class where it is no target; (n, 0) without classes
    entry: Tensor  # dz there beside the outer product


def smoothed(targets: Tensor, d_nll: Tensor, d_smooth: Tensor, weight: Tensor, ranks: Ranks | None) -> Smoothed:
    """Each class that a row's `targets` (n, E) name may be named by several of them."""
    own, aside, largest = weight_sums(weight)
    if ranks is not None:
        elsewhere = ranks.over_others(own)
        own, aside = own + elsewhere, aside + elsewhere
    if is_none(weight.shape[0]):
        return Smoothed(d_nll, d_smooth * own, weight, targets[:, :0], d_nll[:, :0])
    at = weight.argmax()
    mine = (targets if ranks is None else ranks.here(targets)) == at
    first, known = mine & (mine.cumsum(1) == 1), mine.any(1)
    mass = d_smooth * largest
    return Smoothed(
        d_nll + torch.where(first, mass.unsqueeze(1), 0.0),
        d_smooth * torch.where(known, aside, own),
        weight.index_fill(0, at, 0.0),
        torch.where(known, IGNORED, at).unsqueeze(1),
        -torch.where(known, 0.0, mass).unsqueeze(1),
    )
