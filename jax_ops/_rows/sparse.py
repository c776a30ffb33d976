"""Sums over a row's equal ids."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def by_class(ids: Array, a: Array) -> tuple[Array, Array, Array]:
    """(sum of a (N, K) over the slots of this slot's class, over all others, whether it is its class's first).

    `a` is 0 where an id names no class. No sum is a difference of two.
    """
    order = jnp.argsort(ids, 1, stable=True)
    at = jnp.take_along_axis(ids, order, 1)
    begins = jnp.concatenate([jnp.ones_like(at[:, :1], dtype=bool), at[:, 1:] != at[:, :-1]], 1)
    place, row = jnp.cumsum(begins, 1) - 1, jnp.arange(ids.shape[0])[:, None]
    sums = jnp.zeros_like(a).at[row, place].add(jnp.take_along_axis(a, order, 1))
    zero = jnp.zeros_like(a[:, :1])
    before = jnp.concatenate([zero, jnp.cumsum(sums, 1)[:, :-1]], 1)
    after = jnp.concatenate([jnp.cumsum(sums[:, ::-1], 1)[:, ::-1][:, 1:], zero], 1)
    own, others = (
        jnp.zeros_like(a).at[row, order].set(jnp.take_along_axis(s, place, 1)) for s in (sums, before + after)
    )
    return own, others, jnp.zeros_like(begins).at[row, order].set(begins) & (ids >= 0)
