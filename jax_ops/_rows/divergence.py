"""A student's rows of logits against a teacher's: native kernels where they serve, plain jax.numpy everywhere else.

legend:  s, t logits after scale and cap; p, q their softmaxes (p the student's)
         d_j = log p_j - log q_j = (s_j - t_j) - shift,  shift = lse_s - lse_t
value:   sum_j q_j f(p_j / q_j) with f(1) = f'(1) = 0: no term is negative and none cancels.
           forward_kl  q (expm1(d) - d)          reverse_kl  p (expm1(-d) + d)          tv  |p - q| / 2
           jsd         beta q h((1 - beta) expm1(d)) + (1 - beta) p h(beta expm1(-d)),  h(w) = w - log1p(w)
first:   dL/ds = p (u - <u>) for u = f'(p / q), <u> = sum_k p_k u_k; p - q for forward_kl
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_ops._rows.arithmetic import compute, slope
from jax_ops._rows.mean import centred, softmax
from jax_ops._rows.primitive import Row, transposable
from jax_ops._rows.ratios import Pair, met, slope_of, terms
from softmax_ext.contract import KINDS

STATE = 7  # numbers of a row that the kernels' forward leaves for their backward


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


def divergence_bwd_over(
    student: Array, teacher: Array, keep: Array | None, state: Array, d_value: Array, *, pair: Pair
) -> Array:
    """`divergence_bwd`, the kernel writing over logits that nothing else needs."""
    (dx,) = _divergence_bwd_over(student, teacher, lax.stop_gradient(state), d_value, keep, **pair._asdict())
    return dx


def divergence_fwd_bwd(
    student: Array, teacher: Array, keep: Array | None, d_value: Array, *, pair: Pair
) -> tuple[Array, Array]:
    """(dL/d(student), the divergences) in one visit, the kernel writing over the student's logits."""
    dx, value = _divergence_fwd_bwd(student, teacher, d_value, keep, **pair._asdict())
    return dx, value


def _in_two_visits(
    student: Array, teacher: Array, d_value: Array, keep: Array | None, **options: Any
) -> tuple[Array, Array]:
    """What `divergence_fwd_bwd` is: its derivatives are those of the two."""
    pair = Pair(**options)
    value, state = divergence_fwd(student, teacher, keep, pair=pair)
    return divergence_bwd_over(student, teacher, keep, state, d_value, pair=pair), value


def _plain_fwd(student: Array, teacher: Array, keep: Array | None, **options: Any) -> tuple[Array, Array]:
    """divergence_fwd in jax.numpy; its state is for kernels, which have no part here.

    Where one serves the backward all the same (a pullback taken to another device), it finds no number and gives NaN.
    """
    pair = Pair(**options)
    value = _value(pair, *kept(student, teacher, keep, pair))
    if keep is not None:
        value = jnp.where(keep, value, 0.0)
    return value, jnp.full_like(lax.stop_gradient(value), jnp.inf, shape=(*value.shape, STATE))


def _plain_bwd(
    student: Array, teacher: Array, _state: Array, d_value: Array, keep: Array | None, **options: Any
) -> Array:
    """divergence_bwd in jax.numpy, from the logits alone: whatever differentiates it need know nothing of a state."""
    pair = Pair(**options)
    dx = jnp.expand_dims(d_value, pair.axis) * _gradient(pair, *kept(student, teacher, keep, pair))
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
    found = (_gradient(pair, *kept(student, teacher, keep, pair)) * compute(along)).sum(pair.axis)
    return [found if keep is None else jnp.where(keep, found, 0.0)]


def kept(student: Array, teacher: Array, keep: Array | None, pair: Pair) -> tuple[Array, Array]:
    """Both, with 0 in rows that reach no result: a NaN there would, by 0 * NaN."""
    if keep is None:
        return student, teacher
    some, zero = jnp.expand_dims(keep, pair.axis), jnp.zeros((), student.dtype)
    return jnp.where(some, student, zero), jnp.where(some, teacher, zero.astype(teacher.dtype))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(pair: Pair, student: Array, teacher: Array) -> Array:
    if not student.shape[pair.axis]:
        return jnp.full(pair.rows(student), jnp.nan, compute(student).dtype)
    d, p, q, _ = met(pair, student, teacher)
    return terms(pair, d, p, q).sum(pair.axis)


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
        g = p * centred(slope_of(pair, d, gone), p, pair.axis)
        if pair.kind == "reverse_kl":
            g = jnp.where(gone.any(pair.axis, keepdims=True), jnp.nan, g)
    g = jnp.where(jnp.isnan(q), jnp.nan, g)  # a teacher without a distribution
    return g * slope(student, pair.scale, pair.softcap)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_ratio(pair: Pair, student: Array, teacher: Array) -> Array:
    return met(pair, student, teacher)[0]


@_log_ratio.defjvp
def _log_ratio_jvp(pair: Pair, primals: Any, tangents: Any) -> Any:
    p = softmax(pair.axis, pair.student(primals[0]))
    w = slope(primals[0], pair.scale, pair.softcap) * compute(tangents[0])
    return _log_ratio(pair, *primals), centred(w, p, pair.axis)


def attributes(_present: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Numbers in the type the kernel expects, whatever JAX makes of 64 bits; 0 is no soft cap."""
    names = ("beta", "scale", "softcap", "teacher_scale", "teacher_softcap")
    numbers = {name: np.float64(options[name] or 0.0) for name in names}
    return {"kind": np.int64(KINDS.index(options["kind"])), **numbers}


# keep, which may be absent, comes last: so do the kernels take it
_divergence_fwd = Row("divergence_fwd", _plain_fwd, kernel=("divergence_fwd", attributes))
_divergence_bwd, _divergence_bwd_over = (
    transposable(
        Row(name, _plain_bwd, linear=[3], kernel=("divergence_bwd", attributes), inplace=inplace),
        like=2,
        back=_plain_bwd_transpose,
    )
    for name, inplace in (("divergence_bwd", False), ("divergence_bwd_over", True))
)
_divergence_fwd_bwd = Row("divergence_fwd_bwd", _in_two_visits, kernel=("divergence_fwd_bwd", attributes), inplace=True)
