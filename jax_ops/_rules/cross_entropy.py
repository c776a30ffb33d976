"""A cross-entropy row with its analytic derivative in both modes."""

from __future__ import annotations

from functools import cache
from typing import Any

from jax import Array

from jax_ops._rows import dispatch as rows
from jax_ops._rules.autodiff import analytic
from jax_ops._rules.plan import Plan
from jax_ops._rules.varying import alike, as_rows


def row(logits: Array, target: Array, weight: Array | None, axis: int, plan: Plan) -> dict[str, Array]:
    """The numbers asked for of each row, with every derivative; targets canonical or soft."""
    arrays = alike(logits, as_rows(target, logits, axis), weight)
    return dict(zip(plan.names, _row(axis, plan)(*arrays), strict=True))


@cache
def _row(axis: int, plan: Plan) -> Any:
    """The named numbers of each row. Saves logits, target, weight, m and rest."""

    def fwd(logits: Any, target: Any, weight: Any) -> Any:
        values = rows.cross_entropy_fwd(logits, target, weight, **plan.wanted(axis))
        found = dict(zip(plan.computed, values, strict=True))
        return tuple(found[name] for name in plan.names), (logits, target, weight, found["m"], found["rest"])

    def bwd(saved: tuple[Any, Any, Any, Any, Any], cotangents: Any) -> Any:
        d_nll, d_lse, d_smooth, d_entropy = plan.upstream(cotangents)
        d_logits = rows.cross_entropy_bwd(*saved, d_nll, d_lse, d_smooth, d_entropy, **plan.row(axis))
        d_target, d_weight = rows.cross_entropy_mass_bwd(*saved, d_nll, d_smooth, **plan.row(axis))
        return d_logits, d_target, d_weight

    return analytic(fwd, bwd)
