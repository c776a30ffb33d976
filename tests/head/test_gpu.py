"""The linear head on a GPU, without one: cuBLAS' float32 sums by a stand-in for its calls, and no look at a value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torch_ops
from tests.rows.gpu import interpreter
from torch_ops._head import chunks, fast, lean, linear, loops, ops, rounding, unrounded
from torch_ops._rows import targets, triton

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    unrounded._offered.cache_clear()
    yield
    unrounded._offered.cache_clear()


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

    monkeypatch.setattr(unrounded, "_may_offer", lambda device: True)
    monkeypatch.setattr(unrounded, "_set", stand_in("set", 0))
    monkeypatch.setattr(unrounded, "_add", stand_in("add", 1))
    return seen


@pytest.fixture
def half_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and products in the input's type, as on a GPU."""
    for module in (linear, loops, fast, lean):
        monkeypatch.setattr(module, "formed_in", lambda x, target: x.dtype)


def _pairs(dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 6, generator=g).to(dtype)
    pairs = [(torch.randn(9, 40, generator=g).to(dtype), torch.randn(9, 6, generator=g).to(dtype)) for _ in range(3)]
    return weight, pairs


@pytest.mark.parametrize("dtype", HALVES)
def test_products_are_summed_in_order_and_unrounded(dtype: torch.dtype, calls: list[Any]) -> None:
    weight, pairs = _pairs(dtype)
    sums = linear.Linear(weight, None).gradient(True, False, False, summed=True)
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

    monkeypatch.setattr(unrounded, refused, refuse)
    weight, pairs = _pairs(torch.bfloat16)
    sums = linear.Linear(weight, None).gradient(True, False, False, summed=True)
    want = torch.zeros(40, 6)
    for dz, x in pairs:
        sums.add(dz, x)
        want += dz.t() @ x  # each product rounded
    assert len(asked) == 1
    assert all(shape == (8, 8) for _, shape in calls)
    assert torch.equal(sums.dw, want)  # pyright: ignore[reportArgumentType]


