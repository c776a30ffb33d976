"""Log-probabilities renormalised on the classes that a sampler kept, without the logits of the others.

    python -m examples.recipes_jax.kept_set

A token sampled among the top k or the top p of a row was drawn from what was kept there. Its ratio of importance is of
log-probabilities renormalised on that set: `log_softmax` of `linear_at`. Rows with fewer classes are filled with -100,
which `linear_at` makes -inf.
"""

import jax
import jax.numpy as jnp
from jax import Array

import jax_ops
from examples.beside import beside

ROWS, WIDTH, VOCAB, K, TEMPERATURE = 48, 24, 500, 16, 0.8


def sampled(hidden: Array, head: Array, kept: Array, tokens: Array) -> Array:
    """log p of each token among the classes kept (rows, K)."""
    log_p = jax_ops.log_softmax(jax_ops.linear_at(hidden, head, kept) / TEMPERATURE)
    place = (kept == tokens[:, None]).argmax(-1, keepdims=True)
    return jnp.take_along_axis(log_p, place, -1)[:, 0]


def plain_sampled(hidden: Array, head: Array, kept: Array, tokens: Array) -> Array:
    """The same by all logits, those not kept at -inf."""
    logits = hidden @ head.T / TEMPERATURE
    named = jnp.zeros(logits.shape, int).at[jnp.arange(len(kept))[:, None], kept].add(kept != -100) > 0
    log_p = jax.nn.log_softmax(jnp.where(named, logits, -jnp.inf))
    return jnp.take_along_axis(log_p, tokens[:, None], -1)[:, 0]


def loss_of(log_p: Array, old: Array, advantage: Array) -> Array:
    """The policy gradient's surrogate."""
    return -(jnp.exp(log_p - old) * advantage).mean()


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 6)
    hidden = jax.random.normal(keys[0], (ROWS, WIDTH))
    head = jax.random.normal(keys[1], (VOCAB, WIDTH)) * WIDTH**-0.5
    advantage = jax.random.uniform(keys[2], (ROWS,))
    # The sampler's step: its own weights, top k and top p.
    logits = (hidden + 0.1 * jax.random.normal(keys[3], hidden.shape)) @ head.T / TEMPERATURE
    p, kept = jax.lax.top_k(jax.nn.softmax(logits), K)
    kept = jnp.where(p.cumsum(-1) - p > 0.5, -100, kept)
    draws = jax.random.categorical(keys[4], jnp.where(kept == -100, -jnp.inf, jnp.log(p)))
    tokens = jnp.take_along_axis(kept, draws[:, None], -1)[:, 0]
    old = plain_sampled(hidden, head, kept, tokens) + 0.1 * jax.random.normal(keys[5], (ROWS,))
    found = []
    for way in (sampled, plain_sampled):
        of = lambda hidden, head, way=way: loss_of(way(hidden, head, kept, tokens), old, advantage)  # noqa: E731
        loss, gradients = jax.jit(jax.value_and_grad(of, (0, 1)))(hidden, head)
        found.append((loss, *gradients))
    beside("a kept set", *found)


if __name__ == "__main__":
    main()
