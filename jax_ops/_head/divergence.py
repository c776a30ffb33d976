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
from jax_ops._head.two_heads import Heads
from jax_ops._parallel.divergence import whole
from jax_ops._parallel.shard import Shard
from jax_ops._rows.divergence import STATE, divergence_bwd_over, divergence_fwd, divergence_fwd_bwd
from jax_ops._rows.divergence_slices import part_bwd_over
from jax_ops._rows.ratios import Pair
from jax_ops._rules.autodiff import selective
from jax_ops._rules.varying import varying, varying_as

_STUDENT = ("x", "w", "b")


def divergence_rows(of: Heads, cut: Cut, pair: Pair, shard: Shard) -> Array:
    """The divergence of each row, differentiable by the student's three. Six matmuls with first derivatives."""
    return _divergence_rows(cut, pair, shard)(*of.own(shard))


def divergence_sum(of: Heads, a: Array, cut: Cut, pair: Pair, shard: Shard) -> Array:
    """sum_i a_i divergence_i, the gradients formed chunk by chunk on the way. Four matmuls."""
    arrays = of.own(shard, a)
    dtypes = tuple(None if v is None else str(v.dtype) for v in (*arrays[:3], arrays[7]))
    return _divergence_sum(cut, pair, shard, dtypes)(*arrays)


@cache
def _divergence_rows(cut: Cut, pair: Pair, shard: Shard) -> Any:
    """The divergences. Saves its arguments and the rows' states."""

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(*arrays: Any) -> Any:
            of = Heads(*arrays)

            def step(out: tuple[Array, Array], part: Part) -> tuple[Array, Array]:
                _, *row = _chunk(cut, part, of)
                value, state = _visited(*row, pair=pair, shard=shard)
                return cut.put(out[0], value, part), cut.put(out[1], state, part)

            n = of.x.shape[0]
            start = _blank(of, (n,), of.kind, shard), _blank(of, (n, STATE), of.kind, shard)
            value, state = cut.loop(step, start)
            return value, (of, state)

        def bwd(saved: tuple[Heads, Array], ct: Any) -> Any:
            of, state = saved
            (up,), (own,) = shard.cotangents(ct, like=of.x), shard.own(state)

            def step(sums: Sums, part: Part) -> Sums:
                xi, *row = _chunk(cut, part, of)
                (s, t, some), known = row, cut.take(own, part)
                dz = _bwd(s, t, some, known, cut.take_fresh(up, part), pair, shard)
                return _added(sums, cut, part, Linear(*of[1:3]), dz, xi, some)

            sums = cut.loop(step, _zeros(wanted, *of[:3]))
            given: Any = zip(_STUDENT, of[:3], strict=True)
            return *(sums[name].astype(v.dtype) if name in sums else None for name, v in given), *(None,) * 4

        return fwd, bwd

    return selective(rules)


@cache
def _divergence_sum(cut: Cut, pair: Pair, shard: Shard, dtypes: tuple[str | None, ...]) -> Any:
    """The sum. Saves its gradients, those wanted, and each row's divergence."""

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(*given: Any) -> Any:
            of, a = Heads(*given[:7]), given[7]

            def step(sums: Sums, part: Part) -> Sums:
                xi, s, t, some = _chunk(cut, part, of)
                (up,), dz = shard.own(cut.take_fresh(a, part)), None
                if any(wanted[:3]) and not shard.names:
                    dz, value = divergence_fwd_bwd(s, t, some, up, pair=pair)
                else:
                    value, state = _visited(s, t, some, pair, shard)
                    if any(wanted[:3]):
                        (state,) = shard.own(state)
                        dz = _bwd(s, t, some, state, up, pair, shard)
                sums = sums | {"a": cut.put(sums["a"], value, part)}
                return sums if dz is None else _added(sums, cut, part, Linear(*of[1:3]), dz, xi, some)

            sums = cut.loop(step, _zeros(wanted, *of[:3]) | {"a": _blank(of, a.shape, a.dtype, shard)})
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


def _chunk(cut: Cut, part: Part, of: Heads) -> tuple[Any, ...]:
    """(the student's rows, its logits, the teacher's, keep) of a chunk."""
    keep = cut.take(of.keep, part)
    xi, yi = (without(cut.take(v, part), _ignored(keep)) for v in (of.x.astype(of.w.dtype), of.teacher_x))
    s, t = Linear(of.w, of.b).logits(xi), Linear(of.teacher_w, of.teacher_b).logits(yi)
    return xi, s.astype(of.kind), t.astype(of.kind), keep


def _visited(s: Array, t: Array, keep: Array | None, pair: Pair, shard: Shard) -> tuple[Array, Array]:
    """(the divergences of a chunk's rows, their states)."""
    return whole(s, t, keep, pair, shard) if shard.names else divergence_fwd(s, t, keep, pair=pair)


def _bwd(s: Array, t: Array, keep: Array | None, state: Array, up: Array, pair: Pair, shard: Shard) -> Array:
    """dL/ds of a chunk, over s."""
    bwd = part_bwd_over if shard.names else divergence_bwd_over
    return bwd(s, t, keep, state, up, pair=pair)


def _ignored(keep: Array | None) -> Array | None:
    return None if keep is None else ~keep


def _blank(of: Heads, shape: tuple[int, ...], kind: Any, shard: Shard) -> Array:
    """Zeros for numbers of the whole rows, which are the same on all devices where the rows' own are."""
    axes = varying(of.x) - set(shard.names)
    return varying_as(jnp.zeros(shape, kind), axes if of.keep is None else axes | varying(of.keep))


def _zeros(wanted: tuple[bool, ...], x: Array, w: Array, b: Array | None) -> Sums:
    sums = {"x": jnp.zeros_like(x, dtype=wide(x.dtype))} if wanted[0] else {}
    return sums | Linear(w, b).gradient(*wanted[1:3], up=False)


def _added(sums: Sums, cut: Cut, part: Part, head: Linear, dz: Array, x: Array, keep: Array | None) -> Sums:
    """The gradients with those of a chunk of the rows, whose inputs are x, added."""
    return add_rows(sums, cut, part, head, dz.astype(wide(head.weight.dtype)), x, _ignored(keep))
