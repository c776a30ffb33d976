"""Divergences of a student from a teacher for JAX: between two arrays of logits, or the logits of two heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_ops._arguments import describe, scale_of, unwrap
from jax_ops._lowering import as_typed
from jax_ops._parallel.mesh import spread_of, under_auto_axes
from jax_ops._parallel.shard import Shard, shard_of
from jax_ops._reduction import divergence_mean, divergence_reduced, divergence_weight
from softmax_ext import contract


def divergence(
    input: ArrayLike,
    teacher: ArrayLike,
    *,
    kind: Literal["forward_kl", "reverse_kl", "jsd", "tv"] = "forward_kl",
    beta: float = 0.5,
    logit_scale: ArrayLike = 1.0,
    teacher_scale: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weight: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    reduction: str = "mean",
    axis: int = -1,
    axis_name: str | Sequence[str] | None = None,
) -> jax.Array:
    """Divergence of the student's softmax p from the teacher's softmax q along one axis, in nats.

    Formula: `sum(q * (log(q) - log(p)))` for kind "forward_kl"; "reverse_kl" exchanges p and q, "jsd" is
    beta KL(q, m) + (1 - beta) KL(p, m) with m = beta q + (1 - beta) p, "tv" is sum |p - q| / 2.
    Gradient: `p - q` for "forward_kl", at the student's logits; the teacher is a constant.
    A student equal to its teacher has 0 and a gradient of 0; one next to it loses no digits. Nothing is multiplied by a
    temperature squared.

    Args:
        input: the student's logits, of any shape; float16, bfloat16, float32 or float64.
        teacher: logits of the input's shape, any floating type, without a gradient.
        kind: "forward_kl", "reverse_kl", "jsd" or "tv".
        beta: number in (0, 1), the teacher's share of the mixture of "jsd".
        logit_scale: finite number > 0 the student's logits are multiplied by first (1 / temperature); or an array () or
            of the rows' shape, differentiable.
        teacher_scale: the same for the teacher's logits.
        softcap: finite number > 0 or None; then the student's logits become softcap * tanh(logits / softcap).
        teacher_softcap: the same for the teacher's logits.
        token_weight: one weight per row, any floating type.
        keep: booleans, one per row: other rows reach no result, even when they are NaN.
        reduction: "mean" (over the kept rows, weighted by token_weight), "sum" or "none".
        axis: the classes' axis.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) whose devices have an equal part of the classes
            each, in their order, of input and teacher. Rows, token_weight, keep and results are the same on every
            device.

    Returns:
        The divergence, float32 for half-precision logits: a scalar, or row-shaped with reduction "none". The mean of
        no kept row is NaN.

    Raises:
        TypeError: an argument of the wrong type, or a teacher that is differentiated.
        ValueError: a shape or value outside its rule.

    Memory:
        The backward pass keeps both arrays of logits and seven numbers per row. A logit_scale that is an array
        multiplies a piece of the logits at a time.

    Source:
        Csiszar 1963 for the divergences; Agarwal et al. 2024, "On-Policy Distillation of Language Models", for "jsd".

    Example:
        >>> import jax.numpy as jnp, jax_ops
        >>> student, teacher = jnp.array([[0.0, 0.0, 0.0]]), jnp.array([[2.0, 1.0, 0.0]])
        >>> round(jax_ops.divergence(student, teacher).item(), 4)
        0.2662
    """
    from jax_ops._rules.divergence import constant

    s, factor = scale_of(logit_scale)
    options = contract.DivergenceOptions(kind, beta, factor, teacher_scale, softcap, teacher_softcap, reduction)
    arrays = [None if a is None else unwrap(a, numbers=False) for a in (input, teacher, token_weight, keep)]
    facts, *more = [None if a is None else describe(a) for a in arrays]
    facts = contract.at_least_1d("divergence", "input", facts)
    at = contract.dimension("divergence", "axis", axis, len(facts.shape))
    of_scale = None if s is None else describe(s)
    contract.divergence("divergence", facts, *more, options=options, axis=at, logit_scale=of_scale)
    given: list[Any] = [None if a is None else jnp.asarray(a) for a in (*arrays, s)]
    given[1] = constant("divergence", "teacher")(given[1])
    rows = [i for i in range(len(facts.shape)) if i != at]
    shard = shard_of("divergence", axis_name, facts.shape[at])
    return _spread(_of_logits, given, rows, facts.shape, options, axis=at, shard=shard)


def linear_divergence(
    input: ArrayLike,
    linear_weight: ArrayLike,
    teacher_input: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    kind: Literal["forward_kl", "reverse_kl", "jsd", "tv"] = "forward_kl",
    beta: float = 0.5,
    logit_scale: ArrayLike = 1.0,
    teacher_scale: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weight: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    reduction: str = "mean",
    shift: int = 0,
    memory: Literal["fast", "lean"] = "fast",
    chunk_size: int | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> jax.Array:
    """Divergence of softmax(input @ linear_weight.T) from the teacher head's softmax, in nats.

    Formula: `sum(q * (log(q) - log(p)))` for kind "forward_kl", with p = softmax(input @ linear_weight.T + linear_bias)
    and q = softmax(teacher_input @ teacher_weight.T + teacher_bias); the other kinds as in `divergence`.
    Gradient: `(p - q) @ w` for "forward_kl", at the input; the teacher's four are constants.

    Args:
        input: the student's (..., D), any leading dimensions or none; float16, bfloat16, float32 or float64.
        linear_weight: (V, D), of the input's type.
        teacher_input: (..., E), with the input's leading dimensions; any floating type, without a gradient.
        teacher_weight: (V, E), of teacher_input's type, without a gradient.
        linear_bias: (V,), of the input's type.
        teacher_bias: (V,), of teacher_input's type, without a gradient.
        kind: "forward_kl", "reverse_kl", "jsd" or "tv".
        beta: number in (0, 1), the teacher's share of the mixture of "jsd".
        logit_scale: the student's logits are multiplied by this first: a number, or an array () or of the rows' shape
            (...), differentiable. It multiplies the input; beside a linear_bias the weight is copied with it.
        teacher_scale: the teacher's logits are multiplied by this first.
        softcap: then the student's are bounded to softcap * tanh(logits / softcap).
        teacher_softcap: the same for the teacher's logits.
        token_weight: one weight per row (...).
        keep: booleans (...): other rows reach no result, even when they are NaN.
        reduction: "mean" (over the kept rows, weighted by token_weight), "sum" or "none".
        shift: k compares positions [..., :-k, :], by token_weight and keep of [..., k:]. A logit_scale of the rows'
            shape goes with the input.
        memory: "fast" or "lean"; see Memory.
        chunk_size: rows (fast) or classes (lean) at a time; None takes the most whose logits, of both heads, fit the
            workspace.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) whose devices have an equal part of the classes
            each, in their order, of both weights and biases. Both inputs' rows, token_weight, keep and results are the
            same on every device.

    Returns:
        The divergence, float32 for half-precision inputs: a scalar, or row-shaped with reduction "none". The mean of
        no kept row is NaN.

    Raises:
        TypeError: an argument of the wrong type, or a teacher's that is differentiated.
        ValueError: a shape or value outside its rule.

    Memory:
        At most 256 MiB of logits, of both heads together, exist at a time (1 GiB where JAX's default backend is no
        CPU). fast with "mean" or "sum" forms the gradients in the forward pass (four matmuls) and keeps them, the
        weight's in float32. With reduction "none" and where memory is "lean" the arguments and seven numbers per row
        are kept, and the backward pass recomputes both heads' logits (six matmuls; lean "jsd" and "tv" eight). lean
        writes the weight's gradient once, in its own type.

    Source:
        Csiszar 1963 for the divergences; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models".

    Example:
        >>> import jax.numpy as jnp, jax_ops
        >>> x, weight = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> round(jax_ops.linear_divergence(x, weight, 2.0 * x, weight).item(), 4)
        0.1156
    """
    from jax_ops._rules.divergence import constant

    s, factor = scale_of(logit_scale)
    options = contract.DivergenceOptions(kind, beta, factor, teacher_scale, softcap, teacher_softcap, reduction)
    every = (input, linear_weight, teacher_input, teacher_weight, linear_bias, teacher_bias, token_weight, keep)
    arrays = [None if a is None else unwrap(a, numbers=False) for a in every]
    facts = [None if a is None else describe(a) for a in arrays]
    static: Any = {"shift": shift, "memory": memory, "chunk_size": chunk_size}
    of_scale = None if s is None else describe(s)
    contract.linear_divergence("linear_divergence", *facts, options=options, **static, logit_scale=of_scale)
    given: list[Any] = [None if a is None else jnp.asarray(a) for a in (*arrays, s)]
    for i, name in ((2, "teacher_input"), (3, "teacher_weight"), (5, "teacher_bias")):
        if given[i] is not None:
            given[i] = constant("linear_divergence", name)(given[i])
    shape, static["shard"] = given[0].shape, shard_of("linear_divergence", axis_name, given[1].shape[0])
    if shift:
        shape = (*shape[:-2], _shorter(shape[-2], shift), shape[-1])
    return _spread(_of_heads, given, range(len(shape) - 1), shape, options, **static)


def _spread(fn: Any, arrays: Any, rows: Any, shape: Any, options: contract.DivergenceOptions, **how: Any) -> jax.Array:
    """fn(*arrays, options, **how), its results sharded as its rows where Explicit mesh axes cut any of the arrays."""
    if (spread := spread_of(rows, *arrays)) is None:
        return fn(*arrays, options=options, **how)
    out = spread.sharding([shape[i] for i in rows] if options.reduction == "none" else ())
    if fn is _of_heads:
        how["blocks"] = spread.blocks
    return under_auto_axes(fn, *arrays, spread=spread, out=out, options=options, **how)


# One program each, as a loss's: an eager gradient is one as well.
@partial(jax.jit, static_argnames=("options", "axis", "shard"), inline=True)
@as_typed
def _of_logits(
    x: jax.Array,
    t: jax.Array,
    tokens: jax.Array | None,
    keep: jax.Array | None,
    scale: jax.Array | None,
    *,
    options: contract.DivergenceOptions,
    axis: int,
    shard: Shard,
) -> jax.Array:
    from jax_ops._head.scaled_rows import each_divergence

    values = each_divergence(x, t, keep, scale, options, axis, shard)
    return divergence_reduced(values, divergence_weight(values, tokens, keep), keep, options)


@partial(jax.jit, static_argnames=("options", "shift", "memory", "chunk_size", "shard", "blocks"), inline=True)
@as_typed
def _of_heads(
    x: jax.Array,
    w: jax.Array,
    tx: jax.Array,
    tw: jax.Array,
    b: jax.Array | None,
    tb: jax.Array | None,
    tokens: jax.Array | None,
    keep: jax.Array | None,
    scale: jax.Array | None,
    *,
    options: contract.DivergenceOptions,
    shift: int,
    memory: str,
    chunk_size: int | None,
    shard: Shard,
    blocks: int = 1,
) -> jax.Array:
    from jax_ops._head.chunks import cut, that_fit
    from jax_ops._head.columns import scaled
    from jax_ops._head.divergence import divergence_rows, divergence_sum
    from jax_ops._head.divergence_lean import lean_divergence
    from jax_ops._head.linear import wide
    from jax_ops._head.two_heads import Heads
    from jax_ops._rows.ratios import Pair

    lead, outside = x.shape[:-1], ...
    if shift:
        tokens, keep = _shifted(lead, tokens, keep, shift)
        outside = (..., slice(_shorter(lead[-1], shift)))
    n = math.prod(lead)
    x, tx = x.reshape(n, x.shape[-1]), tx.reshape(n, tx.shape[-1])
    tokens, keep = (a if a is None else a.reshape(n) for a in (tokens, keep))
    if scale is not None:
        x, w, b = scaled(x, w, b, scale.reshape(n) if scale.ndim else scale, keep)
    kind = wide(jnp.promote_types(x.dtype, tx.dtype))
    lean, classes = memory == "lean", w.shape[0]
    fits = that_fit(chunk_size, 2 * (n if lean else classes), kind.itemsize, by_rows=not lean)
    parts = cut(classes, fits) if lean else cut(n, fits, strided=True, blocks=blocks)
    how = (parts, Pair.of(options, 1, kind), shard)
    weight = divergence_weight(jnp.ones_like(x, shape=(n,), dtype=kind), tokens, keep)
    of = Heads(x, w, b, tx, tw, tb, keep)
    if options.reduction != "none" and not lean:
        return divergence_mean(divergence_sum(of, weight, *how), weight, keep, options)
    rows = lean_divergence if lean else divergence_rows
    out = divergence_reduced(rows(of, *how), weight, keep, options)
    return out.reshape(lead)[outside] if options.reduction == "none" else out


def _shorter(length: Any, shift: int) -> Any:
    """How many positions have another `shift` further on; exported for any length, there are."""
    return max(length - shift, 0) if isinstance(length, int) else length - shift


def _shifted(lead: Any, tokens: jax.Array | None, keep: jax.Array | None, shift: int) -> tuple[Any, jax.Array]:
    """token_weight and keep of the position `shift` further on; the last rows stay, as in a loss, and reach nothing."""
    shift = min(shift, lead[-1]) if isinstance(lead[-1], int) else shift
    widths = [*[(0, 0)] * (len(lead) - 1), (0, shift)]
    keep = jnp.ones(lead, bool) if keep is None else keep
    keep = jnp.pad(keep[..., shift:], widths, constant_values=False)
    return None if tokens is None else jnp.pad(tokens[..., shift:], widths), keep
