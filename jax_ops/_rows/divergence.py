"""A student's rows of logits against a teacher's: native kernels where they serve, plain jax.numpy everywhere else.

legend:  s, t logits after scale and cap; p, q their softmaxes (p the student's)
         d_j = log p_j - log q_j = (s_j - t_j) - shift,  shift = lse_s - lse_t
value:   sum_j q_j f(p_j / q_j) with f(1) = f'(1) = 0: no term is negative and none cancels.
           forward_kl  q (expm1(d) - d)          reverse_kl  p (expm1(-d) + d)          tv  |p - q| / 2
           jsd         beta q h((1 - beta) expm1(d)) + (1 - beta) p h(beta expm1(-d)),  h(w) = w - log1p(w)
first:   dL/ds = p (u - <u>) for u = f'(p / q), <u> = sum_k p_k u_k; p - q for forward_kl
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_ops._rows.arithmetic import capped, compute, exponentials, slope
from jax_ops._rows.mean import centred, softmax
from jax_ops._rows.primitive import Row, transposable
from softmax_ext.contract import KINDS

STATE = 7  # numbers of a row that the kernels' forward leaves for their backward


class Pair(NamedTuple):
    """The static part of a divergence's rows."""

    axis: int
    kind: str
    beta: float
    scale: float
    softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None

    @property
    def alike(self) -> bool:
        """Whether both sides' logits are only multiplied by one scale: it then comes after their difference."""
        return self.softcap is None and self.teacher_softcap is None and self.scale == self.teacher_scale

    def student(self, x: Array) -> Array:
        """s."""
        return capped(x, self.scale, self.softcap)

    def teacher(self, x: Array) -> Array:
        """t."""
        return capped(x, self.teacher_scale, self.teacher_softcap)

    def rows(self, x: Array) -> tuple[int, ...]:
        """The shape of what a row has one of."""
        return (*x.shape[: self.axis], *x.shape[self.axis + 1 :])


def divergence_fwd(student: Array, teacher: Array, keep: Array | None, *, pair: Pair) -> tuple[Array, Array]:
    """(the divergences in nats, row-shaped; the state of each row for the kernels)."""
    value, state = _divergence_fwd(student, teacher, keep, **pair._asdict())
    return value, state


def divergence_bwd(
    student: Array, teacher: Array, keep: Array | None, state: Array, d_value: Array, *, pair: Pair
) -> Array:
    """dL/d(student) from the rows' upstream gradients, in which it is linear."""
    (dx,) = _divergence_bwd(student, teacher, lax.stop_gradient(state), d_value, keep, **pair._asdict())
    return dx


def _plain_fwd(student: Array, teacher: Array, keep: Array | None, **options: Any) -> tuple[Array, Array]:
    """divergence_fwd in jax.numpy; its state is for kernels, which have no part here.

    Where one serves the backward all the same (a pullback taken to another device), it finds no number and gives NaN.
    """
    pair = Pair(**options)
    value = _value(pair, *_kept(student, teacher, keep, pair))
    if keep is not None:
        value = jnp.where(keep, value, 0.0)
    return value, jnp.full_like(lax.stop_gradient(value), jnp.inf, shape=(*value.shape, STATE))


def _plain_bwd(
    student: Array, teacher: Array, _state: Array, d_value: Array, keep: Array | None, **options: Any
) -> Array:
    """divergence_bwd in jax.numpy, from the logits alone: whatever differentiates it need know nothing of a state."""
    pair = Pair(**options)
    dx = jnp.expand_dims(d_value, pair.axis) * _gradient(pair, *_kept(student, teacher, keep, pair))
    if keep is not None:
        dx = jnp.where(jnp.expand_dims(keep, pair.axis), dx, 0.0)
    return dx.astype(student.dtype)


def _plain_bwd_transpose(
    student: Array,
    teacher: Array,
    _state: Array,
    along: Array,
    keep: Array | None,
    *,
    wanted: Sequence[int],
    **options: Any,
) -> list[Array]:
    """The transpose in d_value: what a direction of the logits changes each row's divergence by."""
    pair = Pair(**options)
    found = (_gradient(pair, *_kept(student, teacher, keep, pair)) * compute(along)).sum(pair.axis)
    return [found if keep is None else jnp.where(keep, found, 0.0)]


def _kept(student: Array, teacher: Array, keep: Array | None, pair: Pair) -> tuple[Array, Array]:
    """Both, with 0 in rows that reach no result: a NaN there would, by 0 * NaN."""
    if keep is None:
        return student, teacher
    kept, zero = jnp.expand_dims(keep, pair.axis), jnp.zeros((), student.dtype)
    return jnp.where(kept, student, zero), jnp.where(kept, teacher, zero.astype(teacher.dtype))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(pair: Pair, student: Array, teacher: Array) -> Array:
    if not student.shape[pair.axis]:
        return jnp.full(pair.rows(student), jnp.nan, compute(student).dtype)
    d, p, q = _met(pair, student, teacher)
    return _terms(pair, d, p, q).sum(pair.axis)


@_value.defjvp
def _value_jvp(pair: Pair, primals: Any, tangents: Any) -> Any:
    moved = _gradient(pair, *primals) * compute(tangents[0])
    return _value(pair, *primals), moved.sum(pair.axis)


