"""The rows of logits whose classes are sharded over devices."""

from __future__ import annotations

from functools import cache
from typing import Any

from jax import Array

from jax_ops._parallel.shard import Shard
from jax_ops._rows import dispatch as rows
from jax_ops._rows import slices
from jax_ops._rules.autodiff import analytic
from jax_ops._rules.plan import Plan
from jax_ops._rules.varying import alike


def sharded_row(
    logits: Array, target: Array, weight: Array | None, axis: int, plan: Plan, shard: Shard
) -> dict[str, Array]:
    """As `row` of _rules/cross_entropy, of the whole rows."""
    arrays = shard.own(*alike(logits, target, weight, but=shard.names))
    return dict(zip(plan.names, _sharded_row(axis, plan, shard)(*arrays), strict=True))


@cache
def _sharded_row(axis: int, plan: Plan, shard: Shard) -> Any:
    """The named numbers of each row. Saves the arguments, m and rest, and the mass of soft targets and e if used."""
    layout = plan.row(axis)

    def fwd(logits: Any, target: Any, weight: Any) -> Any:
        state = slices.of(logits, *shard.local(target), weight, names=plan.names, layout=layout)
        out = slices.numbers(shard.joined(state, axis), target, axis)
        sums = (out.get("mass"), out.get("e"))
        return tuple(out[name] for name in plan.names), (logits, target, weight, out["m"], out["rest"], *sums)

    def bwd(saved: Any, cotangents: Any) -> Any:
        logits, target, weight, *whole = saved
        m, rest, mass, e = shard.own(*whole)
        ups = d_nll, _, d_smooth, d_entropy = plan.upstream(shard.cotangents(*cotangents, like=logits))
        weights = 0.0 if d_smooth is None else shard.weights(weight)
        (t, inside), masses = shard.local(target), (mass, weights, e)
        here = slices.upstream(logits, t, inside, weight, m, rest, masses, *ups, layout=layout)
        d_logits = rows.cross_entropy_bwd(logits, t, weight, m, rest, *here, d_smooth, d_entropy, **layout)
        d_target, d_weight = rows.cross_entropy_mass_bwd(logits, t, weight, m, rest, d_nll, d_smooth, **layout)
        return d_logits, d_target, d_weight

    return analytic(fwd, bwd)
