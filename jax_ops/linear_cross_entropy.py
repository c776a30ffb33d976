"""Fused linear layer and softmax cross-entropy for JAX: of the logits, a chunk at a time exists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_ops._arguments import describe, describe_target, parts_of, scale_of, unwrap, unwrap_all
from jax_ops._lowering import as_typed
from jax_ops._parallel.mesh import spread_of, under_auto_axes
from jax_ops._parallel.shard import Shard, shard_of
from jax_ops._reduction import as_asked, coefficients, finish, reduce
from jax_ops._rows.dispatch import is_soft
from jax_ops._rows.targets import canonical
from jax_ops._rules.plan import Plan
from softmax_ext import contract

OP = "linear_cross_entropy"


@overload
def linear_cross_entropy(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike | tuple[ArrayLike, ArrayLike],
    *,
    linear_bias: ArrayLike | None = None,
    low_rank: tuple[ArrayLike, ArrayLike] | None = None,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: ArrayLike | None = None,
    on_all_ignored: str = "nan",
    stats: tuple[()] = (),
    shift: int = 0,
    memory: str = "fast",
    chunk_size: int | None = None,
    grad_samples: int | None = None,
    key: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> jax.Array: ...
@overload
def linear_cross_entropy(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike | tuple[ArrayLike, ArrayLike],
    *,
    linear_bias: ArrayLike | None = None,
    low_rank: tuple[ArrayLike, ArrayLike] | None = None,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: ArrayLike | None = None,
    on_all_ignored: str = "nan",
    stats: Sequence[Literal["lse", "logprob", "entropy", "argmax", "log_sum_sq", "mean_logit", "rank"]],
    shift: int = 0,
    memory: str = "fast",
    chunk_size: int | None = None,
    grad_samples: int | None = None,
    key: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]: ...
def linear_cross_entropy(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike | tuple[ArrayLike, ArrayLike],
    *,
    linear_bias: ArrayLike | None = None,
    low_rank: tuple[ArrayLike, ArrayLike] | None = None,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: ArrayLike | None = None,
    on_all_ignored: str = "nan",
    stats: Sequence[str] = (),
    shift: int = 0,
    memory: str = "fast",
    chunk_size: int | None = None,
    grad_samples: int | None = None,
    key: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy between softmax(input linear_weightT + linear_bias) and targets, in nats.

    Formula: `sum(y) * log(sum(exp(x @ w.T))) - sum(y * (x @ w.T))` for probabilities y, one-hot for a class index.
    Gradient: `(exp(x @ w.T) / sum(exp(x @ w.T)) * sum(y) - y) @ w`

    Args:
        input: (..., D); float16, bfloat16, float32 or float64.
        linear_weight: (V, D), of the input's type (for a Flax kernel (D, V) pass `kernel.T`); or
            (V, d1, .., dK, D) with an input (N, D), for logits (N, V, d1, .., dK).
        target: class indices (...), any integer type, or probabilities (..., V), any floating type; with
            a K-dimensional linear_weight (N, d1, .., dK) or (N, V, d1, .., dK); or a pair of both with K classes a
            row, (ids, probabilities), where probabilities have V: those that add up at the ids.
        linear_bias: the shape of linear_weight without D, the input's type.
        low_rank: a pair (A, B) of shapes (r, D) and (V, r), of the input's type: (input @ A.T) @ B.T is added to the
            logits, and nothing of size (V, D) is copied.
        weight: one weight per class (V,), any floating type.
        ignore_index: class index of rows that reach no result; None means -100. In a pair, of slots that count
            nothing; a row of such slots reaches no result.
        reduction: "mean" (weighted by class and token weights), "sum" or "none".
        label_smoothing: s in [0, 1]; targets become (1 - s) * target + s / V.
        logit_scale: finite number > 0 the logits are multiplied by first (1 / temperature); or an array () or of the
            rows' shape, differentiable. In half precision it multiplies the input, which is rounded once more.
        softcap: finite number > 0 or None; then logits become softcap * tanh(logits / softcap).
        z_loss: number >= 0; adds z_loss * lse^2 to each kept row, not multiplied by class weights.
        token_weight: one weight per row, the shape of the class indices.
        on_all_ignored: what a mean over nothing gives: "nan", or "zero" (with zero gradients).
        stats: names among "lse", "logprob", "entropy", "argmax", "log_sum_sq" (log sum p^2), "mean_logit" (over the
            classes) and "rank" (how many logits are larger than the target's) to return for each row as well.
        shift: k >= 0; the loss of input[..., :-k, :] and target[..., k:], token_weight likewise. A logit_scale of the
            rows' shape goes with the input.
        memory: "fast" works by chunks of the rows, "lean" by slices of the classes, and keeps less.
        chunk_size: rows (fast) or classes (lean) at a time, at most; None picks what 256 MiB hold of logits
            (fast where JAX's default backend is no CPU: 1 GiB).
        grad_samples: K, or None for the exact gradient. Loss and statistics stay exact; off its targets a row's
            gradient is taken at K stratified points of its distribution: without bias, and of at most 1 / K of the
            variance that the label has under the model. One matmul. Forward mode stays exact; second derivatives raise
            NotImplementedError; probabilities (..., V), memory="lean" and low_rank are refused.
        key: a `jax.random` key, which grad_samples needs: the points of all rows are drawn from it at once. With
            axis_name it is the first device's; devices that have other rows need keys of their own.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) whose devices have an equal part of the classes
            each, in their order: of linear_weight, linear_bias, B, soft targets and weight. Class indices count all
            of the classes; the input's rows, a pair, losses and statistics are the same on every device.

    Returns:
        The loss, float32 for half-precision input: a scalar, or row-shaped with reduction "none". With `stats`
        a pair (loss, {name: array}), the statistics of the scaled and capped logits in nats (argmax, rank:
        integers; logprob and rank of a pair: at every id).
        A row whose class index is outside [0, V) and not ignore_index has a NaN loss and gradient, and makes
        those of linear_weight and linear_bias NaN.

    Raises:
        TypeError: an argument of the wrong type; options but logit_scale are Python values, never arrays.
        ValueError: a shape or value outside its rule.

    Memory:
        A chunk of the logits, in float32 for half precision. "fast" with reduction "mean" or "sum" and no stats
        forms the gradients in the forward pass (three matmuls) and keeps those of what is differentiated, in float32.
        Otherwise the arguments and two to six numbers per row are kept, and the backward pass forms the logits again
        (four matmuls). Second derivatives form each chunk again. "argmax" is one matmul more. grad_samples: one matmul,
        and K ids a row are kept.

    Source:
        Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv:2411.09009), for the idea.

    Example:
        >>> import jax.numpy as jnp, jax_ops
        >>> hidden, weight = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, 0.3], [0.4, 0.9], [0.2, 0.0], [-1.7, 0.0]])
        >>> round(jax_ops.linear_cross_entropy(hidden, weight, jnp.array([1])).item(), 4)
        0.3977
    """
    from jax_ops._parallel.points import first_key

    s, factor = scale_of(logit_scale)
    options = contract.LossOptions(
        ignore_index, reduction, label_smoothing, factor, softcap, z_loss, on_all_ignored, stats
    )
    arrays = unwrap_all((input, linear_weight, target, linear_bias, weight, token_weight))
    low = [unwrap(a, numbers=False) for a in low_rank] if isinstance(low_rank, tuple | list) else low_rank
    parts = parts_of(arrays[2])
    arrays[2], probabilities = parts[0], parts[1] if len(parts) > 1 else None
    facts = [None if a is None or i == 2 else describe(a) for i, a in enumerate(arrays)]
    facts[2] = describe_target(parts)
    more = {"shift": shift, "memory": memory, "chunk_size": chunk_size}
    about: Any = {"logit_scale": None if s is None else describe(s)}
    about["low_rank"] = tuple(None if a is None else describe(a) for a in low) if isinstance(low, list) else low
    soft = contract.linear_loss(OP, *facts, options=options, **more, **about, grad_samples=grad_samples)
    contract.key_of_samples(OP, grad_samples, key is not None)
    if grad_samples is not None:
        _check_sampling(options)

    x, w = map(jnp.asarray, arrays[:2])
    shard = shard_of(OP, axis_name, w.shape[0])
    t = jnp.asarray(arrays[2] if soft else canonical(arrays[2], shard.total, options.ignored))
    # Here and not inside of the chunks, nor by them: whatever their size, a row has the same points.
    u, drawn = None, (math.prod(x.shape[:-1]) * math.prod(w.shape[1:-1]), int(grad_samples or 0))
    if grad_samples is not None:
        u = jax.random.uniform(first_key(key, shard), drawn, jnp.float32)  # pyright: ignore[reportArgumentType]
    others = (*arrays[3:], s, *(low or (None, None)), probabilities, u)
    given = (x, w, t, *(None if a is None else jnp.asarray(a) for a in others))
    how = {"options": replace(options, stats=tuple(stats)), "shard": shard, **more}
    if (spread := spread_of(range(x.ndim - 1), *given)) is None:
        found: Any = _loss(*given, **how)
        return as_asked(found, stats) if stats else found
    rows = spread.sharding((*x.shape[:-2], max(x.shape[-2] - shift, 0), *w.shape[1:-1]) if x.ndim > 1 else ())
    loss = rows if reduction == "none" else spread.sharding(())
    out: Any = (loss, dict.fromkeys(stats, rows)) if stats else loss
    if probabilities is not None and "logprob" in stats:
        lead = t.ndim - 1 - len(w.shape[1:-1])
        shape = [max(n - shift, 0) if i == lead - 1 else n for i, n in enumerate(t.shape)]
        out[1]["logprob"] = spread.along(lead).sharding(shape)
    found = under_auto_axes(_loss, *given, spread=spread, out=out, blocks=spread.blocks, **how)
    return as_asked(found, stats) if stats else found


