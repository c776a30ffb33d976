"""K stratified points of each row's distribution without its targets: kernels, or plain jax.numpy."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_ops._lowering import as_typed, compiled
from jax_ops._rows import native
from jax_ops._rows.arithmetic import capped
from jax_ops._rows.classes import IGNORED
from jax_ops._rows.primitive import serves


def points(
    logits: Array, m: Array, rest: Array, excepted: Array, u: Array, *, scale: float, softcap: float | None
) -> tuple[Array, Array]:
    """(ids (N, K) int32, q (N,)) of logits (N, V): q is the mass off the `excepted` (N, E) classes, IGNORED is none.

    Point k is the first class where the off-target sum passes (k + u_k) / K of its whole. Where q is 0, and in a row
    whose targets are all ignored, the ids are IGNORED; in a row without a distribution they are 0 and q is NaN.
    """
    arrays = lax.stop_gradient((logits, m, rest, excepted, u))
    ids, mass = _points.bind(*arrays, scale=scale, softcap=softcap)
    return ids, mass.sum(1) / (1.0 + arrays[2])


def _plain(
    logits: Array, m: Array, rest: Array, excepted: Array, u: Array, *, scale: float, softcap: float | None
) -> list[Array]:
    """[ids, (N, 2) the mass in two parts]."""
    (n, classes), k = logits.shape, u.shape[1]
    ignored, kind = (excepted == IGNORED).all(1), m.dtype
    if classes == 0:
        return [jnp.full_like(excepted, IGNORED, shape=u.shape, dtype=jnp.int32), jnp.stack([rest, rest], 1)]
    z = capped(logits, scale, softcap) - m[:, None]
    with jax.enable_x64(True):  # in float32 the sums of many classes would lose points
        e = jnp.exp(z.astype(jnp.float64))
        inside = (excepted >= 0) & (excepted < classes)
        e = e.at[jnp.arange(n)[:, None], jnp.where(inside, excepted, classes)].set(0.0, mode="drop")
        sums = jnp.cumsum(e, 1)
        at = (jnp.arange(k) + u.astype(jnp.float64)) / k * sums[:, -1:]
        ids = jax.vmap(partial(jnp.searchsorted, side="right"))(sums, at)
        last = (sums < sums[:, -1:]).sum(1, keepdims=True)  # rounding may bring the last threshold to the whole
        ids = jnp.where(sums[:, -1:] > 0, jnp.minimum(ids, last), IGNORED).astype(jnp.int32)
        whole = sums[:, -1].astype(kind)
    lost = jnp.isnan(whole / (1.0 + rest))
    whole = jnp.where(ignored, 0.0, jnp.where(lost, jnp.nan, whole)).astype(kind)
    ids = jnp.where(ignored[:, None], IGNORED, jnp.where(lost[:, None], 0, ids)).astype(jnp.int32)
    return [ids, jnp.stack([whole, jnp.zeros_like(whole)], 1)]


@as_typed
def _run(*arrays: Any, **how: Any) -> list[Array]:
    return _plain(*arrays, **how)


def _types(*avals: Any, **how: Any) -> Any:
    return jax.make_jaxpr(partial(_run, **how))(*avals).out_avals


def _lower(ctx: Any, *values: Any, scale: float, softcap: float | None) -> Any:
    if native.missing or "points" not in native.served or not serves(ctx):
        return mlir.lower_fun(_run, multiple_results=True)(ctx, *values, scale=scale, softcap=softcap)
    numbers = {"scale": np.float64(scale), "softcap": np.float64(softcap or 0.0)}
    return jax.ffi.ffi_lowering(native.target("points"))(ctx, *values, **numbers)


def _batch(axis: Any, args: Any, dims: Any, **how: Any) -> Any:
    if all(d is None for d in dims):
        return (out := _points.bind(*args, **how)), [None] * len(out)
    pairs = zip(args, dims, strict=True)
    front = [batching.bdim_at_front(a, d, axis.size, axis.explicit_mesh_axis) for a, d in pairs]
    out = _points.bind(*(a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]) for a in front), **how)
    return [v.reshape(axis.size, v.shape[0] // axis.size, *v.shape[1:]) for v in out], [0] * len(out)


_points = Primitive("softmax_ext_points")
_points.multiple_results = True
_points.def_impl(compiled(_points, "scale", "softcap"))
_points.def_abstract_eval(_types)
batching.fancy_primitive_batchers[_points] = as_typed(_batch)
mlir.register_lowering(_points, _lower, cacheable=False)
