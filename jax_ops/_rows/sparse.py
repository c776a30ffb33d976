"""Sums over equal ids. None is a scatter that adds: on a GPU that adds in whatever order its threads come."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def by_class(ids: Array, a: Array) -> tuple[Array, Array, Array]:
    """(sum of a (N, K) over the slots of this slot's class, over all others, whether it is its class's first).

    `a` is 0 where an id names no class. No sum is a difference of two.
    """
    order = jnp.argsort(ids, 1, stable=True)
    at, given = (jnp.take_along_axis(v, order, 1) for v in (ids, a))
    turns, one, zero = at[:, 1:] != at[:, :-1], jnp.ones_like(at[:, :1], dtype=bool), jnp.zeros_like(a[:, :1])
    begins, ends = jnp.concatenate([one, turns], 1), jnp.concatenate([turns, one], 1)
    slot = lax.broadcasted_iota(jnp.int32, at.shape, 1)
    first = lax.cummax(jnp.where(begins, slot, 0), axis=1)
    last = lax.cummin(jnp.where(ends, slot, at.shape[1]), axis=1, reverse=True)
    own = jnp.take_along_axis(run_sums(begins, given, 1), last, 1)
    before = jnp.concatenate([zero, jnp.cumsum(given, 1)[:, :-1]], 1)
    after = jnp.concatenate([jnp.cumsum(given[:, ::-1], 1)[:, ::-1][:, 1:], zero], 1)
    others = jnp.take_along_axis(before, first, 1) + jnp.take_along_axis(after, last, 1)
    back = jnp.argsort(order, 1)
    own, others, begins = (jnp.take_along_axis(v, back, 1) for v in (own, others, begins))
    return own, others, begins & (ids >= 0)


def run_sums(begins: Array, a: Array, axis: int) -> Array:
    """a added up from the begin of each run along `axis`; `begins` broadcasts to it."""

    def joined(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        (some, before), (begun, own) = left, right
        return some | begun, jnp.where(begun, own, before + own)

    return lax.associative_scan(joined, (begins, a), axis=axis)[1]
