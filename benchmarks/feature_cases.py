"""The questions of `benchmarks.features`: one problem, and what a right answer is, in NumPy and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from softmax_ext import reference

rng = np.random.default_rng(0)
ROWS, CLASSES, WIDTH = 6, 50, 8
X = rng.standard_normal((ROWS, WIDTH))
HEAD = rng.standard_normal((CLASSES, WIDTH))
TARGET = rng.integers(0, CLASSES, ROWS)
SOFT = rng.dirichlet(np.ones(CLASSES), ROWS)
WEIGHT = rng.uniform(0.5, 2.0, CLASSES)
UP = rng.uniform(0.5, 2.0, ROWS)  # upstream gradients, and token weights
DIRECTION = rng.standard_normal((ROWS, WIDTH))
IDS, SHARES = rng.integers(0, CLASSES, (ROWS, 3)), rng.dirichlet(np.ones(3), ROWS)  # K classes a row
# A confident row: its logits are x itself.
SURE_X, SURE_HEAD, SURE_TARGET = np.array([[60.0, 0.0, 0.0, 0.0, 0.0]]), np.eye(5), np.array([0])
OPTIONS = {
    "label smoothing": {"label_smoothing": 0.1},
    "soft cap": {"softcap": 2.0},
    "logit scale": {"logit_scale": 0.5},
    "z-loss": {"z_loss": 0.01},
}


class Absent(Exception):
    """The peer has no such option."""


@dataclass(frozen=True)
class Question:
    """What is asked of a peer: {name: (its answer, the truth)}."""

    feature: str
    ask: Callable[[Any], dict[str, tuple[Any, Any]]]
    tolerance: float = 2e-4  # float32 by another order of sums
    floor: float = 2e-6


def truth(target: np.ndarray = TARGET, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(loss of each row, the gradient of UP's sum by x)."""
    rows = np.asarray(reference.linear_cross_entropy(X, HEAD, target, reduction="none", **options))
    gradient = reference.linear_cross_entropy_grad(X, HEAD, target, reduction="sum", token_weight=UP, **options)[0]
    return rows, gradient


def dense() -> np.ndarray:
    """The soft target that IDS and SHARES mean."""
    target = np.zeros((ROWS, CLASSES))
    np.add.at(target, (np.arange(ROWS)[:, None], IDS), SHARES)
    return target


def second() -> np.ndarray:
    """The gradient of UP's sum by x along DIRECTION, by differences of the exact gradient."""
    step = 1e-5
    ends = [
        reference.linear_cross_entropy_grad(
            X + sign * step * DIRECTION, HEAD, TARGET, reduction="sum", token_weight=UP
        )[0]
        for sign in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * step)


def class_weight_gradient() -> np.ndarray:
    """d(UP's sum)/d(class weights) of class indices: each class's own rows."""
    plain = np.asarray(reference.linear_cross_entropy(X, HEAD, TARGET, reduction="none"))
    return np.bincount(TARGET, UP * plain, CLASSES)


def entropy() -> tuple[np.ndarray, np.ndarray]:
    """(entropy of each row, the gradient of UP's sum of it by x)."""
    logits = X @ HEAD.T
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    p = np.exp(log_p)
    rows = -(p * log_p).sum(1)
    return rows, (UP[:, None] * -p * (log_p + rows[:, None])) @ HEAD
