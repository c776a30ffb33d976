"""Rows by their targets: how those without a class are marked, and what reaches their results and derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

IGNORED = -1  # canonical target of a row that reaches no result
INVALID = -2  # canonical target of a row whose class index names no class
MASKED = -1.0  # what nll says of one of K classes that has no probability, whose nll is infinite: none is negative


def is_soft(target: Array) -> bool:
    """Whether targets are probabilities rather than class indices."""
    return jnp.issubdtype(target.dtype, jnp.floating)


def of_rows(target: Array, ndim: int, axis: int) -> Array:
    """One class index a row of logits of `ndim` dimensions: of K along `axis`, IGNORED if all are, INVALID if any is.

    One a row already, and soft targets, are as they were.
    """
    if target.ndim < ndim or is_soft(target):
        return target
    low = target.min(axis, initial=IGNORED)
    return jnp.where(low == INVALID, low, target.max(axis, initial=IGNORED))


def mass_sum(mass: Array, nll: Array, axis: int) -> Array:
    """sum_k mass_k nll_k over K classes a row: of an infinite nll (MASKED) infinite, but nothing where no mass is."""
    masked = nll < 0
    lost = jnp.where(masked & (mass != 0), jax.lax.stop_gradient(mass) * jnp.inf, 0.0)
    # Added, not chosen: 0 in value, a masked class still takes its part of the gradient, as a dense target's.
    return (mass * finite(nll) + lost).sum(axis)


def finite(nll: Array) -> Array:
    """nll of K classes a row, 0 where it is infinite (MASKED)."""
    return nll + (nll < 0)


def without_ignored(target: Array, axis: int, logits: Array, m: Array, rest: Array) -> tuple[Array, Array, Array]:
    """Logits, m and rest with ignored rows at 0: not even through 0 * NaN do they reach a derivative."""
    if is_soft(target):
        return logits, m, rest
    ignored = of_rows(target, logits.ndim, axis) == IGNORED
    logits = jnp.where(jnp.expand_dims(ignored, axis), jnp.zeros((), logits.dtype), logits)
    return logits, jnp.where(ignored, 0.0, m), jnp.where(ignored, 0.0, rest)


def upstream_of(upstream: Array, target: Array, axis: int | None) -> Array:
    """A row's upstream gradient, 0 for an ignored row and NaN for an invalid one (with `axis`, if one is given)."""
    if not is_soft(target):
        upstream = jnp.where(target == IGNORED, 0.0, upstream)
        upstream = upstream * jnp.where(target <= INVALID, jnp.nan, 1.0)
    return upstream if axis is None else jnp.expand_dims(upstream, axis)
