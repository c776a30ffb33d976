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
from jax_ops._rows.dispatch import IGNORED, INVALID, finite, is_soft, mass_sum, of_rows
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
    probabilities: Array | None = None,
    axis: int = 1,
) -> Coefficients:
    """What each row's numbers are multiplied by; `ones` has the rows' shape and type, targets are canonical or soft.

    Ignored rows have numbers of 0, so a coefficient is one number where no weights are given. With K classes a row,
    along `axis`, each has its own: its probability, weighted by class.
    """
    s, soft = options.label_smoothing, is_soft(target)
    marks = of_rows(target, ones.ndim + 1, axis)
    kept = jnp.ones_like(ones, dtype=bool) if soft else marks != IGNORED
    share: Array = kept.astype(ones.dtype)
    of_row = nll = 1.0
    if token_weight is not None:
        of_row = jnp.where(kept, token_weight.astype(ones.dtype), 0.0)
    tokens = of_row if probabilities is None or token_weight is None else jnp.expand_dims(of_row, axis)
    if probabilities is not None:  # what an ignored slot holds is not read, NaN included
        nll = jnp.where(target == IGNORED, 0.0, probabilities.astype(ones.dtype))
    if not soft and weight is not None and not (isinstance(shard.total, int) and shard.total == 0):
        t, inside = shard.local(target)
        at = weight.astype(ones.dtype).at[t.clip(0, shard.classes - 1)]
        # Ignored rows read no weight, not even through 0 * inf; an invalid one reads that of class 0.
        mine = inside | ((target <= INVALID) & (shard.first(target.dtype) == 0)) if shard.names else target != IGNORED
        of_class = shard.sum(jnp.where(mine, at.get(mode="clip", out_sharding=jax.typeof(t).sharding), 0.0))
        nll, share = nll * of_class, of_class if probabilities is None else share
    return Coefficients(
        nll=(1.0 - s) * nll * tokens if s < 1.0 else None,
        smooth=s / _classes(shard.total, ones) * of_row if s > 0.0 else None,
        square=options.z_loss * of_row if options.z_loss > 0.0 else None,
        share=share * of_row,
        kept=kept,
    )


def _classes(total: Any, like: Array) -> Any:
    """The number of classes as a divisor, be it one that an export leaves open."""
    return max(total, 1) if isinstance(total, int) else jnp.asarray(total).astype(like.dtype)


def combine(rows: dict[str, Array], target: Array, by: Coefficients, axis: int = 1) -> Array:
    """The rows' losses from their nll, smooth and lse; `axis`: where nll has K a row."""
    terms = []
    if by.nll is not None and rows["nll"].ndim > by.kept.ndim:
        terms.append(mass_sum(by.nll, rows["nll"], axis))  # pyright: ignore[reportArgumentType]
    elif by.nll is not None:
        terms.append(by.nll * rows["nll"])
    if by.smooth is not None:
        terms.append(by.smooth * rows["smooth"])
        if not is_soft(target):
            marks = of_rows(target, rows["smooth"].ndim + 1, axis)
            terms[-1] = jnp.where(marks == INVALID, jnp.nan, terms[-1])
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
    rows: dict[str, Array],
    argmax: Callable[[], Array],
    target: Array,
    by: Coefficients,
    options: LossOptions,
    axis: int = 1,
) -> tuple[Array, dict[str, Array]]:
    """(loss, statistics) from the rows' numbers; `argmax()` is each row's largest class."""
    loss = combine(rows, target, by, axis)
    if options.reduction != "none":
        loss = reduce(loss.sum(), by, options)
    return loss, statistics(rows, argmax, target, options, by.kept.ndim, axis)


def statistics(
    rows: dict[str, Array],
    argmax: Callable[[], Array],
    target: Array,
    options: LossOptions,
    ndim: int,
    axis: int = 1,
) -> dict[str, Array]:
    """The statistics asked for, of the rows' `ndim` dimensions; ignored rows hold 0 (argmax -1).

    Of K classes a row "logprob" has the shape of their ids.
    """
    out: dict[str, Array] = {}
    for name in options.stats:
        if name == "logprob" and rows["nll"].ndim > ndim:
            out[name] = 0.0 - finite(rows["nll"]) - jnp.where(rows["nll"] < 0, jnp.inf, 0.0)
        elif name == "logprob":
            out[name] = 0.0 - rows["nll"]
        elif name == "argmax":
            at = argmax()
            out[name] = at if is_soft(target) else jnp.where(of_rows(target, ndim + 1, axis) == IGNORED, -1, at)
        elif name == "rank":
            out[name] = jnp.where(target < 0, -1, rows[name])
        else:
            out[name] = rows[name]
    return out


def as_asked(found: tuple[Array, dict[str, Array]], names: Sequence[str]) -> tuple[Array, dict[str, Array]]:
    """A loss with its statistics in the order asked for, indices in the type JAX has for integers around the call."""
    (loss, stats), kind = found, jax.dtypes.canonicalize_dtype(int)
    return loss, {n: stats[n].astype(kind) if n in ("argmax", "rank") else stats[n] for n in names}


def divergence_weight(like: Array, tokens: Array | None, kept: Array | None) -> Array:
    """What each row's divergence is multiplied by: 0 where it is not kept."""
    weight = jnp.ones_like(like) if tokens is None else tokens.astype(like.dtype)
    return weight if kept is None else jnp.where(kept, weight, 0.0)


def divergence_reduced(values: Array, weight: Array, kept: Array | None, options: Any) -> Array:
    """The rows' divergences weighted, or their sum or mean."""
    losses = weight * values
    return losses if options.reduction == "none" else divergence_mean(losses.sum(), weight, kept, options)


def divergence_mean(total: Array, weight: Array, kept: Array | None, options: Any) -> Array:
    """The sum or mean from the summed divergence."""
    if options.reduction == "sum":
        return total
    if kept is None and 0 not in weight.shape:
        return total / weight.sum()
    if kept is None:  # through 0 / 0 the gradients of nothing would be NaN
        return jnp.nan + 0.0 * total
    some = kept.any()  # exchanged before dividing: a gradient through an unused 0 / 0 would be NaN
    return jnp.where(some, total / jnp.where(some, weight.sum(), 1.0), jnp.nan)
