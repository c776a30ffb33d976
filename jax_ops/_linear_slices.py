"""The rows' numbers of a linear layer, slice by slice of the classes: of all rows, a slice of the logits at a time.

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
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops import _linear as linear
from jax_ops import _rows as rows
from jax_ops._arrays import same_axes
from jax_ops._autodiff import selective
from jax_ops._chunks import Cut, Part

State = dict[str, Array]

_LOWEST = -1000.0  # exp of this is 0


def per_row(
    x: Array,
    w: Array,
    b: Array | None,
    target: Array,
    weight: Array | None,
    *,
    cut: Cut,
    scale: float,
    softcap: float | None,
    names: tuple[str, ...],
) -> tuple[Array, ...]:
    """The numbers asked for of each row, differentiable in all floats. Four matmuls with first derivatives."""
    arrays = same_axes(x, w, b, target, weight)
    return _per_row(cut, scale, softcap, names)(*arrays)


def argmax(x: Array, w: Array, b: Array | None, *, cut: Cut, scale: float, softcap: float | None) -> Array:
    """The first class with the largest logit of each row (the logits must have classes)."""
    x, w, b = jax.lax.stop_gradient(same_axes(x, w, b))

    def step(best: tuple[Array, Array], part: Part) -> tuple[Array, Array]:
        z = rows.capped(linear.logits(x, cut.take(w, part), _bias(cut, b, part, w)), scale, softcap)
        top, at = z.max(1), z.argmax(1)
        better = (top > best[0]) | (jnp.isnan(top) & ~jnp.isnan(best[0]))
        return jnp.where(better, top, best[0]), jnp.where(better, at + cut.start(part), best[1])

    kind = jnp.argmax(jnp.zeros(1)).dtype
    lowest = jnp.full_like(x, -jnp.inf, shape=x.shape[:1], dtype=linear.wide(x.dtype))
    return cut.loop(step, (lowest, jnp.zeros_like(x, shape=x.shape[:1], dtype=kind)))[1]


@cache
def _per_row(cut: Cut, scale: float, softcap: float | None, names: tuple[str, ...]) -> Any:
    """The named numbers of each row. Saves the arguments, M and rest, and S of soft targets and e if they are used."""
    layout: dict[str, Any] = {"axis": 1, "scale": scale, "softcap": softcap}
    entropy = "entropy" in names

    def logits_of(arrays: Any, part: Part) -> tuple[Any, ...]:
        """The slice of the logits, and of what else has classes."""
        x, w, b, target, weight = arrays
        wk, fresh, weight_k = cut.take(w, part), cut.fresh(part), cut.take_fresh(weight, part)
        if fresh is not None and weight is None and (rows.is_soft(target) or "smooth" in names):
            weight_k = fresh.astype(linear.wide(x.dtype))
        return linear.logits(x, wk, _bias(cut, b, part, w)), wk, *_local(cut, target, part), weight_k

    def fwd(x: Any, w: Any, b: Any, target: Any, weight: Any) -> Any:
        masked = linear.kept_rows(x, _kept(target))

        def step(state: State, part: Part) -> State:
            z, _, t, inside, weight_k = logits_of((masked, w, b, target, weight), part)
            return _merge(state, _slice(z, t, inside, weight_k, names, layout))

        masses = ["nll"] * ("nll" in names) + ["smooth"] * ("smooth" in names)
        start = {"m": -jnp.inf, "rest": -1.0, "e": 0.0} | {f"{k}{name}": 0.0 for name in masses for k in "uS"}
        kind = linear.wide(x.dtype)
        start = {k: jnp.full_like(x, v, shape=x.shape[:1], dtype=kind) for k, v in start.items() if k != "e" or entropy}
        state = cut.loop(step, start)
        m, rest = state["m"], jnp.where(jnp.isfinite(state["m"]), state["rest"], jnp.nan)
        log_total = jnp.log1p(rest)
        out = {"lse": m + log_total}
        out |= {name: state[f"u{name}"] + state[f"S{name}"] * log_total for name in masses}
        if entropy:
            out["entropy"] = log_total - state["e"] / (1.0 + rest)
        if not rows.is_soft(target):
            if "nll" in out:
                out["nll"] = jnp.where(target <= rows.INVALID, jnp.nan, out["nll"])
            out = {name: jnp.where(target == rows.IGNORED, 0.0, value) for name, value in out.items()}
        sums = (state.get("Snll") if rows.is_soft(target) else None, state.get("e"))
        return tuple(out[name] for name in names), (x, w, b, target, weight, m, rest, *sums)

    def rules(wanted: tuple[bool, ...]) -> Any:
        def bwd(saved: Any, cotangents: Any) -> Any:
            x, w, b, target, weight, m, rest, mass, e = saved
            up = dict(zip(names, cotangents, strict=True))
            d_nll, d_lse, d_smooth, d_entropy = map(up.get, ("nll", "lse", "smooth", "entropy"))
            kept = _kept(target)
            masked = linear.kept_rows(x, kept)

            def step(sums: dict[str, Array], part: Part) -> dict[str, Array]:
                # legend:  p, M, rest of the whole row; S, W, e sums over the whole row, S', W', e' over the slice
                # formula: `cross_entropy_bwd` forms dL/dz_j = A' p_j - .. with the slice's masses and entropy;
                #          what the others hold of them multiplies p_j alone, as dL/dlse does
                z, wk, t, inside, weight_k = logits_of((masked, w, b, target, weight), part)
                others = [] if d_lse is None else [d_lse]
                d_nll_k = d_nll
                if d_nll is not None and rows.is_soft(target):
                    others.append(d_nll * (mass - _mass(t, weight_k, z.dtype)))
                elif d_nll is not None:
                    d_nll_k = jnp.where(inside | (target < 0), d_nll, 0.0)
                    others.append(jnp.where(inside, 0.0, d_nll))
                if d_smooth is not None:
                    here = z.shape[1] if weight_k is None else weight_k.sum()
                    others.append(d_smooth * ((cut.size if weight is None else weight.sum()) - here))
                if d_entropy is not None:
                    d = rows.capped(z, scale, softcap) - m[:, None]
                    here = (jnp.exp(d) * jnp.maximum(d, _LOWEST)).sum(1)
                    others.append(d_entropy * ((e - here) / (1.0 + rest)))
                d_lse_k = functools.reduce(jnp.add, others) if others else None
                sums = dict(sums)
                if wanted[3] or wanted[4]:
                    found = rows.cross_entropy_mass_bwd(z, t, weight_k, m, rest, d_nll, d_smooth, **layout)
                    for name, value, axis in zip(("target", "weight"), found, (1, 0), strict=True):
                        if name in sums and value is not None:
                            sums[name] = cut.put(sums[name], value, part, axis)
                if any(wanted[:3]):
                    ups = (d_nll_k, d_lse_k, d_smooth, d_entropy)
                    dz = rows.cross_entropy_bwd_over(z, t, weight_k, m, rest, *ups, **layout)
                    if "x" in sums:
                        sums["x"] = sums["x"] + linear.input_bwd(dz, wk)
                    if "w" in sums:
                        sums["w"] = linear.weight_bwd(sums["w"], dz, masked, cut.start(part))
                    if "b" in sums:
                        sums["b"] = cut.put(sums["b"], dz.sum(0), part)
                return sums

            arrays = dict(zip(("x", "w", "b", "target", "weight"), saved[:5], strict=True))
            sums = {
                name: jnp.zeros_like(arrays[name])
                for name, on in zip(("target", "weight"), wanted[3:], strict=True)
                if on
            }
            sums |= linear.zeros(wanted[:3], x, w, b)
            sums = cut.loop(step, sums)
            if "x" in sums:
                sums["x"] = linear.kept_rows(sums["x"], kept)
            return tuple(sums[name].astype(a.dtype) if name in sums else None for name, a in arrays.items())

        return fwd, bwd

    return selective(rules)


def _bias(cut: Cut, b: Array | None, part: Part, like: Array) -> Array | None:
    """The slice's bias: -inf for classes that another slice has, so that they take no part."""
    bk, fresh = cut.take(b, part), cut.fresh(part)
    if fresh is None:
        return bk
    return jnp.where(fresh, jnp.zeros((), like.dtype) if bk is None else bk, jnp.asarray(-jnp.inf, like.dtype))


