"""The rows' numbers of logits whose classes are sharded over devices."""

from __future__ import annotations

from functools import cache
from typing import Any

from jax import Array

from jax_ops._arguments import same_axes
from jax_ops._parallel import slices
from jax_ops._parallel.shard import Shard
from jax_ops._rows import dispatch as rows
from jax_ops._rules.autodiff import analytic


def per_row(
    logits: Array,
    target: Array,
    weight: Array | None,
    *,
    shard: Shard,
    axis: int,
    scale: float,
    softcap: float | None,
    names: tuple[str, ...],
) -> tuple[Array, ...]:
    """The numbers asked for of each row, differentiable in all floats."""
    arrays = shard.own(*same_axes(logits, target, weight, but=shard.names))
    return _per_row(shard, axis, scale, softcap, names)(*arrays)


@cache
def _per_row(shard: Shard, axis: int, scale: float, softcap: float | None, names: tuple[str, ...]) -> Any:
    """The named numbers of each row. Saves the arguments, m and rest, and the mass of soft targets and e if used."""
    layout: dict[str, Any] = {"axis": axis, "scale": scale, "softcap": softcap}

    def fwd(logits: Any, target: Any, weight: Any) -> Any:
        state = slices.of(logits, *shard.local(target), weight, names=names, layout=layout)
        state = slices.over(state, shard)
        out = slices.numbers(state, target)
        sums = (state.get("mass"), state.get("e"))
        return tuple(out[name] for name in names), (logits, target, weight, out["m"], out["rest"], *sums)

    def bwd(saved: Any, cotangents: Any) -> Any:
        logits, target, weight, *whole = saved
        m, rest, mass, e = shard.own(*whole)
        up = dict(zip(names, shard.cotangents(*cotangents, like=logits), strict=True))
        d_nll, d_lse, d_smooth, d_entropy = map(up.get, ("nll", "lse", "smooth", "entropy"))
        weights = 0.0 if d_smooth is None else shard.weight_sum(weight)
        (t, inside), masses = shard.local(target), (mass, weights, e)
        ups = (d_nll, d_lse, d_smooth, d_entropy)
        here = slices.upstream(logits, t, inside, weight, m, rest, masses, *ups, layout=layout)
        d_logits = rows.cross_entropy_bwd(logits, t, weight, m, rest, *here, d_smooth, d_entropy, **layout)
        d_target, d_weight = rows.cross_entropy_mass_bwd(logits, t, weight, m, rest, d_nll, d_smooth, **layout)
        return d_logits, d_target, d_weight

    return analytic(fwd, bwd)
