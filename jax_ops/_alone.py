"""Two ways to compute one thing: for a device that holds all of the arrays, and for arrays XLA spreads over several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Function = Callable[..., jax.Array]


def when_alone(pieces: Function, whole: Function, *arrays: jax.Array) -> jax.Array:
    """whole(*arrays), computed as pieces(*arrays) where each device holds all of the arrays it works on.

    Cutting an array that XLA has spread over devices, inside of a loop, gathers it on each of them; which arrays it
    spreads is only known when a program is lowered. Both are functions of a module, not closures; derivatives are
    those of `whole`.
    """
    return _either.bind(*arrays, pieces=pieces, whole=whole)


def alone(ctx: Any) -> bool:
    """Whether the program being lowered runs on one device, or says itself what each of several does."""
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):
        return set(context.manual_axes) == set(context.mesh.axis_names)
    return isinstance(context, mlir.ShardingContext) and context.num_devices == 1


@dataclass(frozen=True)
class _Mapped:
    """fn over one more dimension; equal ones are the same function to a cache."""

    fn: Function
    dims: tuple[int | None, ...]

    def __call__(self, *arrays: Any) -> Any:
        return jax.vmap(self.fn, in_axes=self.dims)(*arrays)


def _types(*avals: Any, pieces: Function, whole: Function) -> Any:
    (out,) = jax.make_jaxpr(whole)(*avals).out_avals
    return out


def _jvp(primals: Any, tangents: Any, *, pieces: Function, whole: Function) -> Any:
    moved = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero and t.dtype != jax.dtypes.float0]

    def along(*some: Any) -> Any:
        args = dict(enumerate(primals)) | dict(zip(moved, some, strict=True))
        return whole(*args.values())

    out = _either.bind(*primals, pieces=pieces, whole=whole)
    return out, jax.jvp(along, [primals[i] for i in moved], [tangents[i] for i in moved])[1]


def _transpose(ct: Any, *args: Any, pieces: Function, whole: Function) -> list[Any]:
    asked = [i for i, a in enumerate(args) if ad.is_undefined_primal(a)]

    def along(*some: Any) -> Any:
        full = dict(enumerate(args)) | dict(zip(asked, some, strict=True))
        return whole(*full.values())

    found = jax.linear_transpose(along, *[args[i].aval for i in asked])(ad.instantiate_zeros(ct))
    return [dict(zip(asked, found, strict=True)).get(i) for i in range(len(args))]


def _batch(args: Any, dims: Any, *, pieces: Function, whole: Function) -> Any:
    dims = tuple(dims)
    return _either.bind(*args, pieces=_Mapped(pieces, dims), whole=_Mapped(whole, dims)), 0


def _lower(ctx: Any, *values: Any, pieces: Function, whole: Function) -> Any:
    return mlir.lower_fun(pieces if alone(ctx) else whole, multiple_results=False)(ctx, *values)


def compiled(primitive: Primitive, *names: str) -> Function:
    """What an eager call of a primitive does: its lowering, compiled. Under jax.disable_jit() too: it has no other."""
    run = jax.jit(primitive.bind, static_argnames=names)

    def call(*args: Any, **parameters: Any) -> Any:
        if not jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return run(*args, **parameters)
        with jax.disable_jit(False):
            return run(*args, **parameters)

    return call


_either = Primitive("softmax_ext_either")
_either.def_impl(compiled(_either, "pieces", "whole"))
_either.def_abstract_eval(_types)
ad.primitive_jvps[_either] = _jvp
ad.primitive_transposes[_either] = _transpose
batching.primitive_batchers[_either] = _batch
# Not cached by types alone: inside a shard_map and outside it the same types may have other lowerings.
mlir.register_lowering(_either, _lower, cacheable=False)
