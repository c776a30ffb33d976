"""One public function for both modes of differentiation, from one analytic pullback."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def analytic(fwd: Callable[..., Any], bwd: Callable[..., Any]) -> Callable[..., Any]:
    """The function fwd(*arrays)[0] with the derivative bwd(residuals, cotangents), in every mode.

    A custom_vjp alone refuses jvp, linearize and jacfwd; a custom_jvp alone lets JAX choose what to keep for
    the backward pass. So the custom_vjp stands inside a custom_jvp whose tangent is the linear transpose of
    the analytic pullback; transposed again, for reverse mode, it is that pullback. Hence `bwd` must be
    literally linear in the cotangents (no comparison of them), and arrays must be arguments, never closed
    over: scan and checkpoint would leak their tracers. Both halves are checkpointed, otherwise linearising
    them would keep their intermediate arrays. The whole is jitted, otherwise each eager gradient would trace both
    rules anew (10 ms instead of 2 for a small softmax on a 2-core x86-64); inlined, so that inside another jit
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
    def function(*arrays: Any) -> Any:
        fwd, _ = rules((False,) * len(arrays))
        return fwd(*arrays)[0]

    def tangent(primals: Any, tangents: Any) -> Any:
        wanted = tuple(map(_moves, primals, tangents))

        @_checkpoint
        def forward(*arrays: Any) -> Any:
            return jax.vjp(reverse(wanted), *arrays)

        out, pull = forward(*primals)
        saved, structure = jax.tree.flatten(pull)
        ups, shape = jax.tree.flatten(out)

        def pullback(*leaves: Any) -> Any:
            cotangents = shape.unflatten(leaves[len(saved) :])
            return _only(wanted, structure.unflatten(leaves[: len(saved)])(cotangents))

        program = jax.make_jaxpr(pullback)(*saved, *ups)
        dout = _linear.bind(*saved, *_only(wanted, tangents), pullback=program, saved=len(saved), back=False)
        return out, shape.unflatten(dout)

    function.defjvp(tangent, symbolic_zeros=True)
    return jax.jit(function, inline=True)


def _moves(x: Any, tangent: Any) -> bool:
    if x is None or isinstance(tangent, jax.custom_derivatives.SymbolicZero):
        return False
    return jnp.issubdtype(x.dtype, jnp.inexact)


# A pullback as a primitive that is linear in all arguments but the saved ones: the cotangents, or (not `back`) the
# tangents, of which it is then the transpose. Transposed it is again the pullback as it was written. Had JAX to
# transpose its transpose, half-precision matmuls would come out with an operand in float32, and each update of
# one slice of an array as a sum of two whole arrays.
_linear = Primitive("softmax_ext_linear")
_linear.multiple_results = True


def _run(*args: Any, pullback: Any, saved: int, back: bool) -> list[Any]:
    given, linear = args[:saved], args[saved:]

    @_checkpoint
    def pull(*cotangents: Any) -> Any:
        return jaxpr_as_fun(pullback)(*given, *cotangents)

    return list(pull(*linear) if back else jax.linear_transpose(pull, *pullback.in_avals[saved:])(list(linear)))


def _types(*avals: Any, **how: Any) -> Any:
    return jax.make_jaxpr(partial(_run, **how))(*avals).out_avals


def _jvp(primals: Any, tangents: Any, *, saved: int, **how: Any) -> Any:
    run, bind = partial(_run, saved=saved, **how), partial(_linear.bind, saved=saved, **how)
    out = bind(*primals)
    moved = [i for i, t in enumerate(tangents[:saved]) if type(t) is not ad.Zero and t.dtype != jax.dtypes.float0]
    terms = []
    if moved:

        def along(*some: Any) -> Any:
            args = dict(enumerate(primals)) | dict(zip(moved, some, strict=True))
            return run(*args.values())

        terms.append(jax.jvp(along, [primals[i] for i in moved], [tangents[i] for i in moved])[1])
    if any(type(t) is not ad.Zero for t in tangents[saved:]):
        terms.append(bind(*primals[:saved], *map(ad.instantiate_zeros, tangents[saved:])))
    if not terms:
        return out, [jnp.zeros_like(o) for o in out]
    return out, [reduce(jnp.add, each) for each in zip(*terms, strict=True)]


def _transpose(cotangents: Any, *args: Any, saved: int, back: bool, **how: Any) -> list[Any]:
    full = map(ad.instantiate_zeros, cotangents)
    out = _linear.bind(*args[:saved], *full, saved=saved, back=not back, **how)
    asked = [ad.is_undefined_primal(a) for a in args[saved:]]
    return [None] * saved + [ct if on else None for ct, on in zip(out, asked, strict=True)]


def _batch(args: Any, dims: Any, **how: Any) -> Any:
    out = jax.vmap(partial(_run, **how), in_axes=tuple(dims))(*args)
    return out, [0] * len(out)


_linear.def_impl(_run)
_linear.def_abstract_eval(_types)
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
mlir.register_lowering(_linear, mlir.lower_fun(_run, multiple_results=True), cacheable=False)


def _checkpoint(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.checkpoint(fn, prevent_cse=False)


def _only(wanted: tuple[bool, ...], values: Any) -> tuple[Any, ...]:
    return tuple(v for v, on in zip(values, wanted, strict=True) if on)
