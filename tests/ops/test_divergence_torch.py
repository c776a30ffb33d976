"""Divergences in PyTorch: every derivative, the kernels that ran, a teacher that is a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_ops
from softmax_ext.contract import KINDS
from tests.judging.cases import Array
from tests.judging.divergences import BETA, DOORS, judged, pairs
from tests.ops.test_divergence import test_the_mean_of_no_row_moves_nothing as of_no_row
from tests.rows.native.test_torch import _Ran
from torch_ops._head import divergence_loss, ops
from torch_ops._rows import divergence as rows
from torch_ops._rows import native

SERVED = ["plain"] if native.missing else ["native", "plain"]


@pytest.fixture(params=SERVED)
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(native, "serves", lambda x, dim: False)
    return request.param


def ours(s: Array, t: Array, dtype: str, **options: Any) -> tuple[Array, Array]:
    x = torch.from_numpy(s).to(getattr(torch, dtype)).requires_grad_()
    y = torch.from_numpy(t).to(getattr(torch, dtype))
    value = torch_ops.divergence(x, y, reduction="none", **options)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach().double().numpy(), gradient.double().numpy()


def test_which_kernels_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.missing:
        pytest.skip(f"no native kernels: {native.missing}")
    x, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)

    def both() -> None:
        torch_ops.divergence(x, t).backward()

    with _Ran() as ran:
        both()
    assert ran.names == ["divergence_fwd", "divergence_bwd"]
    w, u = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    for observed, names in ((True, ["two_heads_fwd_bwd"]), (False, ["divergence_fwd_bwd_"])):
        monkeypatch.setattr(ops, "is_observed", lambda *arrays, observed=observed: observed)
        with _Ran() as ran:
            torch_ops.linear_divergence(x, w, t, u).backward()
        assert ran.names == names


def composed(s: Tensor, t: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """Each row's divergence as the formula stands, in the framework's own ops."""
    lp, lq = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    p, q = lp.exp(), lq.exp()
    if kind == "forward_kl":
        return (q * (lq - lp)).sum(-1)
    if kind == "reverse_kl":
        return (p * (lp - lq)).sum(-1)
    if kind == "tv":
        return 0.5 * (p - q).abs().sum(-1)
    m = beta * q + (1 - beta) * p
    return (beta * q * (lq - m.log()) + (1 - beta) * p * (lp - m.log())).sum(-1)


def test_an_uncorrected_shift_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "serves", lambda x, dim: False)
    s, t = pairs(129, "float32")["a millionth"]
    judged(*ours(s, t, "float32"), s, t, "float32")
    monkeypatch.setattr(rows, "less", lambda d, p, q: torch.zeros_like(d))
    with pytest.raises(AssertionError):
        judged(ours(s, t, "float32")[0], ours(s, t, "float32")[1], s, t, "float32")


def test_a_plain_quotient_of_no_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_loss, "reduced", lambda total, weight, *_: total / weight.sum())
    with pytest.raises(AssertionError):
        of_no_row("fast", False, DOORS["torch"]())


IN = torch.linspace(-2.0, 2.0, 18, dtype=torch.float64).reshape(3, 6).sin() * 3.0
OF = torch.linspace(1.0, 4.0, 18, dtype=torch.float64).reshape(3, 6).cos() * 2.0
KEEP = torch.tensor([True, False, True])
CAPPED: dict[str, Any] = {"logit_scale": 1.2, "softcap": 3.0, "teacher_scale": 0.9, "teacher_softcap": 2.0}


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_every_order(kind: str, served: str) -> None:
    tw = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64, requires_grad=True)
    x = IN.clone().requires_grad_()
    cap: Callable[..., Tensor] = lambda z, scale, cap: cap * torch.tanh(scale * z / cap)  # noqa: E731

    def f(x: Tensor, tw: Tensor) -> Tensor:
        return torch_ops.divergence(x, OF, kind=kind, beta=BETA, token_weight=tw, keep=KEEP, **CAPPED)  # pyright: ignore

    def g(x: Tensor, tw: Tensor) -> Tensor:
        each = composed(cap(x, 1.2, 3.0), cap(OF, 0.9, 2.0), kind, BETA)
        return (each * tw * KEEP).sum() / (tw * KEEP).sum()

    gradcheck(f, (x, tw), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    gradgradcheck(f, (x, tw), check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)
    w = tw.detach()
    for derive in (torch.func.grad, torch.func.hessian, lambda h: torch.func.jacfwd(torch.func.hessian(h))):
        mine, theirs = (derive(lambda x, of=of: of(x, w))(IN) for of in (f, g))  # pyright: ignore
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    each = torch.func.vmap(torch.func.grad(lambda a, b: torch_ops.divergence(a, b, kind=kind)))(IN, OF)  # pyright: ignore
    x = IN.clone().requires_grad_()
    whole = torch.autograd.grad(torch_ops.divergence(x, OF, kind=kind, reduction="sum"), x)[0]  # pyright: ignore
    torch.testing.assert_close(each, whole)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "tv"])
def test_derivatives_where_the_teacher_lacks_a_class(kind: str, served: str) -> None:
    """Tangents and Hessians know as the gradient does that the student is above such a teacher there."""
    lost = OF.masked_fill(torch.arange(6) == 2, -torch.inf)

    def f(x: Tensor) -> Tensor:
        return torch_ops.divergence(x, lost, kind=kind, beta=BETA, reduction="sum")  # pyright: ignore

    def g(x: Tensor) -> Tensor:  # e^-700 is nothing beside the others, and has a logarithm
        return composed(x, lost.clamp(min=-700.0), kind, BETA).sum()

    along = IN.flip(1)
    tangents = [torch.func.jvp(of, (IN,), (along,))[1] for of in (f, g)]
    torch.testing.assert_close(*tangents, rtol=1e-9, atol=1e-12)
    for derive in (torch.func.grad, torch.func.hessian, lambda of: torch.func.jacrev(torch.func.grad(of))):
        torch.testing.assert_close(derive(f)(IN), derive(g)(IN), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "tv"])
def test_tangents_where_the_student_lacks_a_class(kind: str, served: str) -> None:
    """Of forward_kl it is p - q there as everywhere, though the divergence is infinite."""
    x = IN.masked_fill(torch.arange(6) == 2, -torch.inf)
    f = lambda x: torch_ops.divergence(x, OF, kind=kind, beta=BETA, reduction="sum")  # pyright: ignore # noqa: E731
    along = IN.flip(1)
    due = (torch.func.grad(f)(x) * along).sum()
    torch.testing.assert_close(torch.func.jvp(f, (x,), (along,))[1], due, rtol=1e-9, atol=1e-12)


def test_the_teacher_is_a_constant() -> None:
    x, w = IN.clone().requires_grad_(), 0.5 * IN.reshape(6, 3)
    moving = OF.clone().requires_grad_()
    grad, jvp = torch.func.grad, torch.func.jvp
    calls: list[Callable[[], Any]] = [
        lambda: torch_ops.divergence(x, moving),
        lambda: grad(lambda t: torch_ops.divergence(IN, t))(OF),
        lambda: jvp(lambda t: torch_ops.divergence(IN, t), (OF,), (OF,)),
        lambda: grad(lambda t: grad(lambda s: torch_ops.divergence(s, t))(IN).sum())(OF),
        lambda: jvp(lambda t: grad(lambda s: torch_ops.divergence(s, t))(IN), (OF,), (OF,)),
        lambda: torch.func.vmap(grad(lambda t: torch_ops.divergence(IN[0], t)))(OF),
        lambda: grad(lambda u: torch_ops.linear_divergence(IN[:, :3], w, IN[:, :3], u))(w),
        lambda: grad(lambda t: torch_ops.linear_divergence(IN[:, :3], w, t, w))(IN[:, :3]),
        lambda: grad(lambda u: grad(lambda s: torch_ops.linear_divergence(s, w, IN[:, :3], u))(IN[:, :3]).sum())(w),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"teacher\w* must be a constant.*; got an array that is differentiated\.$"):
            call()
    with torch.no_grad():
        torch_ops.divergence(x, moving)
