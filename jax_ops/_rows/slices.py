"""What a slice of the classes says of the rows, and how slices merge: in a loop over them, and over devices.

Each slice gives what `cross_entropy_fwd` says of it alone. Two disjoint slices A, B with masses S of what is
averaged over the classes merge by

    M = max(m_A, m_B);   rest = rest of the one that holds M + exp(m - M) (1 + rest) of the other
    u = sum_j mass_j (M - z_j) = u_A + S_A (M - m_A) + u_B + S_B (M - m_B)
    e = sum_j exp(z_j - M) (z_j - M) = exp(m_A - M) (e_A + (m_A - M) (1 + rest_A)) + the same of B

all sums of terms of one sign, so a confident row keeps its loss and gradient. At the end

    lse = M + log1p(rest);   nll, smooth = u + S log1p(rest);   entropy = log1p(rest) - e / (1 + rest)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._rows import dispatch as rows
from jax_ops._rows.arithmetic import LOWEST, relative
from jax_ops._rows.weights import Weights

State = dict[str, Array]


def nothing(like: Array, target: Array, kind: Any, names: tuple[str, ...]) -> State:
    """What no class at all says of the rows (n,)."""
    soft, rows_ = rows.is_soft(target), like.shape[:1]
    start = {"m": -jnp.inf, "rest": -1.0}
    start |= {f"{k}{name}": 0.0 for name in ("nll", "smooth") if name in names for k in "uS"}
    start |= {"mass": 0.0} if soft and "nll" in names else {}
    start |= {"e": 0.0} if "entropy" in names else {}
    shapes: dict[str, tuple[int, ...]] = {"unll": target.shape, "Snll": target.shape}
    shapes = {"mass": (*rows_, 3)} if soft else shapes
    return {n: jnp.full_like(like, value, shape=shapes.get(n, rows_), dtype=kind) for n, value in start.items()}


def of(
    z: Array, t: Array, inside: Any, weight: Array | None, *, names: tuple[str, ...], layout: dict[str, Any]
) -> State:
    """What a slice of the logits says of the rows; class indices are local, `inside` says which are in it."""
    axis, smooth, entropy = layout["axis"], "smooth" in names, "entropy" in names
    # All -inf in the slice: no distribution there, and no part in the row's.
    empty = jax.lax.stop_gradient(z.max(axis, initial=-jnp.inf) == -jnp.inf)
    dead = empty if inside is None else empty & (rows.of_rows(t, z.ndim, axis) != rows.IGNORED)
    # Whatever the target: logits of many targets are dead where they are for all, and an ignored row's are anyway.
    alive = rows.alive(axis, z, empty, weight, *[t] * (inside is None))
    values = rows.cross_entropy_fwd(alive, t, weight, **layout, smooth=smooth, entropy=entropy)
    m, rest = values[-2], jnp.where(dead, 0.0, values[-1])
    log_total = jnp.log1p(rest)
    state = {"m": jnp.where(dead, -jnp.inf, jnp.where(jnp.isnan(jax.lax.stop_gradient(rest)), jnp.nan, m))}
    state["rest"] = jnp.where(dead, -1.0, rest)

    def mass_sums(name: str, value: Array, mass: Array, some: Array | bool) -> State:
        # sum_j mass_j (m - z_j): the row's number without mass log1p(rest), of which it is the larger.
        gone, total = along(dead, mass, axis), along(log_total, mass, axis)
        u = jnp.where(gone, jnp.where(some, jnp.inf, 0.0), value - mass * total)
        return {f"u{name}": u, f"S{name}": mass}

    if "nll" in names:
        if inside is None:
            masses = _masses(t, weight, z.dtype, axis)
            # A soft target of 0 on -inf counts 0, and so does its derivative, which in S is the lse. `mass` is for the
            # gradient S p - mass of the logits, where it is p: unsharded too.
            capped = rows.capped(z, layout["scale"], layout["softcap"])
            gone = capped == -jnp.inf
            live = jnp.where(gone, jax.lax.stop_gradient(masses), masses)
            state |= mass_sums("nll", values[0], live.sum(axis), (masses != 0).any(axis))
            state["mass"] = _mass_and_aside(capped, masses, m, axis)
        else:
            nll = jnp.where(values[0] < 0, jnp.inf, values[0]) if t.ndim == z.ndim else values[0]
            nll = jnp.where(inside, nll - along(log_total, nll, axis), 0.0)
            state |= mass_sums("nll", nll, jnp.zeros_like(nll), inside) | {"Snll": inside.astype(m.dtype)}
    if smooth:
        mass = jnp.full_like(m, z.shape[axis]) if weight is None else jnp.where(dead, jnp.zeros_like(m), weight.sum())
        state |= mass_sums("smooth", values[2], mass, z.shape[axis] > 0 if weight is None else (weight != 0).any())
    if entropy:
        state["e"] = jnp.where(dead, 0.0, (log_total - values[-3]) * (1.0 + rest))
    return state


def merge(a: State, b: State, axis: int = 1) -> State:
    """What two disjoint slices say together; of K classes a row nll has them along `axis`."""
    m, by_a, by_b = _higher(a["m"], b["m"])
    (more_a, e_a, rest_a), (more_b, e_b, rest_b) = _moved(a, by_a), _moved(b, by_b)
    out = {"m": m, "rest": jnp.where(a["m"] >= b["m"], rest_a + more_b, rest_b + more_a)}
    for name in a:
        if name.startswith("S"):
            out[name] = a[name] + b[name]
            u = f"u{name[1:]}"
            out[u] = (a[u] - _times(a[name], by_a, axis)) + (b[u] - _times(b[name], by_b, axis))
    if "mass" in a:
        out["mass"] = _mass_beside(a, m, axis) + _mass_beside(b, m, axis)
    if "e" in a:
        out["e"] = e_a + e_b
    return out


def over(
    state: State,
    largest: Callable[[Array], tuple[Array, Array]],
    sum_of: Callable[[Array], Array],
    axis: int = 1,
) -> State:
    """What the slices of all devices say together, in two messages: a maximum and one sum, of a few numbers a row.

    `largest` gives the maximum, and how far below each is.
    """
    m, by = largest(state["m"])  # with or without the NaN of one slice: its row's sums carry that
    more, e, rest = _moved(state, by)
    top = state["m"] == m
    # Among ties for the maximum all but one count in full: adding their number less 1 is exact.
    parts = {"rest": jnp.where(top, rest, more), "top": top.astype(more.dtype)}
    for name in state:
        if name.startswith("S"):
            u = f"u{name[1:]}"
            parts |= {name: state[name], u: state[u] - _times(state[name], by, axis)}
    if "mass" in state:
        parts["mass"] = _mass_beside(state, m, axis)
    if "e" in state:
        parts["e"] = e
    lines = [jnp.moveaxis(v, axis, 0) if v.ndim > m.ndim else v[None] for v in parts.values()]
    found, out, at = sum_of(jnp.concatenate(lines)), {}, 0
    for (name, value), line in zip(parts.items(), lines, strict=True):
        own = found[at : at + line.shape[0]]
        out[name], at = jnp.moveaxis(own, 0, axis) if value.ndim > m.ndim else own[0], at + line.shape[0]
    out["rest"] = out["rest"] + (out.pop("top") - 1.0)
    return out | {"m": m}


def numbers(state: State, target: Array, axis: int = 1) -> State:
    """The rows' lse, and nll, smooth and entropy where the state has their sums; m, rest, mass and e."""
    m, rest = state["m"], jnp.where(jnp.isfinite(state["m"]), state["rest"], jnp.nan)
    log_total = jnp.log1p(rest)
    out = {"lse": m + log_total}
    sums = {k[1:]: (state[f"u{k[1:]}"], state[k]) for k in state if k.startswith("S")}
    out |= {name: u + mass * along(log_total, mass, axis) for name, (u, mass) in sums.items()}
    if "e" in state:
        out["entropy"] = log_total - state["e"] / (1.0 + rest)
    if not rows.is_soft(target):
        several, marks = target.ndim > m.ndim, rows.of_rows(target, m.ndim + 1, axis)
        if "nll" in out:
            nll = jnp.where(out["nll"] == jnp.inf, rows.MASKED, out["nll"]) if several else out["nll"]
            out["nll"] = jnp.where(target <= rows.INVALID, jnp.nan, nll)
        ignored = {"nll": target == rows.IGNORED}
        out = {name: jnp.where(ignored.get(name, marks == rows.IGNORED), 0.0, value) for name, value in out.items()}
    return out | {"m": m, "rest": rest} | {name: state[name] for name in ("mass", "e") if name in state}


