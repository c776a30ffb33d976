"""The recipes for Flax NNX and Equinox: loss, gradients and memory against optax's loss on the same model's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_ops

nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")

from examples import equinox_recipe, nnx_recipe  # noqa: E402
from tests.judging.quick import QUICK  # noqa: E402

B, L, V = 4, 32, 4096
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, L))).at[0, -5:].set(-100)


def composed(logits: Any, tokens: Any) -> Any:
    kept = tokens[:, 1:] >= 0
    rows = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.maximum(tokens[:, 1:], 0))
    return jnp.where(kept, rows, 0.0).sum() / kept.sum()


def of_nnx() -> tuple[Any, Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(parameters, the recipe's loss of them, optax's, the losses that two training steps return)."""
    model, optimizer = nnx_recipe.start(V, width=16, heads=2, depth=1)
    graph, state = nnx.split(model)

    def steps() -> tuple[Any, Any]:
        return nnx_recipe.train_step(model, optimizer, TOKENS), nnx_recipe.train_step(model, optimizer, TOKENS)

    return (
        state,
        lambda p, t: nnx_recipe.next_token_loss(nnx.merge(graph, p), t),
        lambda p, t: composed(nnx.merge(graph, p)(jnp.maximum(t, 0)), t),
        steps,
    )


def of_equinox() -> tuple[Any, Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The same for Equinox."""
    model, state = equinox_recipe.start(V, width=16, heads=2, depth=1)
    parameters, static = eqx.partition(model, eqx.is_array)

    def steps() -> tuple[Any, Any]:
        after, then, loss = equinox_recipe.train_step(model, state, TOKENS)
        return loss, equinox_recipe.train_step(after, then, TOKENS)[2]

    return (
        parameters,
        lambda p, t: equinox_recipe.next_token_loss(eqx.combine(p, static), t),
        lambda p, t: composed(jax.vmap(eqx.combine(p, static))(jnp.maximum(t, 0)), t),
        steps,
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [of_nnx, of_equinox])
def test_loss_gradients_and_memory(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, ours, theirs, steps = recipe()
    head = jax_ops.linear_cross_entropy
    # A head this small would be one chunk; the recipe leaves the size to the library.
    monkeypatch.setattr(jax_ops, "linear_cross_entropy", lambda *a, **k: head(*a, **k, chunk_size=16))
    found = []
    for loss in (ours, theirs):
        compiled = jax.jit(jax.value_and_grad(loss), **QUICK).lower(parameters, TOKENS).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        found.append((*compiled(parameters, TOKENS), memory.temp_size_in_bytes))
    (loss, gradients, fused), (truth, true_gradients, whole) = found
    np.testing.assert_allclose(loss, truth, rtol=1e-6)
    pairs = list(zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True))
    top = max(float(jnp.abs(b).max()) for _, b in pairs)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()) + 1e-6 * top)
    logits = B * L * V * 4
    assert whole >= logits, "the composed loss keeps the logits"
    assert fused < logits / 2
    before, after = steps()
    np.testing.assert_allclose(before, truth, rtol=1e-6)
    assert after < before
