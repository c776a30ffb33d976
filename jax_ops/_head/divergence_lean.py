"""The divergence between two heads' rows by slices of the classes: nothing but row numbers outlives a slice.

legend and gradients as in `divergence.py`; jsd and tv read their slices twice, for the rows' numbers and for their sums
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._head.chunks import Cut, Part
from jax_ops._head.linear import Linear, Sums, weight_bwd, wide, without
from jax_ops._head.two_heads import Heads
from jax_ops._parallel.divergence import completed, total
from jax_ops._parallel.shard import Shard
from jax_ops._rows import divergence_slices as slices
from jax_ops._rows.ratios import Pair
from jax_ops._rules.autodiff import selective


def lean_divergence(of: Heads, cut: Cut, pair: Pair, shard: Shard) -> Array:
    """The divergence of each row, differentiable by the student's three. Six matmuls, of jsd and tv eight."""
    return _lean_divergence(cut, pair, shard)(*of.own(shard))


@cache
def _lean_divergence(cut: Cut, pair: Pair, shard: Shard) -> Any:
    """The divergences. Saves its arguments and the rows' states."""

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(*arrays: Any) -> Any:
            value, state = _whole(Heads(*arrays), cut, pair, shard)
            return value, (Heads(*arrays), state)

        def bwd(saved: tuple[Heads, Array], ct: Any) -> Any:
            of, state = saved
            (up,), (known,) = shard.cotangents(ct, like=of.x), shard.own(state)
            sums = _bwd(of, known, up, wanted, cut, pair)
            given: Any = zip(("x", "w", "b"), of[:3], strict=True)
            return *(sums[name].astype(v.dtype) if name in sums else None for name, v in given), *(None,) * 4

        return fwd, bwd

    return selective(rules)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _whole(of: Heads, cut: Cut, pair: Pair, shard: Shard) -> tuple[Array, Array]:
    """(the divergence of each row, its state)."""

    def step(state: slices.State, part: Part) -> slices.State:
        return slices.merge(state, slices.of(*_both(cut, part, of), of.keep, pair), pair)

    def sums(known: Array) -> Array:
        def step(so_far: Array, part: Part) -> Array:
            return so_far + slices.sums(*_both(cut, part, of), of.keep, known, pair)

        return cut.loop(step, jnp.zeros_like(known, shape=(*known.shape[:-1], 3)))

    state = cut.loop(step, slices.nothing(of.x, of.kind, pair))
    return completed(state, of.keep, pair, shard, sums)


@_whole.defjvp
def _whole_jvp(cut: Cut, pair: Pair, shard: Shard, primals: Any, moved: Any) -> Any:
    (of,), (along,) = primals, moved
    out = _whole(of, cut, pair, shard)
    (known,) = shard.own(out[1])

    def step(so_far: Any, part: Part) -> Any:
        student = lambda *own: _both(cut, part, Heads(*own, *of[3:]))  # noqa: E731
        s, ds, t = jax.jvp(student, of[:3], along[:3], has_aux=True)
        return tuple(map(jnp.add, so_far, slices.pushed(s, t, of.keep, known, ds, pair)))

    none = jnp.zeros_like(known, shape=known.shape[:-1])
    found = cut.loop(step, (none,) * (4 if pair.kind == "jsd" else 2))
    return out, slices.tangents(out[1], total(shard)(*found), pair)


def _bwd(of: Heads, state: Array, up: Array, wanted: tuple[bool, ...], cut: Cut, pair: Pair) -> Sums:
    """The gradients wanted of the student's three; the weight's is written slice by slice, in its own type."""
    student: Any = of[:3]
    x, w, b = student
    judged = without(x.astype(w.dtype), of.gone)

    def step(sums: Sums, part: Part) -> Sums:
        s, t = _both(cut, part, of)
        dz = slices.part_bwd_over(s, t, of.keep, state, up, pair=pair).astype(wide(w.dtype))
        layer = Linear(w, b).part(cut, part)
        if "x" in sums:
            sums = sums | {"x": sums["x"] + layer.input_bwd(dz)}
        if "w" in sums:
            none = jnp.zeros_like(layer.weight, dtype=wide(w.dtype))
            sums = sums | {"w": cut.put(sums["w"], weight_bwd(none, dz, judged, 0), part)}
        if "b" in sums:
            sums = sums | {"b": cut.put(sums["b"], dz.sum(0), part)}
        return sums

    sums = {"x": jnp.zeros_like(x, dtype=wide(x.dtype))} if wanted[0] else {}
    sums |= {name: jnp.zeros_like(v) for name, v, on in (("w", w, wanted[1]), ("b", b, wanted[2])) if on}
    sums = cut.loop(step, sums)
    return sums | {"x": without(sums["x"], of.gone)} if "x" in sums else sums


def _both(cut: Cut, part: Part, of: Heads) -> tuple[Array, Array]:
    """A slice of both heads' logits, in one type; -inf for classes that another slice has."""

    def logits(x: Array, w: Array, b: Array | None) -> Array:
        return Linear(w, b).part(cut, part).logits(without(x, of.gone), cut.fresh(part)).astype(of.kind)

    return logits(of.x.astype(of.w.dtype), *of[1:3]), logits(*of[3:6])
