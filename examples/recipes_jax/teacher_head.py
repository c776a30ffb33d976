"""Distillation from a teacher's head: the divergence of two heads whose logits are never stored.

    python -m examples.recipes_jax.teacher_head

Hinton's loss: T^2 times the forward divergence at temperature T, beside the labels' own loss. The teacher may have
another width; its logits exist by the chunk, as the student's. A token without a label (-100) counts in neither.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jax_ops
from examples.beside import beside

BATCH, LENGTH, WIDTH, TEACHER_WIDTH, VOCAB = 2, 16, 24, 32, 500
TEMPERATURE, SHARE = 2.0, 0.75


def loss_of(student: Array, head: Array, teacher: Array, teacher_head: Array, labels: Array) -> Array:
    """The loss of hidden states (batch, length, width), labels one position ahead."""
    divergence = jax_ops.linear_divergence(
        student,
        head,
        teacher,
        teacher_head,
        logit_scale=1 / TEMPERATURE,
        teacher_scale=1 / TEMPERATURE,
        keep=labels != -100,
        shift=1,
    )
    own = jax_ops.linear_cross_entropy(student, head, labels, shift=1)
    return SHARE * TEMPERATURE**2 * divergence + (1 - SHARE) * own


def plain(student: Array, head: Array, teacher: Array, teacher_head: Array, labels: Array) -> Array:
    """The same by both arrays of logits."""
    logits, others = ((x @ w.T)[:, :-1] for x, w in ((student, head), (teacher, teacher_head)))
    labels, kept = jnp.maximum(labels[:, 1:], 0), labels[:, 1:] != -100
    log_p, log_q = (jax.nn.log_softmax(z / TEMPERATURE) for z in (logits, others))
    each = optax.losses.kl_divergence_with_log_targets(log_p, log_q)
    own = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(SHARE * TEMPERATURE**2 * each + (1 - SHARE) * own, where=kept)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    student = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH))
    head = jax.random.normal(keys[1], (VOCAB, WIDTH)) * WIDTH**-0.5
    teacher = jax.random.normal(keys[2], (BATCH, LENGTH, TEACHER_WIDTH))
    teacher_head = jax.random.normal(keys[3], (VOCAB, TEACHER_WIDTH)) / 4
    labels = jax.random.randint(keys[4], (BATCH, LENGTH), 0, VOCAB).at[0, :5].set(-100)
    answers = []
    for way in (loss_of, plain):
        loss, gradients = jax.jit(jax.value_and_grad(way, (0, 1)))(student, head, teacher, teacher_head, labels)
        answers.append((loss, *gradients))
    beside("a teacher's head", *answers)


if __name__ == "__main__":
    main()
