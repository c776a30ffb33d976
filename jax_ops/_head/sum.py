"""The weighted sum of the rows' losses of a linear layer, its gradients formed chunk by chunk on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_ops._arguments import same_axes
from jax_ops._head import linear
from jax_ops._head.chunks import Cut, Part
from jax_ops._parallel import slices
from jax_ops._parallel.shard import Shard
from jax_ops._rows import dispatch as rows
from jax_ops._rules.autodiff import selective


def total(
    x: Array,
    w: Array,
    b: Array | None,
    target: Array,
    weight: Array | None,
    nll: Array | None,
    smooth: Array | None,
    square: Array | None,
    *,
    cut: Cut,
    shard: Shard,
    scale: float,
    softcap: float | None,
) -> Array:
    """sum_i nll_i * (the row's nll) + smooth_i * (its smooth) + square_i * lse_i^2, differentiable in all floats.

    The upstream gradients of the rows are known but for one common factor: the gradients are those of the sum,
    which the backward pass multiplies by it. Three matmuls.
    """
    arrays = same_axes(shard.wide(x), w, b, target, weight, nll, smooth, square, but=shard.names)
    arrays = (*shard.own(*arrays[:5]), *arrays[5:])
    return _total(cut, shard, scale, softcap, tuple(None if a is None else str(a.dtype) for a in arrays))(*arrays)


@cache
def _total(
    cut: Cut, shard: Shard, scale: float, softcap: float | None, dtypes: tuple[str | None, ...]
) -> Callable[..., Any]:
    layout: dict[str, Any] = {"axis": 1, "scale": scale, "softcap": softcap}

    def rules(wanted: tuple[bool, ...]) -> Any:
        soft_wanted, weight_wanted = wanted[3:5]

        def fwd(x: Any, w: Any, b: Any, target: Any, weight: Any, nll: Any, smooth: Any, square: Any) -> Any:
            x = x.astype(w.dtype)
            computed = ("nll", "lse", *(("smooth",) if smooth is not None else ()), "m", "rest")
            names = tuple(name for name, c in (("nll", nll), ("smooth", smooth)) if c is not None)
            weights = 0.0 if smooth is None else shard.weight_sum(weight)

            def step(sums: dict[str, Any], part: Part) -> dict[str, Any]:
                t, (d_nll, d_smooth, c) = (
                    cut.take(target, part),
                    (cut.take_fresh(a, part) for a in (nll, smooth, square)),
                )
                kept = None if rows.is_soft(t) else t != rows.IGNORED
                xi = linear.kept_rows(cut.take(x, part), kept)
                z, given = linear.logits(xi, w, b), {"smooth": smooth is not None, "entropy": False}
                dz = state = None
                if shard.names:
                    state = slices.over(slices.of(z, *shard.local(t), weight, names=names, layout=layout), shard)
                    found = slices.numbers(state, t)
                elif any(wanted[:3]) and c is None and not (soft_wanted or weight_wanted):
                    dz, *values = rows.cross_entropy_fwd_bwd(
                        z, t, weight, d_nll, None, d_smooth, None, **layout, **given
                    )
                    found = dict(zip(computed, values, strict=True))
                else:
                    found = dict(zip(computed, rows.cross_entropy_fwd(z, t, weight, **layout, **given), strict=True))
                if smooth is not None and kept is not None:
                    found["smooth"] = jnp.where(t == rows.INVALID, jnp.nan, found["smooth"])
                sums = sums | {name: cut.put(sums[name], found[name], part) for name in found if name in sums}
                m, rest = shard.own(found["m"], found["rest"])
                d_lse = None if c is None else 2.0 * c * found["lse"]
                d_nll, d_lse, d_smooth = shard.own(d_nll, d_lse, d_smooth)
                if state is not None:
                    (t, inside), masses = shard.local(t), (state.get("mass"), weights, None)
                    ups = (d_nll, d_lse, d_smooth, None)
                    d_here = slices.upstream(z, t, inside, weight, m, rest, masses, *ups, layout=layout)
                else:
                    d_here = d_nll, d_lse
                if soft_wanted or weight_wanted:
                    d_target, d_weight = rows.cross_entropy_mass_bwd(z, t, weight, m, rest, d_nll, d_smooth, **layout)
                    if d_target is not None:
                        sums["target"] = cut.put(sums["target"], d_target, part)
                    if weight_wanted:
                        sums["weight"] = sums["weight"] + d_weight
                if any(wanted[:3]):
                    if dz is None:
                        dz = rows.cross_entropy_bwd_over(z, t, weight, m, rest, *d_here, d_smooth, None, **layout)
                    sums = linear.add(sums, cut, part, dz, xi, w, kept)
                return sums

            kind, empty = linear.wide(x.dtype), jnp.zeros_like
            by = {"nll": nll, "smooth": smooth, "lse": square}
            sums = {name: empty(c) for name, c in by.items() if c is not None}
            sums |= linear.zeros(wanted[:3], x, w, b)
            sums |= {"target": empty(target, dtype=kind)} if soft_wanted else {}
            sums |= {"weight": empty(weight)} if weight_wanted else {}
            sums = cut.loop(step, sums)
            terms = {name: sums[name] for name in by if name in sums}
            if square is not None:
                terms["lse"] = jnp.square(terms["lse"])
            out = sum((by[name] * term).sum() for name, term in terms.items())
            return out, {**sums, **terms}

        def bwd(sums: dict[str, Any], ct: Any) -> Any:
            own = [name for name in ("x", "w", "b", "target", "weight") if name in sums]
            # Of a coefficient every device has the row's whole number, and so what its own cotangent makes of it.
            (here,) = shard.cotangents(ct, like=sums[own[0]]) if own else (None,)
            found = zip(("x", "w", "b", "target", "weight", "nll", "smooth", "lse"), wanted, dtypes, strict=True)
            return tuple(
                ((here if name in own else ct) * sums[name]).astype(dtype) if on else None for name, on, dtype in found
            )

        return fwd, bwd

    return selective(rules)
