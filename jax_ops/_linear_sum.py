"""The weighted sum of the rows' losses of a linear layer, its gradients formed chunk by chunk on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_ops import _linear as linear
from jax_ops import _rows as rows
from jax_ops._arrays import same_axes
from jax_ops._autodiff import selective
from jax_ops._chunks import Cut, Part


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
    scale: float,
    softcap: float | None,
) -> Array:
    """sum_i nll_i * (the row's nll) + smooth_i * (its smooth) + square_i * lse_i^2, differentiable in all floats.

    The upstream gradients of the rows are known but for one common factor: the gradients are those of the sum,
    which the backward pass multiplies by it. Three matmuls.
    """
    arrays = same_axes(x, w, b, target, weight, nll, smooth, square)
    return _total(cut, scale, softcap, tuple(None if a is None else str(a.dtype) for a in arrays))(*arrays)


@cache
def _total(cut: Cut, scale: float, softcap: float | None, dtypes: tuple[str | None, ...]) -> Callable[..., Any]:
    layout: dict[str, Any] = {"axis": 1, "scale": scale, "softcap": softcap}

    def rules(wanted: tuple[bool, ...]) -> Any:
        soft_wanted, weight_wanted = wanted[3:5]

        def fwd(x: Any, w: Any, b: Any, target: Any, weight: Any, nll: Any, smooth: Any, square: Any) -> Any:
            def step(sums: dict[str, Any], part: Part) -> dict[str, Any]:
                t, (d_nll, d_smooth, c) = (
                    cut.take(target, part),
                    (cut.take_fresh(a, part) for a in (nll, smooth, square)),
                )
                kept = None if rows.is_soft(t) else t != rows.IGNORED
                xi = linear.kept_rows(cut.take(x, part), kept)
                z, given = linear.logits(xi, w, b), {"smooth": smooth is not None, "entropy": False}
                dz = None
                if any(wanted[:3]) and c is None and not (soft_wanted or weight_wanted):
                    dz, *values = rows.cross_entropy_fwd_bwd(
                        z, t, weight, d_nll, None, d_smooth, None, **layout, **given
                    )
                else:
                    values = rows.cross_entropy_fwd(z, t, weight, **layout, **given)
                m, rest = values[-2:]
                found = dict(zip(("nll", "lse", "smooth"), values[:-2], strict=False))
                if smooth is not None and kept is not None:
                    found["smooth"] = jnp.where(t == rows.INVALID, jnp.nan, found["smooth"])
                sums = sums | {name: cut.put(sums[name], found[name], part) for name in found if name in sums}
                if soft_wanted or weight_wanted:
                    d_target, d_weight = rows.cross_entropy_mass_bwd(z, t, weight, m, rest, d_nll, d_smooth, **layout)
                    if soft_wanted:
                        sums["target"] = cut.put(sums["target"], d_target, part)
                    if weight_wanted:
                        sums["weight"] = sums["weight"] + d_weight
                if any(wanted[:3]):
                    if dz is None:
                        d_lse = None if c is None else 2.0 * c * found["lse"]
                        dz = rows.cross_entropy_bwd_over(z, t, weight, m, rest, d_nll, d_lse, d_smooth, None, **layout)
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
            names = ("x", "w", "b", "target", "weight", "nll", "smooth", "lse")
            found = zip(names, wanted, dtypes, strict=True)
            return tuple((ct * sums[name]).astype(dtype) if on else None for name, on, dtype in found)

        return fwd, bwd

    return selective(rules)
