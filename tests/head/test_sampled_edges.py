"""Edges of a sampled gradient, and digits of targets of K classes, at the doors of both frameworks."""

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
from jax_ops._head import sampled as jax_sampled
from jax_ops._rows import native as jax_native
from torch_ops._head import sampled as torch_sampled
from torch_ops._rows import native as torch_native
from torch_ops._rows import picked

LAST = 1 - 2.0**-24  # the largest u there is
TORCH: Any = torch_ops
JAX: Any = jax_ops


def by_torch(x: Any, w: Any, b: Any, t: Any, u: Any = None, **options: Any) -> list[np.ndarray]:
    leaves = [torch.from_numpy(np.array(a)).requires_grad_() for a in (x, w, b)]
    target = tuple(map(torch.from_numpy, t)) if isinstance(t, tuple) else torch.from_numpy(t)
    with pytest.MonkeyPatch.context() as patch:
        if u is not None:
            patch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, u))
            options["grad_samples"] = K
        loss = TORCH.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], **options)
    return [a.detach().numpy() for a in (loss, *torch.autograd.grad(loss.sum(), leaves))]


def by_jax(x: Any, w: Any, b: Any, t: Any, u: Any = None, **options: Any) -> list[np.ndarray]:
    def loss(x: Any, w: Any, b: Any) -> Any:
        value = JAX.linear_cross_entropy(x, w, t, linear_bias=b, **options)
        return value.sum(), value

    with pytest.MonkeyPatch.context() as patch:
        if u is not None:
            patch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.full(shape, u, dtype))
            options |= {"grad_samples": K, "key": jax.random.key(0)}
        (_, value), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*map(jnp.asarray, (x, w, b)))
    return [np.asarray(a) for a in (value, *grads)]


K = 4
Call = Callable[..., list[np.ndarray]]


@pytest.fixture(params=["torch", "torch, plain", "jax", "jax, plain"])
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, programs_for: Any) -> Any:
    """A door with its kernels, and without."""
    plain = request.param.endswith("plain")
    if plain:
        monkeypatch.setattr(torch_native, "serves", lambda *_: False)
        monkeypatch.setattr(picked, "_serving", lambda *_: None)
        monkeypatch.setattr(jax_native, "missing", "taken away")
    programs_for("plain" if plain else "native")
    return by_torch if request.param.startswith("torch") else by_jax


