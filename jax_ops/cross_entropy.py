"""Fused softmax cross-entropy for JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_ops._arguments import describe, describe_target, parts_of, scale_of, unwrap_all
from jax_ops._lowering import as_typed
from jax_ops._parallel.mesh import lies_otherwise, spread_of, under_auto_axes
from jax_ops._parallel.shard import Shard, shard_of
from jax_ops._reduction import as_asked, coefficients, finish
from jax_ops._rows.dispatch import capped, is_soft
from jax_ops._rows.targets import canonical
from jax_ops._rules.cross_entropy import row
from jax_ops._rules.plan import Plan
from softmax_ext import contract


@overload
def cross_entropy(
    input: ArrayLike,
    target: ArrayLike | tuple[ArrayLike, ArrayLike],
    weight: ArrayLike | None = None,
    *,
    axis: int = -1,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: ArrayLike | None = None,
    on_all_ignored: str = "nan",
    stats: tuple[()] = (),
    axis_name: str | Sequence[str] | None = None,
) -> jax.Array: ...
@overload
def cross_entropy(
    input: ArrayLike,
    target: ArrayLike | tuple[ArrayLike, ArrayLike],
    weight: ArrayLike | None = None,
    *,
    axis: int = -1,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: ArrayLike | None = None,
    on_all_ignored: str = "nan",
    stats: Sequence[Literal["lse", "logprob", "entropy", "argmax", "log_sum_sq", "mean_logit", "rank"]],
    axis_name: str | Sequence[str] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]: ...
def cross_entropy(
    input: ArrayLike,
    target: ArrayLike | tuple[ArrayLike, ArrayLike],
    weight: ArrayLike | None = None,
    *,
    axis: int = -1,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: ArrayLike | None = None,
    on_all_ignored: str = "nan",
    stats: Sequence[str] = (),
    axis_name: str | Sequence[str] | None = None,
) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy between softmax(input) and targets, in nats.

    Formula: `sum(y) * log(sum(exp(x))) - sum(y * x)` for probabilities y, one-hot for a class index.
    Gradient: `exp(x) / sum(exp(x)) * sum(y) - y`

    Args:
        input: logits of at least one dimension; float16, bfloat16, float32 or float64.
        target: class indices, the input's shape without its class axis, any integer type; or
            probabilities, the input's shape, any floating type (their sum need not be 1); or a pair of both with K
            classes a row, (ids, probabilities), where the input has V: the probabilities that add up at the ids.
        weight: one weight per class (V,), any floating type.
        axis: the class axis, in [-ndim, ndim - 1].
        ignore_index: class index of rows that reach no result; None means -100. In a pair, of slots that count
            nothing; a row of such slots reaches no result.
        reduction: "mean" (weighted by class and token weights), "sum" or "none".
        label_smoothing: s in [0, 1]; targets become (1 - s) * target + s / V.
        logit_scale: finite number > 0 the logits are multiplied by first (1 / temperature); or an array () or of the
            class indices' shape, any floating type, differentiable, its values not looked at.
        softcap: finite number > 0 or None; then logits become softcap * tanh(logits / softcap).
        z_loss: number >= 0; adds z_loss * lse^2 to each kept row, not multiplied by class weights.
        token_weight: one weight per row, the shape of the class indices.
        on_all_ignored: what a mean over nothing gives: "nan", or "zero" (with zero gradients).
        stats: names among "lse", "logprob", "entropy", "argmax", "log_sum_sq" (log sum p^2), "mean_logit" (over the
            classes) and "rank" (how many logits are larger than the target's) to return for each row as well.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) whose devices have an equal part of the classes
            each, in their order: of logits, soft targets and weight. Class indices count all of the classes, and a
            pair is the same on every device; so are rows, losses and statistics.

    Returns:
        The loss, float32 for half-precision logits: a scalar, or row-shaped with reduction "none". With `stats`
        a pair (loss, {name: array}), the statistics of the scaled and capped logits in nats (argmax, rank:
        integers; logprob and rank of a pair: at every id).
        The loss and gradient of a row whose class index is outside [0, V) and not ignore_index are NaN.

    Raises:
        TypeError: an argument of the wrong type; options but logit_scale are Python values, never arrays.
        ValueError: a shape or value outside its rule.

    Memory:
        The backward pass keeps the logits, the targets and two numbers per row. A logit_scale that is an array
        multiplies a piece of the logits at a time.

    Source:
        Kurbiel 2021, "Derivative of the Softmax Function and the Categorical Cross-Entropy Loss".

    Example:
        >>> import jax.numpy as jnp, jax_ops
        >>> logits = jnp.array([[1.1, 2.2, 0.2, -1.7]])
        >>> round(jax_ops.cross_entropy(logits, jnp.array([1])).item(), 4)
        0.3977
    """
    s, factor = scale_of(logit_scale)
    options = contract.LossOptions(
        ignore_index, reduction, label_smoothing, factor, softcap, z_loss, on_all_ignored, stats
    )
    arrays = unwrap_all((input, target, weight, token_weight))
    parts = parts_of(arrays[1])
    arrays[1], probabilities = parts[0], parts[1] if len(parts) > 1 else None
    facts = [None if a is None else describe(a) for a in (arrays[0], *arrays[2:])]
    about = contract.at_least_1d("cross_entropy", "input", facts[0])
    axis = contract.dimension("cross_entropy", "axis", axis, len(about.shape))
    of_scale = None if s is None else describe(s)
    soft = contract.loss(
        "cross_entropy",
        about,
        describe_target(parts),
        *facts[1:],
        options=options,
        axis=axis,
        logit_scale=of_scale,
    )

    shard = shard_of("cross_entropy", axis_name, about.shape[axis])
    raw = not soft and not isinstance(arrays[1], np.ndarray)
    if not soft and not raw:
        arrays[1] = canonical(arrays[1], shard.total, options.ignored)
    given = [a if a is None or isinstance(a, jax.Array) else jnp.asarray(a) for a in (*arrays, s, probabilities)]
    options = replace(options, stats=tuple(stats))
    how: dict[str, Any] = {"options": options, "shard": shard, "axis": axis, "raw": raw}
    logits, kept = jnp.asarray(given[0]), [i for i in range(len(about.shape)) if i != axis]
    otherwise = probabilities is not None or lies_otherwise(axis, logits, *given[1:])
    spread = spread_of(kept, *given) if otherwise else None
    found: Any
    if spread is None:
        found = _loss(*given, **how)
    else:  # Where classes are cut, JAX would ask for the sharding of each sum and index over them.
        rows_out = spread.sharding([logits.shape[i] for i in kept])
        loss = rows_out if reduction == "none" else spread.sharding(())
        several = {"logprob": spread.along(axis).sharding(arrays[1].shape)} if probabilities is not None else {}
        out = (loss, {name: several.get(name, rows_out) for name in stats}) if stats else loss
        found = under_auto_axes(_loss, *given, spread=spread, out=out, **how)
    return as_asked(found, stats) if stats else found