def _local(cut: Cut, target: Array, part: Part) -> tuple[Array, Array | None]:
    """The slice's targets and, of class indices, which are inside it; the others name its class 0."""
    if rows.is_soft(target):
        return cut.take(target, part, 1), None
    first = cut.start(part)
    inside = (target >= part * cut.each) & (target < first + cut.each)
    return jnp.where(inside, target - first, jnp.minimum(target, 0)).astype(target.dtype), inside


def _slice(
    z: Array, t: Array, inside: Array | None, weight: Array | None, names: tuple[str, ...], layout: dict[str, Any]
) -> State:
    """What a slice of the logits says of the rows."""
    smooth, entropy = "smooth" in names, "entropy" in names
    # All -inf in the slice: no distribution there, and no part in the row's.
    dead = jax.lax.stop_gradient(z.max(1) == -jnp.inf)
    values = rows.cross_entropy_fwd(_alive(z, dead), t, weight, **layout, smooth=smooth, entropy=entropy)
    m, rest = jax.lax.stop_gradient(values[-2]), jnp.where(dead, 0.0, values[-1])
    log_total = jnp.log1p(rest)
    state = {"m": jnp.where(dead, -jnp.inf, jnp.where(jnp.isnan(jax.lax.stop_gradient(rest)), jnp.nan, m))}
    state["rest"] = jnp.where(dead, -1.0, rest)

    def mass_sums(name: str, value: Array, mass: Array, some: Array | bool) -> State:
        # sum_j mass_j (m - z_j): the row's number without mass log1p(rest), of which it is the larger.
        u = jnp.where(dead, jnp.where(some, jnp.inf, 0.0), value - mass * log_total)
        return {f"u{name}": u, f"S{name}": mass}

    if "nll" in names:
        if inside is None:
            mass = _mass(t, weight, z.dtype)
            state |= mass_sums("nll", values[0], mass, (t != 0).any(1) if weight is None else (t * weight != 0).any(1))
        else:
            nll = jnp.where(inside, values[0] - log_total, 0.0)
            state |= mass_sums("nll", nll, jnp.zeros_like(m), inside) | {"Snll": inside.astype(m.dtype)}
    if smooth:
        mass = jnp.full_like(m, z.shape[1]) if weight is None else jnp.zeros_like(m) + weight.sum()
        state |= mass_sums("smooth", values[2], mass, True if weight is None else (weight != 0).any())
    if entropy:
        state["e"] = jnp.where(dead, 0.0, (log_total - values[-3]) * (1.0 + rest))
    return state


