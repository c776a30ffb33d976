"""x . W[id] for K classes a row, and the two products that are its derivatives: kernels, or plain jax.numpy.

legend:  x (N, D), W (V, D), ids (N, K): a class, IGNORED (no class at all) or INVALID (a row of NaN that takes nothing)
formula: z_ik = x_i . W[id_ik];  dX_i = sum_k c_ik W[id_ik];  dW[v] = sum of c_ik x_i over id_ik = v
Each is linear in both of its matrices, and its transposes are the other two: three primitives, every order, both modes.
Half-precision rows are summed in float32; `wide` results are not rounded back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_ops._lowering import alone, as_typed, compiled
from jax_ops._rows import native
from jax_ops._rows.classes import IGNORED
from jax_ops._rows.primitive import serves
from jax_ops._rows.sparse import run_sums

# Bytes of rows of W that stand side by side where no kernel serves.
_WORKSPACE = 1 << 26


def picked_fwd(x: Array, w: Array, ids: Array) -> Array:
    """z (N, K), in the compute type: 0 at IGNORED, NaN at INVALID."""
    return _fwd.bind(x, w, ids)


def picked_input_bwd(c: Array, w: Array, ids: Array, *, wide: bool = False) -> Array:
    """dX (N, D), in W's type or the compute type."""
    return _input_bwd.bind(c, w, ids, wide=wide)


def picked_weight_bwd(c: Array, x: Array, ids: Array, classes: int, *, wide: bool = False) -> Array:
    """dW (V, D), in x's type or the compute type: the same bits for any number of threads, and on a GPU in any run.

    But where XLA itself cuts the rows over several GPUs: sorting them by class would gather them.
    """
    return _weight_bwd.bind(c, x, ids, classes=classes, wide=wide)


def _plain_fwd(x: Array, w: Array, ids: Array) -> Array:
    kind = jnp.promote_types(x.dtype, jnp.float32)

    def of(x: Array, ids: Array) -> Array:
        z = jnp.einsum("nd,nkd->nk", x, _rows(w, ids, kind), preferred_element_type=kind)
        return jnp.where(ids < 0, jnp.where(ids == IGNORED, 0.0, jnp.nan), z).astype(kind)

    x, step, across = x.astype(kind), *_spans(ids, w.shape[1], kind)
    return jnp.concatenate([_by_rows(of, step, x, ids[:, i:j]) for i, j in across], 1)


def _plain_input_bwd(c: Array, w: Array, ids: Array, *, wide: bool) -> Array:
    kind = jnp.promote_types(w.dtype, jnp.float32)

    def of(c: Array, ids: Array) -> Array:
        return jnp.einsum("nk,nkd->nd", c, _rows(w, ids, kind), preferred_element_type=kind)

    c, step, across = jnp.where(ids < 0, 0.0, c).astype(kind), *_spans(ids, w.shape[1], kind)
    dx = jnp.zeros_like(c, shape=(ids.shape[0], w.shape[1]))
    for i, j in across:
        dx = dx + _by_rows(of, step, c[:, i:j], ids[:, i:j])
    dx = jnp.where((ids < IGNORED).any(1, keepdims=True), jnp.nan, dx)
    return dx if wide else dx.astype(w.dtype)


def _plain_weight_bwd(c: Array, x: Array, ids: Array, *, classes: int, wide: bool) -> Array:
    kind = jnp.promote_types(x.dtype, jnp.float32)

    def add(dw: Array, c: Array, x: Array, ids: Array) -> Array:
        terms = c[:, :, None] * x[:, None, :]
        # a class that is not named takes nothing of the row, NaN included
        return dw.at[jnp.where(ids < 0, classes, ids)].add(terms, mode="drop")

    x, step, across = x.astype(kind), *_spans(ids, x.shape[1], kind)
    dw = jnp.zeros_like(x, shape=(classes, x.shape[1]))
    for i, j in across if classes else ():
        parts = [_split(a, step, fill) for a, fill in ((c[:, i:j].astype(kind), 0), (x, 0), (ids[:, i:j], IGNORED))]
        if parts[0].shape[0] == 1:
            dw = add(dw, *(p[0] for p in parts))
        else:
            dw = lax.scan(lambda dw, p: (add(dw, *p), None), dw, tuple(parts))[0]
    return dw if wide else dw.astype(x.dtype)


