"""JAX's calls by op, each under jit: ours, and the built-in's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_ops
from benchmarks.cases import Case
from benchmarks.timing import Call

VERSION = f"jax {jax.__version__}"
DTYPES = ("float32", "bfloat16", "float16")  # float64 is a mode of the whole process
INDEX_BYTES = 4


class Inputs:
    """One case's arrays."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.logits = jnp.asarray(case.logits(), case.dtype)
        self.target = jnp.asarray(case.target(), jnp.int32)

    @cached_property
    def sparse(self) -> tuple[jax.Array, jax.Array]:
        """Targets of K classes a row."""
        ids, probabilities = self.case.sparse()
        return jnp.asarray(ids, jnp.int32), jnp.asarray(probabilities)

    @cached_property
    def teacher(self) -> jax.Array:
        """Logits of a teacher."""
        return jnp.asarray(self.case.teacher(), self.case.dtype)

    @cached_property
    def upstream(self) -> jax.Array:
        """A gradient of the logits' shape."""
        return jnp.asarray(self.case.upstream(), self.case.dtype)


def numpy(answer: jax.Array) -> np.ndarray:
    """For `check`: NumPy knows bfloat16 as a stranger."""
    return np.asarray(answer.astype(jnp.float32))


def _compiled(function: Callable[..., Any], *arrays: Any) -> Call:
    """Arrays are arguments: as constants the compiler would fold them."""
    program = jax.jit(function)
    return Call(lambda: jax.block_until_ready(program(*arrays)))


def _forward(ours: Callable[..., Any], theirs: Callable[..., Any], on: Inputs) -> dict[str, Call]:
    def call(softmax: Callable[..., Any]) -> Call:
        return _compiled(lambda x: (softmax(x, axis=1),), on.logits)

    return {"ours": call(ours), "jax.nn": call(theirs)}


def _backward(ours: Callable[..., Any], theirs: Callable[..., Any], on: Inputs) -> dict[str, Call]:
    """The backward alone: what the forward keeps is an argument."""

    def call(softmax: Callable[..., Any]) -> Call:
        pullback = jax.jit(lambda x: jax.vjp(partial(softmax, axis=1), x)[1])(on.logits)
        return _compiled(lambda pullback, dy: pullback(dy), pullback, on.upstream)

    return {"ours": call(ours), "jax.nn": call(theirs)}


def _mean(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda x, t: loss(x, t, axis=1).mean()


_OURS = _mean(jax_ops.softmax_cross_entropy_with_integer_labels)
_OPTAX = _mean(optax.softmax_cross_entropy_with_integer_labels)


def _cross_entropy(on: Inputs) -> dict[str, Call]:
    def call(loss: Callable[..., Any]) -> Call:
        return _compiled(lambda x, t: (loss(x, t),), on.logits, on.target)

    return {"ours": call(_OURS), "optax": call(_OPTAX)}


def _value_and_grad(on: Inputs) -> dict[str, Call]:
    def call(loss: Callable[..., Any]) -> Call:
        return _compiled(jax.value_and_grad(loss), on.logits, on.target)

    return {"ours": call(_OURS), "optax": call(_OPTAX)}


def _dense(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Optax's way to such targets."""
    dense = jnp.put_along_axis(jnp.zeros(x.shape, x.dtype), pair[0], pair[1].astype(x.dtype), axis=1, inplace=False)
    return optax.softmax_cross_entropy(x, dense, axis=1).mean()


def _value_and_grad_sparse(on: Inputs) -> dict[str, Call]:
    """Beside the same logits' integer targets."""

    def call(loss: Callable[..., Any], target: Any, op: str | None = None) -> Call:
        return replace(_compiled(jax.value_and_grad(loss), on.logits, target), op=op)

    ours = partial(jax_ops.cross_entropy, axis=1)
    found = {"ours": call(ours, on.sparse), "optax, dense targets": call(_dense, on.sparse)}
    return {**found, "integer targets": call(ours, on.target, "cross_entropy_value_and_grad")}


def kl_div(student: jax.Array, teacher: jax.Array, axis: int = -1) -> jax.Array:
    """What everyone writes of two arrays of logits."""
    p, q = (jax.nn.log_softmax(z.astype(jnp.float32), axis) for z in (student, teacher))
    return (jnp.exp(q) * (q - p)).sum(axis).mean()


def optax_kl_div(student: jax.Array, teacher: jax.Array, axis: int = -1) -> jax.Array:
    """Optax's, of log-probabilities."""
    p, q = (jax.nn.log_softmax(z.astype(jnp.float32), axis) for z in (student, teacher))
    return optax.losses.kl_divergence_with_log_targets(p, q, axis=axis).mean()


def _of_teacher(timed: Callable[..., Any], on: Inputs) -> dict[str, Call]:
    def call(divergence: Callable[..., jax.Array]) -> Call:
        return _compiled(timed(partial(divergence, axis=1)), on.logits, on.teacher)

    return {"ours": call(jax_ops.divergence), "jax.nn": call(kl_div), "optax": call(optax_kl_div)}


def _alone(divergence: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, t: (divergence(x, t),)


CALLS: dict[str, Callable[[Any], dict[str, Call]]] = {
    "softmax": partial(_forward, jax_ops.softmax, jax.nn.softmax),
    "softmax_bwd": partial(_backward, jax_ops.softmax, jax.nn.softmax),
    "log_softmax": partial(_forward, jax_ops.log_softmax, jax.nn.log_softmax),
    "log_softmax_bwd": partial(_backward, jax_ops.log_softmax, jax.nn.log_softmax),
    "cross_entropy": _cross_entropy,
    "cross_entropy_value_and_grad": _value_and_grad,
    "divergence": partial(_of_teacher, _alone),
    "divergence_value_and_grad": partial(_of_teacher, jax.value_and_grad),
    "sparse_value_and_grad": _value_and_grad_sparse,
}
