"""Rows whose scale is an array: their product with it, whose rules have every order.

legend:  s the row's scale, u = s x its logits, g = dL/du
formula: dL/dx = s g;  dL/ds = sum_j g_j x_j
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._rows import dispatch as rows


def times(logits: Array, scale: Array, axis: int, nothing: Array | None = None) -> Array:
    """Logits times a row's number or one number, in the compute type; a -inf logit stays -inf.

    Of the rows that `nothing` marks the product is 0: they reach no result, not even through 0 * NaN.
    """
    x, s, lost = operands(logits, scale, axis, nothing)
    return jnp.where(lost, x * of_lost(s), jnp.where(lost, 0.0, x) * s)


def ignored(logits: Array, target: Array, axis: int) -> Array | None:
    """The rows that a target says nothing of; None for soft ones."""
    return None if rows.is_soft(target) else rows.of_rows(target, logits.ndim, axis) == rows.IGNORED


def operands(logits: Array, scale: Array, axis: int, nothing: Array | None) -> tuple[Array, Array, Array]:
    """(x, s beside it, which x are -inf) in the compute type; of rows marked `nothing` 0 and 1."""
    kind = jnp.promote_types(logits.dtype, jnp.float32)
    x, s = logits.astype(kind), scale.astype(kind)
    if nothing is not None:
        x = jnp.where(jnp.expand_dims(nothing, axis), 0.0, x)
        s = jnp.where(nothing, 1.0, s) if s.ndim else s
    return x, jnp.expand_dims(s, axis) if s.ndim else s, jnp.isneginf(x)


def of_lost(s: Array) -> Array:
    """What a -inf logit is multiplied by.

    It has the gradient s g that its mass gives it, but says nothing of s, not even 0 * inf.
    """
    return jnp.maximum(jnp.abs(jax.lax.stop_gradient(s)), jnp.finfo(s.dtype).tiny)


def along(x: Array, lost: Array, g: Array, total: Array | None, axis: int, *, centred: bool) -> Array:
    """dL/ds = sum_j g_j x_j of each row; `total` is sum_j g_j, where it is known (None: 0) and so `centred`."""
    if not centred:
        return jnp.where(lost, 0.0, g * x).sum(axis)
    # What all x of a row have in common meets sum_j g_j: it is taken from the sum before that rounds.
    top = jax.lax.stop_gradient(x).max(axis, keepdims=True, initial=-jnp.inf)
    c = jnp.where(jnp.isfinite(top), top, 0.0)
    found = jnp.where(lost, 0.0, g * (x - c)).sum(axis)
    c = c.squeeze(axis)
    found = found - c * jnp.where(lost, g, 0.0).sum(axis)
    return found if total is None else found + c * total
