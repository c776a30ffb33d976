"""Low-rank heads and scales of rows by the public door: against the reference and the joined weight, to every order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import torch_ops
from softmax_ext import reference
from tests.head.problems import MEMORY
from tests.judging import checks
from torch_ops._head import linear

N, D, V, R = 9, 6, 23, 3
F64 = torch.float64


def given(dtype: torch.dtype = F64, lead: tuple[int, ...] = (N,), inner: tuple[int, ...] = ()) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    mk = lambda *n: torch.randn(*n, dtype=F64, generator=g).to(dtype).requires_grad_()  # noqa: E731
    found = {"x": mk(*lead, D), "w": mk(V, *inner, D), "b": mk(V, *inner), "down": mk(R, D), "up": mk(V, *inner, R)}
    found["s"] = (0.3 + 1.5 * torch.rand(*lead, *inner, dtype=F64, generator=g)).to(dtype).requires_grad_()
    return found


def target(*shape: int) -> Tensor:
    t = torch.arange(int(np.prod(shape))).reshape(shape) * 5 % V
    t.view(-1)[4] = -100
    return t


def joined(*arrays: Any, **options: Any) -> Any:
    """The same by one weight, and by logits."""
    x, w, b, down, up, s, t = arrays
    z = x @ (w if up is None else w + up @ down).t()
    z = z if b is None else z + b
    z = z if s is None else z * (s.unsqueeze(-1) if s.dim() else s)
    return torch_ops.cross_entropy(z.flatten(0, -2), t.flatten(), **options)


def loss(*arrays: Any, **options: Any) -> Any:
    """Of x, W, b, A, B, the scale and the target."""
    x, w, b, down, up, s, t = arrays
    low = None if up is None else (down, up)
    scale = 1.0 if s is None else s
    return torch_ops.linear_cross_entropy(x, w, t, linear_bias=b, low_rank=low, logit_scale=scale, **options)


def both(leaves: dict[str, Any], t: Tensor, options: dict[str, Any], how: dict[str, Any]) -> None:
    args = [leaves.get(k) for k in ("x", "w", "b", "down", "up", "s")]
    wrt, found = [v for v in leaves.values() if v.requires_grad], []
    for value in (loss(*args, t, **options, **how), joined(*args, t, **options)):
        first = torch.autograd.grad(value, wrt, create_graph=True)
        plain = torch.autograd.grad(value, wrt, retain_graph=True)
        found.append((value, plain, first, torch.autograd.grad(torch.stack([g.sin().sum() for g in first]).sum(), wrt)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    ("names", "one"),
    [("x w down up", False), ("x w b s", False), ("x w b s", True), ("x w b down up s", True), ("x w s", False)],
)
def test_values_and_two_orders(names: str, memory: str, one: bool) -> None:
    leaves = {k: v for k, v in given().items() if k in names.split()}
    if one and "s" in leaves:
        leaves["s"] = leaves["s"][1].detach().requires_grad_()
    each: list[dict[str, Any]] = [{}, {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.1, "reduction": "sum"}]
    for options in each:
        for chunk in (None, 4):
            both(leaves, target(N), options, {"memory": memory, "chunk_size": chunk})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("slow", [False, True])
def test_every_type(dtype: str, memory: Any, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 on the rounded arguments, over pieces of the weight and chunks."""
    monkeypatch.setattr(linear, "_slow_halves", lambda _: slow)
    monkeypatch.setattr(linear, "PIECE_OF_WEIGHT", 8 * D)
    a, t = given(getattr(torch, dtype)), target(N)
    names = ("x", "w", "b", "down", "up")
    args = [*(a[k] for k in names), a["s"]]
    value = loss(*args, t, memory=memory, chunk_size=5)
    truth = [v.detach().double().requires_grad_() for v in args]
    want = joined(*truth, t)
    u = 2.0**-24 if dtype == "float32" else 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    with torch.no_grad():
        size = (
            max(
                float((a["s"].double().abs() * (a["x"].double().abs() @ m.double().abs().t()).amax(1)).amax())
                for m in (a["w"], a["up"] @ a["down"])
            )
            + 4
        )
    assert value.dtype == torch.float32
    assert abs(float(value.double() - want)) < 8 * u * size
    for k, g, w in zip((*names, "s"), torch.autograd.grad(value, args), torch.autograd.grad(want, truth), strict=True):
        assert g.dtype == a[k].dtype
        # a matmul of halves rounds each of its terms' sums once or twice
        scale = np.full(w.shape, float(w.abs().max()) * size * u / 2.0**-24)
        checks.close(g.double().numpy(), w.numpy(), scale, dtype=dtype, c=0.25, what=k)