def upstream(
    z: Array,
    t: Array,
    inside: Any,
    weight: Array | None,
    m: Array,
    rest: Array,
    masses: tuple[Any, Any, Any],
    d_nll: Array | None,
    d_lse: Array | None,
    d_smooth: Array | None,
    d_entropy: Array | None,
    *,
    layout: dict[str, Any],
) -> tuple[Array | None, Array | None]:
    """(d_nll, d_lse) of which `cross_entropy_bwd` forms the whole row's gradient in this slice.

    `masses` are the whole row's mass of soft targets, all of it and what lies beside its maximum, the number of classes
    or their Weights, and e.
    """
    # legend:  p, M, rest of the whole row; S, W, e sums over the whole row, S', W', e' over the slice
    # formula: `cross_entropy_bwd` forms dL/dz_j = A' p_j - .. with the slice's masses and entropy;
    #          what the others hold of them multiplies p_j alone, as dL/dlse does
    axis, (mass, weights, e) = layout["axis"], masses
    others = [] if d_lse is None else [d_lse]
    if d_nll is not None and inside is None:
        found = _mass_and_aside(
            rows.capped(z, layout["scale"], layout["softcap"]), _masses(t, weight, z.dtype, axis), m, axis
        )
        others.append(d_nll * _mass_of_others(mass, found, rest, axis))
    elif d_nll is not None:
        elsewhere = jnp.where(inside | (t == rows.IGNORED), 0.0, d_nll)
        others.append(elsewhere.sum(axis) if t.ndim == z.ndim else elsewhere)
        d_nll = jnp.where(inside | (t < 0), d_nll, 0.0)
    if d_smooth is not None:
        if isinstance(weights, Weights):
            others.append(d_smooth * weights.elsewhere(weight))  # pyright: ignore[reportArgumentType]
        else:
            others.append(d_smooth * (weights - (z.shape[axis] if weight is None else weight.sum())))
    if d_entropy is not None:
        whole = (jnp.expand_dims(v, axis) for v in (m, rest))
        d, f = relative(rows.capped(z, layout["scale"], layout["softcap"]), *whole)
        here = (f * jnp.maximum(d, LOWEST)).sum(axis)
        others.append(d_entropy * ((e - here) / (1.0 + rest)))
    return d_nll, functools.reduce(jnp.add, others) if others else None


