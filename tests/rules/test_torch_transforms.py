"""Section 7 of the contract for PyTorch: every transform, for all three ops and their options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import torch_ops

N, V = 3, 5
TARGET = torch.tensor([1, -100, 4])
SCALE, CAP, Z, S = 0.7, 3.0, 0.1, 0.2


def _inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    make = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    return {"x": 4.0 * make(N, V) - 2.0, "y": make(N, V) + 0.1, "w": make(V) + 0.5, "tw": make(N) + 0.5}


IN = _inputs()
UP = torch.linspace(-1.0, 2.0, N * V, dtype=torch.float64).reshape(N, V)


def _composed(x: Tensor, y: Tensor | None, w: Tensor, tw: Tensor, s: float, cap: bool, ent: float) -> Tensor:
    """The loss with every option as a composition of torch's own ops."""
    z = CAP * torch.tanh(SCALE * x / CAP) if cap else x
    logp, kept = torch.log_softmax(z, 1), TARGET != -100
    smooth = -(logp * w).sum(1) * s / V
    if y is None:
        share = torch.where(kept, w[TARGET.clamp(0)], 0.0) * tw
        rows = -logp.gather(1, TARGET.clamp(0)[:, None])[:, 0] * w[TARGET.clamp(0)]
    else:
        kept, share = torch.ones(N, dtype=torch.bool), tw
        rows = -(logp * y * w).sum(1)
    rows = (1 - s) * rows + smooth + Z * torch.logsumexp(z, 1) ** 2
    total = torch.where(kept, rows * tw, 0.0).sum() / share.sum()
    entropy = -(logp.exp() * logp).sum(1)
    return total + ent * torch.where(kept, entropy, 0.0).sum()


def _full(x: Tensor, y: Tensor | None, w: Tensor, tw: Tensor) -> Tensor:
    loss, stats = torch_ops.cross_entropy(
        x,
        TARGET if y is None else y,
        w,
        label_smoothing=S,
        logit_scale=SCALE,
        softcap=CAP,
        z_loss=Z,
        token_weight=tw,
        stats=("entropy",),
    )
    return loss + 0.5 * stats["entropy"].sum()


# name: (ours, the built-in composition), functions of the logits with a scalar result
SCALAR: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softmax": (
        lambda x: (torch_ops.softmax(x, 1) * UP[: x.shape[0]]).sum(),
        lambda x: (torch.softmax(x, 1) * UP[: x.shape[0]]).sum(),
    ),
    "log_softmax": (
        lambda x: (torch_ops.log_softmax(x, 1) * UP[: x.shape[0]]).sum(),
        lambda x: (torch.log_softmax(x, 1) * UP[: x.shape[0]]).sum(),
    ),
    "cross_entropy": (
        lambda x: torch_ops.cross_entropy(x, TARGET),
        lambda x: F.cross_entropy(x, TARGET),
    ),
    "cross_entropy, every option": (
        lambda x: _full(x, None, IN["w"], IN["tw"]),
        lambda x: _composed(x, None, IN["w"], IN["tw"], S, True, 0.5),
    ),
    "cross_entropy, soft, every option": (
        lambda x: _full(x, IN["y"], IN["w"], IN["tw"]),
        lambda x: _composed(x, IN["y"], IN["w"], IN["tw"], S, True, 0.5),
    ),
}

func = torch.func
TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "value": lambda f: f,
    "grad": func.grad,
    "vjp": lambda f: lambda x: func.vjp(f, x)[1](torch.tensor(1.5, dtype=x.dtype))[0],
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (x.cos(),))[1],
    "jacrev": func.jacrev,
    "jacfwd": func.jacfwd,
    "hessian": func.hessian,
    "jacrev of jacrev": lambda f: func.jacrev(func.jacrev(f)),
    "jacrev of jacfwd": lambda f: func.jacrev(func.jacfwd(f)),
    "jacfwd of jacfwd": lambda f: func.jacfwd(func.jacfwd(f)),
    "hvp": lambda f: lambda x: func.jvp(func.grad(f), (x,), (x.cos(),))[1],
    "vmap": lambda f: lambda x: func.vmap(f)(torch.stack([x, 2 * x])),
    "vmap(grad)": lambda f: lambda x: func.vmap(func.grad(f))(torch.stack([x, 2 * x])),
    "grad(vmap)": lambda f: func.grad(lambda x: func.vmap(f)(torch.stack([x, 2 * x])).sum()),
}
THIRD: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "reverse 3": lambda f: func.jacrev(func.jacrev(func.jacrev(f))),
    "forward over hessian": lambda f: func.jacfwd(func.hessian(f)),
}


def _same(ours: Any, theirs: Any, tol: float = 1e-10) -> None:
    assert ours.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    assert theirs.abs().max() > 1e-3, "the truth is too small for the comparison to see anything"
    torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)


