"""The short way of small eager PyTorch calls: taken where it should be, and the ordinary way's answers to the bit."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ops
from torch_ops._rows import native

if native.missing:
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

OPS = ("softmax", "log_softmax", "cross_entropy")
SHAPES = ((32, 10), (1, 50), (1, 1), (7, 1), (3, 130), (1000, 9))
SHORT = {"softmax": "softmax_fwd", "log_softmax": "log_softmax_alone", "cross_entropy": "cross_entropy_mean"}


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    x = 9.0 * torch.randn(shape, generator=g, dtype=torch.float64)
    return x.to(dtype), torch.randint(shape[1], shape[:1], generator=g)


def call(op: str, x: Any, target: Any, *args: Any, **options: Any) -> Any:
    return getattr(torch_ops, op)(x, *((target, *args) if op == "cross_entropy" else args), **options)


@contextmanager
def ordinary() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "serves_directly", lambda x: False)
        yield


@contextmanager
def short(op: str) -> Iterator[list[int]]:
    """The number of rows of each call that went the short way."""
    found: list[int] = []
    real = getattr(native, SHORT[op])

    def spy(x: Tensor, *args: Any) -> Any:
        out = real(x, *args)
        if not isinstance(out, list) or out:
            found.append(len(x))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, SHORT[op], spy)
        yield found


def same(one: Tensor, other: Tensor) -> None:
    assert (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad)
    assert np.array_equal(bits(one), bits(other))


def bits(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(-1).view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_same_bits(op: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, target = problem(shape, dtype)
    strided = torch.stack([x, -x], -1)[..., 0]
    # Flags that stand for values, which the dispatcher has to resolve: a pointer alone would miss them.
    negative, zero = (-x)._neg_view(), torch.ops.aten._efficientzerotensor(list(shape), dtype=dtype)
    spread = torch.stack([target, -target], -1)[:, 0]
    for view in (x, strided, x.t().contiguous().t(), negative, zero):
        for t in (target, spread, (-target)._neg_view()):
            with short(op) as calls:
                got = call(op, view, t)
            with ordinary():
                same(got, call(op, view, t))
            assert calls == [len(x)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_same_derivatives(op: str, shape: tuple[int, int]) -> None:
    def all_of() -> tuple[Tensor, ...]:
        x, target = problem(shape)
        x.requires_grad_()
        y = call(op, x, target)
        up = torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape).requires_grad_()
        (dx,) = torch.autograd.grad(y, x, up, create_graph=True)
        second = torch.autograd.grad(dx, (x, up), torch.linspace(-1, 1, x.numel()).reshape(x.shape))
        return (y, dx, *second)

    ours = all_of()
    with ordinary():
        for one, other in zip(ours, all_of(), strict=True):
            same(one, other)


@pytest.mark.parametrize("op", OPS[:2])
def test_a_first_derivative_goes_the_short_way(op: str) -> None:
    calls: list[int] = []
    x = X.clone().requires_grad_()
    y, up = call(op, x, T), torch.linspace(-1, 1, X.numel()).reshape(X.shape)
    with pytest.MonkeyPatch.context() as patch:
        real = getattr(native, f"{op}_bwd")
        patch.setattr(native, f"{op}_bwd", lambda dy, *args: (calls.append(len(dy)), real(dy, *args))[1])
        (got,) = torch.autograd.grad(y, x, up, retain_graph=True)
        with ordinary():
            same(got, torch.autograd.grad(y, x, up, retain_graph=True)[0])
        assert calls == [len(x)]
        # whoever differentiates it, watches it, maps it or hands over another class of tensor has the ordinary way
        torch.autograd.grad(y, x, up, create_graph=True)
        with _Dispatch():
            torch.autograd.grad(y, x, up, retain_graph=True)
        torch.autograd.grad(y, x, up.as_subclass(_Subclass), retain_graph=True)
        torch.func.vmap(torch.func.grad(lambda x: (call(op, x, T) * up).sum()))(X.expand(2, 3, 4))
        assert calls == [len(x)]


def test_special_values() -> None:
    x, target = problem((5, 7))
    x[0, 1], x[1, 2], x[2, 3], x[3] = -torch.inf, torch.inf, torch.nan, -torch.inf
    for op in OPS:
        for rows in (x, x[:1], x[4:]):
            got = call(op, rows, target[: len(rows)])
            with ordinary():
                same(got, call(op, rows, target[: len(rows)]))


@pytest.mark.parametrize("target", [[-100, 1, 2], [-100] * 3], ids=["some", "all"])
def test_ignored_rows_go_the_ordinary_way(target: list[int]) -> None:
    x, t = problem((3, 4))[0], torch.tensor(target)
    with short("cross_entropy") as calls:
        got = torch_ops.cross_entropy(x, t)
    assert not calls
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(x, t), equal_nan=True)


X, T = problem((3, 4))
MISTAKES: dict[str, tuple[Any, ...]] = {
    "a class too large": (X, torch.tensor([0, 4, 1])),
    "a negative class": (X, torch.tensor([0, 1, -1])),
    "too few rows": (X, T[:2]),
    "no rows": (X, T[:0]),
    "a target of the input's shape": (X, T.unsqueeze(1).expand(3, 4)),
    "a scalar input": (X[0, 0], T),
    "an integer input": (T.unsqueeze(1), T),
    "a complex input": (X.to(torch.complex64), T),
    "a bool target": (X, T > 0),
    "a float target": (X, T.float()),
    "a sparse input": (X.to_sparse(), T),
    "a sparse target": (X, T.to_sparse()),
    "a nested input": (torch.nested.nested_tensor([X[0], X[1]]), T),
    "a nested target": (X, torch.nested.nested_tensor([T, T])),
    "a list": (X.tolist(), T),
    "a NumPy target": (X, T.numpy()),
    "a target elsewhere": (X, T.to("meta")),
    "an input elsewhere": (X.to("meta"), T),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "smoothing False": {"label_smoothing": False},
    "scale True": {"logit_scale": True},
    "z_loss False": {"z_loss": False},
    "scale a tensor of no row": {"logit_scale": torch.ones(1)},
    "scale an array": {"logit_scale": np.ones(2)},
    "smoothing a list": {"label_smoothing": [0.0]},
    "reduction None": {"reduction": None},
    "reduction unknown": {"reduction": "avg"},
    "stats a string": {"stats": "lse"},
    "stats None": {"stats": None},
    "ignore_index a float": {"ignore_index": -100.0},
    "inplace_backward 0": {"inplace_backward": 0},
    "softcap 0": {"softcap": 0.0},
}
ALONG: dict[str, tuple[Any, ...]] = {
    "dim None": (X, None),
    "dim True": (X, True),
    "dim a float": (X, 1.0),
    "dim too large": (X, 2),
    "dim too small": (X, -3),
    "an integer input": (T, 0),
    "a sparse input": (X.to_sparse(), 1),
    "a nested input": (torch.nested.nested_tensor([X[0], X[1]]), 1),
    "a list": (X.tolist(), 1),
}


def outcome(run: Any) -> Any:
    try:
        return run()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    "run",
    [pytest.param(lambda a=a: torch_ops.cross_entropy(*a), id=name) for name, a in MISTAKES.items()]
    + [pytest.param(lambda o=o: torch_ops.cross_entropy(X, T, **o), id=name) for name, o in OPTIONS.items()]
    + [
        pytest.param(lambda op=op, a=a: getattr(torch_ops, op)(*a), id=f"{op}: {name}")
        for op, (name, a) in itertools.product(OPS[:2], ALONG.items())
    ],
)
def test_same_mistakes(run: Any) -> None:
    got = outcome(run)
    assert isinstance(got, tuple), "meant to be refused"
    with ordinary():
        assert got == outcome(run)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.0, "logit_scale": float("1"), "reduction": "".join("mean"), "ignore_index": -100},
        {"softcap": None, "stats": (), "on_all_ignored": "nan", "z_loss": -0.0},
    ],
)
def test_options_at_their_defaults_go_the_short_way(options: dict[str, Any]) -> None:
    with short("cross_entropy") as calls:
        torch_ops.cross_entropy(X, T, **options)
        torch_ops.nn.CrossEntropyLoss(**options)(X, T)
    assert calls == [3, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"label_smoothing": 0.1},
        {"logit_scale": 2.0},
        {"logit_scale": 2},
        {"softcap": 3.0},
        {"z_loss": 0.1},
        {"ignore_index": 1},
        {"on_all_ignored": "zero"},
        {"stats": ("lse",)},
        {"weight": torch.ones(4)},
        {"token_weight": torch.ones(3)},
    ],
    ids=lambda o: next(iter(o)),
)
def test_any_option_goes_the_ordinary_way(options: dict[str, Any]) -> None:
    with short("cross_entropy") as calls:
        torch_ops.cross_entropy(X, T, **options)
    assert not calls


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        SEEN.append(func)
        return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    """A tensor of another class."""


SEEN: list[Any] = []


@pytest.mark.parametrize("op", OPS)
def test_whoever_watches_sees_the_ordinary_way(op: str) -> None:
    with short(op) as calls:
        with _Function():
            call(op, X, T)
        assert getattr(torch_ops, op) in SEEN
        calls.clear()  # the mode is off inside its handler
        with _Dispatch():
            call(op, X, T)
        assert isinstance(call(op, X.as_subclass(_Subclass), T), _Subclass)
        torch.func.vmap(lambda x: call(op, x, T))(X.expand(2, 3, 4))
        torch.func.grad(lambda x: call(op, x, T).sum())(X)
        with forward_ad.dual_level():
            y = call(op, forward_ad.make_dual(X, torch.ones_like(X)), T)
            assert forward_ad.unpack_dual(y).tangent is not None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call(op, X, T)
        make_fx(lambda x: call(op, x, T))(X)
    assert not calls


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "setting",
    [nullcontext, torch.no_grad, torch.inference_mode],
    ids=["grad", "no_grad", "inference"],
)
def test_gradient_modes(op: str, setting: Any) -> None:
    x = X.clone().requires_grad_()
    with setting():
        got = call(op, x, T)
        with ordinary():
            other = call(op, x, T)
        same(got, other)
        assert got.is_inference() == other.is_inference()


@pytest.mark.parametrize("op", OPS)
def test_settings_of_the_framework(op: str) -> None:
    with ordinary():
        truth = call(op, X, T)
    torch.use_deterministic_algorithms(True)
    try:
        same(call(op, X, T), truth)
    finally:
        torch.use_deterministic_algorithms(False)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(call(op, X, T))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for answer in found:
        same(answer, truth)


def test_a_changed_input_is_an_error_in_the_backward() -> None:
    x = (X.clone().requires_grad_() * 1.0).exp()
    loss = torch_ops.cross_entropy(x, T)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_batched_gradients() -> None:
    x = X.clone().requires_grad_()
    for op in OPS:
        y = call(op, x, T)
        up = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(0))
        (many,) = torch.autograd.grad(y, x, up, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in up]
        torch.testing.assert_close(many, torch.stack(each))


def test_gradcheck() -> None:
    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: torch_ops.cross_entropy(x, T), x, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(lambda x: torch_ops.cross_entropy(x, T), x)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_compiled(op: str) -> None:
    torch._dynamo.reset()
    with short(op) as calls:
        got = torch.compile(lambda x: call(op, x, T), fullgraph=True, backend="aot_eager")(X)
    assert not calls
    torch.testing.assert_close(got, call(op, X, T))
