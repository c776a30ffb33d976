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


def by_torch_lean(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    leaf, head = torch.from_numpy(x).requires_grad_(), torch.eye(x.shape[1])
    how: Any = {"memory": "lean", "chunk_size": x.shape[1] // 3}
    loss = torch_ops.linear_cross_entropy(leaf, head, torch.from_numpy(y), **how)
    return torch.autograd.grad(loss, leaf)[0].numpy()


def by_jax_lean(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    how: Any = {"memory": "lean", "chunk_size": x.shape[1] // 3}
    loss: Any = lambda x: jax_ops.linear_cross_entropy(x, jnp.eye(x.shape[1]), jnp.asarray(y), **how)  # noqa: E731
    return np.asarray(jax.grad(loss)(jnp.asarray(x)))


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


DOORS = {"torch": by_torch, "jax": by_jax, "torch lean": by_torch_lean, "jax lean": by_jax_lean}


@pytest.fixture(params=[door + rows for door in DOORS for rows in ("", ", plain")])
def gradient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, programs_for: Any) -> Any:
    """A door's, with its kernels and without."""
    plain = request.param.endswith("plain")
    if plain:
        monkeypatch.setattr(torch_native, "serves", lambda *_: False)
        monkeypatch.setattr(torch_native, "serves_directly", lambda *_: False)
        monkeypatch.setattr(jax_native, "missing", "taken away")
    programs_for("plain" if plain else "native")
    return DOORS[request.param.removesuffix(", plain")]


SHAPES = [(3, 10), (3, 300), (3, 9000), (1, 50, 3), (1, 300, 3)]


@pytest.mark.parametrize("other", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_lies_on_the_others_keeps_its_digits(gradient: Gradient, shape: tuple[int, ...], other: float) -> None:
    if gradient in (by_torch_lean, by_jax_lean) and (len(shape) > 2 or max(shape) > 300):
        pytest.skip("rows of a small head")
    judge(gradient, shape, other)


def test_a_difference_is_seen() -> None:
    def wrong(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        p, d = np.exp(x - x.max(1, keepdims=True)), np.float32(1 / len(x))
        p /= p.sum(1, keepdims=True)
        return (y.sum(1, keepdims=True) * d - y * d).astype(np.float32) - (1 - p) * d

    with pytest.raises(AssertionError):
        judge(wrong, (3, 300), 1e-6)


@pytest.mark.parametrize("cap", [None, 4.0])
def test_slices_of_a_confident_row_are_that_row(cap: float | None) -> None:
    """With class weights, whose products may be rounded in one sum and not in another; tied maxima too."""
    r = np.random.default_rng(0)
    z, y, w = r.normal(size=(4, 8)), r.random((4, 8)), 0.5 + r.random(8)
    z[0, 3], z[1, [2, 6]], z[3, 7], y[0] = 12.0, 9.0, 5.0, 1e-7 * y[0]
    y[0, 3] = 1.0
    rows: dict[str, Any] = {"softcap": cap, "label_smoothing": 0.1, "reduction": "sum"}
    lean: dict[str, Any] = {**rows, "memory": "lean", "chunk_size": 3}
    with jax.enable_x64(True):
        a, t, c = map(jnp.asarray, (z, y, w))
        due = jax.grad(lambda z: jax_ops.cross_entropy(z, t, weight=c, **rows))(a)
        found = jax.grad(lambda z: jax_ops.linear_cross_entropy(z, jnp.eye(8), t, weight=c, **lean))(a)
    leaf, head = torch.from_numpy(z).requires_grad_(), torch.eye(8, dtype=torch.float64)
    given = torch.from_numpy(y), torch.from_numpy(w)
    loss = torch_ops.linear_cross_entropy(leaf, head, given[0], weight=given[1], **lean)
    (other,) = torch.autograd.grad(loss, leaf)
    for a in (found, other.numpy()):
        np.testing.assert_allclose(a, due, rtol=1e-9, atol=1e-13)
