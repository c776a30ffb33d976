"""The axes a row runs over: one, several or all, and `where` masks along them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_ops._arguments import describe, unwrap
from softmax_ext import contract

Axis = int | Sequence[int] | None


def dimensions(op: str, axis: Axis, ndim: int) -> tuple[int, ...]:
    """The non-negative axes in the order given; none for a scalar, whose one row is itself."""
    if axis is None:
        return tuple(range(ndim))
    several = isinstance(axis, tuple | list)
    axes = [contract.dimension(op, "axis", a, ndim) for a in (axis if several else (axis,))]
    if len(set(axes)) != len(axes):
        contract.fail_value(op, "axis", "name each dimension once", repr(axis))
    return tuple(axes) if ndim else ()


def as_one(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, int]:
    """x with the axes as one, and where that is: several (or none) are flattened into a last one."""
    if len(axes) == 1:
        return x, axes[0]
    at = x.ndim - len(axes)
    x = jnp.moveaxis(x, axes, range(at, x.ndim))
    return x.reshape(*x.shape[:at], math.prod(x.shape[at:])), at


def as_before(y: jax.Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `as_one` for an array that had `shape`."""
    if len(axes) == 1:
        return y
    rows = [n for i, n in enumerate(shape) if i not in axes]
    y = y.reshape(*rows, *(shape[i] for i in axes))
    return jnp.moveaxis(y, range(len(rows), len(shape)), axes)


def mask_of(op: str, where: Any, x: jax.Array) -> jax.Array:
    """`where` as a boolean array of the shape of x."""
    where = unwrap(where)
    facts = describe(where)
    if facts.kind != "bool":
        contract.fail_value(op, "where", "be a boolean array or None", facts.dtype)
    # A mask larger than x is refused: jax.nn then sums over another axis than it takes the maximum of.
    if broadcast(facts.shape, x.shape) != x.shape:
        contract.fail_value(op, "where", f"broadcast to shape {x.shape}", str(facts.shape))
    return jnp.broadcast_to(jnp.asarray(where), x.shape)


def leave_out(x: jax.Array, mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """x with -inf where the mask is False, or 0 in rows of False alone, which are nobody's logits."""
    some = mask.any(axes, keepdims=True)
    return jnp.where(mask, x, jnp.where(some, -jnp.inf, 0.0).astype(x.dtype))


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that arrays of these shapes broadcast to, or None."""
    try:
        return jnp.broadcast_shapes(*shapes)
    except ValueError:
        return None
