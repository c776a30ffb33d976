"""The rows' numbers of a linear layer, slice by slice of the classes: of all rows, a slice of the logits at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._arguments import same_axes
from jax_ops._head import linear
from jax_ops._head.chunks import Cut, Part
from jax_ops._parallel import slices
from jax_ops._parallel.shard import Shard
from jax_ops._rows import dispatch as rows
from jax_ops._rules.autodiff import selective


def per_row(
    x: Array,
    w: Array,
    b: Array | None,
    target: Array,
    weight: Array | None,
    *,
    cut: Cut,
    shard: Shard,
    scale: float,
    softcap: float | None,
    names: tuple[str, ...],
) -> tuple[Array, ...]:
    """The numbers asked for of each row, differentiable in all floats. Four matmuls with first derivatives."""
    arrays = shard.own(*same_axes(shard.wide(x), w, b, target, weight, but=shard.names))
    return _per_row(cut, shard, scale, softcap, names)(*arrays)


def argmax(
    x: Array, w: Array, b: Array | None, *, cut: Cut, shard: Shard, scale: float, softcap: float | None
) -> Array:
    """The first class with the largest logit of each row (the logits must have classes)."""
    x, w, b = jax.lax.stop_gradient(shard.own(*same_axes(x, w, b, but=shard.names)))

    def step(best: tuple[Array, Array], part: Part) -> tuple[Array, Array]:
        z = rows.capped(_logits(cut, x, cut.take(w, part), b, part), scale, softcap)
        top, at = z.max(1), z.argmax(1)
        better = (top > best[0]) | (jnp.isnan(top) & ~jnp.isnan(best[0]))
        return jnp.where(better, top, best[0]), jnp.where(better, at + cut.start(part), best[1])

    kind = jnp.argmax(jnp.zeros(1)).dtype
    lowest = jnp.full_like(x, -jnp.inf, shape=x.shape[:1], dtype=linear.wide(x.dtype))
    return shard.first_largest(*cut.loop(step, (lowest, jnp.zeros_like(x, shape=x.shape[:1], dtype=kind))))


@cache
def _per_row(cut: Cut, shard: Shard, scale: float, softcap: float | None, names: tuple[str, ...]) -> Any:
    """The named numbers of each row. Saves the arguments, M and rest, and the mass of soft targets and e if used."""
    layout: dict[str, Any] = {"axis": 1, "scale": scale, "softcap": softcap}

    def logits_of(arrays: Any, part: Part) -> tuple[Any, ...]:
        """The slice of the logits, and of what else has classes."""
        x, w, b, target, weight = arrays
        wk, fresh, weight_k = cut.take(w, part), cut.fresh(part), cut.take_fresh(weight, part)
        if fresh is not None and weight is None and (rows.is_soft(target) or "smooth" in names):
            weight_k = fresh.astype(linear.wide(x.dtype))
        return _logits(cut, x, wk, b, part), wk, *_local(cut, shard, target, part), weight_k

    def fwd(x: Any, w: Any, b: Any, target: Any, weight: Any) -> Any:
        x = x.astype(w.dtype)
        masked = linear.kept_rows(x, _kept(target))

        def step(state: slices.State, part: Part) -> slices.State:
            z, _, t, inside, weight_k = logits_of((masked, w, b, target, weight), part)
            return slices.merge(state, slices.of(z, t, inside, weight_k, names=names, layout=layout))

        start = slices.nothing(x, x.shape[:1], linear.wide(x.dtype), names, soft=rows.is_soft(target))
        state = slices.over(cut.loop(step, start), shard)
        out = slices.numbers(state, target)
        sums = (state.get("mass"), state.get("e"))
        return tuple(out[name] for name in names), (x, w, b, target, weight, out["m"], out["rest"], *sums)

    def rules(wanted: tuple[bool, ...]) -> Any:
        def bwd(saved: Any, cotangents: Any) -> Any:
            x, w, b, target, weight, *whole = saved
            m, rest, mass, e = shard.own(*whole)
            up = dict(zip(names, shard.cotangents(*cotangents, like=x), strict=True))
            d_nll, d_lse, d_smooth, d_entropy = map(up.get, ("nll", "lse", "smooth", "entropy"))
            weights = 0.0 if d_smooth is None else shard.weight_sum(weight)
            kept = _kept(target)
            masked = linear.kept_rows(x, kept)

            def step(sums: dict[str, Array], part: Part) -> dict[str, Array]:
                z, wk, t, inside, weight_k = logits_of((masked, w, b, target, weight), part)
                ups = (d_nll, d_lse, d_smooth, d_entropy)
                masses = (mass, weights, e)
                here = slices.upstream(z, t, inside, weight_k, m, rest, masses, *ups, layout=layout)
                sums = dict(sums)
                if wanted[3] or wanted[4]:
                    found = rows.cross_entropy_mass_bwd(z, t, weight_k, m, rest, d_nll, d_smooth, **layout)
                    for name, value, axis in zip(("target", "weight"), found, (1, 0), strict=True):
                        if name in sums and value is not None:
                            sums[name] = cut.put(sums[name], value, part, axis)
                if any(wanted[:3]):
                    dz = rows.cross_entropy_bwd_over(z, t, weight_k, m, rest, *here, d_smooth, d_entropy, **layout)
                    if "x" in sums:
                        sums["x"] = sums["x"] + linear.input_bwd(dz, wk)
                    if "w" in sums:
                        sums["w"] = linear.weight_bwd(sums["w"], dz, masked, cut.start(part))
                    if "b" in sums:
                        sums["b"] = cut.put(sums["b"], dz.sum(0), part)
                return sums

            arrays = dict(zip(("x", "w", "b", "target", "weight"), (shard.wide(x), *saved[1:5]), strict=True))
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


def _logits(cut: Cut, x: Array, wk: Array, b: Array | None, part: Part) -> Array:
    """The slice's logits: -inf for classes that another slice has, so that they take no part."""
    bk, fresh = cut.take(b, part), cut.fresh(part)
    if fresh is not None and bk is None:
        bk = jnp.zeros_like(wk, shape=wk.shape[:1])
    return linear.logits(x, wk, bk, fresh)


def _local(cut: Cut, shard: Shard, target: Array, part: Part) -> tuple[Array, Any]:
    """The slice's targets and, of class indices, which no slice before has and are inside it."""
    if rows.is_soft(target):
        return cut.take(target, part, 1), None
    t, inside = shard.local(target, cut.start(part), cut.each)
    if cut.fresh(part) is not None:
        inside = inside & (target >= shard.first(target.dtype) + part * cut.each)
    return t, inside


def _kept(target: Array) -> Array | None:
    return None if rows.is_soft(target) else target != rows.IGNORED
