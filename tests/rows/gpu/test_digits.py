"""The Triton kernels on confident rows whose soft targets, K classes or weights agree with them, in the interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.rows.gpu import interpreter

pytest.importorskip("jax", reason="what judges both frameworks imports both")

from tests.judging.heavy import TARGETS, Problem
from tests.ops import test_heavy_weights, test_soft_digits

if interpreter.why_not():
    pytest.skip(f"Triton's interpreter: {interpreter.why_not()}", allow_module_level=True)

torch: Any = importlib.import_module("torch")
ops: Any = importlib.import_module("torch_ops._rows.triton_ops")
sparse: Any = importlib.import_module("torch_ops._rows.sparse")


@pytest.fixture(autouse=True)
def ran() -> Iterator[list[str]]:
    with interpreter.interpreted() as names:
        yield names


def both(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Forward and gradient in one kernel, over the logits."""
    rows = x.size // x.shape[1]
    logits, d_nll = torch.from_numpy(x.copy()), torch.full((*x.shape[:1], *x.shape[2:]), 1 / rows)
    torch.ops.softmax_ext_triton.cross_entropy_fwd_bwd_(
        logits, torch.from_numpy(y), None, d_nll, None, None, None, 1, 1.0, None, False, False
    )
    return logits.numpy()


@pytest.mark.parametrize("gradient", [test_soft_digits.by_torch, both])
@pytest.mark.parametrize("other", [1e-3, 1e-6])
@pytest.mark.parametrize(("shape", "blocks"), [((3, 10), False), ((3, 300), True), ((1, 40, 3), True)], ids=str)
def test_soft_targets(
    gradient: Any, shape: tuple[int, ...], blocks: bool, other: float, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks:  # rows wider than 32 are read in blocks of 32
        plan = ops.gpu.plan
        monkeypatch.setattr(ops.gpu, "plan", lambda o, v, i, widest, *rest: plan(o, v, i, 32, *rest))
    test_soft_digits.judge(gradient, shape, other)
    assert "cross_entropy_bwd_kernel" in ran


@pytest.mark.parametrize(
    ("door", "classes", "smoothing", "blocks"),
    [
        ("torch", 1, 0.1, False),
        ("torch", 8, 1.0, False),
        ("torch", 100, 0.1, True),
        ("torch, planes", 8, 0.1, False),
        ("torch, fast", 40, 1e-3, True),
    ],
)
def test_weights_of_nearly_one_class(
    door: str, classes: int, smoothing: float, blocks: bool, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks:
        plan = ops.gpu.plan
        monkeypatch.setattr(ops.gpu, "plan", lambda o, v, i, widest, *rest: plan(o, v, i, 32, *rest))
    for target in TARGETS:
        p = Problem(classes, "float32", target, smoothing)
        p.judge(*test_heavy_weights.DOORS[door](p))
    assert "cross_entropy_bwd_kernel" in ran


@pytest.mark.parametrize("target", TARGETS)
def test_weights_whose_largest_is_not_told_are_seen(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.weight_sums
    for module in (ops, sparse):
        monkeypatch.setattr(module, "weight_sums", lambda w: (*right(w)[:2], w.sum() * float("nan")))
    # K classes a row are written in float64: there it takes that much more
    p = Problem(17, "float64" if target == "pairs" else "float32", target, 1.0)
    with pytest.raises(AssertionError, match="gradient"):
        p.judge(*test_heavy_weights.DOORS["torch"](p))