def bwd(
    z: Array,
    t: Array,
    inside: Any,
    weight: Array | None,
    m: Array,
    rest: Array,
    masses: tuple[Any, Any, Any] | None,
    ups: Sequence[Array | None],
    wanted: Sequence[bool],
    layout: dict[str, Any],
) -> tuple[Array | None, Array | None, Array | None]:
    """(dL/dz, dL/dtarget, dL/dweight) of a slice, those that the gradients `wanted` of a head need, dL/dz over z.

    `masses` as in `upstream`, None where the slice is all of its rows; `ups` are the whole rows'.
    """
    here = ups[:2] if masses is None else upstream(z, t, inside, weight, m, rest, masses, *ups, layout=layout)
    dz = d_target = d_weight = None
    if any(wanted[4:6]):
        found = rows.cross_entropy_mass_bwd(z, t, weight, m, rest, ups[0], ups[2], **layout)
        d_target, d_weight = (value if on else None for value, on in zip(found, wanted[4:6], strict=True))
    if any(wanted[:4]):
        dz = rows.cross_entropy_bwd_over(z, t, weight, m, rest, *here, *ups[2:], **layout)
    return dz, d_target, d_weight


def _mass_and_aside(z: Array, masses: Array, m: Array, axis: int) -> Array:
    """Beside each other along `axis`: a slice's mass, that of its classes below m, whether one is m."""
    top = jax.lax.stop_gradient(z) == jnp.expand_dims(m, axis)
    aside = jnp.where(top, 0.0, masses).sum(axis)
    return jnp.stack([masses.sum(axis), aside, top.any(axis).astype(masses.dtype)], axis)


