"""A confident row whose soft target agrees with it: its gradient there is of what lies on the other classes.

(A - a_m) - A (1 - p_m), where A - a_m formed as a difference leaves the roundings of a_m: 3 % of it at 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_ops
import torch_ops
from jax_ops._rows import native as jax_native
from torch_ops._rows import native as torch_native

Gradient = Callable[[np.ndarray, np.ndarray], np.ndarray]
AT, LOGIT = 7, 60.0


def by_torch(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    leaf = torch.from_numpy(x).requires_grad_()
    return torch.autograd.grad(torch_ops.cross_entropy(leaf, torch.from_numpy(y)), leaf)[0].numpy()


def by_jax(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    call: Any = jax_ops.cross_entropy
    return np.asarray(jax.grad(lambda x: call(x, jnp.asarray(y), axis=1))(jnp.asarray(x)))


def judge(gradient: Gradient, shape: tuple[int, ...], other: float) -> None:
    x = np.zeros(shape, np.float32)
    x[:, AT] = LOGIT
    y = np.full(shape, other / (shape[1] - 1), np.float32)
    y[:, AT] = 1 - other
    rows = x.size // shape[1]
    found = gradient(x, y)[:, AT].astype(np.float64)
    aside = np.delete(y, AT, 1).sum(1, dtype=np.float64)
    w = (shape[1] - 1) * np.exp(-LOGIT)
    lost = (aside + y[:, AT]) * w / (1 + w)
    off = np.abs(found - (aside - lost) / rows)
    assert (off <= 16 * 2.0**-24 * (aside + lost) / rows).all(), (found.ravel()[0], (aside - lost).ravel()[0] / rows)


@pytest.fixture(params=["torch", "torch, plain", "jax", "jax, plain"])
def gradient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A door's, with its kernels and without."""
    plain = request.param.endswith("plain")
    if plain:
        monkeypatch.setattr(torch_native, "serves", lambda *_: False)
        monkeypatch.setattr(torch_native, "serves_directly", lambda *_: False)
        monkeypatch.setattr(jax_native, "missing", "taken away")
        jax.clear_caches()
    yield by_torch if request.param.startswith("torch") else by_jax
    monkeypatch.undo()
    if plain:
        jax.clear_caches()


SHAPES = [(3, 10), (3, 300), (3, 9000), (1, 50, 3), (1, 300, 3)]


@pytest.mark.parametrize("other", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_lies_on_the_others_keeps_its_digits(gradient: Gradient, shape: tuple[int, ...], other: float) -> None:
    judge(gradient, shape, other)


def test_a_difference_is_seen() -> None:
    def wrong(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        p, d = np.exp(x - x.max(1, keepdims=True)), np.float32(1 / len(x))
        p /= p.sum(1, keepdims=True)
        return (y.sum(1, keepdims=True) * d - y * d).astype(np.float32) - (1 - p) * d

    with pytest.raises(AssertionError):
        judge(wrong, (3, 300), 1e-6)
