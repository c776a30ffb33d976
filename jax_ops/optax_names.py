"""optax's two softmax cross-entropies by their own names, on our rows: one loss per row, never reduced."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_ops._arguments import describe, unwrap
from jax_ops._axes import Axis, as_one, broadcast, dimensions, leave_out, mask_of
from jax_ops._lowering import as_typed
from jax_ops._rows.targets import canonical
from jax_ops._rules.cross_entropy import row
from jax_ops._rules.plan import Plan
from softmax_ext import contract


def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Cross-entropy of each row between softmax(logits) and label probabilities, in nats.

    Formula: `sum(y) * log(sum(exp(x))) - sum(y * x)` for labels y.
    Gradient: `exp(x) / sum(exp(x)) * sum(y) - y`

    Args:
        logits: logits of any shape; float16, bfloat16, float32 or float64.
        labels: probabilities (their sum need not be 1), of a shape that broadcasts against the logits'.
        axis: the class axis, a tuple or list of axes that are one row together, or None for all.
        where: mask of the logits' shape, or of the rows'; where it is False an entry is left out.

    Returns:
        The losses, one per row, in the type that logits and labels promote to; 0 for a row left out altogether.

    Raises:
        TypeError: logits are not floating, labels are no real array, or axis is no Python integer(s) or None.
        ValueError: a shape that does not broadcast, or an axis out of range.

    Memory:
        The backward pass keeps the logits, the labels and two numbers per row.

    Source:
        optax 0.2.8, `softmax_cross_entropy`; but a label of 0 on a logit of -inf counts 0, not NaN.

    Example:
        >>> import jax.numpy as jnp, jax_ops
        >>> logits, labels = jnp.array([[1.1, 2.2, 0.2, -1.7]]), jnp.array([[0.0, 1.0, 0.0, 0.0]])
        >>> round(jax_ops.softmax_cross_entropy(logits, labels)[0].item(), 4)
        0.3977
    """
    op = "softmax_cross_entropy"
    logits, labels = unwrap(logits), unwrap(labels)
    contract.floating(op, "logits", describe(logits))
    facts = describe(labels)
    if facts.kind not in ("float", "int", "bool"):
        contract.fail_type(op, "labels", "be a real array", facts.dtype)
    x, y = jnp.asarray(logits), jnp.asarray(labels)
    y = y if facts.kind == "float" else y.astype(x.dtype)
    # Counted from the end, the axes stay the same classes when rows are broadcast.
    back = [a - x.ndim for a in dimensions(op, axis, x.ndim)]
    shape = broadcast(x.shape, y.shape)
    if shape is None or any(shape[a] != x.shape[a] for a in back):
        contract.fail_value(op, "labels", f"broadcast to shape {x.shape}", str(y.shape))
    mask = None if where is None else _mask(op, where, x, back)
    return _dense(x, y, mask, shape=shape, axes=tuple(a + len(shape) for a in back))


@partial(jax.jit, static_argnames=("shape", "axes"), inline=True)
@as_typed
def _dense(
    x: jax.Array, y: jax.Array, mask: jax.Array | None, *, shape: tuple[int, ...], axes: tuple[int, ...]
) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, y.dtype)
    x, y = jnp.broadcast_to(x, shape), jnp.broadcast_to(y, shape)
    if mask is not None:
        mask = jnp.broadcast_to(mask, shape)
        x, y = leave_out(x, mask, axes), jnp.where(mask, y, jnp.zeros((), y.dtype))
    (x, at), (y, _) = as_one(x, axes), as_one(y, axes)
    return row(x, y, None, at, Plan())["nll"].astype(dtype)


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy of each row between softmax(logits) and a class index, in nats.

    Formula: `log(sum(exp(x))) - sum(y * x)` for y the one-hot label.
    Gradient: `exp(x) / sum(exp(x)) - y`

    Args:
        logits: logits of at least one dimension; float16, bfloat16, float32 or float64.
        labels: class indices, the logits' shape without `axis`, any integer type.
        axis: the class axis, or a tuple or list of axes that are one row together: labels then index the row
            flattened in the order of the axes.
        where: mask of the logits' shape, or of the rows'; where it is False an entry is left out of the sum.

    Returns:
        The losses, one per row, in the logits' type; 0 for a row left out altogether, NaN where a label is no class.

    Raises:
        TypeError: logits are not floating, labels are no integers, or axis is no Python integer(s).
        ValueError: a shape outside its rule, or an axis out of range.

    Memory:
        The backward pass keeps the logits, the labels and two numbers per row.

    Source:
        optax 0.2.8, `softmax_cross_entropy_with_integer_labels`; but label -1 is no class, not the last one.

    Example:
        >>> import jax.numpy as jnp, jax_ops
        >>> logits, labels = jnp.array([[1.1, 2.2, 0.2, -1.7]]), jnp.array([1])
        >>> round(jax_ops.softmax_cross_entropy_with_integer_labels(logits, labels)[0].item(), 4)
        0.3977
    """
    op = "softmax_cross_entropy_with_integer_labels"
    logits, labels = unwrap(logits), unwrap(labels)
    contract.floating(op, "logits", describe(logits))
    contract.at_least_1d(op, "logits", describe(logits))
    facts = describe(labels)
    if facts.kind != "int":
        contract.fail_type(op, "labels", "have an integer type", facts.dtype)
    if axis is None:
        contract.fail_type(op, "axis", "be a Python integer or a tuple of them", "None")
    x = jnp.asarray(logits)
    axes = dimensions(op, axis, x.ndim)
    shape = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    if facts.shape != shape:
        contract.fail_value(op, "labels", f"have shape {shape}", str(facts.shape))
    mask = None if where is None else _mask(op, where, x, axes)
    labels = labels if isinstance(labels, np.ndarray) else jnp.asarray(labels)
    raw = isinstance(labels, jax.Array)
    if not raw:
        labels = jnp.asarray(canonical(labels, math.prod(x.shape[a] for a in axes), None))
    return _labelled(x, labels, mask, axes=axes, raw=raw)


@partial(jax.jit, static_argnames=("axes", "raw"), inline=True)
@as_typed
def _labelled(x: jax.Array, t: jax.Array, mask: jax.Array | None, *, axes: tuple[int, ...], raw: bool) -> jax.Array:
    full, at = as_one(x, axes)
    t = canonical(t, full.shape[at], None) if raw else t
    if mask is None:
        return row(full, t, None, at, Plan())["nll"].astype(x.dtype)
    mask, _ = as_one(mask, axes)
    per_row = row(leave_out(full, mask, (at,)), t, None, at, Plan(names=("nll", "lse")))
    loss = per_row["nll"]
    if not isinstance(full.shape[at], int) or full.shape[at]:
        # A label that is itself left out still names a logit: optax measures it against the others' lse.
        index = jnp.expand_dims(t.clip(0), at)
        label = jnp.take_along_axis(full, index, at, mode="clip").squeeze(at)
        out = ~jnp.take_along_axis(mask, index, at, mode="clip").squeeze(at) & (t >= 0)
        loss = jnp.where(out, per_row["lse"] - jnp.where(out, label, 0.0), loss)
    return jnp.where(mask.any(at), loss, 0.0).astype(x.dtype)


def _mask(op: str, where: ArrayLike, x: jax.Array, axes: tuple[int, ...] | list[int]) -> jax.Array:
    """The mask of the logits that a mask of the logits or of the rows stands for."""
    where = unwrap(where)
    if getattr(where, "ndim", x.ndim) != x.ndim:
        where = jnp.expand_dims(where, axes)
    return mask_of(op, where, x)
