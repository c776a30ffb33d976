"""JAX ops under jax.disable_jit(): the same numbers, in every derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import jax_ops

X = jnp.linspace(-2.0, 3.0, 12).reshape(3, 4)
T = jnp.array([3, -100, 0])
W = jnp.linspace(-1.0, 1.0, 20).reshape(5, 4)


def _head(x: Any, memory: Any = "fast", **options: Any) -> Any:
    return jax_ops.linear_cross_entropy(x, W, T, memory=memory, **options)


CALLS: dict[str, Callable[[], Any]] = {
    "softmax": lambda: jax_ops.softmax(X),
    "softmax, jacobian": lambda: jax.jacfwd(jax_ops.softmax)(X[0]),
    "log_softmax, hessian": lambda: jax.hessian(lambda x: jax_ops.log_softmax(x)[0])(X[0]),
    "cross_entropy": lambda: jax_ops.cross_entropy(X, T, label_smoothing=0.1, stats=("entropy",)),
    "cross_entropy, gradient": lambda: jax.grad(lambda x: jax_ops.cross_entropy(x, T))(X),
    "cross_entropy, mapped": lambda: jax.vmap(jax_ops.cross_entropy)(X, jnp.abs(T) % 4),
    "head": lambda: jax.value_and_grad(_head)(X),
    "head in chunks": lambda: jax.value_and_grad(lambda x: _head(x, chunk_size=2))(X),
    "lean head": lambda: jax.value_and_grad(lambda x: _head(x, "lean", chunk_size=2))(X),
    "head, second derivative": lambda: jax.jvp(jax.grad(_head), (X,), (X,))[1],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.long
def test_without_jit(name: str) -> None:
    with jax.disable_jit():
        found = jax.tree.leaves(CALLS[name]())
    for one, other in zip(found, jax.tree.leaves(CALLS[name]()), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_soft_targets_without_mass_of_their_own(memory: str) -> None:
    """With label_smoothing 1 the loss does not depend on them: zeros, in every mode."""
    y = jnp.full((3, 5), 0.2)

    def loss(y: Any) -> Any:
        return jax_ops.linear_cross_entropy(X, W, y, label_smoothing=1.0, memory=memory)  # pyright: ignore[reportArgumentType]

    np.testing.assert_array_equal(jax.grad(loss)(y), jnp.zeros_like(y))
    assert jax.jvp(loss, (y,), (y,))[1] == 0
    np.testing.assert_array_equal(jax.jit(jax.hessian(loss))(y), jnp.zeros((3, 5, 3, 5)))
