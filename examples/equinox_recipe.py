"""An Equinox transformer whose head is fused with its loss: training forms no logits, inference does."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

import jax_ops


class Block(eqx.Module):
    """Causal attention and an MLP, each on normalised input and added to it."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    before: eqx.nn.RMSNorm
    between: eqx.nn.RMSNorm

    def __init__(self, width: int, heads: int, key: Array):
        first, second = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=first)
        self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=second)
        self.before, self.between = eqx.nn.RMSNorm(width), eqx.nn.RMSNorm(width)

    def __call__(self, x: Array) -> Array:
        """(length, width) to the same."""
        y = jax.vmap(self.before)(x)
        x = x + self.attention(y, y, y, mask=jnp.tri(len(x), dtype=bool))
        return x + jax.vmap(self.mlp)(jax.vmap(self.between)(x))


class Transformer(eqx.Module):
    """A language model with a head of its own; `embed.weight` in its place would tie the two."""

    embed: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, classes: int, width: int, heads: int, depth: int, key: Array):
        first, second, *others = jax.random.split(key, 2 + depth)
        self.embed = eqx.nn.Embedding(classes, width, key=first)
        self.blocks = [Block(width, heads, k) for k in others]
        self.norm = eqx.nn.RMSNorm(width)
        self.head = eqx.nn.Linear(width, classes, key=second)

    def hidden(self, tokens: Array) -> Array:
        """(length,) token ids to (length, width), what the head sees."""
        x = jax.vmap(self.embed)(tokens)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.norm)(x)

    def __call__(self, tokens: Array) -> Array:
        """Logits, for inference."""
        return jax.vmap(self.head)(self.hidden(tokens))


def next_token_loss(model: Transformer, tokens: Array) -> Array:
    """The mean loss of each token (batch, length) after the first, in nats; -100 marks what is not judged."""
    hidden = jax.vmap(model.hidden)(jnp.maximum(tokens, 0))
    # Outside vmap: one call for the whole batch, one mean over its judged tokens.
    return jax_ops.linear_cross_entropy(hidden, model.head.weight, tokens, linear_bias=model.head.bias, shift=1)


OPTIMIZER = optax.adamw(1e-3)


@eqx.filter_jit
def train_step(model: Transformer, state: optax.OptState, tokens: Array) -> tuple[Transformer, optax.OptState, Array]:
    """One step; the new model and state, and the loss before it."""
    loss, gradients = eqx.filter_value_and_grad(next_token_loss)(model, tokens)
    updates, state = OPTIMIZER.update(gradients, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state, loss


def start(classes: int, width: int = 64, heads: int = 4, depth: int = 2) -> tuple[Transformer, optax.OptState]:
    """A model and its optimizer's state."""
    model = Transformer(classes, width, heads, depth, jax.random.key(0))
    return model, OPTIMIZER.init(eqx.filter(model, eqx.is_array))
