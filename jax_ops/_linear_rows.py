"""The rows' numbers of a linear layer by chunks of the rows; the backward pass forms each chunk's logits again."""

from __future__ import annotations

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

    def step(best: Array, part: Part) -> Array:
        z = rows.capped(linear.logits(cut.take(x, part), w, b), scale, softcap)
        return cut.put(best, z.argmax(1), part)

    return cut.loop(step, jnp.zeros_like(x, shape=x.shape[:1], dtype=jnp.argmax(jnp.zeros(1)).dtype))


@cache
def _per_row(cut: Cut, scale: float, softcap: float | None, names: tuple[str, ...]) -> Any:
    """The named numbers of each row. Saves the arguments, m and rest."""
    layout: dict[str, Any] = {"axis": 1, "scale": scale, "softcap": softcap}
    wished = {"smooth": "smooth" in names, "entropy": "entropy" in names}
    computed = ["nll", "lse", *(name for name, on in wished.items() if on), "m", "rest"]

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(x: Any, w: Any, b: Any, target: Any, weight: Any) -> Any:
            def step(out: dict[str, Array], part: Part) -> dict[str, Array]:
                t = cut.take(target, part)
                xi = linear.kept_rows(cut.take(x, part), _kept(t))
                values = rows.cross_entropy_fwd(linear.logits(xi, w, b), t, weight, **layout, **wished)
                found = dict(zip(computed, values, strict=True))
                return {name: cut.put(out[name], found[name], part) for name in out}

            kept = {*names, "m", "rest"}
            empty = {name: jnp.zeros_like(x, shape=x.shape[:1], dtype=linear.wide(x.dtype)) for name in kept}
            out = cut.loop(step, empty)
            return tuple(out[name] for name in names), (x, w, b, target, weight, out["m"], out["rest"])

        def bwd(saved: Any, cotangents: Any) -> Any:
            x, w, b, target, weight, m, rest = saved
            up = dict(zip(names, cotangents, strict=True))
            ups = [up.get(name) for name in ("nll", "lse", "smooth", "entropy")]

            def step(sums: dict[str, Array], part: Part) -> dict[str, Array]:
                t, mi, ri = (cut.take(a, part) for a in (target, m, rest))
                d = [cut.take_fresh(a, part) for a in ups]
                kept = _kept(t)
                xi = linear.kept_rows(cut.take(x, part), kept)
                z = linear.logits(xi, w, b)
                if wanted[3] or wanted[4]:
                    d_target, d_weight = rows.cross_entropy_mass_bwd(z, t, weight, mi, ri, d[0], d[2], **layout)
                    if wanted[3] and d_target is not None:
                        sums = sums | {"target": cut.put(sums["target"], d_target, part)}
                    if wanted[4]:
                        sums = sums | {"weight": sums["weight"] + d_weight}
                if any(wanted[:3]):
                    dz = rows.cross_entropy_bwd_over(z, t, weight, mi, ri, *d, **layout)
                    sums = linear.add(sums, cut, part, dz, xi, w, kept)
                return sums

            sums = linear.zeros(wanted[:3], x, w, b)
            more = zip(("target", "weight"), (target, weight), wanted[3:], strict=True)
            sums |= {name: jnp.zeros_like(a) for name, a, on in more if on}
            sums = cut.loop(step, sums)
            arrays = zip(("x", "w", "b", "target", "weight"), saved[:5], strict=True)
            return tuple(sums[name].astype(a.dtype) if name in sums else None for name, a in arrays)

        return fwd, bwd

    return selective(rules)


def _kept(target: Array) -> Array | None:
    return None if rows.is_soft(target) else target != rows.IGNORED