@pytest.mark.parametrize("transform", [*TRANSFORMS, *THIRD])
@pytest.mark.parametrize("op", SCALAR)
def test_transform_agrees_with_the_builtins(op: str, transform: str) -> None:
    apply = {**TRANSFORMS, **THIRD}[transform]
    ours, theirs = SCALAR[op]
    _same(apply(ours)(IN["x"]), apply(theirs)(IN["x"]))


INSIDE = {
    "softmax": ("value", "jvp", "hessian", "vmap"),
    "log_softmax": ("jacrev", "hvp", "vmap(grad)"),
    "cross_entropy, every option": ("grad", "jvp", "hessian", "vmap(grad)"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("op", "transform"), [(op, transform) for op, names in INSIDE.items() for transform in names])
def test_transform_inside_a_compiled_function(op: str, transform: str) -> None:
    torch._dynamo.reset()
    ours, theirs = SCALAR[op]
    compiled = torch.compile(TRANSFORMS[transform](ours), fullgraph=True, backend="aot_eager")
    _same(compiled(IN["x"]), TRANSFORMS[transform](theirs)(IN["x"]))


# Functions of every differentiable argument, for gradcheck: (function, arguments)
CHECKED: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "softmax": (lambda x: torch_ops.softmax(x, 1), ["x"]),
    "softmax, middle axis": (lambda x: torch_ops.softmax(x.reshape(1, V, N), 1), ["x"]),
    "log_softmax": (lambda x: torch_ops.log_softmax(x, 0), ["x"]),
    "mean": (lambda x: torch_ops.cross_entropy(x, TARGET), ["x"]),
    "middle axis": (lambda x: torch_ops.cross_entropy(x.reshape(1, V, N), TARGET[None], reduction="none"), ["x"]),
    "1-d": (lambda x: torch_ops.cross_entropy(x[0], TARGET[0]), ["x"]),
    "weights": (
        lambda x, w, tw: torch_ops.cross_entropy(x, TARGET, w, token_weight=tw, label_smoothing=S),
        ["x", "w", "tw"],
    ),
    "scale, cap, z": (
        lambda x, tw: torch_ops.cross_entropy(x, TARGET, logit_scale=SCALE, softcap=CAP, z_loss=Z, token_weight=tw),
        ["x", "tw"],
    ),
    "stats": (
        lambda x: _flat(torch_ops.cross_entropy(x, TARGET, reduction="none", stats=("lse", "logprob", "entropy"))),
        ["x"],
    ),
    "soft": (lambda x, y: torch_ops.cross_entropy(x, y), ["x", "y"]),
    "soft, every option": (_full, ["x", "y", "w", "tw"]),
    "every option": (lambda x, w, tw: _full(x, None, w, tw), ["x", "w", "tw"]),
}


def _flat(result: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, ...]:
    return (result[0], *result[1].values())


def _leaves(names: list[str]) -> tuple[Tensor, ...]:
    return tuple(IN[name].clone().requires_grad_() for name in names)


