"""The short way of a plain mean cross_entropy on a GPU, and its kernel of class indices, in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.rows.gpu import interpreter

if interpreter.why_not():
    pytest.skip(f"Triton's interpreter: {interpreter.why_not()}", allow_module_level=True)

torch: Any = importlib.import_module("torch")
torch_ops: Any = importlib.import_module("torch_ops")
native: Any = importlib.import_module("torch_ops._rows.native")
triton: Any = importlib.import_module("torch_ops._rows.triton")
ops: Any = importlib.import_module("torch_ops._rows.triton_ops")
targets: Any = importlib.import_module("torch_ops._rows.targets")
modes: Any = importlib.import_module("torch_ops._modes")
dispatch: Any = importlib.import_module("torch.utils._python_dispatch")

X = 5.0 * torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
FEW = torch.tensor([0, 8, -100, 3, 3, -100, 1])  # some rows are ignored
WRONG = torch.tensor([0, 9, -100, -1, 2**40, 4, -(2**40)])
NONE = torch.full((7,), -100)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """CPU tensors are served as a GPU's are; the number of rows of each call that went the short way."""
    rows: list[int] = []
    mean = triton.cross_entropy_mean

    def spy(x: Any, t: Any) -> Any:
        rows.append(len(x))
        return mean(x, t)

    with interpreter.interpreted():
        monkeypatch.setattr(triton, "DEVICES", ("cpu",))
        monkeypatch.setattr(triton, "why_not", lambda device: "")
        monkeypatch.setattr(triton, "cross_entropy_mean", spy)
        monkeypatch.setattr(modes, "can_look", lambda target: False)
        yield rows


