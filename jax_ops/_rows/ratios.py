"""A student's logits beside a teacher's, class by class: how far apart, and what each adds to a divergence.

legend as in `divergence.py`, where the formulas stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jax_ops._rows.arithmetic import capped, compute, exponentials
from softmax_ext.contract import DivergenceOptions


class Pair(NamedTuple):
    """The static part of a divergence's rows."""

    axis: int
    kind: str
    beta: float
    scale: float
    softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None

    @classmethod
    def of(cls, options: DivergenceOptions, axis: int, dtype: Any) -> Pair:
        """Of an op's options, for logits of a type."""
        limits = jnp.finfo(jnp.promote_types(dtype, jnp.float32))
        return cls(axis, options.kind, options.beta, *options.fitted(float(limits.tiny), float(limits.max)))

    @property
    def alike(self) -> bool:
        """Whether both sides' logits are only multiplied by one scale: it then comes after their difference."""
        return self.softcap is None and self.teacher_softcap is None and self.scale == self.teacher_scale

    @property
    def unit(self) -> float:
        """What the difference of logits, and the shift, are multiplied by."""
        return self.scale if self.alike else 1.0

    def student(self, x: Array) -> Array:
        """s."""
        return capped(x, self.scale, self.softcap)

    def teacher(self, x: Array) -> Array:
        """t."""
        return capped(x, self.teacher_scale, self.teacher_softcap)

    def rows(self, x: Array) -> tuple[int, ...]:
        """The shape of what a row has one of."""
        return (*x.shape[: self.axis], *x.shape[self.axis + 1 :])


def met(pair: Pair, student: Array, teacher: Array) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """(d, p, q, the rows' numbers: m and rest of both, and the shift as a sum of two)."""
    _, e_s, m_s, rest_s = exponentials(pair.student(student), pair.axis)
    _, e_t, m_t, rest_t = exponentials(pair.teacher(teacher), pair.axis)
    p, q = e_s / (1.0 + rest_s), e_t / (1.0 + rest_t)
    ratio = log_ratios(pair, *difference(pair, student, teacher))
    coarse = (m_s - m_t) + (jnp.log1p(rest_s) - jnp.log1p(rest_t))
    shift = shift_of(pair, coarse, ratio, p, q, lambda x: x.sum(pair.axis, keepdims=True))
    return ratio(*shift), p, q, (m_s, rest_s, m_t, rest_t, *shift)


# The compiler may not see through sums that carry rounding errors: it would simplify them to 0.
_hide = lax.optimization_barrier


def difference(pair: Pair, student: Array, teacher: Array) -> tuple[Array, Array]:
    """s - t, in units of the scale where both have one, and the rounding error of it."""
    s, t = compute(student), compute(teacher)
    if not pair.alike:
        s, t = pair.student(student), pair.teacher(teacher)
    apart = _hide(s - t)
    back = _hide(apart - s)
    return apart, jnp.nan_to_num((s - _hide(apart - back)) - (t + back), nan=0.0, posinf=0.0, neginf=0.0)


def log_ratios(pair: Pair, apart: Array, error: Array) -> Callable[[Array, Array], Array]:
    """d as a function of the shift, a sum of two numbers."""
    return lambda hi, lo: ((apart - hi) + (error - lo)) * pair.unit