def test_against_the_reference() -> None:
    a, t = given(), target(N)
    value, stats = loss(*a.values(), t, reduction="none", stats=("lse", "entropy"))
    plain: Any = [v.detach().numpy() for v in a.values()]
    x, w, b, down, up, s = plain
    how: Any = {
        "linear_bias": b,
        "low_rank": (down, up),
        "logit_scale": s,
        "reduction": "none",
        "stats": ("lse", "entropy"),
    }
    want, theirs = reference.linear_cross_entropy(x, w, t.numpy(), **how)
    np.testing.assert_allclose(value.detach(), want, rtol=1e-13)
    for name in theirs:
        np.testing.assert_allclose(stats[name].detach(), theirs[name], rtol=1e-12)
    ups = np.linspace(0.5, 2.0, N)
    dx, dw, db = reference.linear_cross_entropy_grad(x, w, t.numpy(), dloss=ups, **how)
    found = torch.autograd.grad(value, [*a.values()], torch.from_numpy(ups))
    z = x @ (w + up @ down).T + b
    dz = reference.cross_entropy_grad(z, t.numpy(), dloss=ups, logit_scale=s, reduction="none")
    ds = reference.logit_scale_grad(z, dz, s)
    want: tuple[Any, ...] = (dx, dw, db, up.T @ dw, dw @ down.T, ds)
    for g, right in zip(found, want, strict=True):
        np.testing.assert_allclose(g, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("memory", MEMORY)
def test_leading_dimensions_shift_and_positions(memory: str) -> None:
    """A scale goes with the input's rows; of a K-dimensional weight each position has its own."""
    a, t = given(lead=(3, 4)), target(3, 4)
    how: dict[str, Any] = {"memory": memory, "chunk_size": 4}
    args = [a[k] for k in ("x", "w", "b", "down", "up", "s")]
    cut = [a["x"][:, :-1], *args[1:5], a["s"][:, :-1]]
    for found, want in (
        (loss(*args, t, shift=1, **how), joined(*cut, t[:, 1:])),
        (loss(*args, t, **how), joined(*args, t)),
    ):
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(*(torch.autograd.grad(v, args) for v in (found, want)))
    a, t = given(inner=(2,)), target(N, 2)
    args = [a[k] for k in ("x", "w", "b", "down", "up", "s")]
    parts = [
        joined(
            a["x"], *(a[k][:, p] for k in ("w", "b")), a["down"], a["up"][:, p], a["s"][:, p], t[:, p], reduction="sum"
        )
        for p in range(2)
    ]
    found, want = loss(*args, t, reduction="sum", **how), parts[0] + parts[1]
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, args) for v in (found, want)))


@pytest.mark.parametrize("memory", MEMORY)
def test_ignored_rows_reach_nothing(memory: Any) -> None:
    """Not even through 0 * NaN in A's gradient, or the scale's; nor do rows that a shift leaves out."""
    a, t = given(lead=(3, 4)), target(3, 4)
    spoilt = a["x"].detach().clone()
    spoilt[1, 0] = spoilt[:, -1] = torch.nan
    t[1, 1] = -100
    s = a["s"].detach().clone()
    s[1, 0] = torch.nan
    args = [spoilt.requires_grad_(), a["w"], a["b"], a["down"], a["up"], s.requires_grad_()]
    found = torch.autograd.grad(loss(*args, t, shift=1, memory=memory), args)
    args[0], args[5] = a["x"], a["s"]
    torch.testing.assert_close(found, torch.autograd.grad(loss(*args, t, shift=1, memory=memory), args))
    pair = (t.unsqueeze(-1), torch.ones(3, 4, 1, dtype=F64))
    args[0], args[5] = spoilt, s
    again = torch.autograd.grad(loss(*args, pair, shift=1, memory=memory), args)
    torch.testing.assert_close(found, again)


