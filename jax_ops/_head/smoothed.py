"""What label smoothing adds to a sampled gradient of weighted classes: an outer product, but for the heaviest class.

legend:  h the class of the largest weight, W the sum of the weights, p, q = 1 - p a row's probability of h
formula: dz_h = d_smooth (W p - w_h) = d_smooth ((W - w_h) p - w_h q), W - w_h the sum of the others: where h is a
         target its weight is one more mass of that target, exact as the others are; else it is an entry of its own
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jax_ops._parallel.points import here
from jax_ops._parallel.shard import Shard
from jax_ops._rows.arithmetic import weight_sums
from jax_ops._rows.classes import IGNORED


class Smoothed(NamedTuple):
    """Of a device's classes; of other devices' targets it says nothing."""

    d_nll: Array  # the targets' masses (n, E), with that of the heaviest class where it is one of them
    a: Array  # what smoothing adds to all p_j of a row
    weight: Array  # (V,), of the outer product
    ids: Array  # (n, 1): the heaviest class where it is no target; (n, 0) without classes
    entry: Array  # dz there beside the outer product


def smoothed(targets: Array, d_nll: Array, d_smooth: Array, weight: Array, shard: Shard) -> Smoothed:
    """Each class that a row's `targets` (n, E) name may be named by several of them."""
    own, aside, largest = weight_sums(weight)
    elsewhere = shard.sum_of_others(own)
    own, aside = own + elsewhere, aside + elsewhere
    if weight.shape[0] == 0:
        return Smoothed(d_nll, d_smooth * own, weight, targets[:, :0], d_nll[:, :0])
    at = weight.argmax()
    mine = here(targets, shard) == at
    first, known = mine & (mine.cumsum(1) == 1), mine.any(1)
    mass = d_smooth * largest
    return Smoothed(
        d_nll + jnp.where(first, mass[:, None], 0.0),
        d_smooth * jnp.where(known, aside, own),
        jnp.where(jnp.arange(weight.shape[0]) == at, 0.0, weight),
        jnp.where(known, IGNORED, at.astype(targets.dtype))[:, None],
        -jnp.where(known, 0.0, mass)[:, None],
    )
