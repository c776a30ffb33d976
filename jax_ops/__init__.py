"""Softmax and cross-entropy operators for JAX, with analytic derivatives of every order."""

from jax_ops.cross_entropy import cross_entropy
from jax_ops.divergence import divergence, linear_divergence
from jax_ops.linear_at import linear_at
from jax_ops.linear_cross_entropy import linear_cross_entropy
from jax_ops.optax_names import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels
from jax_ops.softmax import log_softmax, softmax

__all__ = [
    "cross_entropy",
    "divergence",
    "linear_at",
    "linear_cross_entropy",
    "linear_divergence",
    "log_softmax",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]
