"""One public function for both modes of differentiation, from one analytic pullback."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp


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

        @_checkpoint
        def pullback(cotangents: Any) -> Any:
            return _only(wanted, pull(cotangents))

        (dout,) = jax.linear_transpose(pullback, out)(_only(wanted, tangents))
        return out, dout

    function.defjvp(tangent, symbolic_zeros=True)
    return jax.jit(function, inline=True)


def _moves(x: Any, tangent: Any) -> bool:
    frozen = x is None or isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    return not frozen and jnp.issubdtype(x.dtype, jnp.inexact)


def _checkpoint(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.checkpoint(fn, prevent_cse=False)


def _only(wanted: tuple[bool, ...], values: Any) -> tuple[Any, ...]:
    return tuple(v for v, on in zip(values, wanted, strict=True) if on)