# One program, so that an eager gradient is one as well: 2 ms, where tracing each of its steps anew took 13 (a loss of
# (4, 10) logits on a 2-core x86-64).
@partial(jax.jit, static_argnames=("options", "shard", "axis", "raw"), inline=True)
@as_typed
def _loss(
    logits: jax.Array,
    t: jax.Array,
    w: jax.Array | None,
    tokens: jax.Array | None,
    scale: jax.Array | None,
    probabilities: jax.Array | None,
    *,
    options: contract.LossOptions,
    shard: Shard,
    axis: int,
    raw: bool,
) -> Any:
    """The loss, and its statistics; targets are soft, canonical, or `raw` class indices, with K of them a row pairs."""
    if raw:
        t = canonical(t, shard.total, options.ignored)
    plan, by_scale = Plan.of(options, logits.dtype), None
    of_class, x = plan.class_weight(w, logits.dtype, soft=is_soft(t)), logits
    if scale is not None:
        from jax_ops._head.scaled_rows import scaled_row
        from jax_ops._rules.scaled import ignored, times

        (own,) = shard.own(scale)
        by_scale = lambda x: times(x, own, axis, ignored(x, t, axis))  # noqa: E731
        logits = by_scale(x)  # formed for who asks for more than the row's own numbers
    if shard.names:
        from jax_ops._parallel.logits import sharded_row

        per_row = sharded_row(logits, t, of_class, axis, plan, shard)
    elif scale is not None:
        per_row = scaled_row(scale, x, t, of_class, axis, plan)
    else:
        per_row = row(logits, t, of_class, axis, plan)
    one = per_row[plan.names[0]]
    ones = jnp.ones_like(one.sum(axis) if one.ndim == logits.ndim else one)
    if options.stats:
        from jax_ops._parallel.statistics import MORE, statistics_of

        per_row |= statistics_of([n for n in options.stats if n in MORE], x, t, axis, plan, shard, by_scale)
    by = coefficients(ones, t, w, tokens, options, shard, probabilities, axis)
    loss, found = finish(per_row, lambda: _argmax(logits, axis, plan, shard), t, by, options, axis)
    return (loss, found) if options.stats else loss


def _argmax(logits: jax.Array, axis: int, plan: Plan, shard: Shard) -> jax.Array:
    """The first class with the largest logit of each row; -1 where there are no classes."""
    z = capped(jax.lax.stop_gradient(logits), plan.scale, plan.softcap)
    if isinstance(shard.total, int) and not shard.total:
        return jnp.full(z.sum(axis).shape, -1)
    return shard.first_largest(z.max(axis), z.argmax(axis))