def _gradient(pair: Pair, student: Array, teacher: Array) -> Array:
    """The derivative of each row's divergence by its logits; the row's is NaN where that is infinite and has none."""
    s, t = pair.student(student), pair.teacher(teacher)
    if not s.shape[pair.axis]:
        return s
    p, q, d = softmax(pair.axis, s), softmax(pair.axis, t), _log_ratio(pair, student, teacher)
    known = jnp.isfinite(d)
    gone = (p > 0) & (d == jnp.inf)  # the teacher has no such class
    d = jnp.where(known, d, 0.0)
    if pair.kind == "forward_kl":
        near = known & (jnp.abs(d) < 0.7)
        g = jnp.where(near, -p * jnp.expm1(-jnp.where(near, d, 0.0)), p - q)
    else:
        g = p * centred(_slope_of(pair, d, gone), p, pair.axis)
        if pair.kind == "reverse_kl":
            g = jnp.where(gone.any(pair.axis, keepdims=True), jnp.nan, g)
    g = jnp.where(jnp.isnan(q), jnp.nan, g)  # a teacher without a distribution
    return g * slope(student, pair.scale, pair.softcap)


def _slope_of(pair: Pair, d: Array, gone: Array) -> Array:
    """u = f'(p / q)."""
    if pair.kind == "reverse_kl":
        return d
    if pair.kind == "tv":
        return 0.5 * jnp.where(gone, 1.0, jnp.sign(lax.stop_gradient(d)))
    b, ahead = pair.beta, d >= 0  # log(m / p) by whichever exponential does not overflow
    up, down = jnp.where(ahead, d, 0.0), jnp.where(ahead, 0.0, d)
    log = jnp.where(ahead, _log1p(b * jnp.expm1(-up)), _log1p((1 - b) * jnp.expm1(down)) - down)
    return (b - 1) * jnp.where(gone, math.log1p(-b), log)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_ratio(pair: Pair, student: Array, teacher: Array) -> Array:
    return _met(pair, student, teacher)[0]


@_log_ratio.defjvp
def _log_ratio_jvp(pair: Pair, primals: Any, tangents: Any) -> Any:
    p = softmax(pair.axis, pair.student(primals[0]))
    w = slope(primals[0], pair.scale, pair.softcap) * compute(tangents[0])
    return _log_ratio(pair, *primals), centred(w, p, pair.axis)


def _met(pair: Pair, student: Array, teacher: Array) -> tuple[Array, Array, Array]:
    """(d, p, q)."""
    # The maxima and sums of both rows give the shift to a few ulp of lse, too coarse for two rows that are next to each
    # other. But sum_j (p_j - q_j) is 0: what it comes out as is the shift's error, to the last digits of the terms.
    s, t = pair.student(student), pair.teacher(teacher)
    _, e_s, m_s, rest_s = exponentials(s, pair.axis)
    _, e_t, m_t, rest_t = exponentials(t, pair.axis)
    p, q = e_s / (1.0 + rest_s), e_t / (1.0 + rest_t)
    unit = pair.scale if pair.alike else 1.0
    if pair.alike:
        s, t = compute(student), compute(teacher)
    # The compiler may not see through sums that carry rounding errors: it would simplify them to 0.
    hide = lax.optimization_barrier
    apart = hide(s - t)
    back = hide(apart - s)
    error = jnp.nan_to_num((s - hide(apart - back)) - (t + back), nan=0.0, posinf=0.0, neginf=0.0)
    hi = hide(((m_s - m_t) + (jnp.log1p(rest_s) - jnp.log1p(rest_t))) / unit)
    lo = jnp.zeros_like(hi)
    for _ in range(2):
        d = ((apart - hi) + (error - lo)) * unit
        off = jnp.log1p(jnp.maximum(_less(d, p, q).sum(pair.axis, keepdims=True), -0.5)) / unit
        total = hide(hi + (lo + off))
        hi, lo = total, (hi - total) + (lo + off)
    return ((apart - hi) + (error - lo)) * unit, p, q


def _less(d: Array, p: Array, q: Array) -> Array:
    """p - q: q expm1(d) where the two are close."""
    return jnp.where(jnp.abs(d) < 0.7, q * jnp.expm1(d), p - q)


def _terms(pair: Pair, d: Array, p: Array, q: Array) -> Array:
    """q f(p / q)."""
    close = jnp.abs(d) < 0.7
    if pair.kind == "tv":
        return 0.5 * jnp.abs(_less(d, p, q))
    if pair.kind == "forward_kl":
        return jnp.where(close, q * _curve(d), _less(d, p, q) - jnp.where(q == 0, 0.0, q * d))
    if pair.kind == "reverse_kl":
        return jnp.where(close, p * _curve(-d), jnp.where(p == 0, 0.0, p * d) - _less(d, p, q))
    b, c, ahead = pair.beta, 1.0 - pair.beta, d >= 0
    near = b * q * _less_log1p(c * jnp.expm1(d)) + c * p * _less_log1p(b * jnp.expm1(-d))
    # log(m / q) and log(m / p): of the smaller ratio by log1p, of the larger by adding d
    log = _log1p(jnp.where(ahead, b, c) * jnp.expm1(-jnp.abs(d)))
    of_q, of_p = jnp.where(ahead, log + d, log), jnp.where(ahead, log, log - d)
    far = -b * jnp.where(q == 0, 0.0, q * of_q) - c * jnp.where(p == 0, 0.0, p * of_p)
    return jnp.where(close, near, far)


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


def _attributes(_present: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Numbers in the type the kernel expects, whatever JAX makes of 64 bits; 0 is no soft cap."""
    names = ("beta", "scale", "softcap", "teacher_scale", "teacher_softcap")
    numbers = {name: np.float64(options[name] or 0.0) for name in names}
    return {"kind": np.int64(KINDS.index(options["kind"])), **numbers}


# keep, which may be absent, comes last: so do the kernels take it
_divergence_fwd = Row("divergence_fwd", _plain_fwd, kernel=("divergence_fwd", _attributes))
_divergence_bwd = transposable(
    Row("divergence_bwd", _plain_bwd, linear=[3], kernel=("divergence_bwd", _attributes)),
    like=2,
    back=_plain_bwd_transpose,
)