def ordinary(x: Any, t: Any, **options: Any) -> Any:
    """What the ordinary way says, kernels and all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "serves_directly", lambda x: False)
        patch.setattr(triton, "serves_indices", lambda t: False)
        return torch_ops.cross_entropy(x, t, **options)


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("ignored", [-100, -1, 3, 156])
def test_class_indices(dtype: Any, ignored: int, short: list[int]) -> None:
    t = torch.arange(-130, 2900, 7).to(dtype)  # narrow types wrap around: 156 of uint8 is no -100
    for one in (t, t[::2], t[:0], t.reshape(-1, 1), t[3]):
        found = targets.canonical("cross_entropy", one, 9, ignored)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton, "serves_indices", lambda t: False)
            truth = targets.canonical("cross_entropy", one, 9, ignored)
        assert found.dtype == torch.int64
        assert torch.equal(found, truth)
    assert {-2, -1, 5} <= set(targets.canonical("cross_entropy", torch.arange(-200, 200).to(dtype), 9, 4).tolist())


def test_unsigned_64_bit_indices_go_the_ordinary_way() -> None:
    assert not triton.serves_indices(torch.zeros(1, dtype=torch.uint64))


def test_schema_and_fake() -> None:
    op = torch.ops.softmax_ext_triton.canonical.default
    torch.library.opcheck(op, (FEW, 9, -100), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(op, (FEW.int()[::2], 9, 2), test_utils=("test_schema", "test_faketensor"))
    op = torch.ops.softmax_ext_triton.kept_mean.default
    torch.library.opcheck(op, (torch.rand(3), torch.tensor([2, -1, 0])), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 5, 1024, 2500])
def test_mean_of_the_rows_kept(n: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ops: Any = importlib.import_module("torch_ops._rows.triton_ops")
    g = torch.Generator().manual_seed(n)
    target = torch.randint(-2, 3, (n,), generator=g)
    nll = torch.rand(n, generator=g, dtype=dtype).masked_fill(target == -1, 0.0)
    due = nll.double().sum() / (target != -1).sum()
    for few in (1 << 15, 3):  # by one program, and by several kernels
        monkeypatch.setattr(ops.gpu_targets, "FEW_ROWS", few)
        loss, kept = ops.kept_mean(nll, target)
        assert (loss.dtype, kept.dtype, kept.item()) == (dtype, torch.int64, int((target != -1).sum()))
        torch.testing.assert_close(loss.double(), due, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_gradient_by_a_number_is_rounded_once(dtype: Any) -> None:
    ops: Any = importlib.import_module("torch_ops._rows.triton_ops")
    x, factor = torch.randn(37, 129).to(dtype), torch.tensor(1 / 3, dtype=torch.promote_types(dtype, torch.float32))
    for kind in (torch.float16, torch.float32):  # the interpreter cuts off what a bfloat16 rounds
        out = ops.scaled(x, factor, torch.full_like(x, torch.nan, dtype=kind))
        assert torch.equal(out, (x.to(factor.dtype) * factor).to(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [FEW, FEW.to(torch.int16), NONE, WRONG, FEW.clamp(0)], ids=lambda t: str(t.tolist()))
def test_the_ordinary_answers(t: Any, dtype: Any, short: list[int]) -> None:
    def all_of(call: Any) -> list[Any]:
        x = X.to(dtype, copy=True).requires_grad_()
        value = call(x, t)
        up = torch.tensor(1.5, dtype=value.dtype, requires_grad=True)
        (dx,) = torch.autograd.grad(value, x, up, create_graph=True)
        second = torch.autograd.grad(dx, (x, up), torch.linspace(-1, 1, dx.numel()).reshape(dx.shape).to(dx.dtype))
        with torch.no_grad():
            return [value, dx, *second, call(x, t)]

    ours = all_of(torch_ops.cross_entropy)
    assert short == [7, 7]
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-7}
    for one, other in zip(ours, all_of(ordinary), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        torch.testing.assert_close(one, other, equal_nan=True, **tolerance)
    assert short == [7, 7]


def test_against_the_reference(short: list[int]) -> None:
    x = X.clone().requires_grad_()
    value = torch_ops.cross_entropy(x, FEW)
    value.backward()
    case = (X.double().numpy(), FEW.numpy())
    np.testing.assert_allclose(value.item(), float(reference.cross_entropy(*case)), rtol=3e-7)
    truth = np.asarray(reference.cross_entropy_grad(*case), np.float64)
    np.testing.assert_allclose(x.grad.numpy(), truth, rtol=1e-6, atol=1e-38)
    assert not x.grad[2].any()
    assert short == [7]


def test_in_place(short: list[int]) -> None:
    leaf = X.clone().requires_grad_()
    x = leaf * 1
    (dx,) = torch.autograd.grad(torch_ops.cross_entropy(x, FEW, inplace_backward=True), x)
    assert dx.data_ptr() == x.data_ptr()
    assert short == [7]
    torch.testing.assert_close(dx, torch.autograd.grad(ordinary(leaf, FEW), leaf)[0])


def test_few_launches(short: list[int]) -> None:
    """On a GPU each op of the host is microseconds: a loss and its gradient are nine."""

    class Counted(dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def count(call: Any) -> int:
        seen.clear()
        x = X.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch, Counted():
            patch.setattr(modes, "_dispatch_modes", lambda: 0)  # the counting itself would send it the ordinary way
            torch.autograd.grad(call(x, FEW), x)
        return len([name for name in seen if not any(quiet in name for quiet in QUIET)])

    seen: list[str] = []
    assert count(torch_ops.cross_entropy) <= 9, seen
    assert count(ordinary) > 20
    assert short == [7]


QUIET = ("detach", "clone", "empty", "ones_like", "expand", "view", "alias")  # of these none computes


@pytest.mark.parametrize(
    ("x", "t"),
    [
        (X[0], FEW[0]),
        (X[None].movedim(2, 1), FEW[None]),
        (X, X.softmax(1)),
        (X, FEW.to(torch.uint64)),
    ],
    ids=["one row", "a middle axis", "soft targets", "uint64"],
)
def test_others_go_the_ordinary_way(x: Any, t: Any, short: list[int]) -> None:
    torch.testing.assert_close(torch_ops.cross_entropy(x, t), ordinary(x, t), equal_nan=True)
    assert not short


@pytest.mark.parametrize(
    ("x", "t"),
    [(X, FEW[:3]), (X, FEW[:, None]), (X, FEW > 0), (X.long(), FEW), (X.to("meta"), FEW)],
    ids=["too few rows", "a column", "bool targets", "integer logits", "elsewhere"],
)
def test_mistakes_are_the_ordinary_ones(x: Any, t: Any, short: list[int]) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as ours:
        torch_ops.cross_entropy(x, t)
    with pytest.raises(type(ours.value)) as theirs:
        ordinary(x, t)
    assert str(ours.value) == str(theirs.value)
    assert not short


def test_transforms(short: list[int]) -> None:
    both = torch.stack([X, -X])
    mapped = torch.func.vmap(torch_ops.cross_entropy, in_dims=(0, None))(both, FEW)
    torch.testing.assert_close(mapped, torch.stack([ordinary(x, FEW) for x in both]))
    targets = torch.stack([FEW, FEW.flip(0)])
    mapped = torch.func.vmap(torch_ops.cross_entropy)(both, targets)
    torch.testing.assert_close(mapped, torch.stack([ordinary(x, t) for x, t in zip(both, targets, strict=True)]))
    ours = torch.func.hessian(lambda x: torch_ops.cross_entropy(x, FEW))(X)
    torch.testing.assert_close(ours, torch.func.hessian(lambda x: ordinary(x, FEW))(X))
    assert not short
