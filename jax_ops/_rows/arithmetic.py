"""What the plain rows are made of: the logits' exponentials about their maximum, and sums that do not cancel.

A row's m is its largest logit z, rest the sum of exp(z - m) over every position but one of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_ops._rows.classes import MASKED

LOWEST = -1000.0  # exp of this and of everything below is 0, in float64 too


def compute(x: Array) -> Array:
    """x in the type the arithmetic is done in."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def capped(logits: Array, scale: float, softcap: float | None) -> Array:
    """z = softcap tanh(scale logits / softcap), or scale logits; a -inf logit stays -inf."""
    z = compute(logits)
    if scale != 1.0:
        z = z * scale
    if softcap is None:
        return z
    masked = logits == -jnp.inf
    return jnp.where(masked, z, softcap * jnp.tanh(jnp.where(masked, 0.0, z) / softcap))


def slope(logits: Array, scale: float, softcap: float | None) -> Array | float:
    """dz/dlogits = scale (1 - tanh^2), written 4q / (1 + q)^2 with q = exp(-2|.|): no cancellation."""
    if softcap is None:
        return scale
    # JAX takes 1, not 0, for the derivative of abs at 0: so the second derivative of this is right there too.
    q = jnp.exp(-2.0 * jnp.abs(compute(logits) * scale / softcap))
    return scale * (4.0 * q / jnp.square(1.0 + q))


def class_row(weight: Array | None, like: Array, axis: int) -> Array | None:
    """Class weights (V,) shaped to broadcast along `axis`."""
    if weight is None:
        return None
    return weight.reshape([-1 if i == axis else 1 for i in range(like.ndim)])


def weight_sums(weight: Array) -> tuple[Array, Array, Array]:
    """(the sum of class weights, that of all but the largest, which may hold nearly all of it, the largest)."""
    if weight.shape[0] == 0:
        return weight.sum(), weight.sum(), weight.sum()
    heaviest = jnp.arange(weight.shape[0]) == weight.argmax()
    largest, aside = jnp.where(heaviest, weight, 0.0).sum(), jnp.where(heaviest, 0.0, weight).sum()
    return aside + largest, aside, largest


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def exponentials(z: Array, axis: int) -> tuple[Array, Array, Array, Array]:
    """(z - m, exp(z - m), m, rest); rest is NaN where m is not finite, and so is then the whole row."""
    if z.shape[axis] == 0:
        m = jnp.full_like(z.sum(axis, keepdims=True), jnp.nan)
        return z, z, m, m
    m = z.max(axis, keepdims=True)
    d, e = shifted(z, m)
    # 1 at the maximum (e is 1 there, exactly), 0 elsewhere, be it the smallest number below.
    kind = jnp.finfo(d.dtype)
    top = 1.0 - jnp.minimum(jnp.minimum(-d / kind.tiny, 1.0) / kind.eps, 1.0)
    rest = (e - top).sum(axis, keepdims=True) + (top.sum(axis, keepdims=True) - 1.0)
    return d, e, m, jnp.where(jnp.isfinite(m), rest, jnp.nan)


@exponentials.defjvp
def _exponentials_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> Any:
    # What does not depend on the shift does not depend on how it moves. With a class that holds more than half it moves
    # as its logit: all that moves is then relative to that one, and 1 - p there has the others' digits.
    d, e, _, rest = out = exponentials(*primals, axis)
    (dz,) = tangents
    dm = jnp.where(rest < 1, jnp.where(d == 0, dz, 0.0).sum(axis, keepdims=True), 0.0)
    moved = _relative(d, rest, dz, dm)
    return out, (moved, e * moved, dm, (e * moved).sum(axis, keepdims=True))


@jax.custom_jvp
def relative(z: Array, m: Array, rest: Array) -> tuple[Array, Array]:
    """(z - m, exp(z - m)) of rows of which m and rest are known, or of a part of their classes; m moves as there."""
    return shifted(z, m)


@relative.defjvp
def _relative_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Any:
    d, e = out = relative(*primals)
    moved = _relative(d, primals[2], *tangents[:2])
    return out, (moved, e * moved)


def _relative(d: Array, rest: Array, dz: Array, dm: Array) -> Array:
    """dz - dm; nothing, not dz_m - dz_m, at a maximum that m moves with: transposed too it is the others' alone."""
    return jnp.where((d == 0) & (rest < 1), 0.0, dz - dm)


