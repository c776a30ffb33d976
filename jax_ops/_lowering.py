"""How a rule is traced, mapped and lowered: under its own settings, over one more axis, for one device or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Function = Callable[..., Any]


def as_typed(fn: Function) -> Function:
    """fn, traced as the types of its arrays ask for, under whatever settings of JAX it is called.

    A rule may run long after the call it belongs to: x64 that was on for a part of a program is off again when its
    pullback is formed or lowered. And how strictly JAX promotes what a user's own program mixes is no matter of ours.
    """

    @wraps(fn)
    def call(*args: Any, **how: Any) -> Any:
        wide = any(getattr(getattr(a, "dtype", None), "itemsize", 0) == 8 for a in jax.tree.leaves(args))
        with jax.enable_x64(wide), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return fn(*args, **how)

    return call


def loops_are_to_come() -> bool:
    """Whether JAX has its loops and checkpoints to come, of which a program that a rule keeps can hold none.

    JAX (0.10.2) neither transposes them rightly nor lowers what holds them.
    """
    return any(getattr(jax.config, f"jax_{name}", False) for name in ("scan3", "remat3"))


def mapped(fn: Function, axis: Any, dims: Sequence[int | None], out: Any = 0) -> Function:
    """fn over one more dimension, as a batching rule is told of it: its size and the mesh axis it lies on."""
    return jax.vmap(fn, in_axes=tuple(dims), out_axes=out, axis_size=axis.size, spmd_axis_name=axis.spmd_name)


def outputs_mapped(fn: Function, axis: Any, dims: Sequence[int | None], args: Sequence[Any]) -> list[int | None]:
    """For each of fn's results 0, or None where it is the same for all examples."""
    out: list[int | None] = []

    def each(*args: Any) -> Any:
        kind = type(next(a for a, d in zip(args, dims, strict=True) if d is not None))
        results = fn(*args)
        out.extend(0 if type(a) is kind else None for a in results)
        return results

    jax.make_jaxpr(mapped(each, axis, dims))(*args)
    return out


def when_alone(pieces: Function, whole: Function, *arrays: jax.Array) -> jax.Array:
    """whole(*arrays), computed as pieces(*arrays) on a CPU where each device holds all of the arrays it works on.

    Cutting an array that XLA has spread over devices, inside of a loop, gathers it on each of them; which arrays it
    spreads is only known when a program is lowered. Pieces are as large as a CPU's cache: on an H100 those of
    Llama-3's head are thousands of small matmuls, and five times the time. Both are functions of a module, not
    closures; derivatives are those of `whole`.
    """
    (out,) = all_when_alone(pieces, whole, *arrays)
    return out


def all_when_alone(pieces: Function, whole: Function, *arrays: jax.Array) -> list[jax.Array]:
    """`when_alone` of functions with several results."""
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
    mapping: Any
    dims: tuple[int | None, ...]

    def __call__(self, *arrays: Any) -> Any:
        return mapped(self.fn, self.mapping, self.dims)(*arrays)


def _results(fn: Function) -> Function:
    """fn, whose results are a list."""

    def call(*arrays: Any) -> list[Any]:
        out = fn(*arrays)
        return list(out) if isinstance(out, tuple | list) else [out]

    return call


def _types(*avals: Any, pieces: Function, whole: Function) -> Any:
    return jax.make_jaxpr(as_typed(whole))(*avals).out_avals


def _jvp(primals: Any, tangents: Any, *, pieces: Function, whole: Function) -> Any:
    moved = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero and t.dtype != jax.dtypes.float0]

    def along(*some: Any) -> Any:
        args = dict(enumerate(primals)) | dict(zip(moved, some, strict=True))
        return _results(whole)(*args.values())

    out = _either.bind(*primals, pieces=pieces, whole=whole)
    return out, jax.jvp(along, [primals[i] for i in moved], [tangents[i] for i in moved])[1]


def _transpose(cts: Any, *args: Any, pieces: Function, whole: Function) -> list[Any]:
    asked = [i for i, a in enumerate(args) if ad.is_undefined_primal(a)]

    def along(*some: Any) -> Any:
        full = dict(enumerate(args)) | dict(zip(asked, some, strict=True))
        return _results(whole)(*full.values())

    found = jax.linear_transpose(along, *[args[i].aval for i in asked])(list(map(ad.instantiate_zeros, cts)))
    return [dict(zip(asked, found, strict=True)).get(i) for i in range(len(args))]


def _batch(mapping: Any, args: Any, dims: Any, *, pieces: Function, whole: Function) -> Any:
    if all(d is None for d in dims):
        return (out := _either.bind(*args, pieces=pieces, whole=whole)), [None] * len(out)
    pieces, whole = (_Mapped(fn, mapping, tuple(dims)) for fn in (pieces, whole))
    return (out := _either.bind(*args, pieces=pieces, whole=whole)), [0] * len(out)


def _lower(ctx: Any, *values: Any, pieces: Function, whole: Function) -> Any:
    cut = tuple(ctx.module_context.platforms) == ("cpu",) and alone(ctx)
    return mlir.lower_fun(as_typed(_results(pieces if cut else whole)), multiple_results=True)(ctx, *values)


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
_either.multiple_results = True
_either.def_impl(compiled(_either, "pieces", "whole"))
_either.def_abstract_eval(_types)
ad.primitive_jvps[_either] = as_typed(_jvp)
ad.primitive_transposes[_either] = as_typed(_transpose)
batching.fancy_primitive_batchers[_either] = as_typed(_batch)
# Not cached by types alone: inside a shard_map and outside it the same types may have other lowerings.
mlir.register_lowering(_either, _lower, cacheable=False)
