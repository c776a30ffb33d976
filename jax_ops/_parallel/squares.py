"""log sum_j p_j^2 of rows whose classes are sharded over devices, with every derivative.

legend:  as in `_rules/log_sum_sq.py`: L = log S' - 2 log S, c = m + log(S' / S), a = exp(z - c), f = expm1(z - c),
         A = sum a, F = sum a f, r = p^2 / sum p^2; all sums are over the classes of all devices
first:   dL/dz_j = 2 a_j (f_j A - F) / (A (A + F)): no difference of r and p, which agree where all logits nearly do
second:  4 r (v - <v>_r) - 2 p (v - <v>_p), about v of the maximum where it has more than half
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._parallel.shard import Shard
from jax_ops._rows.arithmetic import shifted
from jax_ops._rules.autodiff import analytic
from jax_ops._rules.log_sum_sq import about
from jax_ops._rules.varying import alike


def sharded_log_sum_sq(z: Array, axis: int, shard: Shard) -> Array:
    """As `log_sum_sq` of _rules/log_sum_sq.py, of whole rows."""
    return _sharded_log_sum_sq(axis, shard)(*shard.own(*alike(z, but=shard.names)))


@cache
def _sharded_log_sum_sq(axis: int, shard: Shard) -> Any:
    """L. Saves z, m and c."""

    def fwd(z: Any) -> Any:
        value, m, c = _values(z, axis, shard)
        return value.squeeze(axis), (z, m, c)

    def bwd(saved: tuple[Any, Any, Any], ct: Any) -> Any:
        z, *known = saved
        (up,) = shard.cotangents(ct, like=z)
        return (jnp.expand_dims(up, axis) * _gradient(axis, shard, z, *shard.own(*known)),)

    return analytic(fwd, bwd)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _values(z: Array, axis: int, shard: Shard) -> tuple[Array, Array, Array]:
    """(L, m, c), each beside the logits."""
    m = shard.largest(z.max(axis, keepdims=True, initial=-jnp.inf))
    e = shifted(z, jnp.where(jnp.isfinite(m), m, 0.0))[1]
    top = z == m
    others = jnp.where(top, 0.0, e)
    parts = [v.sum(axis, keepdims=True) for v in (others, others * others, top.astype(e.dtype))]
    rest, rest_sq, held = shard.sum(jnp.stack(parts))
    log, log_sq = jnp.log1p(rest + (held - 1.0)), jnp.log1p(rest_sq + (held - 1.0))
    return jnp.where(jnp.isfinite(m), log_sq - 2.0 * log, jnp.nan), m, m + (log_sq - log)


@_values.defjvp
def _values_jvp(axis: int, shard: Shard, primals: tuple[Array], tangents: tuple[Array]) -> Any:
    ((z,), (dz,)), out = (primals, tangents), _values(*primals, axis, shard)
    slanted = _gradient(axis, shard, z, *shard.own(*out[1:]))
    moved = shard.sum((slanted * dz).sum(axis, keepdims=True))
    return out, (moved, jnp.zeros_like(moved), jnp.zeros_like(moved))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradient(axis: int, shard: Shard, z: Array, m: Array, c: Array) -> Array:
    a, f = about(z, m, c)
    total, over = shard.sum(jnp.stack([v.sum(axis, keepdims=True) for v in (a, a * f)]))
    return 2.0 * a * ((f * total - over) / (total * (total + over)))


@_gradient.defjvp
def _gradient_jvp(axis: int, shard: Shard, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Any:
    (z, m, c), v = primals, tangents[0]  # m and c are those of z, and change nothing
    d = z - c
    along = 4.0 * _turned(2.0 * d, v, axis, shard) - 2.0 * _turned(d, v, axis, shard)
    return _gradient(axis, shard, z, m, c), along


def _turned(z: Array, v: Array, axis: int, shard: Shard) -> Array:
    """y (v - <v>) for the softmax y of logits that exp does not overflow on."""
    e = jnp.exp(z)
    y = e / shard.sum(e.sum(axis, keepdims=True))
    known = jax.lax.stop_gradient(y)
    # What is taken from v before it is summed: the number of the class with more than half, else the mean, rounded.
    top = known > 0.5
    some = shard.sum(top.sum(axis, keepdims=True).astype(y.dtype)) > 0
    own, mean = (
        shard.sum(jnp.where(top, v, 0.0).sum(axis, keepdims=True)),
        shard.sum((known * v).sum(axis, keepdims=True)),
    )
    g = v - jnp.where(some, own, mean)
    return y * (g - shard.sum((y * g).sum(axis, keepdims=True)))
