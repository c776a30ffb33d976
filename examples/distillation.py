"""Distillation in JAX: a student learns a teacher's probabilities at a temperature, beside the true classes.

    python -m examples.distillation

Soft targets have the logits' shape, and need not sum to 1. The temperature is `logit_scale`, a Python number, so no
scaled copy of the student's logits is made.
"""

import jax
import numpy as np

import jax_ops

ROWS, CLASSES, TEMPERATURE, SHARE = 128, 100, 4.0, 0.9


def loss_of(student: jax.Array, teacher: jax.Array, labels: jax.Array) -> jax.Array:
    """Hinton's: T^2 times the divergence from the teacher at temperature T, and the labels' loss at 1."""
    soft = jax_ops.softmax(teacher / TEMPERATURE)
    cross = jax_ops.cross_entropy(student, soft, logit_scale=1 / TEMPERATURE)
    _, own = jax_ops.cross_entropy(teacher, labels, logit_scale=1 / TEMPERATURE, stats=("entropy",))
    divergence = cross - own["entropy"].mean()
    return SHARE * TEMPERATURE**2 * divergence + (1 - SHARE) * jax_ops.cross_entropy(student, labels)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    teacher = 5 * jax.random.normal(keys[0], (ROWS, CLASSES))
    student = jax.random.normal(keys[1], (ROWS, CLASSES))
    labels = jax.random.randint(keys[2], (ROWS,), 0, CLASSES)
    run = jax.jit(jax.value_and_grad(loss_of))
    loss, gradient = run(student, teacher, labels)

    # T^2 (softmax(student / T) - softmax(teacher / T)) / T a row, by (6) of docs/derivation.md.
    @jax.jit
    def by_hand(student: jax.Array, teacher: jax.Array) -> jax.Array:
        soft = TEMPERATURE * (jax.nn.softmax(student / TEMPERATURE) - jax.nn.softmax(teacher / TEMPERATURE))
        hard = jax.nn.softmax(student) - jax.nn.one_hot(labels, CLASSES)
        return (SHARE * soft + (1 - SHARE) * hard) / ROWS

    expected = np.asarray(by_hand(student, teacher))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-8)

    # A student that is the teacher has nothing left to learn from it: the labels' loss remains.
    alone, _ = run(teacher, teacher, labels)
    np.testing.assert_allclose(alone, (1 - SHARE) * jax_ops.cross_entropy(teacher, labels), rtol=1e-4)
    print(f"loss {float(loss):.4f}, gradient as by hand")


if __name__ == "__main__":
    main()
