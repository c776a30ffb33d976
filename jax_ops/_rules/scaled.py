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
    kind = jnp.promote_types(logits.dtype, jnp.float32)
    x, s = logits.astype(kind), scale.astype(kind)
    if nothing is not None:
        x = jnp.where(jnp.expand_dims(nothing, axis), 0.0, x)
        s = jnp.where(nothing, 1.0, s) if s.ndim else s
    s = jnp.expand_dims(s, axis) if s.ndim else s
    # A masked logit has the gradient s g that its mass gives it, but says nothing of s, not even 0 * inf.
    lost = jnp.isneginf(x)
    masked = x * jnp.maximum(jnp.abs(jax.lax.stop_gradient(s)), jnp.finfo(kind).tiny)
    return jnp.where(lost, masked, jnp.where(lost, 0.0, x) * s)


def ignored(logits: Array, target: Array, axis: int) -> Array | None:
    """The rows that a target says nothing of; None for soft ones."""
    return None if rows.is_soft(target) else rows.of_rows(target, logits.ndim, axis) == rows.IGNORED
