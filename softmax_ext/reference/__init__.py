"""The maths of the source documents in NumPy float64, nothing fast: what the tests judge by.

docs/derivation.md walks through the sources and says which step each function comes from:
  1. MLDawn, "The Derivative of Softmax(z) Function w.r.t z"
  2. John Purcell, "Derivative of the Softmax Function" (2021)
  3. a question with its answer: why the derivative is written in the output a, not in z
  4. Thomas Kurbiel, "Derivative of the Softmax Function and the Categorical Cross-Entropy Loss"

Sums run in long double where the machine has one, so the float64 handed back is right to its last
digits. Losses are in nats. Nothing here checks its arguments: the contract does.
"""

from softmax_ext.reference.classes import linear_at, linear_at_grad, points
from softmax_ext.reference.divergence import (
    divergence,
    divergence_grad,
    divergence_parts,
    linear_divergence,
    linear_divergence_grad,
)
from softmax_ext.reference.head import linear_cross_entropy, linear_cross_entropy_grad
from softmax_ext.reference.probabilities import (
    log_softmax,
    log_softmax_vjp,
    softmax,
    softmax_jacobian,
    softmax_jvp,
    softmax_vjp,
)
from softmax_ext.reference.rows import cross_entropy, cross_entropy_grad, logit_scale_grad

__all__ = [
    "cross_entropy",
    "cross_entropy_grad",
    "divergence",
    "divergence_grad",
    "divergence_parts",
    "linear_at",
    "linear_at_grad",
    "linear_cross_entropy",
    "linear_cross_entropy_grad",
    "linear_divergence",
    "linear_divergence_grad",
    "log_softmax",
    "log_softmax_vjp",
    "logit_scale_grad",
    "points",
    "softmax",
    "softmax_jacobian",
    "softmax_jvp",
    "softmax_vjp",
]