def rows(bias: Any, n: int = 2, D: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, w, b) whose logits are the bias."""
    b = np.asarray(bias, np.float32)
    return np.zeros((n, D), np.float32), np.ones((len(b), D), np.float32), b


@pytest.mark.parametrize("u", [0.0, LAST])
def test_where_one_class_is_left_the_gradient_is_exact(call: Call, u: float) -> None:
    """A row of -inf but two, and one class that holds everything: whatever u, all points are that class."""
    masked = np.full(300, -np.inf, np.float32)
    masked[[5, 299]] = 0.5, -7.0
    holds = np.zeros(300, np.float32)
    holds[0] = 200.0
    for b, t in ((masked, 5), (masked, 299), (holds, 4)):
        given, target = rows(b), np.array([t, t])
        found, exact = call(*given, target, u, reduction="none"), call(*given, target, reduction="none")
        for a, e in zip(found, exact, strict=True):
            np.testing.assert_allclose(a, e, rtol=3e-7, atol=1e-30)
        assert np.abs(found[3]).max() > 1e-4


@pytest.mark.parametrize("u", [0.0, LAST])
def test_a_mass_below_the_smallest_number_is_none(call: Call, u: float) -> None:
    b = np.zeros(50, np.float32)
    b[3] = 120.0
    value, *grads = call(*rows(b), np.array([3, 3]), u)
    assert 0 <= value < 1e-40
    for g in grads:
        assert np.abs(g).max() < 1e-40  # and no NaN


@pytest.mark.parametrize("u", [0.0, 0.5, LAST])
def test_more_points_than_classes(call: Call, u: float) -> None:
    """Strata begin at the edges of equal classes: 0 and the last u of a stratum are in the same class."""
    value, _, _, db = call(*rows(np.zeros(3)), np.array([1, 1]), u, reduction="sum")
    np.testing.assert_allclose(value, 2 * np.log(3), rtol=1e-6)
    np.testing.assert_allclose(db, [2 / 3, -4 / 3, 2 / 3], rtol=1e-6)
    two = call(*rows(np.zeros(2)), np.array([0, 0]), u, reduction="sum")[3]
    np.testing.assert_allclose(two, [-1, 1], rtol=1e-6)


MASSES = (1e-3, 1e-8, 1e-12, 1e-20)


def judge_digits(call: Call, mass: float, **options: Any) -> None:
    """One of two targets holds nearly all the mass, and the model agrees: what is left is the others' part."""
    b = np.zeros(200, np.float32)
    b[7] = 56.0
    ids, y = np.array([[3, 7, 3]] * 2), np.array([[mass / 4, 1.0, mass]] * 2, np.float32)
    found = call(*rows(b), (ids, y), reduction="none", **options)[3].astype(np.float64)
    w, (first, _, last) = np.exp(-56.0), y[0].astype(np.float64)
    other, p, q = first + last, 1 / (1 + 199 * w), 199 * w / (1 + 199 * w)
    truth = 2 * (other * p - q)
    terms = 2 * (other * p + q)
    assert abs(found[7] - truth) <= 8 * 2.0**-24 * terms, (found[7], truth)
    np.testing.assert_allclose(found[3], 2 * (w * p - other * (1 - w * p)), rtol=1e-6)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("way", ["fast", "lean", "sampled"])
def test_a_confident_pair_keeps_its_gradient(call: Call, mass: float, way: str) -> None:
    judge_digits(call, mass, **({"u": 0.5} if way == "sampled" else {"memory": way}))


def judge_heavy(call: Call, ids: tuple[int, ...], smoothing: float, u: float | None = 0.5) -> None:
    """A row sure of a class that has nearly all of the weight: what smoothing gives it is of the other weights."""
    b, weight = np.zeros(200, np.float32), np.linspace(1.0, 2.0, 200, dtype=np.float32)
    b[7], weight[7] = 30.0, 1e6
    pair = np.array([ids] * 2), np.full((2, len(ids)), 1 / len(ids), np.float32)
    target = pair if len(ids) > 1 else pair[0][:, 0]
    options: dict[str, Any] = {"weight": weight if call is by_jax else torch.from_numpy(weight), "reduction": "sum"}
    found = call(*rows(b), target, u, label_smoothing=smoothing, **options)[3].astype(np.float64)
    mass, q = smoothing / 200 * weight.astype(np.float64), 199 * np.exp(-30.0) / (1 + 199 * np.exp(-30.0))
    for i in ids:
        mass[i] += (1 - smoothing) * weight[i] / len(ids)
    gained, lost = 2 * np.delete(mass, 7).sum() * (1 - q), 2 * mass[7] * q
    assert abs(found[7] - (gained - lost)) <= 32 * 2.0**-24 * (gained + lost), (found[7], gained - lost)
    np.testing.assert_allclose(found[11], -2 * mass[11], rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("ids", [(7,), (3, 7, 7)], ids=str)
def test_a_heavy_class_keeps_its_digits(call: Call, ids: tuple[int, ...], smoothing: float) -> None:
    judge_heavy(call, ids, smoothing)


def test_an_outer_product_of_all_weights_is_seen(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of(targets: Any, d_nll: Any, d_smooth: Any, weight: Any, _: Any) -> Any:
        return d_nll, d_smooth * weight.sum(), weight, targets[:, :0], d_nll[:, :0]

    for module in (torch_sampled, jax_sampled):
        monkeypatch.setattr(module, "smoothed", all_of)
    with pytest.raises(AssertionError):
        judge_heavy(call, (7,), 1.0)