def shift_of(
    pair: Pair,
    coarse: Array,
    ratio: Callable[[Array, Array], Array],
    p: Array,
    q: Array,
    total: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """The shift, in d's units, from lse_s - lse_t; `total` sums over a row."""
    # The maxima and sums of both rows give the shift to a few ulp of lse, too coarse for two rows that are next to each
    # other. But sum_j (p_j - q_j) is 0: what it comes out as is the shift's error, to the last digits of the terms.
    hi = _hide(coarse / pair.unit)
    lo = jnp.zeros_like(hi)
    for _ in range(2):
        off = jnp.log1p(jnp.maximum(total(less(ratio(hi, lo), p, q)), -0.5)) / pair.unit
        hi, lo = moved_shift(hi, lo, off)
    return hi, lo


def moved_shift(hi: Array, lo: Array, by: Array) -> tuple[Array, Array]:
    """A sum of two numbers, and a small one."""
    total = _hide(hi + (lo + by))
    return total, (hi - total) + (lo + by)


def less(d: Array, p: Array, q: Array) -> Array:
    """p - q: q expm1(d) where the two are close."""
    return jnp.where(jnp.abs(d) < 0.7, q * jnp.expm1(d), p - q)


def terms(pair: Pair, d: Array, p: Array, q: Array) -> Array:
    """q f(p / q)."""
    close = jnp.abs(d) < 0.7
    if pair.kind == "tv":
        return 0.5 * jnp.abs(less(d, p, q))
    if pair.kind == "forward_kl":
        return jnp.where(close, q * _curve(d), less(d, p, q) - jnp.where(q == 0, 0.0, q * d))
    if pair.kind == "reverse_kl":
        return jnp.where(close, p * _curve(-d), jnp.where(p == 0, 0.0, p * d) - less(d, p, q))
    b, c, ahead = pair.beta, 1.0 - pair.beta, d >= 0
    near = b * q * _less_log1p(c * jnp.expm1(d)) + c * p * _less_log1p(b * jnp.expm1(-d))
    # log(m / q) and log(m / p): of the smaller ratio by log1p, of the larger by adding d
    log = _log1p(jnp.where(ahead, b, c) * jnp.expm1(-jnp.abs(d)))
    of_q, of_p = jnp.where(ahead, log + d, log), jnp.where(ahead, log, log - d)
    far = -b * jnp.where(q == 0, 0.0, q * of_q) - c * jnp.where(p == 0, 0.0, p * of_p)
    return jnp.where(close, near, far)


def slope_of(pair: Pair, d: Array, gone: Array) -> Array:
    """u = f'(p / q)."""
    if pair.kind == "reverse_kl":
        return d
    if pair.kind == "tv":
        return 0.5 * jnp.where(gone, 1.0, jnp.sign(lax.stop_gradient(d)))
    b, ahead = pair.beta, d >= 0  # log(m / p) by whichever exponential does not overflow
    up, down = jnp.where(ahead, d, 0.0), jnp.where(ahead, 0.0, d)
    log = jnp.where(ahead, _log1p(b * jnp.expm1(-up)), _log1p((1 - b) * jnp.expm1(down)) - down)
    return (b - 1) * jnp.where(gone, math.log1p(-b), log)


def _curve(x: Array) -> Array:
    """expm1(x) - x, |x| < 1: by its series where the difference would cancel."""
    half = 0.5 * x
    bend = jnp.full_like(x, 1.0 / math.factorial(16))
    for k in range(15, 1, -1):
        bend = bend * half + 1.0 / math.factorial(k)
    bend = bend * jnp.square(half)  # expm1(x / 2) - x / 2
    return jnp.square(half + bend) + 2.0 * bend


def _less_log1p(w: Array) -> Array:
    """w - log1p(w): by its series in w / (2 + w) where the difference would cancel."""
    near = jnp.abs(w) < 0.35
    v = jnp.where(near, w, 0.0)
    r = v / (2.0 + v)
    z = jnp.square(r)
    odd = jnp.full_like(z, 1.0 / 31.0)
    for k in range(29, 1, -2):
        odd = odd * z + 1.0 / k
    return jnp.where(near, v * r - 2.0 * r * z * odd, w - _log1p(w))


def _log1p(w: Array) -> Array:
    """log1p(w), w >= -1: of numbers >= 0, since XLA's (jaxlib 0.10.2) is 300 units off in float64 about -0.4."""
    behind = w < 0
    log = jnp.log1p(jnp.where(behind, -w / (1.0 + w), w))
    return jnp.where(behind, -log, log)