@pytest.mark.parametrize("memory", MEMORY)
def test_every_transform(memory: Any) -> None:
    few = {"x": (2, 2), "w": (4, 2), "b": (4,), "down": (1, 2), "up": (4, 1), "s": (2,)}
    args = [v[tuple(map(slice, few[k]))].detach().requires_grad_() for k, v in given().items()]
    t = torch.tensor([3, 0])
    f = lambda *args: loss(*args, t, memory=memory, softcap=3.0)  # noqa: E731
    assert gradcheck(f, args, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(f, args, check_fwd_over_rev=True, fast_mode=True)
    at = torch.func.vmap(torch.func.grad(lambda x, s: f(x, *args[1:5], s), (0, 1)))
    dx, ds = at(torch.stack([args[0], 2 * args[0]]), torch.stack([args[5]] * 2))
    want = torch.autograd.grad(f(2 * args[0].detach().requires_grad_(), *args[1:]), args[5])
    torch.testing.assert_close(ds[1], want[0])
    assert dx.shape == (2, 2, 2)
    compiled: Any = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*args), args), torch.autograd.grad(f(*args), args))


class Made(TorchDispatchMode):
    """The most numbers any one result has, but for those a bound tensor of its own already had."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            "view" not in str(func)
            and not func._schema.is_mutable
            and func.overloadpacket.__name__ not in ("t", "detach")
        ):
            self.largest = max([self.largest, *(v.numel() for v in tree_leaves(out) if isinstance(v, Tensor))])
        return out


@pytest.mark.parametrize("memory", MEMORY)
def test_nothing_of_a_frozen_weight_is_made(memory: Any) -> None:
    """No array of its size, and no matmul for its gradient."""
    n, d, v = 8, 32, 400
    g = torch.Generator().manual_seed(1)
    mk = lambda *s: torch.randn(*s, generator=g).requires_grad_()  # noqa: E731
    x, down, up, s = mk(n, d), mk(2, d), mk(v, 2), mk(n)
    w, t = mk(v, d).detach(), torch.arange(n)
    with Made() as made, FlopCounterMode(display=False) as flops:
        loss = torch_ops.linear_cross_entropy(
            x,
            w,
            t,
            low_rank=(down, up),
            logit_scale=s.abs() + 1,
            memory=memory,
            chunk_size=4 if memory == "fast" else 200,
        )
        loss.backward()
    assert made.largest < v * d / 2, made.largest
    matmuls = 2 if memory == "fast" else 3  # logits and dX; the logits once more
    assert flops.get_total_flops() < 2 * n * v * (d + 4) * (matmuls + 0.5)
    with Made() as made:
        torch_ops.linear_cross_entropy(x, w + up @ down, t, memory=memory).backward()
    assert made.largest >= v * d, "the measurement sees a joined weight"


def test_sampled_gradients_refuse_what_they_cannot() -> None:
    a, t = given(torch.float32), target(N)
    with pytest.raises(ValueError, match=r"grad_samples must be None with low_rank; got a number\.$"):
        loss(*a.values(), t, grad_samples=4)
    with pytest.raises(
        ValueError, match="grad_samples must be None with linear_bias and a logit_scale that is an array"
    ):
        loss(a["x"], a["w"], a["b"], None, None, a["s"], t, grad_samples=4)
    gen = torch.Generator().manual_seed(0)
    x, s = a["x"], a["s"]
    found = torch.autograd.grad(
        loss(x, a["w"], None, None, None, s, t, grad_samples=4, generator=gen, reduction="sum"), (x, s)
    )
    torch.testing.assert_close(found[1], (found[0] * x).sum(1) / s)
