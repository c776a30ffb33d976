"""Distillation from what a teacher's server sends: log-probabilities of K classes a token, and none of the others.

    python -m examples.recipes_jax.teacher_classes

A pair (ids, probabilities), K last, is a target. Slots of padding have the id -100 and count nothing, whatever stands
beside them; a token of such slots alone is no row. `tail` puts what the teacher gave to all other classes into one
bucket: its own share of the student's probability comes from `stats=("logprob",)`, log p at the K ids.
"""

import jax
import jax.numpy as jnp
from jax import Array

import jax_ops
from examples.beside import beside

ROWS, WIDTH, VOCAB, K = 48, 24, 500, 8


def sparse(hidden: Array, head: Array, ids: Array, log_q: Array) -> Array:
    """Cross-entropy with the teacher's K classes."""
    return jax_ops.linear_cross_entropy(hidden, head, (ids, jnp.exp(log_q)))


def tail(hidden: Array, head: Array, ids: Array, log_q: Array) -> Array:
    """The divergence KL(teacher, student) of K classes and a bucket of all others."""
    pair = (ids, jnp.exp(log_q))
    _, stats = jax_ops.linear_cross_entropy(hidden, head, pair, reduction="none", stats=("logprob",))
    return with_bucket(stats["logprob"], ids, log_q)


def with_bucket(log_p: Array, ids: Array, log_q: Array) -> Array:
    """The mean over the tokens of K classes' divergence and the bucket's."""
    named = ids != -100
    log_p, log_q = (jnp.where(named, x, 0.0) for x in (log_p, log_q))
    p, q = (jnp.where(named, jnp.exp(x), 0.0) for x in (log_p, log_q))
    log_p_other, log_q_other = (jnp.log1p(-jnp.minimum(x.sum(-1), 1 - 1e-6)) for x in (p, q))
    rows = (q * (log_q - log_p)).sum(-1) + jnp.exp(log_q_other) * (log_q_other - log_p_other)
    return jnp.mean(rows, where=named.any(-1))


def plain_sparse(hidden: Array, head: Array, ids: Array, log_q: Array) -> Array:
    """`sparse` by a dense target."""
    named, each = ids != -100, jnp.arange(len(ids))[:, None]
    dense = jnp.zeros((len(ids), VOCAB)).at[each, ids].add(jnp.where(named, jnp.exp(log_q), 0.0))
    return jnp.mean(-(dense * jax.nn.log_softmax(hidden @ head.T)).sum(-1), where=named.any(-1))


def plain_tail(hidden: Array, head: Array, ids: Array, log_q: Array) -> Array:
    """`tail` by all log-probabilities."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(hidden @ head.T), jnp.maximum(ids, 0), -1)
    return with_bucket(log_p, ids, log_q)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (ROWS, WIDTH))
    head = jax.random.normal(keys[1], (VOCAB, WIDTH)) * WIDTH**-0.5
    log_q, ids = jax.lax.top_k(jax.nn.log_softmax(2 * jax.random.normal(keys[2], (ROWS, VOCAB))), K)
    unsent = jax.random.bernoulli(keys[3], 0.2, (ROWS, K)).at[:4].set(True)  # a server sends fewer than K; padding
    ids, log_q = jnp.where(unsent, -100, ids), jnp.where(unsent, jnp.nan, log_q)
    for name, ways in (("K classes", (sparse, plain_sparse)), ("K classes and a bucket", (tail, plain_tail))):
        answers = []
        for way in ways:
            loss, gradients = jax.jit(jax.value_and_grad(way, (0, 1)))(hidden, head, ids, log_q)
            answers.append((loss, *gradients))
        beside(name, *answers)


if __name__ == "__main__":
    main()
