"""The rows' numbers of a linear layer, by the loop that the plan asks for, with every derivative."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
from jax import Array

from jax_ops._head import fast, lean
from jax_ops._head.chunks import Cut
from jax_ops._head.linear import Linear
from jax_ops._parallel.shard import Shard
from jax_ops._rules.autodiff import selective
from jax_ops._rules.plan import Plan
from jax_ops._rules.varying import alike


def per_row(
    x: Array,
    w: Array,
    b: Array | None,
    up: Array | None,
    target: Array,
    weight: Array | None,
    cut: Cut,
    shard: Shard,
    plan: Plan,
) -> tuple[Array, ...]:
    """The numbers asked for of each row, differentiable in all floats. Four matmuls with first derivatives."""
    arrays = shard.own(*alike(shard.wide(x), w, b, up, target, weight, but=shard.names))
    return _per_row(cut, shard, plan)(*arrays)


@cache
def _per_row(cut: Cut, shard: Shard, plan: Plan) -> Any:
    """The named numbers of each row. Saves the arguments, m and rest, and sharded the mass of soft targets and e."""
    loop: Any = lean if plan.lean else fast

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(x: Any, w: Any, b: Any, up: Any, target: Any, weight: Any) -> Any:
            x = x.astype(w.dtype)
            out = loop.fwd(x, Linear(w, b, up), target, weight, cut, shard, plan)
            whole = (out["m"], out["rest"], out.get("mass"), out.get("e"))
            return tuple(out[name] for name in plan.names), (x, w, b, up, target, weight, *whole)

        def bwd(saved: Any, cotangents: Any) -> Any:
            x, w, b, up, target, weight, *whole = saved
            ups = plan.upstream(shard.cotangents(*cotangents, like=x))
            how = (cut, shard, plan)
            sums = loop.bwd(x, Linear(w, b, up), target, weight, shard.own(*whole), ups, wanted, *how)
            arrays = zip(("x", "w", "b", "up", "target", "weight"), (shard.wide(x), *saved[1:6]), strict=True)
            return tuple(sums[name].astype(a.dtype) if name in sums else None for name, a in arrays)

        return fwd, bwd

    return selective(rules)


def argmax(x: Array, w: Array, b: Array | None, up: Array | None, cut: Cut, shard: Shard, plan: Plan) -> Array:
    """The first class with the largest logit of each row (the logits must have classes)."""
    x, *layer = jax.lax.stop_gradient(shard.own(*alike(x, w, b, up, but=shard.names)))
    loop: Any = lean if plan.lean else fast
    return shard.first_largest(*loop.largest(x, Linear(*layer), cut, plan))
