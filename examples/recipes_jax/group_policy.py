"""A step of group-relative policy optimisation (GRPO) in JAX: clipped ratios, a KL term and an entropy bonus.

    python -m examples.recipes_jax.group_policy

`stats=("logprob", "entropy")` gives both of every token, each with its gradient, at the sampling temperature. What the
sampler and the reference model gave the tokens are constants.
"""

import jax
import jax.numpy as jnp
from jax import Array

import jax_ops
from examples.beside import beside

GROUP, LENGTH, WIDTH, VOCAB = 6, 12, 24, 500
TEMPERATURE, CLIP, KL, BONUS = 0.8, 0.2, 0.04, 0.01


def token_statistics(hidden: Array, head: Array, labels: Array) -> tuple[Array, Array]:
    """(log p, entropy) of each label one position ahead, in nats."""
    _, stats = jax_ops.linear_cross_entropy(
        hidden,
        head,
        labels,
        shift=1,
        reduction="none",
        logit_scale=1 / TEMPERATURE,
        stats=("logprob", "entropy"),
    )
    return stats["logprob"], stats["entropy"]


def plain_statistics(hidden: Array, head: Array, labels: Array) -> tuple[Array, Array]:
    """The same by all log-probabilities."""
    log_p, labels = jax.nn.log_softmax((hidden @ head.T)[:, :-1] / TEMPERATURE), labels[:, 1:]
    each = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return jnp.where(labels == -100, 0.0, each), jnp.where(labels == -100, 0.0, entropy)


def loss_of(log_p: Array, entropy: Array, old: Array, reference: Array, rewards: Array, labels: Array) -> Array:
    """The mean over the answers' tokens; one reward an answer, relative to its group's."""
    advantage = ((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4))[:, None]
    ratio = jnp.exp(log_p - old)
    gain = jnp.minimum(ratio * advantage, ratio.clip(1 - CLIP, 1 + CLIP) * advantage)
    divergence = jnp.expm1(reference - log_p) - (reference - log_p)
    return jnp.mean(KL * divergence - gain - BONUS * entropy, where=labels[:, 1:] != -100)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 6)
    hidden = jax.random.normal(keys[0], (GROUP, LENGTH, WIDTH))
    head = jax.random.normal(keys[1], (VOCAB, WIDTH)) * WIDTH**-0.5
    labels, rewards = jax.random.randint(keys[2], (GROUP, LENGTH), 0, VOCAB), jax.random.normal(keys[3], (GROUP,))
    labels = labels.at[:, :4].set(-100).at[2, -3:].set(-100)  # the prompt, a shorter answer
    old, reference = (
        token_statistics(hidden + 0.1 * jax.random.normal(key, hidden.shape), head, labels)[0] for key in keys[4:]
    )
    found = []
    for way in (token_statistics, plain_statistics):

        def of(hidden: Array, head: Array, way=way) -> Array:
            log_p, entropy = way(hidden, head, labels)
            return loss_of(log_p, entropy, old, reference, rewards, labels)

        loss, gradients = jax.jit(jax.value_and_grad(of, (0, 1)))(hidden, head)
        found.append((loss, *gradients))
    beside("GRPO", *found)


if __name__ == "__main__":
    main()
