"""A head's rows by chunks of the rows: matmuls around the row functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_ops._head.chunks import Cut, Part
from jax_ops._head.judged import How, Judged
from jax_ops._head.linear import Linear, Sums, add_rows, ignored_rows, wide, without
from jax_ops._rows import dispatch as rows
from jax_ops._rows import slices
from jax_ops._rules.plan import Plan


def fwd(of: Judged, how: How) -> slices.State:
    """Each row's numbers by name, m and rest; sharded also the mass of soft targets and e."""
    (x, head, target, weight), (cut, shard, plan) = of, how

    def step(out: slices.State, part: Part) -> slices.State:
        t = cut.take(target, part)
        z = head.logits(without(cut.take(x, part), ignored_rows(t)))
        if shard.names:
            found = slices.of(z, *shard.local(t), weight, names=plan.names, layout=plan.row())
        else:
            found = dict(zip(plan.computed, rows.cross_entropy_fwd(z, t, weight, **plan.wanted()), strict=True))
        return {name: cut.put(out[name], found[name], part) for name in out}

    kind = wide(x.dtype)
    if shard.names:
        start = slices.nothing(x, target, kind, plan.names)
        return slices.numbers(shard.joined(cut.loop(step, start)), target)
    shapes = dict.fromkeys((*plan.names, "m", "rest"), x.shape[:1])
    if "nll" in shapes and not rows.is_soft(target):
        shapes["nll"] = target.shape  # of K classes a row K
    return cut.loop(step, {name: jnp.zeros_like(x, shape=shape, dtype=kind) for name, shape in shapes.items()})


def bwd(of: Judged, whole: Sequence[Any], upstream: Sequence[Array | None], wanted: tuple[bool, ...], how: How) -> Sums:
    """The gradients wanted of x, the head, target and weight by name; `whole` are the rows' m, rest, mass and e."""
    (x, head, target, weight), (cut, shard, plan) = of, how
    weights = 0.0 if upstream[2] is None else shard.weights(weight)

    def step(sums: Sums, part: Part) -> Sums:
        t, m, rest, mass, e = (cut.take(a, part) for a in (target, *whole))
        ups = [cut.take_fresh(a, part) for a in upstream]
        ignored, inside, masses = ignored_rows(t), None, None
        xi = without(cut.take(x, part), ignored)
        z = head.logits(xi)
        if shard.names:
            (t, inside), masses = shard.local(t), (mass, weights, e)
        found = slices.bwd(z, t, inside, weight, m, rest, masses, ups, wanted, plan.row())
        return _added(sums, cut, part, head, xi, ignored, *found)

    return cut.loop(step, of.zeros(wanted))


def fwd_bwd(
    of: Judged, nll: Array | None, smooth: Array | None, square: Array | None, wanted: tuple[bool, ...], how: How
) -> Sums:
    """Of the rows' weighted sum the gradients wanted, and the nll, smooth and lse that have a coefficient."""
    (x, head, target, weight), (cut, shard, plan) = of, how
    weights = 0.0 if smooth is None else shard.weights(weight)

    def step(sums: Sums, part: Part) -> Sums:
        t, (a, s, c) = cut.take(target, part), (cut.take_fresh(v, part) for v in (nll, smooth, square))
        ignored, inside, masses = ignored_rows(t), None, None
        xi = without(cut.take(x, part), ignored)
        z = head.logits(xi)
        found, grads = _visit(z, t, weight, (a, s, c), wanted, how)
        if smooth is not None and ignored is not None:
            found["smooth"] = jnp.where(rows.of_rows(t, 2, 1) == rows.INVALID, jnp.nan, found["smooth"])
        sums = sums | {name: cut.put(sums[name], found[name], part) for name in found if name in sums}
        if grads is None:
            m, rest = shard.own(found["m"], found["rest"])
            # d(c lse^2) = 2 c lse dlse
            ups = [*shard.own(a, None if c is None else 2.0 * c * found["lse"], s), None]
            if shard.names:
                (t, inside), masses = shard.local(t), (found.get("mass"), weights, None)
            grads = slices.bwd(z, t, inside, weight, m, rest, masses, ups, wanted, plan.row())
        return _added(sums, cut, part, head, xi, ignored, *grads)

    sums = of.zeros(wanted)
    if "target" in sums:  # by the factor that all have in common it is multiplied later
        sums["target"] = sums["target"].astype(wide(x.dtype))
    by = {"nll": nll, "smooth": smooth, "lse": square}
    return cut.loop(step, sums | {name: jnp.zeros_like(c) for name, c in by.items() if c is not None})


def _visit(
    z: Array, t: Array, weight: Array | None, by: Sequence[Array | None], wanted: tuple[bool, ...], how: How
) -> tuple[slices.State, tuple[Array, None, None] | None]:
    """The numbers of a chunk's rows, and where one visit of them gives it their gradient (of a sum without lse)."""
    (_, shard, plan), (a, s, c) = how, by
    if shard.names:
        state = shard.joined(slices.of(z, *shard.local(t), weight, names=plan.names, layout=plan.row()))
        return slices.numbers(state, t), None
    if c is None and any(wanted[:4]) and not any(wanted[4:6]):
        dz, *values = rows.cross_entropy_fwd_bwd(z, t, weight, a, None, s, None, **plan.wanted())
        return dict(zip(plan.computed, values, strict=True)), (dz, None, None)
    return dict(zip(plan.computed, rows.cross_entropy_fwd(z, t, weight, **plan.wanted()), strict=True)), None


def largest(x: Array, head: Linear, cut: Cut, plan: Plan) -> tuple[Array, Array]:
    """Each row's largest logit, scaled and capped, and its first class."""

    def step(best: tuple[Array, Array], part: Part) -> tuple[Array, Array]:
        z = rows.capped(head.logits(cut.take(x, part)), plan.scale, plan.softcap)
        return cut.put(best[0], z.max(1), part), cut.put(best[1], z.argmax(1), part)

    kinds = wide(x.dtype), jnp.argmax(jnp.zeros(1)).dtype
    return cut.loop(step, tuple(jnp.zeros_like(x, shape=x.shape[:1], dtype=kind) for kind in kinds))


def _added(
    sums: Sums, cut: Cut, part: Part, head: Linear, x: Array, ignored: Array | None, *found: Array | None
) -> Sums:
    """The gradients with those found of a chunk of the rows, whose inputs are x, added."""
    dz, d_target, d_weight = found
    if d_target is not None:
        sums = sums | {"target": cut.put(sums["target"], d_target, part)}
    if d_weight is not None:
        sums = sums | {"weight": sums["weight"] + d_weight}
    return sums if dz is None else add_rows(sums, cut, part, head, dz, x, ignored)