@pytest.mark.parametrize("case", CHECKED)
def test_gradcheck(case: str) -> None:
    fn, names = CHECKED[case]
    assert gradcheck(
        fn, _leaves(names), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("case", CHECKED)
def test_gradgradcheck(case: str) -> None:
    fn, names = CHECKED[case]
    # fast mode: along random directions, a tenth of the time
    assert gradgradcheck(
        fn, _leaves(names), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True, fast_mode=True
    )


def test_class_weights_that_differ_by_example_under_vmap() -> None:
    weights = torch.stack([IN["w"], IN["w"].flip(0)])

    def f(x: Tensor, w: Tensor) -> Tensor:
        return torch_ops.cross_entropy(x, TARGET, w, label_smoothing=S)

    x = torch.stack([IN["x"], -IN["x"]])
    for argnum in (0, 1):
        batched = func.vmap(func.grad(f, argnums=argnum))(x, weights)
        single = torch.stack([func.grad(f, argnums=argnum)(a, w) for a, w in zip(x, weights, strict=True)])
        _same(batched, single)


class _Head(torch.nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = torch_ops.cross_entropy(x, t, label_smoothing=S, softcap=CAP)
        return loss, torch_ops.softmax(x, -1), torch_ops.log_softmax(x, -1)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_rows(strict: bool) -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(_Head(), (IN["x"], TARGET), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    x, t = torch.cat([IN["x"]] * 3), torch.cat([TARGET] * 3)
    for ours, eager in zip(program.module()(x, t), _Head()(x, t), strict=True):
        _same(ours, eager)


@pytest.mark.slow
def test_compiled_training_step_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, t: torch_ops.cross_entropy(x, t, label_smoothing=S, z_loss=Z, softcap=CAP), fullgraph=True
    )
    for rows in (3, 6, 9, 12):
        x = torch.cat([IN["x"]] * (rows // 3)).requires_grad_()
        t = torch.cat([TARGET] * (rows // 3))
        loss = compiled(x, t)
        eager = torch_ops.cross_entropy(x, t, label_smoothing=S, z_loss=Z, softcap=CAP)
        _same(loss.detach(), eager.detach())
        _same(torch.autograd.grad(loss, x)[0], torch.autograd.grad(eager, x)[0])


def test_compiled_function_gives_a_nan_row_where_eager_raises() -> None:
    torch._dynamo.reset()
    target = torch.tensor([0, 9, 2])
    compiled = torch.compile(
        lambda x, t: torch_ops.cross_entropy(x, t, reduction="none"), fullgraph=True, backend="aot_eager"
    )
    x = IN["x"].clone().requires_grad_()
    loss = compiled(x, target)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().tolist() == [False, True, False]
    assert dx.isnan().all(1).tolist() == [False, True, False]
    assert dx[0].isfinite().all()
    batched = func.vmap(lambda x, t: torch_ops.cross_entropy(x, t, reduction="none"))(IN["x"], target)
    assert batched.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    x = IN["x"].clone().requires_grad_()
    loss: Any = checkpoint(lambda x: torch_ops.cross_entropy(3.0 * x, TARGET), x, use_reentrant=reentrant)
    loss.backward()
    assert x.grad is not None
    _same(x.grad, func.grad(lambda x: F.cross_entropy(3.0 * x, TARGET))(IN["x"]))


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_follows_the_builtin(op: str, dtype: torch.dtype) -> None:
    x = IN["x"].to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert getattr(torch_ops, op)(x).dtype == getattr(torch, op)(x, -1).dtype
    wide = getattr(torch_ops, op)(x, dtype=torch.float64)
    _same(wide, getattr(torch, op)(x, -1, dtype=torch.float64))


def test_autocast_widens_where_the_builtin_widens(monkeypatch: pytest.MonkeyPatch) -> None:
    # No device on this machine widens softmax under autocast, so the built-in is replaced by one that does.
    monkeypatch.setattr(torch, "softmax", lambda x, dim: x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch_ops.softmax(IN["x"].bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("op", ["softmax", "log_softmax", "cross_entropy"])
def test_retain_graph_and_second_backward(op: str) -> None:
    x = IN["x"].clone().requires_grad_()
    out = SCALAR[op][0](x)
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    (second,) = torch.autograd.grad(out, x)
    assert torch.equal(first, second)
    assert first.abs().max() > 0


class _Tagged(Tensor):
    """A subclass that keeps its type through torch functions."""


def test_tensor_subclasses_keep_their_type_and_see_our_functions() -> None:
    seen = []

    class Spy(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = IN["x"].as_subclass(Spy)
    calls: list[tuple[Any, tuple[Any, ...]]] = [(torch_ops.softmax, ()), (torch_ops.log_softmax, ())]
    for fn, args in [*calls, (torch_ops.cross_entropy, (TARGET,))]:
        out: Any = fn(x, *args)
        assert isinstance(out, Spy)
        assert seen[0] is fn
        seen.clear()
    assert isinstance(torch_ops.softmax(IN["x"].as_subclass(_Tagged)), _Tagged)


@pytest.mark.parametrize("device", ["meta"])
def test_meta_tensors_have_the_right_shapes(device: str) -> None:
    x = torch.empty(4, 7, 2, device=device, dtype=torch.bfloat16)
    t = torch.zeros(4, 2, dtype=torch.int64, device=device)
    loss, stats = torch_ops.cross_entropy(x, t, reduction="none", stats=("lse", "argmax"))
    assert loss.shape == stats["lse"].shape == stats["argmax"].shape == (4, 2)
    assert (loss.dtype, stats["argmax"].dtype) == (torch.float32, torch.int64)
    assert torch_ops.softmax(x, 1).shape == x.shape


def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        _same(func.grad(SCALAR["cross_entropy"][0])(IN["x"]), func.grad(SCALAR["cross_entropy"][1])(IN["x"]))
    finally:
        torch.use_deterministic_algorithms(False)


MODULES = [
    (torch_ops.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss, {"weight": IN["w"], "label_smoothing": S}),
    (torch_ops.nn.Softmax, torch.nn.Softmax, {"dim": 1}),
    (torch_ops.nn.LogSoftmax, torch.nn.LogSoftmax, {"dim": 1}),
]


@pytest.mark.parametrize(("ours", "theirs", "kwargs"), MODULES)
def test_modules_are_drop_in(ours: Any, theirs: Any, kwargs: dict[str, Any]) -> None:
    a, b = ours(**kwargs), theirs(**kwargs)
    assert a.state_dict().keys() == b.state_dict().keys()
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    args = (IN["x"], TARGET) if "weight" in kwargs else (IN["x"],)
    for module in (a, copy.deepcopy(a)):
        _same(module(*args), b(*args))
    if "weight" in kwargs:
        assert a.label_smoothing == S
        assert repr(a) == f"CrossEntropyLoss(label_smoothing={S})"
        assert not torch.equal(a(*args), a(*args, token_weight=IN["tw"]))
        assert a.to(torch.float32).weight.dtype == torch.float32
        with pytest.raises(AttributeError):
            a.temperature  # noqa: B018
