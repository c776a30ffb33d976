"""A derivative that is exact forwards and another one backwards, which has no derivative of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jax_ops._lowering import as_typed, loops_are_to_come, mapped
from jax_ops._rules.autodiff import apart, moves
from jax_ops._rules.varying import varying_as


def replaced(
    fwd: Callable[..., Any], bwd: Callable[..., Any], exact: Callable[..., Any], refusal: Callable[[], Exception]
) -> Callable[..., Any]:
    """The function fwd(*arrays)[0] whose tangents are those of exact(*arrays), and whose pullback is bwd.

    `fwd` and `bwd` are as for `analytic`; bwd(wanted, residuals, cotangents) gives the gradients of the arrays `wanted`
    alone. What is linear here is one primitive that holds both programs and is only ever run as one of them; a
    derivative of bwd raises `refusal()`.
    """

    @jax.custom_jvp
    @as_typed
    def function(*arrays: Any) -> Any:
        # JAX maps this function and its tangents by themselves: results that all examples have in common would be one
        # here and many there.
        results, shape = jax.tree.flatten(apart(lambda *arrays: fwd(*arrays)[0], *arrays))
        return shape.unflatten(_each.bind(*results, *jax.tree.leaves(arrays), count=len(results)))

    @as_typed
    def tangent(primals: Any, tangents: Any) -> Any:
        at = [i for i, (p, t) in enumerate(zip(primals, tangents, strict=True)) if moves(p, t)]
        out, saved = apart(fwd, *primals)
        if not at:
            return out, jax.tree.map(jnp.zeros_like, out)
        kept, structure = jax.tree.flatten((primals, saved))
        ups, shape = jax.tree.flatten(out)

        def ahead(*leaves: Any) -> Any:
            given, _ = structure.unflatten(leaves[: len(kept)])

            def along(*some: Any) -> Any:
                full = dict(enumerate(given)) | dict(zip(at, some, strict=True))
                return exact(*full.values())

            return jax.tree.leaves(jax.jvp(along, [given[i] for i in at], list(leaves[len(kept) :]))[1])

        def back(*leaves: Any) -> Any:
            _, residuals = structure.unflatten(leaves[: len(kept)])
            return bwd(tuple(at), residuals, shape.unflatten(leaves[len(kept) :]))

        moved = [tangents[i] for i in at]
        programs = {"ahead": jax.make_jaxpr(ahead)(*kept, *moved), "back": jax.make_jaxpr(back)(*kept, *ups)}
        dout = _linear.bind(*kept, *moved, **programs, saved=len(kept), turned=False, refusal=refusal)
        return out, shape.unflatten(dout)

    function.defjvp(tangent, symbolic_zeros=True)
    return jax.jit(function, inline=True)


def _each_batch(axis: Any, args: Any, dims: Any, *, count: int) -> Any:
    pairs = zip(args[:count], dims[:count], strict=True)
    out = [batching.bdim_at_front(a, d, axis.size, axis.explicit_mesh_axis) for a, d in pairs]
    return (out, [0] * count) if any(d is not None for d in dims) else (list(args[:count]), [None] * count)


# The first `count` arguments; where examples are mapped that differ in any argument, each has its own.
_each = Primitive("softmax_ext_each")
_each.multiple_results = True
_each.def_impl(lambda *args, count: list(args[:count]))
_each.def_abstract_eval(lambda *avals, count: list(avals[:count]))
batching.fancy_primitive_batchers[_each] = as_typed(_each_batch)
mlir.register_lowering(_each, lambda ctx, *values, count: list(values[:count]))

_linear = Primitive("softmax_ext_replaced")
_linear.multiple_results = True


def _run(*args: Any, ahead: Any, back: Any, turned: bool, **_: Any) -> list[Any]:
    return jaxpr_as_fun(back if turned else ahead)(*args)


def _types(*avals: Any, ahead: Any, back: Any, turned: bool, **_: Any) -> Any:
    return (back if turned else ahead).out_avals


def _jvp(primals: Any, tangents: Any, *, saved: int, turned: bool, refusal: Any, **how: Any) -> Any:
    real = [type(t) is not ad.Zero and t.dtype != jax.dtypes.float0 for t in tangents]
    if turned and any(real):
        raise refusal()
    more = {"saved": saved, "turned": turned, "refusal": refusal, **how}
    out, at = _linear.bind(*primals, **more), [i for i in range(saved) if real[i]]
    total = [ad.Zero(jax.typeof(o).to_tangent_aval()) for o in out]
    if at:

        def along(*some: Any) -> Any:
            full = dict(enumerate(primals)) | dict(zip(at, some, strict=True))
            return jaxpr_as_fun(how["ahead"])(*full.values())

        total = jax.jvp(along, [primals[i] for i in at], [tangents[i] for i in at])[1]
    if any(real[saved:]):
        steady = _linear.bind(*primals[:saved], *map(ad.instantiate_zeros, tangents[saved:]), **more)
        total = list(map(ad.add_tangents, total, steady))
    return out, total


def _transpose(cotangents: Any, *args: Any, saved: int, turned: bool, **how: Any) -> list[Any]:
    full = map(ad.instantiate_zeros, cotangents)
    return [None] * saved + _linear.bind(*args[:saved], *full, saved=saved, turned=not turned, **how)


def _batch(axis: Any, args: Any, dims: Any, *, ahead: Any, back: Any, saved: int, turned: bool, refusal: Any) -> Any:
    more = {"saved": saved, "turned": turned, "refusal": refusal}
    if all(d is None for d in dims):
        return (out := _linear.bind(*args, ahead=ahead, back=back, **more)), [None] * len(out)
    args, dims = list(args), list(dims)
    for i, (a, d) in enumerate(zip(args, dims, strict=True)):
        if d is not None or (turned and i >= saved):
            args[i], dims[i] = batching.bdim_at_front(a, d, axis.size, axis.explicit_mesh_axis), 0
    here = [0] * len(ahead.in_avals[saved:]) if turned else dims[saved:]
    kept, ups = dims[:saved], [0] * len(back.in_avals[saved:])
    one, other = mapped(jaxpr_as_fun(ahead), axis, [*kept, *here]), _summed(back, axis, [*kept, *ups], here)
    if turned:
        back = jax.make_jaxpr(other)(*args)
        ahead = jax.make_jaxpr(one)(*args[:saved], *back.out_avals)
    else:
        ahead = jax.make_jaxpr(one)(*args)
        back = jax.make_jaxpr(other)(*args[:saved], *ahead.out_avals)
    return (out := _linear.bind(*args, ahead=ahead, back=back, **more)), [0] * len(out)


def _summed(program: Any, axis: Any, dims: Sequence[int | None], outs: Sequence[int | None]) -> Callable[..., Any]:
    """The program of each example, its results summed where examples have one argument together."""
    if all(d == 0 for d in outs):
        return mapped(jaxpr_as_fun(program), axis, dims)

    def call(*args: Any) -> list[Any]:
        # One example after the other: what they share may be a weight, of which there should not be one for each.
        several = [a for a, d in zip(args, dims, strict=True) if d is not None]

        def step(sums: Any, own: Any) -> Any:
            rest = iter(own)
            found = jaxpr_as_fun(program)(*(a if d is None else next(rest) for a, d in zip(args, dims, strict=True)))
            pairs = list(zip(found, outs, strict=True))
            together = [s + v.astype(s.dtype) for s, v in zip(sums, (v for v, d in pairs if d is None), strict=True)]
            return together, [v for v, d in pairs if d is not None]

        alone = [a for a, d in zip(program.out_avals, outs, strict=True) if d is None]
        wide = [
            jnp.promote_types(a.dtype, jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype for a in alone
        ]
        start = [varying_as(jnp.zeros(a.shape, kind), a) for a, kind in zip(alone, wide, strict=True)]
        if not loops_are_to_come():
            sums, each = lax.scan(step, start, several)
        else:
            sums, found = start, []
            for i in range(axis.size):
                sums, own = step(sums, [a[i] for a in several])
                found.append(own)
            each = [jnp.stack(parts) for parts in zip(*found, strict=True)]
        summed, mine = (s.astype(a.dtype) for s, a in zip(sums, alone, strict=True)), iter(each)
        return [next(summed) if d is None else next(mine) for d in outs]

    return call


_linear.def_impl(_run)
_linear.def_abstract_eval(_types)
ad.primitive_jvps[_linear] = as_typed(_jvp)
ad.primitive_transposes[_linear] = as_typed(_transpose)
batching.fancy_primitive_batchers[_linear] = as_typed(_batch)
mlir.register_lowering(_linear, mlir.lower_fun(_run, multiple_results=True), cacheable=False)
