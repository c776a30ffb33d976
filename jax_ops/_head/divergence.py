"""Two linear heads and the divergence between their rows, by chunks of rows: no array of all logits of either.

legend:  s = X WT + b, t = Y UT + c (N, V), never whole; G = dL/ds from the row functions, a the rows' upstream
formula: dX = G W,  dW = GT X,  db = sum_i G_i; the teacher's Y, U, c are constants
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_ops._head.chunks import Cut, Part
from jax_ops._head.linear import Linear, Sums, add_rows, wide, without
from jax_ops._parallel.divergence import whole
from jax_ops._parallel.shard import Shard
from jax_ops._rows.divergence import STATE, divergence_bwd_over, divergence_fwd, divergence_fwd_bwd
from jax_ops._rows.divergence_slices import part_bwd_over
from jax_ops._rows.ratios import Pair
from jax_ops._rules.autodiff import selective
from jax_ops._rules.varying import alike, varying, varying_as

_STUDENT = ("x", "w", "b")


def divergence_rows(
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
    """The divergence of each row, differentiable by the student's three. Six matmuls with first derivatives."""
    arrays = shard.own(*alike(shard.wide(x), w, b, teacher_x, teacher_w, teacher_b, keep, but=shard.names))
    return _divergence_rows(cut, pair, shard)(*arrays)


def divergence_sum(
    x: Array,
    w: Array,
    b: Array | None,
    teacher_x: Array,
    teacher_w: Array,
    teacher_b: Array | None,
    keep: Array | None,
    a: Array,
    cut: Cut,
    pair: Pair,
    shard: Shard,
) -> Array:
    """sum_i a_i divergence_i, the gradients formed chunk by chunk on the way. Four matmuls."""
    *heads, a = alike(shard.wide(x), w, b, teacher_x, teacher_w, teacher_b, keep, a, but=shard.names)
    arrays = shard.own(*heads)
    dtypes = tuple(None if v is None else str(v.dtype) for v in (*arrays[:3], a))
    return _divergence_sum(cut, pair, shard, dtypes)(*arrays, a)


@cache
def _divergence_rows(cut: Cut, pair: Pair, shard: Shard) -> Any:
    """The divergences. Saves its arguments and the rows' states."""

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(*arrays: Any) -> Any:
            def step(out: tuple[Array, Array], part: Part) -> tuple[Array, Array]:
                _, *row = _chunk(cut, part, *arrays)
                value, state = _visited(*row, pair=pair, shard=shard)
                return cut.put(out[0], value, part), cut.put(out[1], state, part)

            kind = wide(jnp.promote_types(arrays[1].dtype, arrays[3].dtype))
            n = arrays[0].shape[0]
            start = _blank(arrays, (n,), kind, shard), _blank(arrays, (n, STATE), kind, shard)
            value, state = cut.loop(step, start)
            return value, (arrays, state)

        def bwd(saved: Any, ct: Any) -> Any:
            arrays, state = saved
            (up,), (own,) = shard.cotangents(ct, like=arrays[0]), shard.own(state)

            def step(sums: Sums, part: Part) -> Sums:
                xi, *row = _chunk(cut, part, *arrays)
                (s, t, some), known = row, cut.take(own, part)
                dz = _bwd(s, t, some, known, cut.take_fresh(up, part), pair, shard)
                return _added(sums, cut, part, Linear(*arrays[1:3]), dz, xi, some)

            sums = cut.loop(step, _zeros(wanted, *arrays[:3]))
            given = zip(_STUDENT, arrays[:3], strict=True)
            return *(sums[name].astype(v.dtype) if name in sums else None for name, v in given), *(None,) * 4

        return fwd, bwd

    return selective(rules)


