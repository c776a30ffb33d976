"""Class weights with label smoothing where one class has nearly all of the weight: no digits of a gradient are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_ops
import torch_ops
from jax_ops._rows import native as jax_native
from jax_ops._rows import weights
from tests.judging.heavy import TARGETS, Problem
from torch_ops._rows import native as torch_native

Call = Callable[..., tuple[Any, Any]]


def of_torch(p: Problem, shape: str = "") -> tuple[Any, Any]:
    leaf, w = torch.from_numpy(p.x).requires_grad_(), torch.from_numpy(p.w)
    target = _mapped(torch.from_numpy, p.target)
    how: Any = {"label_smoothing": p.smoothing, "reduction": "sum"}
    if shape:  # the classes along a middle axis of as many columns
        many = lambda a: a.unsqueeze(-1).expand(*a.shape, int(shape)).contiguous()  # noqa: E731
        loss = torch_ops.cross_entropy(many(leaf), _mapped(many, target), w, **how) / int(shape)
        return torch.autograd.grad(loss, leaf)[0].numpy(), None
    (gradient,) = torch.autograd.grad(torch_ops.cross_entropy(leaf, target, w, **how), leaf, create_graph=True)
    return gradient.detach().numpy(), torch.autograd.grad(gradient, leaf, torch.from_numpy(p.v))[0].numpy()


def of_torch_head(p: Problem, memory: str) -> tuple[Any, Any]:
    leaf, w = torch.from_numpy(p.x).requires_grad_(), torch.from_numpy(p.w)
    head, target = torch.eye(*p.w.shape, dtype=leaf.dtype), _mapped(torch.from_numpy, p.target)
    how: Any = {"weight": w, "label_smoothing": p.smoothing, "memory": memory, "chunk_size": _chunk(p, memory)}
    first = torch_ops.linear_cross_entropy(leaf, head, target, reduction="sum", **how)
    each = torch_ops.linear_cross_entropy(leaf, head, target, reduction="none", **how)
    p.judge(torch.autograd.grad(first, leaf)[0].numpy())
    (gradient,) = torch.autograd.grad(each.sum(), leaf, create_graph=True)
    return gradient.detach().numpy(), torch.autograd.grad(gradient, leaf, torch.from_numpy(p.v))[0].numpy()


def _jax_loss(p: Problem, shape: str = "", memory: str = "") -> Callable[..., Any]:
    w, target = jnp.asarray(p.w), _mapped(jnp.asarray, p.target)
    how: Any = {"label_smoothing": p.smoothing, "reduction": "sum"}
    if memory:
        how |= {"weight": w, "memory": memory, "chunk_size": _chunk(p, memory)}
        return lambda x: jax_ops.linear_cross_entropy(x, jnp.eye(len(w), dtype=w.dtype), target, **how)
    if not shape:
        return lambda x: jax_ops.cross_entropy(x, target, w, **how)
    many = lambda a: jnp.repeat(a[..., None], int(shape), -1)  # noqa: E731
    return lambda x: jax_ops.cross_entropy(many(x), _mapped(many, target), w, axis=1, **how) / int(shape)


def of_jax(p: Problem, shape: str = "", memory: str = "") -> tuple[Any, Any]:
    with jax.enable_x64(p.x.dtype == np.float64):
        return jax.jit(jax.grad(_jax_loss(p, shape, memory)))(jnp.asarray(p.x)), None


def _mapped(of: Any, target: Any) -> Any:
    return tuple(map(of, target)) if isinstance(target, tuple) else of(target)


def _chunk(p: Problem, memory: str) -> int:
    """Rows, or classes, of which the last slice takes some again."""
    return 5 if memory == "fast" else len(p.w) // 3 + 1


DOORS: dict[str, Call] = {
    "torch": of_torch,
    "torch, strips": lambda p: of_torch(p, "16"),
    "torch, planes": lambda p: of_torch(p, "3"),
    "torch, fast": lambda p: of_torch_head(p, "fast"),
    "torch, lean": lambda p: of_torch_head(p, "lean"),
    "jax": of_jax,
    "jax, strips": lambda p: of_jax(p, "16"),
    "jax, fast": lambda p: of_jax(p, memory="fast"),
    "jax, lean": lambda p: of_jax(p, memory="lean"),
}


@pytest.fixture(params=[door + rows for door in DOORS for rows in ("", ", plain")])
def door(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """A door, with its kernels and without."""
    plain = request.param.endswith("plain")
    if plain:
        monkeypatch.setattr(torch_native, "serves", lambda *_: False)
        monkeypatch.setattr(torch_native, "serves_directly", lambda *_: False)
        monkeypatch.setattr(jax_native, "missing", "taken away")
        jax.clear_caches()
    yield DOORS[request.param.removesuffix(", plain")]
    monkeypatch.undo()
    if plain:
        jax.clear_caches()


@pytest.mark.parametrize(("classes", "smoothing"), [(1, 0.1), (2, 0.1), (8, 1.0), (17, 1e-3), (300, 0.1)])
def test_the_heavy_class_keeps_its_digits(door: Call, classes: int, smoothing: float) -> None:
    for target in TARGETS:
        p = Problem(classes, "float32", target, smoothing)
        p.judge(*door(p))


@pytest.mark.parametrize("name", ["torch", "torch, strips", "torch, lean", "jax", "jax, lean"])
def test_in_float64(name: str) -> None:
    for target in TARGETS:
        p = Problem(17, "float64", target, 0.1)
        p.judge(*DOORS[name](p))


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("classes", [2, 8, 300])
def test_a_difference_is_seen(kind: str, classes: int) -> None:
    p = Problem(classes, kind, "indices", 1.0)
    e = np.exp(p.x - p.x.max(1, keepdims=True))
    a = p.mass.astype(kind)
    wrong = (a.sum(1, keepdims=True) * np.asarray(0.1, kind)) * (e / e.sum(1, keepdims=True)) - a * np.asarray(
        0.1, kind
    )
    with pytest.raises(AssertionError, match="gradient"):
        p.judge(wrong / np.asarray(0.1, kind))
    alone = Problem(1, kind, "indices", 0.1)
    with pytest.raises(AssertionError, match="gradient"):
        alone.judge(np.full_like(alone.x, 2e-9))


def test_a_difference_of_slices_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def difference(self: weights.Weights, weight: Any) -> Any:
        return self.total - weight.sum()

    monkeypatch.setattr(weights.Weights, "elsewhere", difference)
    p = Problem(17, "float32", "indices", 1.0)
    with pytest.raises(AssertionError, match="gradient"):
        p.judge(*DOORS["jax, lean"](p))
