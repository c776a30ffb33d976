"""The linear layer of a chunk: its logits, and what a chunk's dlogits add to the gradients.

Matmuls of half-precision operands accumulate, and come out, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jax_ops._autodiff import analytic
from jax_ops._chunks import Cut, Part, cut

Sums = dict[str, Array]

_TILE = 2**22  # bytes of a piece of the weight's gradient, and of its dlogits: less is slower, more is temp memory


def wide(dtype: Any) -> Any:
    """The type a chunk's logits have and gradients accumulate in."""
    return jnp.promote_types(dtype, jnp.float32)


def logits(x: Array, w: Array, b: Array | None) -> Array:
    """x wT + b."""
    z = _dot(x, w, 1, 1)
    return z if b is None else _biased(z, b.astype(z.dtype))


def zeros(wanted: Sequence[bool], x: Array, w: Array, b: Array | None) -> Sums:
    """Accumulators of the gradients wanted of (x, w, b)."""
    arrays = zip("xwb", (x, w, b), wanted, strict=True)
    return {name: jnp.zeros_like(a, dtype=wide(a.dtype)) for name, a, on in arrays if a is not None and on}


def add(sums: Sums, rows: Cut, part: Part, dz: Array, x: Array, w: Array, kept: Array | None) -> Sums:
    """The gradients with those of a chunk of the rows, whose inputs are x, added.

    dX = dz W,  dW = dzT X,  db = sum_i dz_i. Rows not `kept` hold zeros in x and dz, but W may not be finite.
    """
    sums = dict(sums)
    if "x" in sums:
        sums["x"] = rows.put(sums["x"], _kept(input_bwd(dz, w), kept), part)
    if "w" in sums:
        sums["w"] = weight_bwd(sums["w"], dz, x, 0)
    if "b" in sums:
        sums["b"] = sums["b"] + dz.sum(0)
    return sums


def kept_rows(x: Array, kept: Array | None) -> Array:
    """x with 0 in the rows that reach no result: a NaN there would, by 0 * NaN."""
    return _kept(x, kept)


def input_bwd(dz: Array, w: Array) -> Array:
    """dz W."""
    return _dot(dz.astype(w.dtype), w, 1, 0)


def weight_bwd(total: Array, dz: Array, x: Array, start: Part) -> Array:
    """`total` of all classes plus dzT x of those from `start` on."""
    # With a rule of its own: that of its loop would add up dz's cotangent with zeros around each piece.
    return _weight(total, dz, x, jnp.asarray(start))


def _kept(x: Array, kept: Array | None) -> Array:
    return x if kept is None else jnp.where(kept[:, None], x, jnp.zeros((), x.dtype))


def _dot(a: Array, b: Array, i: int, j: int) -> Array:
    return lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=wide(a.dtype))


def _biased_fwd(z: Array, b: Array) -> Any:
    # In pieces of few rows, each written over the one it came from: XLA's CPU backend (jaxlib 0.10.2) otherwise
    # copies the sum before a kernel writes over it.
    pieces = cut(z.shape[0], _TILE // max(z.shape[1] * 4, 1))
    return pieces.loop(lambda z, part: pieces.put(z, pieces.take(z, part) + b, part), z), None


def _biased_bwd(_: None, ct: Array) -> tuple[Array, Array]:
    return ct, ct.sum(0)


_biased = analytic(_biased_fwd, _biased_bwd)


def _weight_fwd(total: Array, dz: Array, x: Array, start: Array) -> Any:
    # In pieces of few classes: their product and their dlogits in the operands' type stay in the cache, where one
    # product of all classes is as large as the weight itself (1024 rows, V=49152, D=576 float32, 2 cores: 0.8 of
    # the time, and 6 MiB where the other takes 108).
    wide_row = max((dz.shape[0] + x.shape[1]) * 4, 1) if isinstance(dz.shape[0], int) else 4096
    classes = cut(dz.shape[1], _TILE // wide_row)

    def step(total: Array, part: Part) -> Array:
        product = _dot(classes.take(dz, part, 1).astype(x.dtype), x, 0, 0)
        at = start + part * classes.each
        product = product + lax.dynamic_slice_in_dim(total, at, product.shape[0])
        return lax.dynamic_update_slice_in_dim(total, product, at, 0)

    return classes.loop(step, total), (dz, x, start)


def _weight_bwd(saved: tuple[Array, Array, Array], ct: Array) -> Any:
    dz, x, start = saved
    part = lax.dynamic_slice_in_dim(ct, start, dz.shape[1])
    return ct, _dot(x.astype(ct.dtype), part, 1, 1), _dot(dz.astype(ct.dtype), part, 1, 0).astype(x.dtype), None


_weight = analytic(_weight_fwd, _weight_bwd)
