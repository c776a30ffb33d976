"""What a slice of the classes says of a student's and a teacher's rows, and how slices merge: in loops, over devices.

legend:  P_k, Q_k the masses that slice k has of the student's and of the teacher's row; D_k = log P_k - log Q_k, the
         slice's own shift less the row's: beside the others a slice is one class, with logits lse_s, lse_t
formula: KL(q | p) = sum_k Q_k KL_k + sum_k Q_k log(Q_k / P_k), the chain rule of entropies; of the reverse P_k KL_k.
         jsd and tv have none: they are summed over the classes once the row's numbers are known
         dlse_s = dshift = <w> = sum_j p_j w_j and d<u> = sum_j (p_j (u_j - <u>) + p_j u'_j) w_j - <w> sum_j p_j u'_j
         for a direction w of s, u' = du/dd
A row's state are m and rest of both sides, the shift as a sum of two numbers, and <u>: all that a gradient asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._rows.arithmetic import compute, shifted, slope
from jax_ops._rows.divergence import attributes, kept
from jax_ops._rows.primitive import Row, transposable
from jax_ops._rows.ratios import Pair, difference, less, log_ratios, met, moved_shift, shift_of, slope_of, terms

State = dict[str, Array]
ENTROPIES = ("forward_kl", "reverse_kl")  # the kinds that have a chain rule


def nothing(like: Array, kind: Any, pair: Pair) -> State:
    """What no class at all says of the rows (n,)."""
    start = {"m_s": -jnp.inf, "rest_s": -1.0, "m_t": -jnp.inf, "rest_t": -1.0, "hi": jnp.nan, "lo": 0.0}
    start |= {"value": 0.0} if pair.kind in ENTROPIES else {}
    return {name: jnp.full_like(like, value, shape=like.shape[:1], dtype=kind) for name, value in start.items()}


def of(student: Array, teacher: Array, keep: Array | None, pair: Pair) -> State:
    """What a slice of both logits says of the rows."""
    own = pair if pair.kind in ENTROPIES else pair._replace(kind="forward_kl")
    value, numbers = _part_fwd(student, teacher, keep, **own._asdict())
    names = ("m_s", "rest_s", "m_t", "rest_t", "hi", "lo")
    state: State = {name: numbers[..., i] for i, name in enumerate(names)}
    # All -inf in the slice: no distribution there, and no part in the row's.
    gone = [x.max(pair.axis, initial=-jnp.inf) == -jnp.inf for x in (student, teacher)]
    gone = [g if keep is None else g & keep for g in gone]
    for side, dead in zip("st", gone, strict=True):
        m, rest = state[f"m_{side}"], state[f"rest_{side}"]
        state[f"m_{side}"] = jnp.where(dead, -jnp.inf, jnp.where(jnp.isnan(rest), jnp.nan, m))
        state[f"rest_{side}"] = jnp.where(dead, -1.0, rest)
    some = ~(gone[0] | gone[1])
    state["hi"] = jnp.where(some, state["hi"], jnp.where(gone[0], -jnp.inf, 0.0) + jnp.where(gone[1], jnp.inf, 0.0))
    state["lo"] = jnp.where(some, state["lo"], 0.0)
    return state | ({"value": jnp.where(some, value, 0.0)} if pair.kind in ENTROPIES else {})


def merge(a: State, b: State, pair: Pair) -> State:
    """What two disjoint slices say together."""
    both = {name: jnp.stack([a[name], b[name]]) for name in a}
    return over(both, pair, lambda *x: [v.max(0) for v in x], lambda *x: [v.sum(0) for v in x])


def over(
    state: State, pair: Pair, largest: Callable[..., Sequence[Array]], total: Callable[..., Sequence[Array]]
) -> State:
    """What all slices say together, in one maximum of two numbers a row, and sums of four, one, one and one."""
    tops, masses, parts = largest(state["m_s"], state["m_t"]), [], []
    for side, m in zip("st", tops, strict=True):
        own, rest = state[f"m_{side}"], state[f"rest_{side}"]
        top = own == m
        masses.append(jnp.exp(jnp.where(top, 0.0, own - m)) * (1.0 + rest))
        # Among ties for the maximum all but one count in full: adding their number less 1 is exact.
        parts += [jnp.where(top, rest, masses[-1]), top.astype(rest.dtype)]
    rest_s, top_s, rest_t, top_t = total(*parts)
    rests = (rest_s + (top_s - 1.0), rest_t + (top_t - 1.0))
    p, q = (jnp.where(v == 0, 0.0, v / (1.0 + rest)) for v, rest in zip(masses, rests, strict=True))
    coarse = (tops[0] - tops[1]) + (jnp.log1p(rests[0]) - jnp.log1p(rests[1]))
    ratio = log_ratios(pair, state["hi"], state["lo"])
    hi, lo = shift_of(pair, coarse, ratio, p, q, lambda x: total(x)[0])
    known = jnp.isfinite(hi)
    lo = jnp.where(known, lo, 0.0)
    out = {"m_s": tops[0], "rest_s": rests[0], "m_t": tops[1], "rest_t": rests[1], "hi": hi, "lo": lo}
    if "value" in state:
        mass = q if pair.kind == "forward_kl" else p
        inside = jnp.where(mass == 0, 0.0, mass * state["value"])
        (value,) = total(inside + terms(pair, ratio(hi, lo), p, q))
        out["value"] = jnp.where(known, value, 0.0)
    return out


def numbers(state: State, pair: Pair) -> tuple[Array, Array]:
    """(the divergences of kinds with a chain rule, the rows' states)."""
    # a maximum over devices need not tell of the NaN of one, rest does
    whole = functools.reduce(
        jnp.logical_and, (jnp.isfinite(state[name]) for name in ("m_s", "rest_s", "m_t", "rest_t"))
    )
    columns = [state[name] for name in ("m_s", "rest_s", "m_t", "rest_t", "hi", "lo")]
    for i in (1, 3, 4):
        columns[i] = jnp.where(whole, columns[i], jnp.nan)
    value = jnp.where(whole, jnp.maximum(state.get("value", state["hi"]), 0.0), jnp.nan)
    columns.append(value if pair.kind == "reverse_kl" else jnp.zeros_like(value))
    return value, jnp.stack(columns, -1)


def sums(student: Array, teacher: Array, keep: Array | None, state: Array, pair: Pair) -> Array:
    """A slice's sums of q f(p / q), p - q and p u, beside each other, of rows of which the state is known."""
    (found,) = _sums(student, teacher, state, keep, **pair._asdict())
    return found


def finished(state: Array, total: Array, pair: Pair) -> tuple[Array, Array]:
    """(the divergences, the states) from the sums of all slices."""
    value, off, mean = jnp.moveaxis(total, -1, 0)
    off = jnp.log1p(jnp.maximum(off, -0.5))  # what the shift was off by, which moves the rest by its first order
    bend = pair.beta * (1.0 - pair.beta)
    value = value - (off * mean if pair.kind == "tv" else 0.5 * bend * jnp.square(off))
    mean = mean - bend * off if pair.kind == "jsd" else mean
    hi, lo = moved_shift(state[..., 4], state[..., 5], off / pair.unit)
    value = jnp.where(jnp.isfinite(state[..., 4]), jnp.maximum(value, 0.0), jnp.nan)
    return value, jnp.concatenate([state[..., :4], jnp.stack([hi, lo, mean], -1)], -1)


def part_bwd(student: Array, teacher: Array, keep: Array | None, state: Array, d_value: Array, *, pair: Pair) -> Array:
    """dL/d(student) of a slice from the whole rows' states and upstream gradients: linear in these."""
    (dx,) = _part_bwd(student, teacher, state, d_value, keep, **pair._asdict())
    return dx


def part_bwd_over(
    student: Array, teacher: Array, keep: Array | None, state: Array, d_value: Array, *, pair: Pair
) -> Array:
    """`part_bwd`, the kernel writing over logits that nothing else needs."""
    (dx,) = _part_bwd_over(student, teacher, state, d_value, keep, **pair._asdict())
    return dx


def pushed(
    student: Array, teacher: Array, keep: Array | None, state: Array, along: Array, pair: Pair
) -> tuple[Array, ...]:
    """A slice's sums for `tangents`, where the student's logits move `along`."""
    student, teacher = kept(student, teacher, keep, pair)
    g, p, d, gone = _rise(pair, student, teacher, state)
    w = slope(student, pair.scale, pair.softcap) * compute(along)
    if keep is not None:
        w = jnp.where(jnp.expand_dims(keep, pair.axis), w, 0.0)
    found = [p * w, g * w]
    if pair.kind == "jsd":
        ones, u = jnp.ones_like(d), partial(slope_of, pair, gone=gone)
        bent = p * jax.jvp(lambda d: u(d=d), (d,), (ones,))[1]
        found += [bent * w, bent]
    return tuple(v.sum(pair.axis) for v in found)


def tangents(state: Array, total: Sequence[Array], pair: Pair) -> tuple[Array, Array]:
    """(the divergences' tangents, the states') from what all slices' `pushed` sum up to."""
    moved, value, *bent = total
    mean = jnp.zeros_like(value) if pair.kind == "forward_kl" else value
    if bent:
        mean = mean + (bent[0] - moved * bent[1])
    none = jnp.zeros_like(moved)
    columns = [none, (1.0 + state[..., 1]) * moved, none, none, moved / pair.unit, none, mean]
    return value, jnp.stack(columns, -1)


def _plain_part_fwd(student: Array, teacher: Array, keep: Array | None, **options: Any) -> tuple[Array, Array]:
    pair = Pair(**options)
    d, p, q, found = met(pair, *kept(student, teacher, keep, pair))
    value = terms(pair, d, p, q).sum(pair.axis)
    columns = [v.squeeze(pair.axis) for v in found]
    state = jnp.stack([*columns, jnp.zeros_like(value)], -1)
    if keep is not None:
        value, state = jnp.where(keep, value, 0.0), jnp.where(keep[..., None], state, 0.0)
    return value, state


def _plain_sums(student: Array, teacher: Array, state: Array, keep: Array | None, **options: Any) -> Array:
    pair = Pair(**options)
    student, teacher = kept(student, teacher, keep, pair)
    p, q, d = _known(pair, student, teacher, state)
    gone = (p > 0) & (d == jnp.inf)
    u = slope_of(pair, jnp.where(jnp.isfinite(d), d, 0.0), gone)
    found = [v.sum(pair.axis) for v in (terms(pair, d, p, q), less(d, p, q), jnp.where(p == 0, 0.0, p * u))]
    out = jnp.stack(found, -1)
    return out if keep is None else jnp.where(keep[..., None], out, 0.0)


def _plain_part_bwd(
    student: Array, teacher: Array, state: Array, d_value: Array, keep: Array | None, **options: Any
) -> Array:
    pair = Pair(**options)
    dx = jnp.expand_dims(d_value, pair.axis) * _slanted(pair, student, teacher, state, keep)
    return dx.astype(student.dtype)


def _plain_part_bwd_transpose(
    student: Array,
    teacher: Array,
    state: Array,
    along: Array,
    keep: Array | None,
    *,
    wanted: Sequence[int],
    **options: Any,
) -> list[Array]:
    pair = Pair(**options)
    return [(_slanted(pair, student, teacher, state, keep) * compute(along)).sum(pair.axis)]


def _slanted(pair: Pair, student: Array, teacher: Array, state: Array, keep: Array | None) -> Array:
    """The derivative of each row's divergence by the logits of a slice."""
    x, t = kept(student, teacher, keep, pair)
    g = _rise(pair, x, t, state)[0] * slope(x, pair.scale, pair.softcap)
    return g if keep is None else jnp.where(jnp.expand_dims(keep, pair.axis), g, 0.0)


def _rise(pair: Pair, student: Array, teacher: Array, state: Array) -> tuple[Array, Array, Array, Array]:
    """(the same by s, p, d with 0 where it is infinite, where the teacher has no such class)."""
    p, q, d = _known(pair, student, teacher, state)
    known = jnp.isfinite(d)
    gone = (p > 0) & (d == jnp.inf)
    d = jnp.where(known, d, 0.0)
    if pair.kind == "forward_kl":
        near = known & (jnp.abs(d) < 0.7)
        g = jnp.where(near, -p * jnp.expm1(-jnp.where(near, d, 0.0)), p - q)
    else:
        g = p * (slope_of(pair, d, gone) - _column(state, 6, pair))
    right = jnp.isfinite(_column(state, 4, pair)) & jnp.isfinite(_column(state, 6, pair))
    return jnp.where(right, g, jnp.nan), p, d, gone


def _known(pair: Pair, student: Array, teacher: Array, state: Array) -> tuple[Array, Array, Array]:
    """(p, q, d)."""
    m_s, rest_s, m_t, rest_t, hi, lo = (_column(state, i, pair) for i in range(6))
    p = shifted(pair.student(student), jax.lax.stop_gradient(m_s))[1] / (1.0 + rest_s)
    q = shifted(pair.teacher(teacher), m_t)[1] / (1.0 + rest_t)
    return p, jax.lax.stop_gradient(q), _ratio(pair, student, teacher, hi, lo)


def _column(state: Array, i: int, pair: Pair) -> Array:
    return jnp.expand_dims(state[..., i], pair.axis)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _ratio(pair: Pair, student: Array, teacher: Array, hi: Array, lo: Array) -> Array:
    return log_ratios(pair, *difference(pair, student, teacher))(hi, lo)


@_ratio.defjvp
def _ratio_jvp(pair: Pair, primals: Any, tangents: Any) -> Any:
    moved = slope(primals[0], pair.scale, pair.softcap) * compute(tangents[0])
    return _ratio(pair, *primals), moved - pair.unit * tangents[2]


_part_fwd = Row("divergence_part_fwd", _plain_part_fwd, kernel=("divergence_fwd", attributes))
_sums = Row("divergence_sums", _plain_sums, kernel=("divergence_sums", attributes))
_part_bwd, _part_bwd_over = (
    transposable(
        Row(name, _plain_part_bwd, linear=[3], kernel=("divergence_bwd", attributes), inplace=inplace),
        like=3,
        back=_plain_part_bwd_transpose,
    )
    for name, inplace in (("divergence_part_bwd", False), ("divergence_part_bwd_over", True))
)
