"""Statistics of a head's rows that its loss has no use for, by chunks of rows, every derivative likewise."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jax_ops._head.chunks import Part
from jax_ops._head.judged import How
from jax_ops._head.linear import Linear, ignored_rows, wide, without
from jax_ops._parallel.statistics import statistics_of
from jax_ops._rows.dispatch import is_soft
from jax_ops._rules.varying import alike


def head_statistics(
    x: Array,
    w: Array,
    b: Array | None,
    up: Array | None,
    target: Array,
    names: Sequence[str],
    how: How,
) -> tuple[Array, ...]:
    """Those named of each row, in their order; their logits are formed once more."""
    cut, shard, plan = how
    x, w, b, up, target = shard.own(*alike(shard.wide(x), w, b, up, target, but=shard.names))
    # In the type that gradients are summed in over chunks; of half-precision numbers the same products.
    kind = wide(x.dtype)
    x, head = (
        x.astype(w.dtype).astype(kind),
        Linear(w.astype(kind), *(a if a is None else a.astype(kind) for a in (b, up))),
    )

    def step(out: dict[str, Array], part: Part) -> dict[str, Array]:
        t = cut.take(target, part)
        z = head.logits(without(cut.take(x, part), ignored_rows(t)))
        found = statistics_of(names, z, t, 1, plan, shard)
        return {name: cut.put(out[name], found[name], part) for name in out}

    kinds = {name: jnp.argmax(jnp.zeros(1)).dtype if name == "rank" else kind for name in names}
    shapes = {name: target.shape if name == "rank" and not is_soft(target) else x.shape[:1] for name in names}
    start = {name: jnp.zeros_like(x, shape=shapes[name], dtype=one) for name, one in kinds.items()}
    found = cut.loop(step, start)
    return tuple(found[name] for name in names)
