"""JAX's calls of the linear head with its loss and the gradients of input and linear_weight, each under jit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jax_ops
from benchmarks.heads import PAIR, HeadCase
from benchmarks.jax_calls import VERSION, kl_div, numpy, optax_kl_div
from benchmarks.table import OURS_SAMPLED
from benchmarks.timing import Call

__all__ = ["CALLS", "DTYPES", "LOSSES", "VERSION", "Inputs", "call", "compiled", "limit", "numpy", "workspace_bytes"]

DTYPES = ("float32", "bfloat16")
Loss = Callable[..., Any]  # of input, linear_weight, targets


class Inputs:
    """One case's arrays."""

    def __init__(self, case: HeadCase) -> None:
        self.case = case
        self.input = jnp.asarray(case.input(), case.dtype)
        self.linear_weight = jnp.asarray(case.linear_weight(), case.dtype)
        self.target = jnp.asarray(case.target(), jnp.int32)

    @cached_property
    def teacher(self) -> tuple[jax.Array, jax.Array]:
        """A teacher's input and weight."""
        y, u = (jnp.asarray(a, self.case.dtype) for a in self.case.teacher())
        return y, u

    @cached_property
    def sparse(self) -> tuple[jax.Array, jax.Array]:
        """Targets of K classes a row."""
        ids, probabilities = self.case.sparse()
        return jnp.asarray(ids, jnp.int32), jnp.asarray(probabilities)


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


def call(loss: Loss, on: Inputs, *others: Any, op: str | None = None) -> Call:
    """Loss and gradients; `others` in the place of the target."""
    arrays = (on.input, on.linear_weight, *(others or (on.target,)))
    program = compiled(loss, *arrays)

    def run() -> tuple[jax.Array, ...]:
        value, gradients = jax.block_until_ready(program(*arrays))
        return value, *gradients

    def workspace(frozen: bool) -> int:
        return workspace_bytes(compiled(loss, *arrays, frozen=True) if frozen else program)

    return Call(run, workspace=workspace, op=op)


def _head(on: Inputs) -> dict[str, Call]:
    def sampled(x: jax.Array, w: jax.Array, target: jax.Array, key: jax.Array) -> Any:
        return jax_ops.linear_cross_entropy(x, w, target, grad_samples=on.case.kept, key=key)

    calls = {name: call(loss, on) for name, loss in LOSSES.items()}
    key = jax.random.key(0)
    return {**calls, OURS_SAMPLED: call(sampled, on, on.target, key, op="linear_cross_entropy, sampled")}


def _dense(x: jax.Array, linear_weight: jax.Array, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Optax's way to targets of K classes a row."""
    z = x @ linear_weight.T
    dense = jnp.put_along_axis(jnp.zeros(z.shape, z.dtype), pair[0], pair[1].astype(z.dtype), axis=1, inplace=False)
    return optax.softmax_cross_entropy(z, dense).mean()


def _sparse(on: Inputs) -> dict[str, Call]:
    """Beside the same head's integer targets."""
    ours = jax_ops.linear_cross_entropy
    found = {"ours": call(ours, on, on.sparse), "optax, dense targets": call(_dense, on, on.sparse)}
    return {**found, "integer targets": call(ours, on, op="linear_cross_entropy")}


def _at(on: Inputs) -> dict[str, Call]:
    arrays = (on.input, on.linear_weight, jnp.asarray(on.case.at(), jnp.int32))

    def gathered(x: jax.Array, w: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x @ w.T, ids, 1).astype(jnp.float32)

    def one(program: Any) -> Call:
        return Call(lambda: (jax.block_until_ready(program(*arrays)),))

    return {"ours": one(jax.jit(jax_ops.linear_at)), "x @ W.T, gathered": one(jax.jit(gathered))}


def _pair(on: Inputs) -> dict[str, Call]:
    """Two heads: the loss of another target, whose gradients are of the same arguments."""

    def joined(divergence: Loss) -> Loss:
        return lambda x, w, y, u: divergence(x @ w.T, y @ u.T)

    losses: dict[str, Loss] = {
        "ours": jax_ops.linear_divergence,
        "ours, lean": partial(jax_ops.linear_divergence, memory="lean"),
        "jax.nn(x @ W.T)": joined(kl_div),
        "optax(x @ W.T)": joined(optax_kl_div),
    }
    return {name: call(loss, on, *on.teacher) for name, loss in losses.items()}


def matmuls(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The three of a head and its gradients, bare."""
    z = x @ w.T
    return z @ w, z.T @ x


def limit(on: Inputs, op: str = "linear_cross_entropy") -> Call:
    """The yardstick: the matmuls alone; a teacher's logits are one more."""
    program, teacher = jax.jit(matmuls), jax.jit(lambda y, u: y @ u.T)

    def run() -> None:
        if op == PAIR:
            jax.block_until_ready(teacher(*on.teacher))
        jax.block_until_ready(program(on.input, on.linear_weight))

    return Call(run)


CALLS: dict[str, Callable[[Any], dict[str, Call]]] = {
    "linear_cross_entropy": _head,
    "linear_cross_entropy_sparse": _sparse,
    "linear_at": _at,
    PAIR: _pair,
}