def _mass_beside(state: State, m: Array, axis: int) -> Array:
    """The same where m is the largest of more slices: all is aside in one that does not have it."""
    (mass, aside, held), own = _each(state["mass"], axis), state["m"] == m
    return jnp.stack([mass, jnp.where(own, aside, mass), jnp.where(own, held, 0.0)], axis)


def _mass_of_others(whole: Array, own: Array, rest: Array, axis: int) -> Array:
    """What the other slices hold of a row's mass: of a confident row's maximum, which may hold nearly all, by the rest.

    A difference of all would leave the roundings of that one. Which class is left out on both sides does not matter.
    """
    (mass, aside, held), (here, here_aside, here_held) = _each(whole, axis), _each(own, axis)
    known = jax.lax.stop_gradient((rest < 0.5) & (held > 0) & (here_held > 0))
    return jnp.where(known, aside - here_aside, mass - here)


def _each(mass: Array, axis: int) -> list[Array]:
    return [mass.take(i, axis) for i in range(3)]


def _masses(target: Array, weight: Array | None, kind: Any, axis: int) -> Array:
    """A slice's soft targets, times class weights."""
    y = target.astype(jnp.promote_types(kind, jnp.float32))
    by = rows.class_row(weight, y, axis)
    return y if by is None else y * by


@jax.custom_jvp
def _higher(m: Array, n: Array) -> tuple[Array, Array, Array]:
    """The larger of two maxima, and how far below it each is."""
    top = jnp.maximum(m, n)
    return top, below(m, top), below(n, top)


@_higher.defjvp
def _higher_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    (m, n), (dm, dn), out = primals, tangents, _higher(*primals)
    top = jnp.where(m > n, dm, jnp.where(n > m, dn, 0.0))
    return out, (top, jnp.where(m > n, 0.0, dm - top), jnp.where(n > m, 0.0, dn - top))


def below(m: Array, top: Array) -> Array:
    """m - top, 0 where both are the same infinity."""
    return jnp.where((m == top) & ~jnp.isfinite(top), 0.0, m - top)


def _moved(state: State, by: Array) -> tuple[Array, Array, Array]:
    """(a slice's sum of exp(z - m), its e, its rest) for an m that its maximum is below by `by`.

    Its rest is of use where m is its maximum: among ties each may move in its own way.
    """
    f, total = jnp.exp(by), 1.0 + state["rest"]
    e = f * (state["e"] + jnp.maximum(by, LOWEST) * total) if "e" in state else f
    return f * total, e, state["rest"] + total * jnp.expm1(by)


def _times(mass: Array, by: Array, axis: int) -> Array:
    return mass * jnp.where(mass == 0, 0.0, along(by, mass, axis))


def along(row: Array, like: Array, axis: int) -> Array:
    """Numbers of the rows, beside those of K classes a row along `axis`."""
    return jnp.expand_dims(row, axis) if like.ndim > row.ndim else row
