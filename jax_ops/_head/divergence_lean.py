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
from jax_ops._parallel.divergence import completed, total
from jax_ops._parallel.shard import Shard
from jax_ops._rows import divergence_slices as slices
from jax_ops._rows.ratios import Pair
from jax_ops._rules.autodiff import selective
from jax_ops._rules.varying import alike


def lean_divergence(
    x: Array,
    w: Array,
    b: Array | None,
    teacher_x: Array,
    teacher_w: Array,
    teacher_b: Array | None,
    keep: Array | None,
    cut: Cut,
    pair: Pair,
    shard: Shard,
) -> Array:
    """The divergence of each row, differentiable by the student's three. Six matmuls, of jsd and tv eight."""
    arrays = shard.own(*alike(shard.wide(x), w, b, teacher_x, teacher_w, teacher_b, keep, but=shard.names))
    return _lean_divergence(cut, pair, shard)(*arrays)


@cache
def _lean_divergence(cut: Cut, pair: Pair, shard: Shard) -> Any:
    """The divergences. Saves its arguments and the rows' states."""

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(*arrays: Any) -> Any:
            value, state = _whole(*arrays, cut=cut, pair=pair, shard=shard)
            return value, (arrays, state)

        def bwd(saved: Any, ct: Any) -> Any:
            arrays, state = saved
            (up,), (known,) = shard.cotangents(ct, like=arrays[0]), shard.own(state)
            sums = _bwd(arrays, known, up, wanted, cut, pair)
            given = zip(("x", "w", "b"), arrays[:3], strict=True)
            return *(sums[name].astype(v.dtype) if name in sums else None for name, v in given), *(None,) * 4

        return fwd, bwd

    return selective(rules)


@partial(jax.custom_jvp, nondiff_argnums=(7, 8, 9))
def _whole(
    x: Any,
    w: Any,
    b: Any,
    teacher_x: Any,
    teacher_w: Any,
    teacher_b: Any,
    keep: Any,
    cut: Cut,
    pair: Pair,
    shard: Shard,
) -> tuple[Array, Array]:
    """(the divergence of each row, its state)."""
    arrays = (x, w, b, teacher_x, teacher_w, teacher_b, keep)

    def step(state: slices.State, part: Part) -> slices.State:
        return slices.merge(state, slices.of(*_both(cut, part, arrays), keep, pair), pair)

    def sums(known: Array) -> Array:
        def step(so_far: Array, part: Part) -> Array:
            return so_far + slices.sums(*_both(cut, part, arrays), keep, known, pair)

        return cut.loop(step, jnp.zeros_like(known, shape=(*known.shape[:-1], 3)))

    kind = wide(jnp.promote_types(w.dtype, teacher_x.dtype))
    state = cut.loop(step, slices.nothing(x, kind, pair))
    return completed(state, keep, pair, shard, sums)


@_whole.defjvp
def _whole_jvp(cut: Cut, pair: Pair, shard: Shard, primals: Any, moved: Any) -> Any:
    out = _whole(*primals, cut=cut, pair=pair, shard=shard)
    (known,), keep = shard.own(out[1]), primals[6]

    def step(so_far: Any, part: Part) -> Any:
        s, along, t = jax.jvp(lambda *own: _both(cut, part, (*own, *primals[3:])), primals[:3], moved[:3], has_aux=True)
        return tuple(map(jnp.add, so_far, slices.pushed(s, t, keep, known, along, pair)))

    none = jnp.zeros_like(known, shape=known.shape[:-1])
    found = cut.loop(step, (none,) * (4 if pair.kind == "jsd" else 2))
    return out, slices.tangents(out[1], total(shard)(*found), pair)


def _bwd(arrays: Any, state: Array, up: Array, wanted: tuple[bool, ...], cut: Cut, pair: Pair) -> Sums:
    """The gradients wanted of the student's three; the weight's is written slice by slice, in its own type."""
    x, w, b, *_, keep = arrays
    judged = without(x.astype(w.dtype), _gone(keep))

    def step(sums: Sums, part: Part) -> Sums:
        s, t = _both(cut, part, arrays)
        dz = slices.part_bwd_over(s, t, keep, state, up, pair=pair).astype(wide(w.dtype))
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
    return sums | {"x": without(sums["x"], _gone(keep))} if "x" in sums else sums


def _both(cut: Cut, part: Part, arrays: Any) -> tuple[Array, Array]:
    """A slice of both heads' logits, in one type."""
    x, w, b, *teacher, keep = arrays
    kind = wide(jnp.promote_types(w.dtype, teacher[0].dtype))
    return _logits(cut, part, keep, kind, x.astype(w.dtype), w, b), _logits(cut, part, keep, kind, *teacher)


def _logits(cut: Cut, part: Part, keep: Array | None, kind: Any, x: Array, w: Array, b: Array | None) -> Array:
    """A slice of a head's logits; -inf for classes that another slice has."""
    return Linear(w, b).part(cut, part).logits(without(x, _gone(keep)), cut.fresh(part)).astype(kind)


def _gone(keep: Array | None) -> Array | None:
    return None if keep is None else ~keep
