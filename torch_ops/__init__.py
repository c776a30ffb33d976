"""Softmax and cross-entropy operators for PyTorch, with analytic derivatives of every order."""

from torch_ops import nn
from torch_ops.cross_entropy import cross_entropy
from torch_ops.divergence import divergence, linear_divergence
from torch_ops.linear_at import linear_at
from torch_ops.linear_cross_entropy import linear_cross_entropy
from torch_ops.softmax import log_softmax, softmax

__all__ = [
    "cross_entropy",
    "divergence",
    "linear_at",
    "linear_cross_entropy",
    "linear_divergence",
    "log_softmax",
    "nn",
    "softmax",
]
