"""Statistics of a head's rows that its loss has no use for, by chunks of rows, every derivative likewise."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jax_ops._head.chunks import Cut, Part
from jax_ops._head.linear import Linear, ignored_rows, wide, without
from jax_ops._parallel.shard import Shard
from jax_ops._parallel.statistics import statistics_of
from jax_ops._rules.plan import Plan
from jax_ops._rules.varying import alike


def head_statistics(
    x: Array,
    w: Array,
    b: Array | None,
    up: Array | None,
    target: Array,
    names: Sequence[str],
    cut: Cut,
    shard: Shard,
    plan: Plan,
) -> tuple[Array, ...]:
    """Those named of each row, in their order; their logits are formed once more."""
    x, w, b, up, target = shard.own(*alike(shard.wide(x), w, b, up, target, but=shard.names))
    x, head = x.astype(w.dtype), Linear(w, b, up)

    def step(out: dict[str, Array], part: Part) -> dict[str, Array]:
        t = cut.take(target, part)
        z = head.logits(without(cut.take(x, part), ignored_rows(t)))
        found = statistics_of(names, z, t, 1, plan, shard)
        return {name: cut.put(out[name], found[name], part) for name in out}

    kinds = {name: jnp.argmax(jnp.zeros(1)).dtype if name == "rank" else wide(x.dtype) for name in names}
    start = {name: jnp.zeros_like(x, shape=x.shape[:1], dtype=kind) for name, kind in kinds.items()}
    found = cut.loop(step, start)
    return tuple(found[name] for name in names)
