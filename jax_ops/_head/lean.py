"""A head's rows by slices of the classes, all rows at once: nothing but row numbers outlives a slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_ops._head.chunks import Cut, Part
from jax_ops._head.judged import How, Judged
from jax_ops._head.linear import Linear, Sums, wide, without
from jax_ops._rows import dispatch as rows
from jax_ops._rows import slices
from jax_ops._rules.plan import Plan


def fwd(of: Judged, how: How) -> slices.State:
    """Each row's numbers by name, m and rest, the mass of soft targets and e."""
    (cut, shard, plan), target = how, of.target
    x = without(of.x, of.ignored)

    def step(state: slices.State, part: Part) -> slices.State:
        z, t, inside, w = _slice(x, of.head.part(cut, part), of, how, part)
        return slices.merge(state, slices.of(z, t, inside, w, names=plan.names, layout=plan.row()))

    start = slices.nothing(x, target, wide(x.dtype), plan.names)
    return slices.numbers(shard.joined(cut.loop(step, start)), target)


def bwd(of: Judged, whole: Sequence[Any], upstream: Sequence[Array | None], wanted: tuple[bool, ...], how: How) -> Sums:
    """The gradients wanted of x, the head, target and weight by name; `whole` are the rows' m, rest, mass and e."""
    (cut, shard, plan), (m, rest, mass, e) = how, whole
    masses = (mass, 0.0 if upstream[2] is None else shard.weights(of.weight), e)
    judged = without(of.x, of.ignored)

    def step(sums: Sums, part: Part) -> Sums:
        layer = of.head.part(cut, part)
        z, t, inside, w = _slice(judged, layer, of, how, part)
        dz, *found = slices.bwd(z, t, inside, w, m, rest, masses, upstream, wanted, plan.row())
        for name, value, axis in zip(("target", "weight"), found, (1, 0), strict=True):
            if value is not None:
                sums = sums | {name: cut.put(sums[name], value, part, axis)}
        if dz is None:
            return sums
        if "x" in sums:
            sums = sums | {"x": sums["x"] + layer.input_bwd(dz)}
        return of.head.add(sums, dz, judged, cut.start(part))

    sums = cut.loop(step, of.zeros(wanted))
    return sums | {"x": without(sums["x"], of.ignored)} if "x" in sums else sums


def largest(x: Array, head: Linear, cut: Cut, plan: Plan) -> tuple[Array, Array]:
    """Each row's largest logit, scaled and capped, and its first class."""

    def step(best: tuple[Array, Array], part: Part) -> tuple[Array, Array]:
        z = rows.capped(head.part(cut, part).logits(x, cut.fresh(part)), plan.scale, plan.softcap)
        top, at = z.max(1), z.argmax(1)
        better = (top > best[0]) | (jnp.isnan(top) & ~jnp.isnan(best[0]))
        return jnp.where(better, top, best[0]), jnp.where(better, at + cut.start(part), best[1])

    kind = jnp.argmax(jnp.zeros(1)).dtype
    lowest = jnp.full_like(x, -jnp.inf, shape=x.shape[:1], dtype=wide(x.dtype))
    return cut.loop(step, (lowest, jnp.zeros_like(x, shape=x.shape[:1], dtype=kind)))


def _slice(x: Array, layer: Linear, of: Judged, how: How, part: Part) -> tuple[Array, Array, Any, Array | None]:
    """A slice of the logits, its targets, of class indices which no slice before has and are in it, and its weights.

    Logits are -inf for classes that another slice has, so that they take no part.
    """
    (cut, shard, plan), target, weight = how, of.target, of.weight
    fresh, soft = cut.fresh(part), rows.is_soft(target)
    z, w = layer.logits(x, fresh), cut.take_fresh(weight, part)
    if fresh is not None and weight is None and (soft or "smooth" in plan.names):
        w = fresh.astype(wide(x.dtype))
    if soft:
        return z, cut.take(target, part, 1), None, w
    t, inside = shard.local(target, cut.start(part), cut.each)
    if fresh is not None:
        inside = inside & (target >= shard.first(target.dtype) + part * cut.each)
    return z, t, inside, w
