"""A Flax NNX transformer whose head is fused with its loss: training forms no logits, inference does."""

import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import jax_ops


class Block(nnx.Module):
    """Causal attention and an MLP, each on normalised input and added to it."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
        self.before, self.between = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        """(batch, length, width) to the same."""
        x = x + self.attention(self.before(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.between(x))))


class Transformer(nnx.Module):
    """A language model with a head of its own; `embed.embedding` in its place would tie the two."""

    def __init__(self, classes: int, width: int, heads: int, depth: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(classes, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, use_bias=False, rngs=rngs)

    def hidden(self, tokens: Array) -> Array:
        """(batch, length) token ids to (batch, length, width), what the head sees."""
        x, mask = self.embed(tokens), nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def __call__(self, tokens: Array) -> Array:
        """Logits, for inference."""
        return self.head(self.hidden(tokens))


def next_token_loss(model: Transformer, tokens: Array) -> Array:
    """The mean loss of each token after the first, in nats; -100 marks what is not judged."""
    hidden, head = model.hidden(jnp.maximum(tokens, 0)), model.head.kernel[...].T  # Flax keeps (D, V)
    return jax_ops.linear_cross_entropy(hidden, head, tokens, shift=1)


@nnx.jit
def train_step(model: Transformer, optimizer: nnx.Optimizer, tokens: Array) -> Array:
    """One step in place; the loss before it."""
    loss, gradients = nnx.value_and_grad(next_token_loss)(model, tokens)
    optimizer.update(model, gradients)
    return loss


def start(classes: int, width: int = 64, heads: int = 4, depth: int = 2) -> tuple[Transformer, nnx.Optimizer]:
    """A model and its optimizer."""
    model = Transformer(classes, width, heads, depth, nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
