"""From the rows' numbers to the loss: class and token weights, smoothing, z-loss, reduction, statistics.

Plain differentiable framework code: what autodiff does here is exact and costs O(N).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._rows import IGNORED, INVALID, is_soft
from softmax_ext.contract import LossOptions


def reduce(
    rows: dict[str, Array],
    target: Array,
    weight: Array | None,
    token_weight: Array | None,
    options: LossOptions,
    classes: int,
) -> Array:
    """The loss from per-row nll, lse and (with smoothing) smooth; targets canonical or soft."""
    nll, s = rows["nll"], options.label_smoothing
    soft = is_soft(target)
    kept = jnp.ones_like(nll, dtype=bool) if soft else target != IGNORED
    share = kept.astype(nll.dtype)  # the row's part of the mean's denominator
    if not soft and weight is not None and classes:
        # Ignored rows read no weight, not even through 0 * inf.
        at = weight.astype(nll.dtype).at[target.clip(0, classes - 1)]
        share = jnp.where(kept, at.get(mode="clip", out_sharding=jax.typeof(target).sharding), 0.0)
        nll = nll * share
    loss = nll
    if s > 0.0:
        smooth = rows["smooth"] * (s / max(classes, 1))
        loss = smooth if s == 1.0 else (1.0 - s) * nll + smooth
        if not soft:
            loss = jnp.where(target == INVALID, jnp.nan, loss)
    if options.z_loss > 0.0:
        loss = loss + options.z_loss * jnp.square(rows["lse"])
    if token_weight is not None:
        t = jnp.where(kept, token_weight.astype(nll.dtype), 0.0)
        share = t if soft else share * t
        loss = loss * t
    if options.reduction == "none":
        return loss
    total = loss.sum()
    if options.reduction == "sum":
        return total
    # The denominator is exchanged before dividing, not the quotient after: a gradient through an unused 0/0
    # would be NaN.
    count, zero = share.sum(), options.on_all_ignored == "zero"
    some = count != 0 if zero else kept.any()
    return jnp.where(some, total / jnp.where(some, count, 1.0), 0.0 if zero else jnp.nan)


def statistics(
    rows: dict[str, Array], z: Callable[[], Array], target: Array, options: LossOptions, axis: int
) -> dict[str, Array]:
    """The statistics asked for, of the target's row shape; ignored rows hold 0 (argmax -1)."""
    out: dict[str, Array] = {}
    for name in options.stats:
        if name == "logprob":
            out[name] = 0.0 - rows["nll"]
        elif name == "argmax":
            if (logits := z()).shape[axis]:
                out[name] = logits.argmax(axis)
            else:
                out[name] = jnp.full(rows["nll"].shape, -1)
            if not is_soft(target):
                out[name] = jnp.where(target == IGNORED, -1, out[name])
        else:
            out[name] = rows[name]
    return out
