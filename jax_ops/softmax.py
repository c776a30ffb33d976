"""Softmax and log-softmax for JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_ops._arguments import describe, unwrap
from jax_ops._axes import Axis, as_before, as_one, dimensions, leave_out, mask_of
from jax_ops._rules.softmax import log_softmax as log_softmax_rule
from jax_ops._rules.softmax import softmax as softmax_rule
from softmax_ext import contract


def softmax(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> jax.Array:
    """Softmax probabilities along one axis or several (no unit).

    Formula: `exp(x) / sum(exp(x))`
    Gradient: `y * (dy - sum(y * dy))` for the output y and its upstream gradient dy.

    Args:
        x: logits of any shape; float16, bfloat16, float32 or float64 (integers are promoted).
        axis: the axis whose entries sum to 1, in [-ndim, ndim - 1]; a tuple or list of axes that sum to 1
            together; or None for all.
        where: mask that broadcasts to the shape of x; where it is False the entry is left out and its
            probability is 0, all of a row's if need be.

    Returns:
        Array of the shape and (floating) type of x, within a few ulp of the true value.

    Raises:
        TypeError: x is not a real array, or axis is not a Python integer, a sequence of them or None.
        ValueError: axis is out of range or repeated, or where does not broadcast to x.

    Memory:
        The backward pass keeps the output only.

    Source:
        Purcell 2021, eq. (5); Bridle 1990, "Probabilistic interpretation of feedforward
        classification network outputs".

    Example:
        >>> import jax.numpy as jnp, jax_ops
        >>> p = jax_ops.softmax(jnp.array([1.1, 2.2, 0.2, -1.7]))
        >>> [round(v, 3) for v in p.tolist()]
        [0.224, 0.672, 0.091, 0.014]
    """
    return _along(softmax_rule, "softmax", x, axis, where, 0.0)


def log_softmax(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> jax.Array:
    """Log-probabilities of the softmax along one axis or several, in nats.

    Formula: `x - log(sum(exp(x)))`
    Gradient: `dy - exp(y) * sum(dy)` for the output y and its upstream gradient dy.

    Args:
        x: logits of any shape; float16, bfloat16, float32 or float64 (integers are promoted).
        axis: the axis to normalise, in [-ndim, ndim - 1]; a tuple or list of axes to normalise together;
            or None for all.
        where: mask that broadcasts to the shape of x; where it is False the entry is left out and its
            log-probability is -inf, all of a row's if need be.

    Returns:
        Array of the shape and (floating) type of x; a confident row's largest entry is -log1p(rest), not 0.

    Raises:
        TypeError: x is not a real array, or axis is not a Python integer, a sequence of them or None.
        ValueError: axis is out of range or repeated, or where does not broadcast to x.

    Memory:
        The backward pass keeps the input and two numbers per row: from them the probabilities are exact to
        rounding, which they are not from a half-precision output.

    Source:
        Kurbiel 2021, "Derivative of the Softmax Function and the Categorical Cross-Entropy Loss".

    Example:
        >>> import jax.numpy as jnp, jax_ops
        >>> jax_ops.log_softmax(jnp.array([20.0, 0.0]))[0].item()
        -2.06115369216775e-09
    """
    return _along(log_softmax_rule, "log_softmax", x, axis, where, -jnp.inf)


def _along(op: Any, name: str, x: Any, axis: Axis, where: ArrayLike | None, left_out: float) -> jax.Array:
    x = unwrap(x)
    facts = describe(x)
    if facts.kind == "int":
        x = x.astype(jax.eval_shape(jnp.exp, x).dtype)
        facts = describe(x)
    contract.floating(name, "input", facts)
    x, mask = jnp.asarray(x), None
    if where is not None:
        mask = mask_of(name, where, x)
    axes = dimensions(name, axis, x.ndim)
    z, at = as_one(x if mask is None else leave_out(x, mask, axes), axes)
    y = as_before(op(z, at), axes, x.shape)
    return y if mask is None else jnp.where(mask, y, left_out)
