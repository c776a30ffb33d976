"""What the linear head does on a GPU and nowhere else: cuBLAS' float32 sums, here by a stand-in for its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

import torch_ops
from torch_ops import _linear_ops, _linear_parts, _linear_rows, _linear_slices, _unrounded

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    _unrounded._offered.cache_clear()
    yield
    _unrounded._offered.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """cuBLAS' two calls, multiplying in float32; what has been asked of them."""
    seen = []

    def stand_in(name: str, beta: float) -> Callable[..., None]:
        def call(out: Tensor, a: Tensor, b: Tensor) -> None:
            assert out.dtype == torch.float32
            assert a.dtype == b.dtype != out.dtype
            seen.append((name, tuple(out.shape)))
            torch.addmm(out, a.float(), b.float(), beta=beta, out=out)

        return call

    monkeypatch.setattr(_unrounded, "_may_offer", lambda device: True)
    monkeypatch.setattr(_unrounded, "_set", stand_in("set", 0))
    monkeypatch.setattr(_unrounded, "_add", stand_in("add", 1))
    return seen


@pytest.fixture
def half_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and products in the input's type, as on a GPU."""
    for module in (_linear_parts, _linear_ops, _linear_rows, _linear_slices):
        monkeypatch.setattr(module, "formed_in", lambda x, target: x.dtype)


def _chunks(dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 6, generator=g).to(dtype)
    pairs = [(torch.randn(9, 40, generator=g).to(dtype), torch.randn(9, 6, generator=g).to(dtype)) for _ in range(3)]
    return weight, pairs


@pytest.mark.parametrize("dtype", HALVES)
def test_products_are_summed_in_order_and_unrounded(dtype: torch.dtype, calls: list[Any]) -> None:
    weight, pairs = _chunks(dtype)
    sums = _linear_parts.ClassGradient(weight, None, True, False, summed=True)
    want = torch.full((40, 6), torch.nan)
    for k, (dz, x) in enumerate(pairs):
        sums.add(dz, x)
        torch.addmm(want, dz.float().t(), x.float(), beta=min(k, 1), out=want)
    probe = [("set", (8, 8)), ("add", (8, 8))]
    assert calls == [*probe, ("set", (40, 6)), ("add", (40, 6)), ("add", (40, 6))]
    assert sums.unrounded()[0] is sums.dw
    assert torch.equal(sums.dw, want)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("refused", ["_set", "_add"])
@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, TypeError])
def test_a_refusal_is_remembered(refused: str, error: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*_: Tensor) -> None:
        asked.append(1)
        raise error("self and mat2 must have the same dtype, but got Float and BFloat16")

    monkeypatch.setattr(_unrounded, refused, refuse)
    weight, pairs = _chunks(torch.bfloat16)
    sums = _linear_parts.ClassGradient(weight, None, True, False, summed=True)
    want = torch.zeros(40, 6)
    for dz, x in pairs:
        sums.add(dz, x)
        want += dz.t() @ x  # each product rounded
    assert len(asked) == 1
    assert all(shape == (8, 8) for _, shape in calls)
    assert torch.equal(sums.dw, want)  # pyright: ignore[reportArgumentType]


def test_other_devices_and_types_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert _unrounded._may_offer(torch.device("cuda", 0))
    assert not _unrounded._may_offer(torch.device("cpu"))
    assert not _unrounded._may_offer(torch.device("xpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not _unrounded._may_offer(torch.device("cuda", 0))
    wide, half = torch.ones(3, 3), torch.ones(3, 3, dtype=torch.bfloat16)
    monkeypatch.setattr(_unrounded, "_offered", lambda *_: True)
    for out, a in ((half, wide), (half, half), (wide, wide), (wide.double(), half), (wide.double(), wide.double())):
        assert not _unrounded.add_product(out, a, a, first=True)


def _errors(memory: Any, chunk: int) -> list[float]:
    """Relative errors of dX and dW, as they are before they are rounded: the upstream gradient is in float32."""
    g = torch.Generator().manual_seed(0)
    n, d, v = 512, 12, 96
    x, w = (torch.randn(shape, generator=g).bfloat16() for shape in ((n, d), (v, d)))
    target = torch.randint(v, (n,), generator=g)
    exact = [a.double().requires_grad_() for a in (x, w)]
    truth = torch.autograd.grad(torch_ops.linear_cross_entropy(exact[0], exact[1], target, reduction="sum"), exact)
    plan = _linear_ops.Plan(1.0, None, False, False, False, memory == "lean", chunk)
    ones = torch.ones(n)
    if memory == "fast":
        _, found = _linear_ops.head_fwd_bwd(
            (x, w, None, target, None, ones, None, None, None), (True, True, False), plan
        )
    else:
        m, rest = _linear_ops.head_fwd((x, w, None, target, None), plan)[2:4]
        arrays = (x, w, None, target, None, m, rest, None, ones, None, None, None)
        found = _linear_ops.head_bwd(arrays, (True, True, False, False, False), plan)
    return [float((a.double() - t).norm() / t.norm()) for a, t in zip(found[:2], truth, strict=True) if a is not None]


@pytest.mark.usefixtures("half_matmuls")
def test_chunks_cost_no_accuracy(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """dW in 64 chunks is as good as in one; dX by slices of 4 classes as good as in one slice."""
    one, many = _errors("fast", 512)[1], _errors("fast", 8)[1]
    assert [name for name, shape in calls if shape == (96, 12)] == ["set", *["add"] * 63]
    assert many < 1.02 * one
    whole, sliced = _errors("lean", 96)[0], _errors("lean", 4)[0]
    assert [name for name, shape in calls if shape == (512, 12)] == ["add"] * 25
    assert sliced < 1.02 * whole
    monkeypatch.setattr(_unrounded, "_offered", lambda *_: False)
    assert _errors("fast", 8)[1] > 1.05 * many, "the measurement sees rounded products"
    assert _errors("lean", 4)[0] > 1.05 * sliced
