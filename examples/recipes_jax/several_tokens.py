"""Multi-token prediction in JAX: states of several depths, one head, the k-th judged k positions ahead.

    python -m examples.recipes_jax.several_tokens

`shift=k` compares position i with the token k further on, so no depth slices its hidden states or its labels, and
each has one chunk of logits at a time.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jax_ops
from examples.beside import beside

BATCH, LENGTH, WIDTH, VOCAB, DEPTHS, DECAY = 2, 16, 24, 500, 3, 0.5


def loss_of(hidden: list[Array], head: Array, tokens: Array) -> Array:
    """The depths' mean losses, each weighing less than the one before."""
    losses = [jax_ops.linear_cross_entropy(h, head, tokens, shift=k) for k, h in enumerate(hidden, 1)]
    return jnp.stack([DECAY**k * loss for k, loss in enumerate(losses)]).sum()


def plain(hidden: list[Array], head: Array, tokens: Array) -> Array:
    """The same by every depth's logits."""
    losses = []
    for k, h in enumerate(hidden, 1):
        labels, kept = jnp.maximum(tokens[:, k:], 0), tokens[:, k:] != -100
        each = optax.losses.softmax_cross_entropy_with_integer_labels((h @ head.T)[:, :-k], labels)
        losses.append(jnp.mean(each, where=kept))
    return jnp.stack([DECAY**k * loss for k, loss in enumerate(losses)]).sum()


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = list(jax.random.normal(keys[0], (DEPTHS, BATCH, LENGTH, WIDTH)))
    head = jax.random.normal(keys[1], (VOCAB, WIDTH)) * WIDTH**-0.5
    tokens = jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCAB).at[1, -4:].set(-100)  # padding
    found = []
    for way in (loss_of, plain):
        loss, (of_hidden, of_head) = jax.jit(jax.value_and_grad(way, (0, 1)))(hidden, head, tokens)
        found.append((loss, *of_hidden, of_head))
    beside("several tokens", *found)


if __name__ == "__main__":
    main()
