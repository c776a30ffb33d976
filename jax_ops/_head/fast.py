"""The rows' numbers of a linear layer by chunks of the rows; the backward pass forms each chunk's logits again."""

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
        z = rows.capped(linear.logits(cut.take(x, part), w, b), scale, softcap)
        return cut.put(best[0], z.max(1), part), cut.put(best[1], z.argmax(1), part)

    kinds = linear.wide(x.dtype), jnp.argmax(jnp.zeros(1)).dtype
    top, at = cut.loop(step, tuple(jnp.zeros_like(x, shape=x.shape[:1], dtype=kind) for kind in kinds))
    return shard.first_largest(top, at)


@cache
def _per_row(cut: Cut, shard: Shard, scale: float, softcap: float | None, names: tuple[str, ...]) -> Any:
    """The named numbers of each row. Saves the arguments, m and rest; sharded also the mass of soft targets and e."""
    layout: dict[str, Any] = {"axis": 1, "scale": scale, "softcap": softcap}
    wished = {"smooth": "smooth" in names, "entropy": "entropy" in names}
    computed = ["nll", "lse", *(name for name, on in wished.items() if on), "m", "rest"]

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(x: Any, w: Any, b: Any, target: Any, weight: Any) -> Any:
            x = x.astype(w.dtype)

            def step(out: dict[str, Array], part: Part) -> dict[str, Array]:
                t = cut.take(target, part)
                z = linear.logits(linear.kept_rows(cut.take(x, part), _kept(t)), w, b)
                if shard.names:
                    found = slices.of(z, *shard.local(t), weight, names=names, layout=layout)
                else:
                    found = dict(zip(computed, rows.cross_entropy_fwd(z, t, weight, **layout, **wished), strict=True))
                return {name: cut.put(out[name], found[name], part) for name in out}

            kind = linear.wide(x.dtype)
            if shard.names:
                start = slices.nothing(x, x.shape[:1], kind, names, soft=rows.is_soft(target))
                state = slices.over(cut.loop(step, start), shard)
                out = slices.numbers(state, target)
            else:
                state, kept = {}, {*names, "m", "rest"}
                out = cut.loop(step, {name: jnp.zeros_like(x, shape=x.shape[:1], dtype=kind) for name in kept})
            sums = (state.get("mass"), state.get("e"))
            return tuple(out[name] for name in names), (x, w, b, target, weight, out["m"], out["rest"], *sums)

        def bwd(saved: Any, cotangents: Any) -> Any:
            x, w, b, target, weight, *whole = saved
            whole = shard.own(*whole)
            up = dict(zip(names, shard.cotangents(*cotangents, like=x), strict=True))
            ups = [up.get(name) for name in ("nll", "lse", "smooth", "entropy")]
            weights = 0.0 if ups[2] is None else shard.weight_sum(weight)

            def step(sums: dict[str, Array], part: Part) -> dict[str, Array]:
                t, mi, ri, mass, e = (cut.take(a, part) for a in (target, *whole))
                d = [cut.take_fresh(a, part) for a in ups]
                kept = _kept(t)
                xi = linear.kept_rows(cut.take(x, part), kept)
                z, d_here = linear.logits(xi, w, b), d[:2]
                if shard.names:
                    t, inside = shard.local(t)
                    masses = (mass, weights, e)
                    d_here = slices.upstream(z, t, inside, weight, mi, ri, masses, *d, layout=layout)
                if wanted[3] or wanted[4]:
                    d_target, d_weight = rows.cross_entropy_mass_bwd(z, t, weight, mi, ri, d[0], d[2], **layout)
                    if wanted[3] and d_target is not None:
                        sums = sums | {"target": cut.put(sums["target"], d_target, part)}
                    if wanted[4]:
                        sums = sums | {"weight": sums["weight"] + d_weight}
                if any(wanted[:3]):
                    dz = rows.cross_entropy_bwd_over(z, t, weight, mi, ri, *d_here, *d[2:], **layout)
                    sums = linear.add(sums, cut, part, dz, xi, w, kept)
                return sums

            sums = linear.zeros(wanted[:3], x, w, b)
            more = zip(("target", "weight"), (target, weight), wanted[3:], strict=True)
            sums |= {name: jnp.zeros_like(a) for name, a, on in more if on}
            sums = cut.loop(step, sums)
            arrays = zip(("x", "w", "b", "target", "weight"), (shard.wide(x), *saved[1:5]), strict=True)
            return tuple(sums[name].astype(a.dtype) if name in sums else None for name, a in arrays)

        return fwd, bwd

    return selective(rules)


def _kept(target: Array) -> Array | None:
    return None if rows.is_soft(target) else target != rows.IGNORED
