"""A Flax NNX training loop: the loss of the head's kernel, without the logits.

    python -m examples.flax_training

Flax keeps a linear layer's kernel as (D, V); `linear_cross_entropy` takes (V, D), so it is passed `kernel.T`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_ops

VOCAB, WIDTH, LENGTH, BATCH, STEPS = 256, 32, 32, 8, 30


class LM(nnx.Module):
    """A causal convolution over embedded tokens, and a head of its own."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.mix = nnx.Conv(WIDTH, WIDTH, kernel_size=(4,), padding="CAUSAL", rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(batch, length) token ids to (batch, length, width), what the head sees."""
        x = self.embedding(tokens)
        return self.norm(x + nnx.gelu(self.mix(x)))


def loss_of(model: LM, tokens: jax.Array) -> jax.Array:
    """The next token's mean loss in nats."""
    kernel, bias = model.head.kernel[...], model.head.bias
    assert bias is not None
    return jax_ops.linear_cross_entropy(model(tokens), kernel.T, tokens, linear_bias=bias[...], shift=1)


@nnx.jit
def step(model: LM, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    """Train on one batch."""
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, gradients)
    return loss


def main() -> None:
    model = LM(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    losses, tokens = [], jnp.zeros((BATCH, LENGTH), jnp.int32)
    for _ in range(STEPS):
        tokens = jnp.asarray((rng.integers(0, VOCAB, (BATCH, 1)) + np.arange(LENGTH)) % VOCAB)
        losses.append(float(step(model, optimizer, tokens)))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")
    assert losses[-1] < losses[0] / 2

    # The same number by logits, which is what it replaces.
    @nnx.jit
    def both(model: LM, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.head(model(tokens))[:, :-1]
        theirs = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return loss_of(model, tokens), theirs

    np.testing.assert_allclose(*both(model, tokens), rtol=1e-4)


if __name__ == "__main__":
    main()
