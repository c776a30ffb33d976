"""Rows that reach no result: their logits keep their values, and where they are differentiated are 0.

Of -inf or NaN in such a row comes NaN, even times 0, in every derivative; in values it is left out at the end. A
primitive of its own: a custom_jvp has as many results as its function, which asks for nothing of the rows, and logits
that many targets share would have to be as many as the targets in every value, for the sake of a derivative.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_ops._lowering import as_typed
from jax_ops._rows.classes import IGNORED, is_soft, of_rows


def alive(axis: int, z: Array, dead: Array, weight: Array | None, *others: Array) -> Array:
    """z. Where it, class weights or `others` are differentiated, 0 in dead rows. Linear in z, of `others` no function.

    Logits or rows of them. What many targets share is dead where it is for all of them: a gradient of it is their sum.
    """
    given = others if weight is None else (weight, *others)
    return _alive.bind(z, dead, *given, axis=axis, weighted=weight is not None)


def alive_rows(
    axis: int, target: Array, weight: Array | None, logits: Array, m: Array, rest: Array, *linear: Array
) -> tuple[Any, ...]:
    """Logits, m, rest and what is `linear` in a row function, alive but for ignored rows whichever is differentiated.

    But for a `linear` one: a linear function is transposed without anything being differentiated.
    """
    row = (logits, m, rest)
    if is_soft(target):
        return (*row, *linear)
    ignored = of_rows(target, logits.ndim, axis) == IGNORED
    return tuple(alive(axis, a, ignored, weight, *row) for a in (*row, *linear))


_alive = Primitive("softmax_ext_alive")


def _without(z: Array, dead: Array, axis: int) -> Array:
    return jnp.where(dead if z.ndim == dead.ndim else jnp.expand_dims(dead, axis), jnp.zeros((), z.dtype), z)


def _jvp(primals: Any, tangents: Any, *, axis: int, weighted: bool) -> Any:
    (z, dead, *_), dz = primals, tangents[0]
    out = _without(z, dead, axis)
    if type(dz) is ad.Zero:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, _without(dz, dead, axis)


def _transpose(ct: Any, z: Any, dead: Any, *others: Any, axis: int, weighted: bool) -> list[Any]:
    return [_without(ad.instantiate_zeros(ct), dead, axis), None, *[None] * len(others)]


def _batch(mapping: Any, arrays: Any, dims: Any, *, axis: int, weighted: bool) -> Any:
    (z, dead, *others), how = arrays, {"axis": axis, "weighted": weighted}
    # A weight's gradient is each example's own: there a row that is dead for it must not reach it.
    own = weighted and dims[1] is not None and dims[2] is not None
    if dims[0] is None and not own:
        shared = dead if dims[1] is None else dead.all(dims[1])
        return _alive.bind(z, shared, *others, **how), None
    z, dead = (
        batching.bdim_at_front(a, d, mapping.size, mapping.explicit_mesh_axis)
        for a, d in zip((z, dead), dims, strict=False)
    )
    return _alive.bind(z, dead, *others, axis=axis + 1, weighted=weighted), 0


_alive.def_impl(lambda z, *_, **__: z)
_alive.def_abstract_eval(lambda z, *_, **__: z)
ad.primitive_jvps[_alive] = as_typed(_jvp)
ad.primitive_transposes[_alive] = as_typed(_transpose)
batching.fancy_primitive_batchers[_alive] = as_typed(_batch)
mlir.register_lowering(_alive, lambda ctx, z, *_, **__: [z])