@jax.custom_jvp
def _alive(z: Array, dead: Array) -> Array:
    """z, whose dead rows have no derivative: what is formed of them is NaN, and not used."""
    return z


@_alive.defjvp
def _alive_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    z, dead = primals
    return z, jnp.where(dead[:, None], jnp.zeros((), z.dtype), tangents[0])


def _merge(a: State, b: State) -> State:
    """What two disjoint slices say together."""
    m = jnp.maximum(a["m"], b["m"])
    (more_a, e_a, by_a), (more_b, e_b, by_b) = _moved(a, m), _moved(b, m)
    out = {"m": m, "rest": jnp.where(a["m"] >= b["m"], a["rest"] + more_b, b["rest"] + more_a)}
    for name in a:
        if name.startswith("S"):
            out[name] = a[name] + b[name]
            u = f"u{name[1:]}"
            out[u] = (a[u] - _times(a[name], by_a)) + (b[u] - _times(b[name], by_b))
    if "e" in a:
        out["e"] = e_a + e_b
    return out


def _moved(state: State, m: Array) -> tuple[Array, Array, Array]:
    """(the slice's sum of exp(z - m), its e, its maximum - m) for an m that is not below its maximum."""
    by = jnp.where(state["m"] == m, 0.0, state["m"] - m)
    f, total = jnp.exp(by), 1.0 + state["rest"]
    e = f * (state["e"] + jnp.maximum(by, _LOWEST) * total) if "e" in state else f
    return f * total, e, by


def _times(mass: Array, by: Array) -> Array:
    return mass * jnp.where(mass == 0, 0.0, by)


def _mass(target: Array, weight: Array | None, kind: Any) -> Array:
    """The sum of a slice's soft targets, times class weights, for each row."""
    y = target.astype(kind)
    return y.sum(1) if weight is None else (y * weight).sum(1)


def _kept(target: Array) -> Array | None:
    return None if rows.is_soft(target) else target != rows.IGNORED
