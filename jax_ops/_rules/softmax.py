"""softmax and log_softmax, each with its analytic derivative in both modes."""

from __future__ import annotations

from functools import cache
from typing import Any

from jax import Array

from jax_ops._rows import dispatch as rows
from jax_ops._rules.autodiff import analytic


def softmax(x: Array, axis: int) -> Array:
    """Probabilities, with every derivative."""
    return _softmax(axis)(x)


def log_softmax(x: Array, axis: int) -> Array:
    """Log-probabilities, with every derivative."""
    return _log_softmax(axis)(x)


@cache
def _softmax(axis: int) -> Any:
    """y = softmax(x). Saves y."""

    def fwd(x: Any) -> Any:
        y = rows.softmax_fwd(x, axis=axis)
        return y, y

    def bwd(y: Any, dy: Any) -> Any:
        return (rows.softmax_bwd(dy, y, axis=axis),)

    return analytic(fwd, bwd)


@cache
def _log_softmax(axis: int) -> Any:
    """log p. Saves x and the row statistics m, rest."""

    def fwd(x: Any) -> Any:
        y, m, rest = rows.log_softmax_fwd(x, axis=axis)
        return y, (x, m, rest)

    def bwd(saved: Any, dy: Any) -> Any:
        return (rows.log_softmax_bwd(dy, *saved, axis=axis),)

    return analytic(fwd, bwd)