@partial(jax.jit, static_argnames=("options", "shard", "shift", "memory", "chunk_size", "blocks"), inline=True)
@as_typed
def _loss(
    x: jax.Array,
    w: jax.Array,
    t: jax.Array,
    b: jax.Array | None,
    class_weight: jax.Array | None,
    tokens: jax.Array | None,
    scale: jax.Array | None,
    down: jax.Array | None,
    up: jax.Array | None,
    probabilities: jax.Array | None,
    u: jax.Array | None,
    *,
    options: contract.LossOptions,
    shard: Shard,
    shift: int,
    memory: str,
    chunk_size: int | None,
    blocks: int = 1,
) -> Any:
    """The loss, and its statistics; targets are canonical or soft, `blocks` of the rows are on devices of their own."""
    from jax_ops._head.judged import How
    from jax_ops._head.layout import each_row, largest, lay_out, more, total
    from jax_ops._parallel.statistics import MORE

    lean, plan = memory == "lean", Plan.of(options, x.dtype, memory == "lean")
    low_rank = None if down is None or up is None else (down, up)
    of = lay_out(x, w, b, t, probabilities, tokens, shift=shift, scale=scale, low_rank=low_rank)
    how = How(of.cut(lean, chunk_size, blocks), shard, plan)
    ones = jnp.ones_like(of.x, shape=of.rows, dtype=of.kind)
    by = coefficients(ones, of.target, class_weight, of.token_weight, options, shard, of.probabilities)
    of_class = plan.class_weight(class_weight, x.dtype, soft=is_soft(t))
    if options.reduction != "none" and not options.stats and not lean and u is None:
        return reduce(total(of, of_class, by, how), by, options)
    names = [n for n in options.stats if n in MORE]
    rows = each_row(of, of_class, how, u)
    if names:  # by rows, whose logits all classes have
        rows |= more(of, tuple(names), how._replace(cut=of.cut(False, None if lean else chunk_size, blocks)))
    loss, found = finish(rows, lambda: largest(of, how), of.target, by, options)
    loss = of.as_given(loss) if options.reduction == "none" else loss
    return (loss, {name: of.as_given(value) for name, value in found.items()}) if options.stats else loss


def _check_sampling(options: contract.LossOptions) -> None:
    if options.label_smoothing and options.softcap is not None:
        # under a cap the smoothing's part of the gradient is no outer product
        contract.fail_value(OP, "grad_samples", "be None with label_smoothing and softcap together", "a number")
