"""softmax and log_softmax with their derivatives."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from softmax_ext.reference.arithmetic import Array, back, last, others, parts, quiet


@quiet
def softmax(x: ArrayLike, *, axis: int = -1) -> Array:
    """Probabilities of the logits along one axis.

    a_i = exp(x_i) / sum_j exp(x_j)

    Args:
        x: logits, any shape.
        axis: the class axis.

    Returns:
        The shape of x, each row summing to 1.

    Source: documents 1-4, their first formula.
    """
    return back(parts(last(x, axis))[0], axis, np.shape(x))


@quiet
def log_softmax(x: ArrayLike, *, axis: int = -1) -> Array:
    """Log-probabilities of the logits along one axis, in nats.

    ln a_i = x_i - ln sum_n exp(x_n)

    Args:
        x: logits, any shape.
        axis: the class axis.

    Returns:
        The shape of x.

    Source: document 2 before its (5); document 4, "the logarithm of s".
    """
    return back(parts(last(x, axis))[2], axis, np.shape(x))


def softmax_jacobian(a: ArrayLike) -> Array:
    """Jacobian of softmax, from its output alone.

    da_i / dz_j = a_i (delta_ij - a_j), that is diag(a) - a aT

    Args:
        a: softmax's output, (V,).

    Returns:
        (V, V): row i the output, column j the input; symmetric.

    Source: document 1 cell by cell, document 2 (5), document 3's matrix form, document 4.
    """
    a = np.asarray(a, np.float64)
    return np.diag(a) - np.outer(a, a)


@quiet
def softmax_vjp(a: ArrayLike, dy: ArrayLike, *, axis: int = -1) -> Array:
    """Gradient at softmax's input, from its output and the gradient there.

    dx_j = sum_i dy_i a_i (delta_ij - a_j) = a_j (dy_j - sum_i a_i dy_i) = a_j sum_{i != j} a_i (dy_j - dy_i)

    Args:
        a: softmax's output, any shape.
        dy: dL/da, the shape of a.
        axis: the class axis.

    Returns:
        dL/dx, the shape of a.

    Source: document 1's reader: weighted by dy, the contributions of all outputs add.
    """
    wide, g = last(a, axis), last(dy, axis)
    # The last form, about the mean: a confident row's maximum is a sum over the others, and what all dy have in common
    # is gone before anything is rounded (beside a mean that is not finite there is nothing to save).
    mean = np.sum(wide * g, -1, keepdims=True)
    g = g - np.where(np.isfinite(mean), mean, 0)
    return back(wide * (g * others(wide) - others(wide * g)), axis, np.shape(a))


def softmax_jvp(a: ArrayLike, dx: ArrayLike, *, axis: int = -1) -> Array:
    """Change of softmax's output along a change dx of its input.

    da_i = sum_j a_i (delta_ij - a_j) dx_j = a_i (dx_i - sum_j a_j dx_j)

    Args:
        a: softmax's output, any shape.
        dx: the direction, the shape of a.
        axis: the class axis.

    Returns:
        The shape of a. The Jacobian is symmetric, so this is softmax_vjp.

    Source: document 2 (5).
    """
    return softmax_vjp(a, dx, axis=axis)


@quiet
def log_softmax_vjp(x: ArrayLike, dy: ArrayLike, *, axis: int = -1) -> Array:
    """Gradient at log_softmax's input.

    dx_j = sum_i dy_i (delta_ij - p_j) = dy_j - p_j sum_i dy_i

    Args:
        x: logits, any shape.
        dy: dL/d(log p), the shape of x.
        axis: the class axis.

    Returns:
        dL/dx, the shape of x.

    Source: document 2, ds/dz_j = delta_ij - sigma(z_j); document 4, its second step.
    """
    p, q, _, _ = parts(last(x, axis))
    dwide = last(dy, axis)
    # Split sum_i dy_i into dy_j and the others: dy_j (1 - p_j) - p_j (others), without 1 - p.
    return back(q * dwide - p * others(dwide), axis, np.shape(x))
