"""What lies about a row's mean, formed so that nothing cancels: softmax's Jacobian, and softmax by its derivatives."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_ops._rows.arithmetic import exponentials, shifted


def centred(g: Array, p: Array, axis: int, confident: Array | None = None) -> Array:
    """g - sum(p g) for probabilities p; where nobody says which is more than half, rounding may have changed their sum.

    Each is a difference to the mean: of g - c for any c it is the same.
    """
    # All that the pivot asks of a row is one reading of it: sums side by side become one loop of XLA's.
    mean = (lax.stop_gradient(p) * g).sum(axis, keepdims=True)
    total: Array | float = 1.0
    if confident is None:
        total, top = p.sum(axis, keepdims=True), p.max(axis, keepdims=True, initial=0.0)
        total = jnp.where(total == 0, 1.0, total)  # a row of zeros has no distribution and no gradient
        mean, confident, some = mean / lax.stop_gradient(total), p > 0.5, top > 0.5
    else:
        some = confident.any(axis, keepdims=True)
    # A number that g may lose before sums round: that of the class with more than half, else their mean. Rows of one
    # sum weigh it out again, so that p is held constant. (A class with less than half would not do: of g one-hot there
    # the mean is all that the others have.)
    g = g - jnp.where(some, jnp.where(confident, g, 0.0).sum(axis, keepdims=True), mean)
    return g - (p * g).sum(axis, keepdims=True) / total


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def softmax(axis: int, x: Array) -> Array:
    """Probabilities of logits in the compute type."""
    _, e, _, rest = exponentials(x, axis)
    return e / (1.0 + rest)


@softmax.defjvp
def _softmax_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The sum's tangent holds the maximum's own, which its quotient would take away again.
    y = softmax(axis, *primals)
    return y, y * centred(*tangents, y, axis)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def log_softmax(axis: int, x: Array) -> tuple[Array, Array, Array]:
    """(log p, m, rest) of logits in the compute type."""
    d, _, m, rest = exponentials(x, axis)
    return d - jnp.log1p(rest), m.squeeze(axis), rest.squeeze(axis)


@log_softmax.defjvp
def _log_softmax_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> Any:
    ((x,), (dx,)) = primals, tangents
    y, m, rest = log_softmax(axis, x)
    p, _, confident = distribution(axis, x, m, rest)
    dy = centred(dx, p, axis, confident)
    return (y, m, rest), (dy, jnp.zeros_like(m), (1.0 + rest) * (p * dx).sum(axis))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def distribution(axis: int, x: Array, m: Array, rest: Array) -> tuple[Array, Array, Array]:
    """(p, 1 - p, whether a class holds more than half) of rows of which m and rest are the numbers."""
    d, e = shifted(x, jnp.expand_dims(m, axis))
    rest = jnp.expand_dims(rest, axis)
    total = 1.0 + rest
    return e / total, jnp.where(d == 0, rest, total - e) / total, (d == 0) & (rest < 1)


@distribution.defjvp
def _distribution_jvp(axis: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Any:
    p, q, confident = distribution(axis, *primals)
    dp = p * centred(tangents[0], p, axis)  # m and rest are those of x: so are their tangents
    return (p, q, confident), (dp, -dp, np.zeros(confident.shape, jax.dtypes.float0))
