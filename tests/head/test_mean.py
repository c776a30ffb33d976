"""The short way of a head without options: taken where it should be, and the ordinary way's answers to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ops
from torch_ops._head import chunks, mean
from torch_ops._head.linear import formed_in
from torch_ops._rows import native

if native.missing:
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

LEADS = ((5,), (1,), (2, 3), (2, 2, 2))
Head = tuple[Tensor, Tensor, Tensor | None, Tensor]


def problem(lead: tuple[int, ...] = (5,), dtype: torch.dtype = torch.float32, *, bias: bool = False) -> Head:
    g = torch.Generator().manual_seed(len(lead))
    x = torch.randn(*lead, 4, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    w = (3.0 * torch.randn(7, 4, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    b = torch.randn(7, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return x, w, b, torch.randint(7, lead, generator=g)


def loss_of(head: Head, **options: Any) -> Any:
    x, w, b, target = head
    return torch_ops.linear_cross_entropy(x, w, target, linear_bias=b, **options)


def answers(head: Head) -> tuple[Tensor, ...]:
    """The loss, its gradients and a derivative of theirs."""
    loss = loss_of(head)
    parts = [v for v in head[:3] if v is not None]
    plain = torch.autograd.grad(2.0 * loss, parts, retain_graph=True)
    first = torch.autograd.grad(loss, parts, create_graph=True)
    second = torch.autograd.grad(sum(d.float().square().sum() for d in first), parts)  # pyright: ignore
    return loss, *plain, *first, *second


@contextmanager
def ordinary() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mean, "mean", lambda *_: None)
        yield


@contextmanager
def short() -> Iterator[list[bool]]:
    """Whether each call that asked for it went the short way."""
    found: list[bool] = []
    real = mean.mean

    def spy(*args: Any) -> Any:
        loss = real(*args)
        found.append(loss is not None)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mean, "mean", spy)
        yield found


def same(ours: Any, others: Any) -> None:
    for one, other in zip(ours, others, strict=True):
        assert (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad)
        assert torch.equal(one, other)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_same_bits(dtype: torch.dtype, lead: tuple[int, ...], bias: bool) -> None:
    head = problem(lead, dtype, bias=bias)
    with short() as calls:
        ours = answers(head)
    own = formed_in(head[0], head[3]) == dtype
    assert calls == [dtype != torch.float16 and own]
    with ordinary():
        same(ours, answers(head))


def test_a_wrong_factor_is_seen() -> None:
    head = problem()
    with ordinary():
        others = answers(head)
    real = mean.LinearSum.apply

    class Twice:
        @staticmethod
        def apply(*args: Any) -> Any:
            return 2.0 * real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mean, "LinearSum", Twice)
        with pytest.raises(AssertionError):
            same(answers(head), others)


@pytest.mark.parametrize("setting", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_without_a_gradient(setting: Any, bias: bool) -> None:
    head = problem(bias=bias)
    with setting(), short() as calls:
        got = loss_of(head)
        with ordinary():
            same([got], [loss_of(head)])
    assert calls == [True]


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_arguments(frozen: int) -> None:
    head = list(problem(bias=True))
    head[frozen] = head[frozen].detach()  # pyright: ignore[reportOptionalMemberAccess]
    wanted = [v for i, v in enumerate(head[:3]) if i != frozen]
    with short() as calls:
        ours = torch.autograd.grad(loss_of(tuple(head)), wanted)  # pyright: ignore
    assert calls == [True]
    with ordinary():
        same(ours, torch.autograd.grad(loss_of(tuple(head)), wanted))  # pyright: ignore


def test_strides_and_flags_that_stand_for_values() -> None:
    x, w, target = detached((6,))
    for x1 in (torch.stack([x, -x], -1)[..., 0], (-x)._neg_view()):
        for w1 in (w.t().contiguous().t(), (-w)._neg_view()):
            for t1 in (torch.stack([target, -target], -1)[:, 0], (-target)._neg_view()):
                head = (x1.requires_grad_(), w1.requires_grad_(), None, t1)
                with short() as calls:
                    ours = answers(head)
                assert calls == [True]
                with ordinary():
                    same(ours, answers(head))


@pytest.mark.parametrize("target", [[-100, 1, 2, 3, 4], [-100] * 5], ids=["some", "all"])
def test_ignored_rows_go_the_ordinary_way(target: list[int]) -> None:
    x, w, *_ = problem()
    t = torch.tensor(target)
    with short() as calls:
        got = torch_ops.linear_cross_entropy(x, w, t)
    assert calls == [False]
    torch.testing.assert_close(got, F.cross_entropy(F.linear(x, w), t), equal_nan=True)


def test_who_does_not_look_at_the_classes_is_seen() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "aminmax", lambda t: (torch.tensor(0), torch.tensor(0)))
        with pytest.raises(AssertionError):
            test_ignored_rows_go_the_ordinary_way([-100, 1, 2, 3, 4])
        with pytest.raises(AssertionError):
            test_same_mistakes("a class too large")


def test_several_chunks_go_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    head = problem()
    with short() as calls:
        whole = answers(head)
        monkeypatch.setattr(chunks, "WORKSPACE", 2 * 7 * 4)
        parts = answers(head)
    assert calls == [True, False]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def detached(lead: tuple[int, ...] = (5,)) -> tuple[Tensor, Tensor, Tensor]:
    x, w, _, target = problem(lead)
    return x.detach(), w.detach(), target


X, W, T = detached()
MISTAKES: dict[str, tuple[Any, ...]] = {
    "a class too large": (X, W, torch.tensor([0, 7, 1, 1, 1])),
    "a negative class": (X, W, torch.tensor([0, 1, -1, 1, 1])),
    "too few rows": (X, W, T[:2]),
    "a target of the logits' shape": (X, W, T.unsqueeze(1).expand(5, 7)),
    "a scalar input": (X[0, 0], W, T),
    "an integer input": (X.long(), W, T),
    "a weight of one dimension": (X, W[0], T),
    "a weight of none": (X, W[0, 0], T),
    "a weight of other features": (X, W[:, :3], T),
    "a weight of another type": (X, W.double(), T),
    "a bool target": (X, W, T > 0),
    "a float target": (X, W, T.float()),
    "a sparse input": (X.to_sparse(), W, T),
    "a sparse weight": (X, W.to_sparse(), T),
    "a sparse target": (X, W, T.to_sparse()),
    "a nested weight": (X, torch.nested.nested_tensor([W[0], W[1]]), T),
    "a nested target": (X, W, torch.nested.nested_tensor([T, T])),
    "a list": (X.tolist(), W, T),
    "a list of weights": (X, W.tolist(), T),
    "a NumPy target": (X, W, T.numpy()),
    "a target elsewhere": (X, W, T.to("meta")),
    "a weight elsewhere": (X, W.to("meta"), T),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "smoothing False": {"label_smoothing": False},
    "reduction unknown": {"reduction": "avg"},
    "shift False": {"shift": False},
    "shift a float": {"shift": 0.0},
    "memory unknown": {"memory": "slow"},
    "chunk_size 0": {"chunk_size": 0},
    "grad_samples 0": {"grad_samples": 0},
    "generator alone": {"generator": torch.Generator()},
    "a bias of other classes": {"linear_bias": torch.ones(6)},
    "a bias of two dimensions": {"linear_bias": torch.ones(7, 1)},
    "a bias of another type": {"linear_bias": torch.ones(7).double()},
    "a bias that is a list": {"linear_bias": [0.0] * 7},
}


def outcome(*args: Any, **options: Any) -> Any:
    try:
        return torch_ops.linear_cross_entropy(*args, **options)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", [*MISTAKES, *OPTIONS])
def test_same_mistakes(name: str) -> None:
    args, options = MISTAKES.get(name, (X, W, T)), OPTIONS.get(name, {})
    got = outcome(*args, **options)
    with ordinary():
        other = outcome(*args, **options)
    assert isinstance(got, tuple) == isinstance(other, tuple)
    assert got == other if isinstance(got, tuple) else torch.equal(got, other)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"label_smoothing": 0.1},
        {"logit_scale": 2},
        {"softcap": 3.0},
        {"z_loss": 0.1},
        {"ignore_index": 1},
        {"on_all_ignored": "zero"},
        {"stats": ("lse",)},
        {"weight": torch.ones(7)},
        {"token_weight": torch.ones(5)},
        {"memory": "lean"},
        {"chunk_size": 2},
        {"low_rank": (torch.ones(2, 4), torch.ones(7, 2))},
    ],
    ids=lambda o: next(iter(o)),
)
def test_any_option_goes_the_ordinary_way(options: dict[str, Any]) -> None:
    with short() as calls:
        torch_ops.linear_cross_entropy(X, W, T, **options)
    assert not any(calls)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    """A tensor of another class."""


def test_whoever_watches_sees_the_ordinary_way() -> None:
    head = problem()
    with short() as calls:
        with _Dispatch():
            loss_of(head)
        torch_ops.linear_cross_entropy(X, W.as_subclass(_Subclass), T)
        torch.func.grad(lambda w: torch_ops.linear_cross_entropy(X, w, T))(W)
        torch.func.vmap(lambda x: torch_ops.linear_cross_entropy(x, W, T))(X.expand(2, 5, 4))
        torch.func.jvp(lambda w: torch_ops.linear_cross_entropy(X, w, T), (W,), (W,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(head)
        make_fx(lambda x: torch_ops.linear_cross_entropy(x, W, T))(X)
    assert not any(calls)


def test_modules_and_parameters_go_the_short_way() -> None:
    module = torch_ops.nn.LinearCrossEntropyLoss(4, 7, bias=True)
    with short() as calls:
        ours = torch.autograd.grad(module(X, T), list(module.parameters()))
    assert calls == [True]
    with ordinary():
        same(ours, torch.autograd.grad(module(X, T), list(module.parameters())))


def test_batched_gradients_and_hooks() -> None:
    x, w, _, target = problem()
    up = torch.tensor([1.0, 2.0])
    loss = torch_ops.linear_cross_entropy(x, w, target)
    (many,) = torch.autograd.grad(loss, w, up, is_grads_batched=True)
    for told in (nullcontext(), torch.autograd.graph.save_on_cpu()):
        with told:
            loss = torch_ops.linear_cross_entropy(x, w, target)
        (one,) = torch.autograd.grad(loss, w)
        torch.testing.assert_close(many, torch.stack([one, 2.0 * one]))
