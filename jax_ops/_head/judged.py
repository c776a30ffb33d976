"""What a head's loss is of, and how its rows are formed, as two values: every loop takes both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jax_ops._head.chunks import Cut
from jax_ops._head.linear import Linear, Sums, ignored_rows, wide
from jax_ops._parallel.shard import Shard
from jax_ops._rules.plan import Plan


class How(NamedTuple):
    """The chunks, the devices that have the classes, and what is wanted of a row."""

    cut: Cut
    shard: Shard
    plan: Plan


class Judged(NamedTuple):
    """Rows of a head and what they are judged by."""

    x: Array  # (n, D), of low rank (n, D + r)
    head: Linear
    target: Array  # (n,) or (n, K) canonical class indices, (n, V) probabilities
    weight: Array | None  # (V,)

    @property
    def ignored(self) -> Array | None:
        """Which rows reach no result; None where all do."""
        return ignored_rows(self.target)

    def zeros(self, wanted: Sequence[bool]) -> Sums:
        """Zeros in the place of the gradients wanted of (x, *head, target, weight)."""
        sums = {"x": jnp.zeros_like(self.x, dtype=wide(self.x.dtype))} if wanted[0] else {}
        sums |= self.head.gradient(*wanted[1:4])
        if wanted[4]:
            sums["target"] = jnp.zeros_like(self.target)
        if wanted[5] and self.weight is not None:
            sums["weight"] = jnp.zeros_like(self.weight)
        return sums
