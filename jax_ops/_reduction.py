"""From the rows' numbers to the loss: class and token weights, smoothing, z-loss, reduction, statistics.

Plain differentiable framework code: what autodiff does here is exact and costs O(N).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._parallel.shard import Shard
from jax_ops._rows.dispatch import IGNORED, INVALID, is_soft
from softmax_ext.contract import LossOptions


class Coefficients(NamedTuple):
    """A row's loss is nll * its nll + smooth * its smooth + square * its lse^2; None where a term is not asked for."""

    nll: Array | float | None
    smooth: Array | float | None
    square: Array | float | None
    share: Array  # the row's part of the mean's denominator
    kept: Array  # whether the row counts at all


def coefficients(
    ones: Array,
    target: Array,
    weight: Array | None,
    token_weight: Array | None,
    options: LossOptions,
    shard: Shard,
) -> Coefficients:
    """What each row's numbers are multiplied by; `ones` has the rows' shape and type, targets are canonical or soft.

    Ignored rows have numbers of 0, so a coefficient is one number where no weights are given.
    """
    s, soft = options.label_smoothing, is_soft(target)
    kept = jnp.ones_like(ones, dtype=bool) if soft else target != IGNORED
    share: Array = kept.astype(ones.dtype)
    tokens = nll = 1.0
    if token_weight is not None:
        tokens = jnp.where(kept, token_weight.astype(ones.dtype), 0.0)
    if not soft and weight is not None and not (isinstance(shard.total, int) and shard.total == 0):
        t, inside = shard.local(target)
        at = weight.astype(ones.dtype).at[t.clip(0, shard.classes - 1)]
        # Ignored rows read no weight, not even through 0 * inf; an invalid one reads that of class 0.
        mine = kept if not shard.names else inside | ((target <= INVALID) & (shard.first(target.dtype) == 0))
        nll = share = shard.sum(jnp.where(mine, at.get(mode="clip", out_sharding=jax.typeof(t).sharding), 0.0))
    return Coefficients(
        nll=(1.0 - s) * nll * tokens if s < 1.0 else None,
        smooth=s / _classes(shard.total, ones) * tokens if s > 0.0 else None,
        square=options.z_loss * tokens if options.z_loss > 0.0 else None,
        share=share * tokens,
        kept=kept,
    )


def _classes(total: Any, like: Array) -> Any:
    """The number of classes as a divisor, be it one that an export leaves open."""
    return max(total, 1) if isinstance(total, int) else jnp.asarray(total).astype(like.dtype)


def combine(rows: dict[str, Array], target: Array, by: Coefficients) -> Array:
    """The rows' losses from their nll, smooth and lse."""
    terms = []
    if by.nll is not None:
        terms.append(by.nll * rows["nll"])
    if by.smooth is not None:
        terms.append(by.smooth * rows["smooth"])
        if not is_soft(target):
            terms[-1] = jnp.where(target == INVALID, jnp.nan, terms[-1])
    if by.square is not None:
        terms.append(by.square * jnp.square(rows["lse"]))
    return sum(terms[1:], terms[0])


def reduce(total: Array, by: Coefficients, options: LossOptions) -> Array:
    """The sum or mean from the summed loss."""
    if options.reduction == "sum":
        return total
    # The denominator is exchanged before dividing, not the quotient after: a gradient through an unused 0/0
    # would be NaN.
    count, zero = by.share.sum(), options.on_all_ignored == "zero"
    some = count != 0 if zero else by.kept.any()
    return jnp.where(some, total / jnp.where(some, count, 1.0), 0.0 if zero else jnp.nan)


def finish(
    rows: dict[str, Array], argmax: Callable[[], Array], target: Array, by: Coefficients, options: LossOptions
) -> tuple[Array, dict[str, Array]]:
    """(loss, statistics) from the rows' numbers; `argmax()` is each row's largest class."""
    loss = combine(rows, target, by)
    if options.reduction != "none":
        loss = reduce(loss.sum(), by, options)
    return loss, statistics(rows, argmax, target, options)


def statistics(
    rows: dict[str, Array], argmax: Callable[[], Array], target: Array, options: LossOptions
) -> dict[str, Array]:
    """The statistics asked for, of the target's row shape; ignored rows hold 0 (argmax -1)."""
    out: dict[str, Array] = {}
    for name in options.stats:
        if name == "logprob":
            out[name] = 0.0 - rows["nll"]
        elif name == "argmax":
            out[name] = argmax() if is_soft(target) else jnp.where(target == IGNORED, -1, argmax())
        else:
            out[name] = rows[name]
    return out


def as_asked(found: tuple[Array, dict[str, Array]], names: Sequence[str]) -> tuple[Array, dict[str, Array]]:
    """A loss with its statistics in the order asked for, indices in the type JAX has for integers around the call."""
    (loss, stats), kind = found, jax.dtypes.canonicalize_dtype(int)
    return loss, {name: stats[name].astype(kind) if name == "argmax" else stats[name] for name in names}
