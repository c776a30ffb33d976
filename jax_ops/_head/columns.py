"""What a scaled head's bias and its scale are as columns of the head and of its rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def apart(bias: Array) -> tuple[Array, Array]:
    """(the bias without its -inf, those alone): as a column, 0 * -inf would reach the scale's gradient."""
    lost = bias == -jnp.inf
    return jnp.where(lost, jnp.zeros((), bias.dtype), bias), jnp.where(lost, -jnp.inf, 0.0).astype(bias.dtype)


def in_parts(scale: Array, x: Array) -> list[Array]:
    """The scale of each row of x as columns of its type: two whose sum it is, where one would be rounded."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    s = scale.astype(wide)
    s = jnp.broadcast_to(s[..., None] if s.ndim else s, (*x.shape[:-1], 1))
    if wide == x.dtype:
        return [s]
    high = jax.lax.stop_gradient(s).astype(x.dtype)
    return [high, (s - high.astype(wide)).astype(x.dtype)]  # the second has the scale's derivative


def scaled(x: Array, w: Array, b: Array | None, scale: Array, keep: Array | None) -> tuple[Array, Array, Array | None]:
    """(s x, W) of rows, or with a bias (s x, s) and (W, b); s in two parts, and b twice, where one would be rounded."""
    if keep is not None:  # such a row reaches no result, not even through 0 * NaN
        x = jnp.where(keep[:, None], x, jnp.zeros((), x.dtype))
        scale = jnp.where(keep, scale, jnp.ones((), scale.dtype)) if scale.ndim else scale
    columns = [] if b is None else in_parts(scale, x)
    if b is not None:
        finite, b = apart(b)
        w = jnp.concatenate([w, *[finite[:, None]] * len(columns)], 1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    by = scale.astype(wide)
    x = (x.astype(wide) * (by[:, None] if by.ndim else by)).astype(x.dtype)
    return jnp.concatenate([x, *columns], 1), w, b
