"""A step of direct preference optimisation (DPO) in JAX: log-probabilities of whole answers from the fused head.

    python -m examples.recipes_jax.preferences

Labels of the prompt and of padding are -100: their log-probability is 0 in `stats`, so an answer's is the sum over its
row. The reference model's are constants.
"""

import jax
import jax.numpy as jnp
from jax import Array

import jax_ops
from examples.beside import beside

PAIRS, LENGTH, WIDTH, VOCAB, BETA = 3, 12, 24, 500, 0.1


def answers(hidden: Array, head: Array, labels: Array) -> Array:
    """log p of each sequence's labels, one position ahead."""
    _, stats = jax_ops.linear_cross_entropy(hidden, head, labels, shift=1, reduction="none", stats=("logprob",))
    return stats["logprob"].sum(-1)


def plain_answers(hidden: Array, head: Array, labels: Array) -> Array:
    """The same by all log-probabilities."""
    log_p, labels = jax.nn.log_softmax((hidden @ head.T)[:, :-1]), labels[:, 1:]
    each = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return each.sum(-1, where=labels != -100)


def loss_of(log_p: Array, reference: Array) -> Array:
    """DPO's loss of chosen answers (the first half) and rejected ones (the second)."""
    chosen, rejected = jnp.split(log_p - reference, 2)
    return -jax.nn.log_sigmoid(BETA * (chosen - rejected)).mean()


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2 * PAIRS, LENGTH, WIDTH))
    head = jax.random.normal(keys[1], (VOCAB, WIDTH)) * WIDTH**-0.5
    labels = jax.random.randint(keys[2], (2 * PAIRS, LENGTH), 0, VOCAB)
    labels = labels.at[:, :4].set(-100).at[1, -3:].set(-100)  # the prompt, a shorter answer
    reference = answers(hidden + 0.3 * jax.random.normal(keys[3], hidden.shape), head, labels)
    found = []
    for way in (answers, plain_answers):
        of = lambda hidden, head, way=way: loss_of(way(hidden, head, labels), reference)  # noqa: E731
        loss, gradients = jax.jit(jax.value_and_grad(of, (0, 1)))(hidden, head)
        found.append((loss, *gradients))
    beside("DPO", *found)


if __name__ == "__main__":
    main()