def shifted(z: Array, m: Array) -> tuple[Array, Array]:
    """(z - m, exp(z - m)), the exponential with the rounding error of the difference put back."""
    # Arithmetic alone, no comparison: XLA's CPU backend fuses that into the sums, where a select would have it
    # write out (N, V) numbers first (jax 0.10.2: 1.3 times the time, and as much memory as the logits).
    z = _at_most(z, m)
    d = z - m
    # Below the floor exp(d) is 0 and the error counts for nothing; -inf - -inf is not formed.
    floor = jnp.maximum(m - 0.5 * jnp.abs(m) + LOWEST, jnp.finfo(z.dtype).min)
    near = jnp.maximum(z, floor)
    rounded = near - m
    back = rounded - near
    error = (near - (rounded - back)) - (m + back)  # exact (Knuth's TwoSum)
    e = jnp.exp(d)
    return d, e + e * lax.stop_gradient(error)


@jax.custom_jvp
def _at_most(z: Array, m: Array) -> Array:
    """z, which is nowhere above its row's maximum m.

    Saying so keeps a compiler from contracting a product that z comes from and the subtraction of m into one
    fma: x/0.7 - m at x = 3e10 came out as 1640, and softmax as NaN (XLA on x86-64, where optimization_barrier
    and reduce_precision do not prevent it).
    """
    return jnp.minimum(z, m)


@_at_most.defjvp
def _at_most_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _at_most(*primals), tangents[0]


def nll_gradient(mass: Array, p: Array, q: Array, confident: Array, axis: int) -> Array:
    """S p - mass for S = sum(mass), in the form that does not cancel: S - mass at a confident maximum by the others."""
    others = jnp.where(confident, 0.0, mass).sum(axis, keepdims=True)
    s = others + jnp.where(confident, mass, 0.0).sum(axis, keepdims=True)
    return jnp.where(confident, others - s * q, s * p - mass)


def entropy_of(d: Array, e: Array, rest: Array, axis: int) -> Array:
    """log(total) - sum p (z - m), keeping `axis`: both terms are >= 0."""
    weighted = (e * jnp.maximum(d, LOWEST)).sum(axis, keepdims=True)
    return jnp.log1p(rest) - weighted / (1.0 + rest)


def dot(mass: Array, minus_log_p: Array, axis: int) -> Array:
    """sum_j mass_j (-log p_j), where a mass of 0 on a -log p of +inf counts 0."""
    free = (mass == 0) & (minus_log_p == jnp.inf)
    return (mass * jnp.where(free, 0.0, minus_log_p)).sum(axis)


def pick(logits: Array, target: Array, m: Array, axis: int, scale: float, softcap: float | None) -> Array:
    """z - m at the target, NaN where the target names no class (keeping `axis`)."""
    t = jnp.expand_dims(target, axis)
    classes = logits.shape[axis]
    if classes == 0:
        return jnp.full_like(m, jnp.nan)
    # From the logits, not from z - m: that would have to be written out to be indexed.
    picked = jnp.take_along_axis(logits, t.clip(0, classes - 1), axis, mode="clip")
    d, _ = shifted(capped(picked, scale, softcap), m)
    return jnp.where((t < 0) | (t >= classes), jnp.nan, d)


def each_nll(
    logits: Array, log_total: Array, target: Array, m: Array, axis: int, scale: float, softcap: float | None
) -> Array:
    """-log p at K classes a row along `axis`: MASKED where it is infinite, NaN where the target names no class."""
    classes = logits.shape[axis]
    if classes == 0:
        return jnp.full_like(m, jnp.nan, shape=target.shape)
    picked = jnp.take_along_axis(logits, target.clip(0, classes - 1), axis, mode="clip")
    d, _ = shifted(capped(picked, scale, softcap), m)
    nll = jnp.where((d == -jnp.inf) & jnp.isfinite(log_total), MASKED, log_total - d)
    return jnp.where((target < 0) | (target >= classes), jnp.nan, nll)


def spread(each: Array, target: Array, like: Array, axis: int) -> Array:
    """`each` of K classes a row added up at its class, in an array like the logits; 0 wherever no class is named."""
    if like.shape[axis] == 0:
        return like
    index = [lax.broadcasted_iota(target.dtype, target.shape, i) for i in range(target.ndim)]
    index[axis] = target.clip(0)
    return jnp.zeros_like(like).at[tuple(index)].add(each, mode="drop")