def _ordered_weight_bwd(c: Array, x: Array, ids: Array, *, classes: int, wide: bool) -> Array:
    """`_plain_weight_bwd` without a scatter that adds at equal indices, which a GPU does in no order."""
    kind, (n, k) = jnp.promote_types(x.dtype, jnp.float32), ids.shape
    dw = jnp.zeros_like(x, shape=(classes, x.shape[1]), dtype=kind)
    if classes and n and k:
        at = jnp.where(ids < 0, classes, ids).reshape(-1)  # those of no class stand last
        order = jnp.argsort(at, stable=True)
        # in a piece each class has one run, whose sum is written once; a run that goes on is read by the next piece
        size = n * k
        fit = max(1, _WORKSPACE // (4 * max(1, x.shape[1]) * kind.itemsize))
        step = min(size, fit) if isinstance(size, int) else size  # exported for any number of rows: all of them at once

        def add(dw: Array, here: Array, which: Array) -> Array:
            terms = c.reshape(-1)[which].astype(kind)[:, None] * x[which // k].astype(kind)
            turns, one = here[1:] != here[:-1], jnp.ones_like(here[:1], dtype=bool)
            sums = run_sums(jnp.concatenate([one, turns])[:, None], terms, 0)
            last = jnp.concatenate([turns, one]) & (here < classes)
            where = jnp.where(last, here, classes + jnp.arange(here.shape[0], dtype=here.dtype))
            return dw.at[where].add(sums, mode="drop", unique_indices=True)

        if (count := -(-size // step)) == 1:
            dw = add(dw, at[order], order)
        else:
            fill = ((0, count * step - size),)
            parts = jnp.pad(at[order], fill, constant_values=classes), jnp.pad(order, fill)
            split = tuple(p.reshape(count, step) for p in parts)
            dw = lax.scan(lambda dw, part: (add(dw, *part), None), dw, split)[0]
    return dw if wide else dw.astype(x.dtype)


def _rows(w: Array, ids: Array, kind: Any) -> Array:
    """W[ids] in the compute type; 0 for no class."""
    if w.shape[0] == 0:
        return jnp.zeros_like(w, shape=(*ids.shape, w.shape[1]), dtype=kind)
    rows = w.at[ids.clip(0)].get(mode="clip").astype(kind)
    return jnp.where((ids < 0)[..., None], 0.0, rows)


def _spans(ids: Array, features: int, kind: Any) -> tuple[int, list[tuple[int, int]]]:
    """(how many rows at a time, which of their ids), so that the pieces' rows of W fit the workspace."""
    fit = max(1, _WORKSPACE // max(1, features * kind.itemsize))
    width = max(1, min(ids.shape[1], fit))
    across = [(k, min(k + width, ids.shape[1])) for k in range(0, ids.shape[1], width)]
    return max(1, fit // width), across or [(0, 0)]


def _split(a: Array, step: int, fill: int) -> Array:
    """The rows of a, `step` at a time; the last piece is filled up."""
    n = a.shape[0]
    if not isinstance(n, int) or n <= step:  # exported for any number of rows: all of them at once
        return a[None]
    count = -(-n // step)
    padded = jnp.pad(a, [(0, count * step - n), (0, 0)], constant_values=fill)
    return padded.reshape(count, step, a.shape[1])


def _by_rows(fn: Callable[..., Array], step: int, a: Array, ids: Array) -> Array:
    """fn(a, ids), `step` rows at a time."""
    parts = _split(a, step, 0), _split(ids, step, IGNORED)
    if parts[0].shape[0] == 1:
        return fn(*(p[0] for p in parts))
    out = lax.map(lambda p: fn(*p), parts)
    return out.reshape(-1, out.shape[-1])[: a.shape[0]]


def _product(
    name: str, plain: Callable[..., Array], *, by_rows: bool, elsewhere: Callable[..., Array] | None = None
) -> Primitive:
    """A product of two matrices at ids as a primitive; where not `by_rows`, its result is of classes.

    `elsewhere` is what a program for more than the CPU has in the place of `plain`, on one device.
    """
    p = Primitive(f"softmax_ext_{name}")

    @as_typed
    def run(*arrays: Any, **how: Any) -> list[Any]:
        return [plain(*arrays, **how)]

    @as_typed
    def run_elsewhere(*arrays: Any, **how: Any) -> list[Any]:
        return [(elsewhere or plain)(*arrays, **how)]

    def types(*avals: Any, **how: Any) -> Any:
        return jax.make_jaxpr(partial(run, **how))(*avals).out_avals[0]

    def lower(ctx: Any, *values: Any, **how: Any) -> Any:
        # A kernel takes matrices of one type, and coefficients in its compute type.
        first, second = (a.dtype for a in ctx.avals_in[:2])
        wanted = second if name == "picked_fwd" else jnp.promote_types(second, jnp.float32)
        if native.missing or name not in native.served or first != wanted or not serves(ctx):
            there = tuple(ctx.module_context.platforms) != ("cpu",) and alone(ctx)
            return mlir.lower_fun(run_elsewhere if there else run, multiple_results=True)(ctx, *values, **how)
        return jax.ffi.ffi_lowering(native.target(name))(ctx, *values)

    def jvp(primals: Any, tangents: Any, **how: Any) -> Any:
        a, b, ids = primals
        pairs = [(t, b) if i == 0 else (a, t) for i, t in enumerate(tangents[:2]) if type(t) is not ad.Zero]
        parts = [p.bind(*pair, ids, **how) for pair in pairs]
        return p.bind(a, b, ids, **how), parts[0] if len(parts) == 1 else ad.add_tangents(*parts)

    def mapped(axis: Any, args: Any, dims: Any, **how: Any) -> Any:
        if all(d is None for d in dims):
            return p.bind(*args, **how), None
        pairs = zip(args, dims, strict=True)
        a, b, ids = (batching.bdim_at_front(v, d, axis.size, axis.explicit_mesh_axis) for v, d in pairs)
        shared = by_rows and dims[1] is None
        classes = 0 if shared else b.shape[1] if by_rows else how["classes"]
        if classes * axis.size > jnp.iinfo(jnp.int32).max:
            return jax.vmap(lambda *each: plain(*each, **how))(a, b, ids), 0
        if not shared:  # each example's classes below the last one's; markers as they are
            begin = jnp.arange(axis.size, dtype=ids.dtype)[:, None, None] * classes
            ids = jnp.where(ids < 0, ids, ids + begin)
        if not by_rows:
            how["classes"] = classes * axis.size
        out = p.bind(_joined(a), args[1] if shared else _joined(b), _joined(ids), **how)
        return out.reshape(axis.size, out.shape[0] // axis.size, out.shape[1]), 0

    p.def_impl(compiled(p, "wide", "classes"))
    p.def_abstract_eval(types)
    ad.primitive_jvps[p] = as_typed(jvp)
    batching.fancy_primitive_batchers[p] = as_typed(mapped)
    mlir.register_lowering(p, lower, cacheable=False)
    return p


def _joined(a: Array) -> Array:
    """The examples' rows one below the other."""
    return a.reshape(a.shape[0] * a.shape[1], a.shape[2])


def _transposed(p: Primitive, first: Callable[..., Array], second: Callable[..., Array]) -> None:
    """Each matrix's part of a cotangent ct: first(ct, b, ids), second(ct, a, ids), in the type it has."""

    def transpose(ct: Any, a: Any, b: Any, ids: Any, **_: Any) -> list[Any]:
        undefined, back, other = (a, first, b) if ad.is_undefined_primal(a) else (b, second, a)
        if type(ct) is ad.Zero:
            found = ad.Zero(undefined.aval)
        else:
            found = back(ct, other, ids, undefined.aval).astype(undefined.aval.dtype)
        return [found if v is undefined else None for v in (a, b, ids)]

    ad.primitive_transposes[p] = as_typed(transpose)


_fwd = _product("picked_fwd", _plain_fwd, by_rows=True)
_input_bwd = _product("picked_input_bwd", _plain_input_bwd, by_rows=True)
_weight_bwd = _product("picked_weight_bwd", _plain_weight_bwd, by_rows=False, elsewhere=_ordered_weight_bwd)
_transposed(
    _fwd,
    lambda c, w, ids, aval: picked_input_bwd(c, w, ids),
    lambda c, x, ids, aval: picked_weight_bwd(c, x, ids, aval.shape[0]),
)
_transposed(
    _input_bwd,
    lambda v, w, ids, aval: picked_fwd(v, w, ids),
    lambda v, c, ids, aval: picked_weight_bwd(c, v, ids, aval.shape[0]),
)
_transposed(
    _weight_bwd,
    lambda v, x, ids, aval: picked_fwd(x, v, ids),
    lambda v, c, ids, aval: picked_input_bwd(c, v, ids),
)