def test_other_devices_and_types_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert unrounded._may_offer(torch.device("cuda", 0))
    assert not unrounded._may_offer(torch.device("cpu"))
    assert not unrounded._may_offer(torch.device("xpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not unrounded._may_offer(torch.device("cuda", 0))
    wide, half = torch.ones(3, 3), torch.ones(3, 3, dtype=torch.bfloat16)
    monkeypatch.setattr(unrounded, "_offered", lambda *_: True)
    for out, a in ((half, wide), (half, half), (wide, wide), (wide.double(), half), (wide.double(), wide.double())):
        assert not unrounded.add_product(out, a, a, first=True)


def _errors(memory: Any, chunk: int) -> list[float]:
    """Relative errors of dX and dW, as they are before they are rounded: the upstream gradient is in float32."""
    g = torch.Generator().manual_seed(0)
    n, d, v = 512, 12, 96
    x, w = (torch.randn(shape, generator=g).bfloat16() for shape in ((n, d), (v, d)))
    target = torch.randint(v, (n,), generator=g)
    exact = [a.double().requires_grad_() for a in (x, w)]
    truth = torch.autograd.grad(torch_ops.linear_cross_entropy(exact[0], exact[1], target, reduction="sum"), exact)
    plan = ops.Plan(1.0, None, False, False, False, memory == "lean", chunk)
    ones = torch.ones(n)
    if memory == "fast":
        _, found = ops.fwd_bwd(
            (x, w, None, None, target, None, ones, None, None, None), (True, True, False, False), plan
        )
    else:
        m, rest = ops.fwd((x, w, None, None, target, None), plan)[2:4]
        arrays = (x, w, None, None, target, None, m, rest, None, ones, None, None, None)
        found = ops.bwd(arrays, (True, True, False, False, False, False), plan)
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
    monkeypatch.setattr(unrounded, "_offered", lambda *_: False)
    assert _errors("fast", 8)[1] > 1.05 * many, "the measurement sees rounded products"
    assert _errors("lean", 4)[0] > 1.05 * sliced


@pytest.mark.parametrize("shape", [(301, 77), (50,)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_scaling_at_once_is_scaling_by_pieces(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for to, factor in product((torch.float32, *HALVES), (torch.tensor(0.3337), None)):
        out = torch.empty_like(x, dtype=to)
        assert torch.equal(rounding._at_once(x, factor, out), rounding.scaled(x, factor, to))


class OnDevice(TorchDispatchMode):
    """Refuses what would wait for a device: a look at a value, a size made of values, a copy from or to the host.

    A meta tensor has no values, so a look has nothing to see and raises by itself; a copy to it would pass.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.lift_fresh.default):
            tensors = [v for v in tree_leaves((args, kwargs, out)) if isinstance(v, Tensor)]
            assert {v.device.type for v in tensors} == {"meta"}, f"{func} from one device to another"
        assert func not in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        return out


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One that the Triton ops and cuBLAS' float32 sums serve."""
    if interpreter.why_not():
        pytest.skip(f"Triton's interpreter: {interpreter.why_not()}")
    monkeypatch.setattr(triton, "DEVICES", ("meta",))
    monkeypatch.setattr(unrounded, "_offered", lambda *_: True)
    monkeypatch.setattr(unrounded, "_add", lambda out, a, b: out.add_(a @ b))
    with OnDevice():
        yield "meta"


HEADS = [
    {},
    {"memory": "lean", "chunk_size": 3},
    {"chunk_size": 2, "linear_bias": True, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.7, "shift": 1},
    {"chunk_size": 2, "weight": True, "label_smoothing": 0.1, "token_weight": True, "on_all_ignored": "zero"},
    {"memory": "lean", "linear_bias": True, "weight": True, "label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.1},
    {"stats": ("lse", "logprob", "entropy", "argmax"), "chunk_size": 2, "weight": True, "label_smoothing": 0.1},
    {"memory": "lean", "stats": ("lse", "logprob", "entropy", "argmax"), "reduction": "none", "shift": 1},
    {"soft": True, "chunk_size": 2, "weight": True, "linear_bias": True, "stats": ("entropy",)},
    {"soft": True, "memory": "lean", "chunk_size": 3, "weight": True, "label_smoothing": 0.1, "z_loss": 0.1},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_nothing_of_a_head_waits_for_the_device(options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Forward and backward of the loops themselves, and backward twice."""
    options = dict(options)
    of = {"device": device, "dtype": dtype, "requires_grad": True}
    x, w, n = torch.empty(2, 3, 4, **of), torch.empty(7, 4, **of), (2, 3)
    soft = options.pop("soft", False)
    target = torch.empty(*n, 7, device=device) if soft else torch.empty(n, dtype=torch.int64, device=device)
    shapes = {"linear_bias": ((7,), dtype), "weight": ((7,), torch.float32), "token_weight": (n, torch.float32)}
    more = {
        name: torch.empty(shape, device=device, dtype=kind, requires_grad=True)
        for name, (shape, kind) in shapes.items()
        if options.pop(name, False)
    }
    head: Any = torch_ops.linear_cross_entropy
    out = head(x, w, target, **more, **options)
    loss, stats = out if isinstance(out, tuple) else (out, {})
    total: Tensor = loss.sum()
    for value in stats.values():
        total = total + value.sum() if value.is_floating_point() else total
    assert total.device.type == device
    given = [x, w, *more.values()]
    grads = torch.autograd.grad(total, given, create_graph=True, allow_unused=True)
    assert {g.device.type for g in grads if g is not None} == {device}
    torch.autograd.grad(grads[0].sum() + grads[1].sum(), given, allow_unused=True)


def test_indices_of_a_group_are_made_canonical_without_a_look(device: str) -> None:
    """The whole vocabulary's size is a tensor there: as a kernel's number it would be looked at."""
    target, classes = (torch.empty(shape, dtype=torch.int64, device=device) for shape in ((5,), ()))
    assert targets.canonical("linear_cross_entropy", target, classes, -100).shape == (5,)  # pyright: ignore


def test_a_devices_workspace_is_its_own(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows; slices of the vocabulary, for those short of memory, have what a CPU has."""
    monkeypatch.setattr(chunks, "WORKSPACE_ON_DEVICE", 1 << 30)
    for at, rows in ((device, 1024), ("cpu", 256)):
        x, w, t = (
            torch.empty(4096, 8, device=at),
            torch.empty(1 << 18, 8, device=at),
            torch.empty(4096, dtype=torch.int64, device=at),
        )
        assert {j - i for i, j in fast.Buffer(x[:2048], linear.Linear(w, None), t, None).spans} == {rows}
        assert {j - i for i, j in lean.Slices(x, linear.Linear(w[: 1 << 15], None), t, None).spans} == {1 << 14}


def test_a_look_and_a_copy_would_be_seen(device: str) -> None:
    x = torch.empty(3, device=device)
    for wait in (
        lambda: bool(x.any()),
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: x.cpu(),
        lambda: torch.zeros(3).to(device),
        lambda: torch.tensor(1.0).to(device),
        lambda: torch.zeros(3, device=device).copy_(torch.zeros(3)),
        lambda: x.fill_(0) if x.max() > 0 else None,
    ):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            wait()


def test_no_number_is_copied_to_a_device() -> None:
    """torch.tensor(number, device=..) copies from the host, unseen by dispatch modes; full and new_full fill."""
    folder = Path(torch_ops.__file__).parent
    found = {
        f"{path.name}: {line.strip()}"
        for path in folder.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"torch\.(tensor|as_tensor)\(", line) and ">>>" not in line
    }
    assert found == {"call.py: wrong = torch.tensor(float(error is not None))"}, "that one where a look is free"
