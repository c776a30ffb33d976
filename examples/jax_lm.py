"""The language model in JAX: Equinox and optax."""

from collections.abc import Callable, Iterator
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jax_ops
from examples.recipe import Recipe, Weights


def _built_in(logits: Array, target: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


Loss = Callable[[Array, Array], Array]
LOSSES: dict[str, Loss] = {"built-in": _built_in, "ours": jax_ops.cross_entropy}


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
        """(batch, length) token ids to (batch, length, V) logits of the next ones."""
        x = self.embedding[tokens] + self.position
        heads = (_norm(x) @ self.qkv.T).reshape(*tokens.shape, 3, self.heads, -1)
        q, k, v = (heads[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.reshape(x.shape) @ self.out.T
        x = x + jax.nn.gelu(_norm(x) @ self.up.T, approximate=False) @ self.down.T
        return _norm(x) @ self.embedding.T


def _norm(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def train(recipe: Recipe, tokens: np.ndarray, loss: str) -> Iterator[float]:
    """Trains; yields the loss in nats of each step once that step is done."""
    cross_entropy = LOSSES[loss]
    model = LM(recipe.initial_weights(), recipe.heads)
    optimizer = optax.sgd(recipe.learning_rate, recipe.momentum)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    def objective(model: LM, batch: Array) -> Array:
        logits = model(batch[:, :-1])
        return cross_entropy(logits.reshape(-1, recipe.vocab), batch[:, 1:].reshape(-1))

    @partial(jax.jit, donate_argnums=(0, 1))  # in place, as PyTorch's optimizer
    def step(model: LM, state: optax.OptState, batch: Array) -> tuple[LM, optax.OptState, Array]:
        value, gradient = jax.value_and_grad(objective)(model, batch)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(model, updates), state, value

    for windows in recipe.batches(tokens):
        model, state, value = step(model, state, jnp.asarray(windows))
        yield float(value)
