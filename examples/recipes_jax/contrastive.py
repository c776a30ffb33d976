"""CLIP's contrastive loss in JAX: the other side's embeddings are the head, and the temperature is learned.

    python -m examples.recipes_jax.contrastive

`logit_scale` may be an array with a gradient, here one number. The (N, N) similarities exist by the chunk, once for
each direction.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jax_ops
from examples.beside import beside

ROWS, WIDTH = 64, 24


def loss_of(images: Array, texts: Array, log_scale: Array) -> Array:
    """The mean of both directions' losses; the i-th image and the i-th text belong together."""
    pairs, scale = jnp.arange(len(images)), jnp.exp(log_scale)
    of_images = jax_ops.linear_cross_entropy(images, texts, pairs, logit_scale=scale)
    of_texts = jax_ops.linear_cross_entropy(texts, images, pairs, logit_scale=scale)
    return 0.5 * (of_images + of_texts)


def plain(images: Array, texts: Array, log_scale: Array) -> Array:
    """The same by all similarities."""
    pairs, logits = jnp.arange(len(images)), jnp.exp(log_scale) * images @ texts.T
    both = [optax.losses.softmax_cross_entropy_with_integer_labels(z, pairs).mean() for z in (logits, logits.T)]
    return 0.5 * (both[0] + both[1])


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    images = jax.random.normal(keys[0], (ROWS, WIDTH))
    texts = images + jax.random.normal(keys[1], (ROWS, WIDTH))
    found = []
    for way in (loss_of, plain):

        def of(images: Array, texts: Array, log_scale: Array, way=way) -> Array:
            unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts)]
            return way(*unit, log_scale)

        loss, gradients = jax.jit(jax.value_and_grad(of, (0, 1, 2)))(images, texts, jnp.asarray(2.0))
        found.append((loss, *gradients))
    beside("a learned temperature", *found)


if __name__ == "__main__":
    main()
