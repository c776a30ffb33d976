"""One public function for both modes of differentiation, from one analytic pullback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jax_ops._lowering import as_typed, mapped, outputs_mapped
from jax_ops._rules.varying import varying, varying_as


def analytic(fwd: Callable[..., Any], bwd: Callable[..., Any]) -> Callable[..., Any]:
    """The function fwd(*arrays)[0] with the derivative bwd(residuals, cotangents), in every mode.

    A custom_vjp alone refuses jvp, linearize and jacfwd; a custom_jvp alone lets JAX choose what to keep for
    the backward pass. So the custom_vjp stands inside a custom_jvp whose tangent is the linear transpose of
    the analytic pullback; transposed again, for reverse mode, it is that pullback. Hence `bwd` must be
    literally linear in the cotangents (no comparison of them), and arrays must be arguments, never closed
    over: scan and checkpoint would leak their tracers. The whole is jitted, otherwise each eager gradient would trace
    both rules anew (10 ms instead of 2 for a small softmax on a 2-core x86-64); inlined, so that inside another jit
    nothing of it is seen. So call `analytic` once for each set of options: the traces are kept by its result.
    """
    return selective(lambda wanted: (fwd, bwd))


def selective(rules: Callable[[tuple[bool, ...]], tuple[Callable[..., Any], Callable[..., Any]]]) -> Callable[..., Any]:
    """`analytic`, with the (fwd, bwd) that serve where only the arrays `wanted` are differentiated.

    So a frozen array's gradient is not computed, outside of jit either. bwd may return None for it. Where
    nothing is differentiated it is the fwd of wanting nothing that runs.
    """

    @cache
    def reverse(wanted: tuple[bool, ...]) -> Any:
        fwd, bwd = rules(wanted)

        @jax.custom_vjp
        def function(*arrays: Any) -> Any:
            return fwd(*arrays)[0]

        function.defvjp(fwd, bwd)
        return function

    @jax.custom_jvp
    @as_typed
    def function(*arrays: Any) -> Any:
        fwd, _ = rules((False,) * len(arrays))
        return apart(lambda *arrays: fwd(*arrays)[0], *arrays)

    @as_typed
    def tangent(primals: Any, tangents: Any) -> Any:
        wanted = tuple(map(moves, primals, tangents))
        out, pull = apart(lambda *arrays: jax.vjp(reverse(wanted), *arrays), *primals)
        saved, structure = jax.tree.flatten(pull)
        ups, shape = jax.tree.flatten(out)

        def pullback(*leaves: Any) -> Any:
            cotangents = shape.unflatten(leaves[len(saved) :])
            return _only(wanted, structure.unflatten(leaves[: len(saved)])(cotangents))

        program = jax.make_jaxpr(pullback)(*saved, *ups)
        dout = _linear.bind(*saved, *_only(wanted, tangents), program=program, saved=len(saved), moved=None, back=False)
        return out, shape.unflatten(dout)

    function.defjvp(tangent, symbolic_zeros=True)
    return jax.jit(function, inline=True)


def moves(x: Any, tangent: Any) -> bool:
    if x is None or isinstance(tangent, jax.custom_derivatives.SymbolicZero):
        return False
    return _is_real(x)


# What follows are programs, kept as they were traced: nothing of a rule is traced again under other settings, and
# what a transform of JAX chooses by its kind (the policies of jax.checkpoint: matmuls, everything) it does not find in
# them. A policy that saw the rules' matmuls would keep all of the logits.


def apart(fn: Callable[..., Any], *arrays: Any) -> Any:
    """fn(*arrays) as one primitive. What is one of the arrays, or another result as well, is not computed again."""
    leaves, given = jax.tree.flatten(arrays)
    shape: Any = None
    taken: list[int] = []  # of each result where it stands among the arrays and, behind them, the program's results

    def flat(*leaves: Any) -> Any:
        nonlocal shape
        results, shape = jax.tree.flatten(fn(*given.unflatten(leaves)))
        known, own = {id(a): i for i, a in enumerate(leaves)}, []
        for out in results:
            if id(out) not in known:
                known[id(out)] = len(known)
                own.append(out)
            taken.append(known[id(out)])
        return own

    program = jax.make_jaxpr(flat)(*leaves)
    found = [*leaves, *_program.bind(*leaves, program=program)]
    return shape.unflatten([found[i] for i in taken])


_program = Primitive("softmax_ext_program")
_program.multiple_results = True


def _run_program(*args: Any, program: Any) -> list[Any]:
    return jaxpr_as_fun(program)(*args)


def _program_jvp(primals: Any, tangents: Any, *, program: Any) -> Any:
    return _program.bind(*primals, program=program), _moved(program, primals, tangents)


def _program_transpose(cotangents: Any, *args: Any, program: Any) -> list[Any]:
    asked = [i for i, a in enumerate(args) if ad.is_undefined_primal(a)]

    def along(*some: Any) -> Any:
        full = dict(enumerate(args)) | dict(zip(asked, some, strict=True))
        return jaxpr_as_fun(program)(*full.values())

    full = list(map(ad.instantiate_zeros, cotangents))
    found = dict(zip(asked, jax.linear_transpose(along, *[args[i].aval for i in asked])(full), strict=True))
    return [found.get(i) for i in range(len(args))]


def _program_batch(axis: Any, args: Any, dims: Any, *, program: Any) -> Any:
    if all(d is None for d in dims):
        return (out := _program.bind(*args, program=program)), [None] * len(out)
    out = outputs_mapped(jaxpr_as_fun(program), axis, dims, args)
    program = jax.make_jaxpr(mapped(jaxpr_as_fun(program), axis, dims, out))(*args)
    return _program.bind(*args, program=program), out


# A linear function of all arguments but the saved ones, of one of two forms:
# - `program` is a pullback, linear in them: this is it (`back`), or its transpose. Transposed it is again the pullback
#   as it was written. Had JAX to transpose its transpose, half-precision matmuls would come out with an operand in
#   float32, and each update of one slice of an array as a sum of two whole arrays.
# - `program` is a function of the saved ones: this is its pullback (`back`), or what it pushes forward, for those
#   `moved`.
_linear = Primitive("softmax_ext_linear")
_linear.multiple_results = True


def _run(*args: Any, program: Any, saved: int, moved: tuple[int, ...] | None, back: bool) -> list[Any]:
    given, linear = args[:saved], args[saved:]
    call = jaxpr_as_fun(program)
    if moved is None:

        def pull(*cotangents: Any) -> Any:
            return call(*given, *cotangents)

        if back:
            return list(pull(*linear))
        ups, linear = program.in_avals[saved:], list(map(varying_as, linear, program.out_avals))
        if more := _joint(args) - _joint([*program.in_avals, *program.out_avals]):  # of a mapping over a mesh axis
            ups = [varying_as(jnp.zeros(a.shape, a.dtype), more | varying(a)) for a in ups]
            linear = [varying_as(a, more) for a in linear]
        return list(jax.linear_transpose(pull, *ups)(linear))

    def along(*some: Any) -> Any:
        full = dict(enumerate(given)) | dict(zip(moved, some, strict=True))
        return [out for out in call(*full.values()) if _is_real(out)]

    at = [given[i] for i in moved]
    return list(jax.vjp(along, *at)[1](list(linear)) if back else jax.jvp(along, at, list(linear))[1])


def _flat(**how: Any) -> Callable[..., list[Any]]:
    return as_typed(lambda *args: _run(*args, **how))


def _types(*avals: Any, program: Any, saved: int, moved: tuple[int, ...] | None, back: bool) -> Any:
    if moved is None:
        return program.out_avals if back else program.in_avals[saved:]
    return [program.in_avals[i] for i in moved] if back else [a for a in program.out_avals if _is_real(a)]


def _joint(arrays: Any) -> frozenset[Any]:
    return frozenset().union(*map(varying, arrays))


def _is_real(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _moved(program: Any, primals: Any, tangents: Any) -> list[Any]:
    """What a program pushes forward."""
    moved = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero and t.dtype != jax.dtypes.float0)
    pushed: Iterator[Any] = iter(())
    if moved:
        linear, how = [tangents[i] for i in moved], {"saved": len(primals), "moved": moved, "back": False}
        pushed = iter(_linear.bind(*primals, *linear, program=program, **how))
    still = [ad.Zero(a.to_tangent_aval()) for a in program.out_avals]
    return [next(pushed, zero) if _is_real(zero.aval) else zero for zero in still]


def _jvp(primals: Any, tangents: Any, *, saved: int, **how: Any) -> Any:
    bind = lambda *args: _linear.bind(*args, saved=saved, **how)  # noqa: E731
    out = bind(*primals)
    program = jax.make_jaxpr(_flat(saved=saved, **how))(*primals)
    linear = [ad.Zero(jax.typeof(p).to_tangent_aval()) for p in primals[saved:]]
    total = _moved(program, primals, [*tangents[:saved], *linear])
    if any(type(t) is not ad.Zero for t in tangents[saved:]):
        steady = bind(*primals[:saved], *map(ad.instantiate_zeros, tangents[saved:]))
        total = list(map(ad.add_tangents, total, steady))
    return out, total


def _transpose(cotangents: Any, *args: Any, saved: int, back: bool, **how: Any) -> list[Any]:
    full = map(ad.instantiate_zeros, cotangents)
    out = _linear.bind(*args[:saved], *full, saved=saved, back=not back, **how)
    asked = [ad.is_undefined_primal(a) for a in args[saved:]]
    return [None] * saved + [ct if on else None for ct, on in zip(out, asked, strict=True)]


def _batch(axis: Any, args: Any, dims: Any, *, program: Any, saved: int, moved: Any, back: bool) -> Any:
    how = {"saved": saved, "moved": moved, "back": back}
    if all(d is None for d in dims):
        return (out := _linear.bind(*args, program=program, **how)), [None] * len(out)
    each = mapped(_flat(program=program, **how), axis, dims)
    if moved is not None:
        return (out := each(*args)), [0] * len(out)
    if all(d == 0 for d in dims[saved:]):
        # As it was written again, in both directions. The other ones' arguments are the pullback's results.
        ups = [jax.typeof(a) for a in args[saved:]]
        if not back:
            ups = jax.make_jaxpr(each)(*args).out_avals
        call = mapped(jaxpr_as_fun(program), axis, [*dims[:saved], *[0] * len(ups)])
        program = jax.make_jaxpr(call)(*args[:saved], *ups)
    else:  # What all examples share is not repeated for each, nor is what all of them add to it.
        program, how["back"] = jax.make_jaxpr(each)(*args), True
    return (out := _linear.bind(*args, program=program, **how)), [0] * len(out)


_program.def_impl(_run_program)
_program.def_abstract_eval(lambda *avals, program: program.out_avals)
ad.primitive_jvps[_program] = as_typed(_program_jvp)
ad.primitive_transposes[_program] = as_typed(_program_transpose)
batching.fancy_primitive_batchers[_program] = as_typed(_program_batch)
mlir.register_lowering(_program, mlir.lower_fun(_run_program, multiple_results=True), cacheable=False)

_linear.def_impl(_flat_call := lambda *args, **how: _flat(**how)(*args))
_linear.def_abstract_eval(_types)
ad.primitive_jvps[_linear] = as_typed(_jvp)
ad.primitive_transposes[_linear] = as_typed(_transpose)
batching.fancy_primitive_batchers[_linear] = as_typed(_batch)
mlir.register_lowering(_linear, mlir.lower_fun(_flat_call, multiple_results=True), cacheable=False)


def _only(wanted: tuple[bool, ...], values: Any) -> tuple[Any, ...]:
    return tuple(v for v, on in zip(values, wanted, strict=True) if on)
