"""JAX's calls of the linear head with its loss and the gradients of input and linear_weight, each under jit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jax_ops
from benchmarks.heads import HeadCase
from benchmarks.jax_calls import VERSION, numpy
from benchmarks.timing import Call

__all__ = ["CALLS", "DTYPES", "LOSSES", "VERSION", "Inputs", "call", "compiled", "limit", "numpy", "workspace_bytes"]

DTYPES = ("float32", "bfloat16")
Loss = Callable[[jax.Array, jax.Array, jax.Array], Any]


class Inputs:
    """One case's arrays."""

    def __init__(self, case: HeadCase) -> None:
        self.case = case
        self.input = jnp.asarray(case.input(), case.dtype)
        self.linear_weight = jnp.asarray(case.linear_weight(), case.dtype)
        self.target = jnp.asarray(case.target(), jnp.int32)


def built_in(x: jax.Array, linear_weight: jax.Array, target: jax.Array) -> jax.Array:
    """What everyone writes."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ linear_weight.T, target).mean()


LOSSES: dict[str, Loss] = {
    "ours": jax_ops.linear_cross_entropy,
    "ours, lean": partial(jax_ops.linear_cross_entropy, memory="lean"),
    "optax(x @ W.T)": built_in,
}


def compiled(loss: Loss, *arrays: Any, frozen: bool = False) -> Any:
    """Loss and gradients as one program, of arrays or of their shapes."""
    return jax.jit(jax.value_and_grad(loss, (0,) if frozen else (0, 1))).lower(*arrays).compile()


def workspace_bytes(program: Any) -> int:
    """What the compiler set aside beside arguments and results."""
    return program.memory_analysis().temp_size_in_bytes


def call(loss: Loss, on: Inputs) -> Call:
    """Loss and gradients."""
    arrays = (on.input, on.linear_weight, on.target)
    program = compiled(loss, *arrays)

    def run() -> tuple[jax.Array, ...]:
        value, gradients = jax.block_until_ready(program(*arrays))
        return value, *gradients

    def workspace(frozen: bool) -> int:
        return workspace_bytes(compiled(loss, *arrays, frozen=True) if frozen else program)

    return Call(run, workspace=workspace)


def _head(on: Inputs) -> dict[str, Call]:
    return {name: call(loss, on) for name, loss in LOSSES.items()}


def matmuls(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The three of a head and its gradients, bare."""
    z = x @ w.T
    return z @ w, z.T @ x


def limit(on: Inputs) -> Call:
    """The yardstick: the three matmuls alone."""
    program = jax.jit(matmuls)
    return Call(lambda: jax.block_until_ready(program(on.input, on.linear_weight)))


CALLS: dict[str, Callable[[Any], dict[str, Call]]] = {"linear_cross_entropy": _head}
