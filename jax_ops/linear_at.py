"""Logits of K classes a row for JAX: a linear layer's outputs at the ids named, and no others."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_ops._arguments import describe, unwrap
from jax_ops._lowering import as_typed
from jax_ops._parallel.mesh import spread_of, under_auto_axes
from jax_ops._rows.dispatch import IGNORED
from jax_ops._rows.targets import canonical
from jax_ops._rules.varying import alike
from softmax_ext import contract


def linear_at(
    input: ArrayLike,
    linear_weight: ArrayLike,
    ids: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    ignore_index: int | None = -100,
) -> jax.Array:
    """Logits of K classes a row, input . linear_weight[id] + linear_bias[id], no unit.

    Formula: `sum(x * w[i])` for each id i of a row x.
    Gradient: `c * w[i]` at x and `c * x` at w[i], for the gradient c of one logit.

    Args:
        input: (..., D), any leading dimensions or none; float16, bfloat16, float32 or float64.
        linear_weight: (V, D), of the input's type.
        ids: classes (..., K), K of them a row, any integer type.
        linear_bias: (V,), of the input's type.
        ignore_index: the id of slots that name no class: their logit is -inf, and they reach no gradient, so that
            `log_softmax(linear_at(...))` is the log-probability within a row's own set; None means -100.

    Returns:
        The shape of ids; float32 for half-precision inputs. An id outside [0, V) that is not ignore_index makes its
        slot and its row of the input's gradient NaN, and adds nothing to those of linear_weight and linear_bias.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a shape or value outside its rule.

    Memory:
        The backward pass keeps the arguments. Nothing of (N, K, D) exists: on a CPU kernels read the rows of
        linear_weight in place, elsewhere at most 64 MiB of them are gathered at a time. On a CPU the weight's gradient
        is the same, bit for bit, for any number of threads.

    Source:
        Bengio and Senecal 2003, "Quick Training of Probabilistic Neural Nets by Importance Sampling": a softmax's
        terms at a few classes.

    Example:
        >>> import jax.numpy as jnp, jax_ops
        >>> x, weight = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> jax_ops.linear_at(x, weight, jnp.array([[2, 0, -100]])).tolist()
        [[3.0, 1.0, -inf]]
    """
    arrays: list[Any] = [
        None if a is None else unwrap(a, numbers=False) for a in (input, linear_weight, ids, linear_bias)
    ]
    contract.linear_at("linear_at", *(None if a is None else describe(a) for a in arrays), ignored=ignore_index)
    ignored = contract.LossOptions(ignore_index).ignored
    at = canonical(arrays[2], arrays[1].shape[0], ignored)
    x, w, b = jnp.asarray(arrays[0]), jnp.asarray(arrays[1]), None if arrays[3] is None else jnp.asarray(arrays[3])
    if (spread := spread_of(range(x.ndim - 1), x, w, at, b)) is None:
        return _logits(x, w, at, b)
    return under_auto_axes(_logits, x, w, at, b, spread=spread, out=spread.sharding(at.shape))


@partial(jax.jit, inline=True)
@as_typed
def _logits(x: jax.Array, w: jax.Array, at: jax.Array, b: jax.Array | None) -> jax.Array:
    """The logits at canonical ids."""
    from jax_ops._rows.picked import picked_fwd

    x, w, at, b = alike(x, w, at, b)
    n, k = math.prod(x.shape[:-1]), at.shape[-1]
    flat = at.reshape(n, k)
    z = picked_fwd(x.reshape(n, x.shape[-1]), w, flat)
    if b is not None and b.shape[0]:  # not by an index alone: its gradient is a scatter, in no order on a GPU
        z = z + picked_fwd(jnp.ones_like(x, shape=(n, 1)), b[:, None], flat)
    return jnp.where(at == IGNORED, -jnp.inf, z.reshape(at.shape))
