"""Arrays and compositions of JAX's ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")


N, V = 3, 5
TARGET = np.array([1, -100, 4])
SCALE, CAP, Z, S = 0.7, 3.0, 0.1, 0.2
RNG = np.random.default_rng(7)
IN = {
    "x": RNG.uniform(-2, 2, (N, V)),
    "y": RNG.uniform(0.1, 1.1, (N, V)),
    "w": RNG.uniform(0.5, 1.5, V),
    "tw": RNG.uniform(0.5, 1.5, N),
}


def _same(ours: Any, theirs: Any, tol: float = 1e-11) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert np.isfinite(theirs).all()
    assert np.abs(theirs).max() > 1e-3, "the truth is too small for the comparison to see anything"
    np.testing.assert_allclose(ours, theirs, rtol=tol, atol=tol)
