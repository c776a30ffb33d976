"""Statistics of a row that the loss itself has no use for: log_sum_sq, mean_logit and rank.

legend:  z the logits scaled and capped, p = softmax(z), r = softmax(2 z), t any class of the row, V classes
formula: log_sum_sq = log sum_j p_j^2 (`_rules/log_sum_sq.py`);  mean_logit = sum_j z_j / V
         rank = how many z_j > z_target, NaN the largest
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._parallel.shard import Shard
from jax_ops._parallel.squares import sharded_log_sum_sq
from jax_ops._rows.dispatch import IGNORED, capped, compute, is_soft, of_rows
from jax_ops._rules.log_sum_sq import log_sum_sq
from jax_ops._rules.plan import Plan

Product = Callable[[Array], Array]

MORE = ("log_sum_sq", "mean_logit", "rank")  # the names of a call's statistics that are formed here


def statistics_of(
    names: Sequence[str],
    logits: Array,
    target: Array,
    axis: int,
    plan: Plan,
    shard: Shard,
    by: Product | None = None,
) -> dict[str, Array]:
    """Those named of each row, or of a shard's rows; of a row that `target` ignores 0, its rank -1.

    `by`: the product of logits with an array scale.
    """
    nothing = None if is_soft(target) else of_rows(target, logits.ndim, axis) == IGNORED
    x = compute(logits)  # what is made of them twice is summed before it is rounded
    if nothing is not None:  # such a row reaches no result, not even through 0 * NaN
        x = jnp.where(jnp.expand_dims(nothing, axis), 0.0, x)
    found = {}
    for name in names:
        if name == "rank":
            found[name] = ranks(scaled(x, by), target, axis, plan, shard)
        else:
            make: Callable[..., Array] = _log_sum_sq if name == "log_sum_sq" else _mean
            value = make(x, axis, plan, shard, by)
            found[name] = value if nothing is None else jnp.where(nothing, 0.0, value)
    return found


def _log_sum_sq(x: Array, axis: int, plan: Plan, shard: Shard, by: Product | None) -> Array:
    if isinstance(shard.total, int) and not shard.total:
        return x.sum(axis) + jnp.nan
    if is_shifted(plan, by):
        x = below(x, shard.largest(x.max(axis, keepdims=True, initial=-jnp.inf)))
    z = bounded(scaled(x, by), plan.scale, plan.softcap)
    return log_sum_sq(z, axis) if not shard.names else sharded_log_sum_sq(z, axis, shard)


def _mean(x: Array, axis: int, plan: Plan, shard: Shard, by: Product | None) -> Array:
    total = bounded(scaled(x, by), plan.scale, plan.softcap).sum(axis)
    return shard.sum(total) / (shard.total if isinstance(shard.total, int) else jnp.asarray(shard.total, x.dtype))


def scaled(x: Array, by: Product | None) -> Array:
    """The product with an array scale, where there is one."""
    return x if by is None else by(x)


def is_shifted(plan: Plan, by: Product | None) -> bool:
    """Whether logits are to be taken from their row's largest first: their product with a scale is rounded.

    What they have in common it would round too, of which log sum p^2 is no function.
    """
    return plan.softcap is None and (plan.scale != 1.0 or by is not None)


def below(x: Array, largest: Array) -> Array:
    """Logits less their row's largest, which is held constant."""
    return x - jnp.where(jnp.isfinite(largest), largest, 0.0)


def bounded(x: Array, scale: float, softcap: float | None) -> Array:
    """The logits scaled and capped, with a derivative that keeps its digits where the cap is nearly flat."""
    if softcap is None:
        return capped(x, scale, None)
    lost = jnp.isneginf(x)  # the cap is flat there
    u = jnp.where(lost, 0.0, x) * (scale / softcap)
    near = (u > -0.5) & (u < 0.5)
    far = jnp.where(near, 1.0, u)
    # tanh u = 1 - 2 sigmoid(-2 u): the derivative of tanh as it is formed, 1 - tanh^2, would be 0 from 9 on
    small = jnp.exp(-2.0 * jnp.abs(far))
    of_far = jnp.sign(far) * (1.0 - 2.0 * small / (1.0 + small))
    return jnp.where(lost, -jnp.inf, softcap * jnp.where(near, jnp.tanh(jnp.where(near, u, 0.0)), of_far))


def ranks(x: Array, target: Array, axis: int, plan: Plan, shard: Shard) -> Array:
    """How many are larger than the target's; -1 where there is no such class."""
    if isinstance(shard.total, int) and not shard.total:
        return jnp.full_like(target, -1)
    z = capped(jax.lax.stop_gradient(x), plan.scale, plan.softcap)
    t, inside = shard.local(target)
    pair = target.ndim == z.ndim
    t, inside = (t, inside) if pair else (jnp.expand_dims(t, axis), inside)
    mine = jnp.take_along_axis(z, jnp.clip(t, 0, z.shape[axis] - 1), axis)
    if shard.names:
        mine = shard.sum(jnp.where(inside if pair else jnp.expand_dims(inside, axis), mine, 0.0))
    counts = [larger(z, v, axis) for v in jnp.split(mine, mine.shape[axis], axis)] if mine.shape[axis] else []
    count = jnp.concatenate(counts, axis) if counts else jnp.zeros_like(t)
    count = shard.sum(count) if shard.names else count
    return jnp.where(target < 0, -1, count if pair else count.squeeze(axis))


def larger(z: Array, than: Array, axis: int) -> Array:
    """How many of each row are larger than one number of it, keeping `axis`."""
    return ((z > than) | (jnp.isnan(z) & ~jnp.isnan(than))).sum(axis, keepdims=True)
