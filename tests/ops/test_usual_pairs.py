"""Sparse targets in eager PyTorch on a CPU: a look at ids and values spares work, and changes no bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torch_ops
from torch_ops import _reduction
from torch_ops._rows import classes

OPS: Any = torch_ops
N, V, K = 6, 30, 4


def problem() -> tuple[Any, Any, Any]:
    """Logits, and ids and probabilities that all count."""
    g = torch.Generator().manual_seed(2)
    x = 3 * torch.randn(N, V, generator=g)
    return x, torch.randint(V, (N, K), generator=g), torch.rand(N, K, generator=g)


def usual(x: Any, ids: Any, v: Any) -> None:
    """As most are."""


def masked(x: Any, ids: Any, v: Any) -> None:
    x[1, ids[1, 0]] = x[2, ids[2, 1]] = -torch.inf
    v[2, ids[2] == ids[2, 1]] = 0.0


def ignored(x: Any, ids: Any, v: Any) -> None:
    ids[0, 1], ids[3] = -100, -100
    v[0, 1] = v[3, 0] = torch.nan


def not_a_number(x: Any, ids: Any, v: Any) -> None:
    x[1, 3] = v[4, 0] = torch.nan


def repeated(x: Any, ids: Any, v: Any) -> None:
    ids[:, 2] = ids[:, 0]
    v[0] = 0.0


def negative(x: Any, ids: Any, v: Any) -> None:
    v[:, 1] *= -1.0


KINDS: dict[str, Callable[[Any, Any, Any], None]] = {
    f.__name__: f for f in (usual, masked, ignored, not_a_number, repeated, negative)
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none", "z_loss": 0.1},
    {"reduction": "sum", "label_smoothing": 0.2, "softcap": 5.0},
    {"label_smoothing": 1.0, "on_all_ignored": "zero"},
    {"stats": ("logprob", "entropy")},
]


def answers(kind: str, options: dict[str, Any], weights: bool, head: bool) -> list[Any]:
    """Loss, statistics, gradients of everything, and theirs along a direction."""
    x, ids, v = problem()
    KINDS[kind](x, ids, v)
    given = {"weight": torch.linspace(0.5, 1.5, V), "token_weight": torch.linspace(0.0, 1.0, N)} if weights else {}
    leaves = [a.requires_grad_() for a in (x, v, *given.values())]
    if head:
        out = OPS.linear_cross_entropy(x, torch.eye(V), (ids, v), **given, **options)
    else:
        out = OPS.cross_entropy(x, (ids, v), **given, **options)
    loss, stats = out if isinstance(out, tuple) else (out, {})
    total = loss.sum() + sum(s.nan_to_num(0.0, 0.0, 0.0).sum() for s in stats.values())
    first = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
    along: Any = sum(
        (g.nan_to_num() * torch.cos(a.detach())).nan_to_num().sum() for g, a in zip(first, leaves, strict=True)
    )
    return [loss, *stats.values(), *first, *torch.autograd.grad(along, leaves, materialize_grads=True)]


def blind(patch: pytest.MonkeyPatch) -> None:
    """No look is free, as on a device."""
    for module in (_reduction, classes):
        patch.setattr(module, "can_look", lambda _: False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [False, True], ids=["logits", "head"])
def test_a_look_changes_no_bit(kind: str, head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, weights in itertools.product(OPTIONS, (False, True)):
        found = answers(kind, options, weights, head)
        with monkeypatch.context() as patch:
            blind(patch)
            due = answers(kind, options, weights, head)
        for a, b in zip(found, due, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_batch_of_no_rows_is_not_looked_at() -> None:
    x, ids, v = (a[:0] for a in problem())
    assert OPS.cross_entropy(x, (ids, v)).isnan()
    assert OPS.cross_entropy(x, (ids, v), on_all_ignored="zero") == 0
    assert OPS.cross_entropy(x[:0, :], (ids[:, :0], v[:, :0]), reduction="sum") == 0


def launches() -> int:
    """How many ops of PyTorch's a usual pair's loss and gradient are."""
    x, ids, v = problem()
    with torch.profiler.profile() as seen:
        torch.autograd.grad(OPS.cross_entropy(x.requires_grad_(), (ids, v)), x)
    return sum(e.name.startswith("aten::") for e in seen.events() or [])


def test_a_look_spares_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launches()
    blind(monkeypatch)
    assert found < 0.75 * launches()
