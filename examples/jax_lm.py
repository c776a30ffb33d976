"""The language model in JAX: Equinox and optax."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jax_ops
from examples.recipe import CHUNKS, Recipe, Weights


def _built_in(hidden: Array, weight: Array, target: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ weight.T, target).mean()


def _cross_entropy(hidden: Array, weight: Array, target: Array) -> Array:
    return jax_ops.cross_entropy(hidden @ weight.T, target)


def _linear_cross_entropy(hidden: Array, weight: Array, target: Array) -> Array:
    return jax_ops.linear_cross_entropy(hidden, weight, target, chunk_size=-(-len(target) // CHUNKS))


# Head and loss: the last hidden states (N, D), the head's weight (V, D) and the targets (N,) to nats.
Loss = Callable[[Array, Array, Array], Array]
LOSSES: dict[str, Loss] = {
    "built-in": _built_in,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}


class LM(eqx.Module):
    """Embedding, causal attention, MLP, and the embedding again as the head."""

    embedding: Array
    position: Array
    qkv: Array
    out: Array
    up: Array
    down: Array
    heads: int = eqx.field(static=True)

    def __init__(self, weights: Weights, heads: int):
        self.heads = heads
        self.embedding, self.position, self.qkv, self.out, self.up, self.down = (
            jnp.asarray(weights[name]) for name in ("embedding", "position", "qkv", "out", "up", "down")
        )

    def __call__(self, tokens: Array) -> Array:
        """(batch, length) token ids to (batch, length, D), what the head sees."""
        x = self.embedding[tokens] + self.position
        heads = (_norm(x) @ self.qkv.T).reshape(*tokens.shape, 3, self.heads, -1)
        q, k, v = (heads[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.reshape(x.shape) @ self.out.T
        x = x + jax.nn.gelu(_norm(x) @ self.up.T, approximate=False) @ self.down.T
        return _norm(x)


def _norm(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


class Training:
    """A model, its optimizer and its loss."""

    def __init__(self, recipe: Recipe, loss: str):
        self.model = LM(recipe.initial_weights(), recipe.heads)
        optimizer = optax.sgd(recipe.learning_rate, recipe.momentum)
        self.state = optimizer.init(eqx.filter(self.model, eqx.is_array))

        def objective(model: LM, batch: Array) -> Array:
            hidden = model(batch[:, :-1]).reshape(-1, recipe.width)
            return LOSSES[loss](hidden, model.embedding, batch[:, 1:].reshape(-1))

        @partial(jax.jit, donate_argnums=(0, 1))  # in place, as PyTorch's optimizer
        def step(model: LM, state: optax.OptState, batch: Array) -> tuple[LM, optax.OptState, Array]:
            value, gradient = jax.value_and_grad(objective)(model, batch)
            updates, state = optimizer.update(gradient, state)
            return eqx.apply_updates(model, updates), state, value

        self._step = step

    def step(self, windows: np.ndarray) -> float:
        """Trains on one batch; returns its loss in nats once that is done."""
        self.model, self.state, value = self._step(self.model, self.state, jnp.asarray(windows))
        return float(value)

    def weights(self) -> Weights:
        """The weights as they are now."""
        named = ((field.name, getattr(self.model, field.name)) for field in fields(self.model))
        return {name: np.asarray(weight) for name, weight in named if eqx.is_array(weight)}
