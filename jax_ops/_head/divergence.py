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
from jax_ops._rows.divergence import Pair, divergence_bwd, divergence_fwd
from jax_ops._rules.autodiff import selective
from jax_ops._rules.varying import alike

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
) -> Array:
    """The divergence of each row, differentiable by the student's three. Six matmuls with first derivatives."""
    return _divergence_rows(cut, pair)(*alike(x, w, b, teacher_x, teacher_w, teacher_b, keep))


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
) -> Array:
    """sum_i a_i divergence_i, the gradients formed chunk by chunk on the way. Four matmuls."""
    arrays = alike(x, w, b, teacher_x, teacher_w, teacher_b, keep, a)
    dtypes = tuple(None if v is None else str(v.dtype) for v in (*arrays[:3], a))
    return _divergence_sum(cut, pair, dtypes)(*arrays)


@cache
def _divergence_rows(cut: Cut, pair: Pair) -> Any:
    """The divergences. Saves its arguments."""

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(*arrays: Any) -> Any:
            def step(out: Array, part: Part) -> Array:
                _, *row = _chunk(cut, part, *arrays)
                return cut.put(out, divergence_fwd(*row, pair=pair)[0], part)

            x, teacher_x = arrays[0], arrays[3]
            kind = wide(jnp.promote_types(x.dtype, teacher_x.dtype))
            return cut.loop(step, jnp.zeros_like(x, shape=x.shape[:1], dtype=kind)), arrays

        def bwd(arrays: Any, ct: Any) -> Any:
            def step(sums: Sums, part: Part) -> Sums:
                xi, *row = _chunk(cut, part, *arrays)
                state = divergence_fwd(*row, pair=pair)[1]
                return _added(sums, cut, part, arrays, xi, row, state, cut.take_fresh(ct, part), pair)

            sums = cut.loop(step, _zeros(wanted, *arrays[:3]))
            given = zip(_STUDENT, arrays[:3], strict=True)
            return *(sums[name].astype(v.dtype) if name in sums else None for name, v in given), *(None,) * 4

        return fwd, bwd

    return selective(rules)


@cache
def _divergence_sum(cut: Cut, pair: Pair, dtypes: tuple[str | None, ...]) -> Any:
    """The sum. Saves its gradients, those wanted, and each row's divergence."""

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(*given: Any) -> Any:
            *arrays, a = given

            def step(sums: Sums, part: Part) -> Sums:
                xi, *row = _chunk(cut, part, *arrays)
                value, state = divergence_fwd(*row, pair=pair)
                sums = sums | {"a": cut.put(sums["a"], value, part)}
                if not any(wanted[:3]):
                    return sums
                return _added(sums, cut, part, arrays, xi, row, state, cut.take_fresh(a, part), pair)

            sums = cut.loop(step, _zeros(wanted, *arrays[:3]) | {"a": jnp.zeros_like(a)})
            return (a * sums["a"]).sum(), sums

        def bwd(sums: Any, ct: Any) -> Any:
            found = zip((*_STUDENT, "a"), (*wanted[:3], wanted[7]), dtypes, strict=True)
            x, w, b, a = ((ct * sums[name]).astype(dtype) if on else None for name, on, dtype in found)
            return x, w, b, None, None, None, None, a

        return fwd, bwd

    return selective(rules)


def _chunk(
    cut: Cut, part: Part, x: Any, w: Any, b: Any, teacher_x: Any, teacher_w: Any, teacher_b: Any, keep: Any
) -> tuple[Any, ...]:
    """(the student's rows, its logits, the teacher's, keep) of a chunk."""
    keep = cut.take(keep, part)
    xi, yi = (without(cut.take(v, part), _ignored(keep)) for v in (x, teacher_x))
    s, t = Linear(w, b).logits(xi), Linear(teacher_w, teacher_b).logits(yi)
    kind = jnp.promote_types(s.dtype, t.dtype)
    return xi, s.astype(kind), t.astype(kind), keep


def _ignored(keep: Array | None) -> Array | None:
    return None if keep is None else ~keep


def _zeros(wanted: tuple[bool, ...], x: Array, w: Array, b: Array | None) -> Sums:
    sums = {"x": jnp.zeros_like(x, dtype=wide(x.dtype))} if wanted[0] else {}
    return sums | Linear(w, b).gradient(*wanted[1:3], up=False)


def _added(
    sums: Sums, cut: Cut, part: Part, arrays: Any, xi: Array, row: Any, state: Array, up: Array, pair: Pair
) -> Sums:
    """The gradients with those of a chunk of the rows added; `row` are both logits and keep."""
    x, w, b = arrays[:3]
    s, t, keep = row
    dz = divergence_bwd(s, t, keep, state, up, pair=pair).astype(wide(x.dtype))
    return add_rows(sums, cut, part, Linear(w, b), dz, xi, _ignored(keep))
