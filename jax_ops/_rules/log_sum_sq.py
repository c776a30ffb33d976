"""log sum_j p_j^2 of a row with its analytic derivatives.

legend:  z a row's logits, scaled and capped, p = softmax(z), r = p^2 / sum p^2, m the maximum, e = exp(z - m)
         S = sum e, S' = sum e^2, c = m + log(S' / S), a = exp(z - c), f = expm1(z - c)
         A = sum a, A' = sum a^2, F = sum a f = A' - A
value:   L = log S' - 2 log S, both logarithms log1p of what all but one maximum add
first:   dL/dz_j = 2 (r_j - p_j) = 2 a_j (f_j A - F) / (A A'), for any c: 1 / A' - 1 / A = -F / (A A')
second:  Hess v = 4 J(r) v - 2 J(p) v, J(y) v = y (v - sum y v)
numbers: where all logits nearly agree r and p do, and of two numbers rounded apart few digits are left: f has them.
         The choice of c makes F nearly 0, so that what others than j round is no more than their own part of the sum.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._rows.arithmetic import shifted
from jax_ops._rows.mean import centred, softmax
from jax_ops._rules.autodiff import analytic


def log_sum_sq(z: Array, axis: int) -> Array:
    """log sum_j p_j^2 of each row of logits in the compute type, with every derivative."""
    return _log_sum_sq(axis)(z)


@cache
def _log_sum_sq(axis: int) -> Any:
    """L. Saves z, m and c."""

    def fwd(z: Any) -> Any:
        value, m, c = _values(z, axis)
        return value, (z, m, c)

    def bwd(saved: tuple[Any, Any, Any], ct: Any) -> Any:
        return (jnp.expand_dims(ct, axis) * _gradient(axis, *saved),)

    return analytic(fwd, bwd)


def _values(z: Array, axis: int) -> tuple[Array, Array, Array]:
    """(L, m, c)."""
    m = z.max(axis, keepdims=True)
    d, e = shifted(z, m)
    top = d == 0
    rests = ((jnp.where(top, 0.0, x)).sum(axis, keepdims=True) + (top.sum(axis, keepdims=True) - 1) for x in (e, e * e))
    log, log_sq = map(jnp.log1p, rests)
    value = jnp.where(jnp.isfinite(m), log_sq - 2.0 * log, jnp.nan)
    return value.squeeze(axis), m.squeeze(axis), (m + (log_sq - log)).squeeze(axis)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradient(axis: int, z: Array, m: Array, c: Array) -> Array:
    a, f = about(z, *(jnp.expand_dims(x, axis) for x in (m, c)))
    total, over = a.sum(axis, keepdims=True), (a * f).sum(axis, keepdims=True)
    return 2.0 * a * ((f * total - over) / (total * (total + over)))


def about(z: Array, m: Array, c: Array) -> tuple[Array, Array]:
    """(a, f) = (exp(z - c), expm1(z - c)), of which no derivative is taken; m is the maximum of z."""
    z = jnp.minimum(z, m)  # so that no product that z comes from is contracted with what follows (`shifted`)
    d = z - c
    back = d - z
    error = (z - (d - back)) - (c + back)  # of the difference (Knuth's TwoSum)
    error = jnp.where(jnp.isfinite(error), error, 0.0)
    a = jnp.exp(d)
    error = a * error
    return a + error, jnp.expm1(d) + error


@_gradient.defjvp
def _gradient_jvp(axis: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    z, v = primals[0], tangents[0]  # m and c are those of z, and change nothing
    p = softmax(axis, z)
    sq = p * p
    r = sq / sq.sum(axis, keepdims=True)
    along = 4.0 * r * centred(v, r, axis) - 2.0 * p * centred(v, p, axis)
    return _gradient(axis, *primals), along
