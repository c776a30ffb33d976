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
    logits: Array,
    m: Array,
    rest: Array,
    excepted: Array,
    u: Array,
    *,
    scale: float,
    softcap: float | None,
    span: Array | None = None,
) -> tuple[Array, Array]:
    """(ids (N, K) int32, q (N,)) of logits (N, V): q is the mass off the `excepted` (N, E) classes, IGNORED is none.

    Point k is the first class where the off-target sum passes (k + u_k) / K of its whole. Where q is 0, and in a row
    whose targets are all ignored, the ids are IGNORED; in a row without a distribution they are 0 and q is NaN.
    Of a shard of the classes, whose m and rest are those of whole rows, `span` (N, 3, 2) holds where its sum begins
    and ends and the whole, each as two numbers whose sum it is, in units of exp(m); points of other shards are IGNORED,
    and q is the shard's own.
    """
    ids, mass = points_and_mass(logits, m, rest, excepted, u, scale=scale, softcap=softcap, span=span)
    return ids, mass.sum(1) / (1.0 + lax.stop_gradient(rest))


def points_and_mass(*arrays: Array, scale: float, softcap: float | None, span: Array | None = None) -> list[Array]:
    """[ids, the mass off the excepted classes in units of exp(m) (N, 2), as two numbers whose sum it is]."""
    given = arrays if span is None else (*arrays, span)
    return _points.bind(*lax.stop_gradient(given), scale=scale, softcap=softcap)


def _plain(
    logits: Array,
    m: Array,
    rest: Array,
    excepted: Array,
    u: Array,
    span: Array | None = None,
    *,
    scale: float,
    softcap: float | None,
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
        begin, end, total = jnp.zeros_like(sums[:, :1]), jnp.inf, sums[:, -1:]
        if span is not None:
            begin, end, total = jnp.split(span.astype(jnp.float64).sum(2), 3, 1)
        at = (jnp.arange(k) + u.astype(jnp.float64)) / k * total
        here = (sums[:, -1:] > 0) & (at >= begin) & (at < end)
        ids = _first_past(sums, at - begin)
        last = (sums < sums[:, -1:]).sum(1, keepdims=True)  # rounding may bring the last threshold to the whole
        ids = jnp.where(here, jnp.minimum(ids, last), IGNORED).astype(jnp.int32)
        high = sums[:, -1].astype(kind)
        low = (sums[:, -1] - high.astype(jnp.float64)).astype(kind)
    lost = jnp.isnan(high / (1.0 + rest))
    high = jnp.where(ignored, 0.0, jnp.where(lost, jnp.nan, high)).astype(kind)
    low = jnp.where(ignored | lost, 0.0, low).astype(kind)
    ids = jnp.where(ignored[:, None], IGNORED, jnp.where(lost[:, None], 0, ids)).astype(jnp.int32)
    return [ids, jnp.stack([high, low], 1)]


def _first_past(sums: Array, at: Array) -> Array:
    """How many of a row's ascending sums (N, V) are at most each of `at` (N, K)."""
    # By halves and without a loop: JAX (0.10.2) cannot map jnp.searchsorted's under its jax_scan3, and a comparison
    # of all with all would be an array (N, K, V).
    classes, found = sums.shape[1], jnp.zeros_like(at, dtype=jnp.int32)
    for bit in reversed(range(classes.bit_length() if isinstance(classes, int) else 31)):
        tried = found + (1 << bit)
        passed = jnp.take_along_axis(sums, jnp.minimum(tried, classes) - 1, 1) <= at
        found = jnp.where((tried <= classes) & passed, tried, found)
    return found


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
