"""Class weights of which a slice of the classes has some, one of them perhaps nearly all of the weight."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Weights(NamedTuple):
    """The class weights of whole rows: their sum, the largest, the sum of all below it and how many are not."""

    total: Array
    largest: Array
    aside: Array
    held: Array

    def elsewhere(self, weight: Array) -> Array:
        """The sum of those that are not in a slice, of which `weight` are the slice's.

        Beside the slice of one that holds nearly all, a difference of all would leave that one's roundings.
        """
        total, aside, held = sums_of(weight, self.largest)
        known = jax.lax.stop_gradient((self.held == 1) & (held == 1))
        return jnp.where(known, self.aside - aside, self.total - total)


def sums_of(weight: Array, largest: Array) -> Array:
    """The sum of class weights, of those below `largest`, and how many are not."""
    held = jax.lax.stop_gradient(weight == largest)
    return jnp.stack([weight.sum(), jnp.where(held, 0.0, weight).sum(), held.astype(weight.dtype).sum()])