@cache
def _divergence_sum(cut: Cut, pair: Pair, shard: Shard, dtypes: tuple[str | None, ...]) -> Any:
    """The sum. Saves its gradients, those wanted, and each row's divergence."""

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(*given: Any) -> Any:
            *arrays, a = given

            def step(sums: Sums, part: Part) -> Sums:
                xi, s, t, some = _chunk(cut, part, *arrays)
                (up,), dz = shard.own(cut.take_fresh(a, part)), None
                if any(wanted[:3]) and not shard.names:
                    dz, value = divergence_fwd_bwd(s, t, some, up, pair=pair)
                else:
                    value, state = _visited(s, t, some, pair, shard)
                    if any(wanted[:3]):
                        (state,) = shard.own(state)
                        dz = _bwd(s, t, some, state, up, pair, shard)
                sums = sums | {"a": cut.put(sums["a"], value, part)}
                return sums if dz is None else _added(sums, cut, part, Linear(*arrays[1:3]), dz, xi, some)

            sums = cut.loop(step, _zeros(wanted, *arrays[:3]) | {"a": _blank(arrays, a.shape, a.dtype, shard)})
            return (a * sums["a"]).sum(), sums

        def bwd(sums: Any, ct: Any) -> Any:
            own = [name for name in _STUDENT if name in sums]
            # Of a coefficient every device has the row's whole number, and so what its own cotangent makes of it.
            (here,) = shard.cotangents(ct, like=sums[own[0]]) if own else (None,)
            found = zip((*_STUDENT, "a"), (*wanted[:3], wanted[7]), dtypes, strict=True)
            x, w, b, a = (
                ((here if name in own else ct) * sums[name]).astype(dtype) if on else None for name, on, dtype in found
            )
            return x, w, b, None, None, None, None, a

        return fwd, bwd

    return selective(rules)


def _chunk(
    cut: Cut, part: Part, x: Any, w: Any, b: Any, teacher_x: Any, teacher_w: Any, teacher_b: Any, keep: Any
) -> tuple[Any, ...]:
    """(the student's rows, its logits, the teacher's, keep) of a chunk."""
    keep = cut.take(keep, part)
    xi, yi = (without(cut.take(v, part), _ignored(keep)) for v in (x.astype(w.dtype), teacher_x))
    s, t = Linear(w, b).logits(xi), Linear(teacher_w, teacher_b).logits(yi)
    kind = jnp.promote_types(s.dtype, t.dtype)
    return xi, s.astype(kind), t.astype(kind), keep


def _visited(s: Array, t: Array, keep: Array | None, pair: Pair, shard: Shard) -> tuple[Array, Array]:
    """(the divergences of a chunk's rows, their states)."""
    return whole(s, t, keep, pair, shard) if shard.names else divergence_fwd(s, t, keep, pair=pair)


def _bwd(s: Array, t: Array, keep: Array | None, state: Array, up: Array, pair: Pair, shard: Shard) -> Array:
    """dL/ds of a chunk, over s."""
    bwd = part_bwd_over if shard.names else divergence_bwd_over
    return bwd(s, t, keep, state, up, pair=pair)


def _ignored(keep: Array | None) -> Array | None:
    return None if keep is None else ~keep


def _blank(arrays: Any, shape: tuple[int, ...], kind: Any, shard: Shard) -> Array:
    """Zeros for numbers of the whole rows, which are the same on all devices where the rows' own are."""
    x, *_, keep = arrays
    axes = varying(x) - set(shard.names)
    return varying_as(jnp.zeros(shape, kind), axes if keep is None else axes | varying(keep))


def _zeros(wanted: tuple[bool, ...], x: Array, w: Array, b: Array | None) -> Sums:
    sums = {"x": jnp.zeros_like(x, dtype=wide(x.dtype))} if wanted[0] else {}
    return sums | Linear(w, b).gradient(*wanted[1:3], up=False)


def _added(sums: Sums, cut: Cut, part: Part, head: Linear, dz: Array, x: Array, keep: Array | None) -> Sums:
    """The gradients with those of a chunk of the rows, whose inputs are x, added."""
    return add_rows(sums, cut, part, head, dz.astype(wide(head.weight.dtype)), x, _ignored(keep))
