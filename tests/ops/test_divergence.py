"""Divergences of a student from a teacher: against the reference where they are large, small and next to nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_ops
from softmax_ext import reference
from softmax_ext.contract import KINDS
from tests.judging.cases import NAN, Array
from tests.judging.divergences import BETA, FACTS, judged, pairs
from tests.rows.native.test_torch import _Ran
from torch_ops._rows import divergence as rows
from torch_ops._rows import native

DTYPES = ("float64", "float32", "bfloat16", "float16")
SIZES = (1, 2, 5, 17, 129, 1000)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_digits_at_every_distance(kind: str, dtype: str, served: str) -> None:
    for classes in SIZES:
        for name, (s, t) in pairs(classes, dtype).items():
            if classes == 1 or (kind == "tv" and name == "one logit"):  # all but one d is the rounding of 0: no sign
                continue
            # Scaled logits are rounded, which costs a probability |z| units: more than these bounds where it is small.
            scaled = {"logit_scale": 0.75, "teacher_scale": 0.75}
            for options in ({}, scaled) if name not in ("elsewhere", "confident") else ({},):
                judged(
                    *ours(s, t, dtype, kind=kind, beta=BETA, **options), s, t, dtype, kind=kind, beta=BETA, **options
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_are_nothing_apart(kind: str, dtype: str, served: str) -> None:
    for classes in SIZES:
        _, t = pairs(classes, dtype)["elsewhere"]
        for options in ({}, {"logit_scale": 0.7, "teacher_scale": 0.7, "softcap": 9.0, "teacher_softcap": 9.0}):
            value, gradient = ours(t, t, dtype, kind=kind, **options)
            assert not value.any()
            assert not gradient.any()


def test_which_kernels_ran() -> None:
    if native.missing:
        pytest.skip(f"no native kernels: {native.missing}")
    x, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)

    def both() -> None:
        torch_ops.divergence(x, t).backward()

    with _Ran() as ran:
        both()
    assert ran.names == ["divergence_fwd", "divergence_bwd"]
    w, u = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    with _Ran() as ran:
        torch_ops.linear_divergence(x, w, t, u).backward()
    assert ran.names == ["divergence_fwd_bwd_"]


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


@pytest.mark.parametrize("kind", KINDS)
def test_saboteurs_are_seen(kind: str) -> None:
    """The formula as it stands, float64 rounded to float32 apart, and wrong parts are all out of bounds."""
    s, t = pairs(129, "float32")["a thousandth"]
    options: dict[str, Any] = {"kind": kind, "beta": BETA}
    value, gradient = ours(s, t, "float32", **options)
    judged(value, gradient, s, t, "float32", **options)

    x = torch.from_numpy(s).float().requires_grad_()
    plain = composed(x, torch.from_numpy(t).float(), kind, BETA)
    (plain_gradient,) = torch.autograd.grad(plain.sum(), x)
    wrong_values = {"as the formula stands": plain.detach().double().numpy(), "zeros": 0.0 * value, "negative": -value}
    if kind in ("forward_kl", "reverse_kl"):
        far, near = pairs(129, "float32")["elsewhere"]
        other = "reverse_kl" if kind == "forward_kl" else "forward_kl"
        right = ours(far, near, "float32", **options)[1]
        with pytest.raises(AssertionError):  # the sides exchanged
            judged(ours(far, near, "float32", kind=other)[0], right, far, near, "float32", **options)
    wrong_gradients = {
        "as autograd has it": plain_gradient.double().numpy(),
        "zeros": 0.0 * gradient,
        "negative": -gradient,
        "rows shifted": np.roll(gradient, 1, 0),
        "last class unwritten": np.where(np.arange(129) == 128, 0.0, gradient),
    }
    for name, wrong in wrong_values.items():
        if (kind, name) != ("tv", "as the formula stands"):  # it loses the 1e-7 / 1e-3 of its digits there, no more
            with pytest.raises(AssertionError):
                judged(wrong, gradient, s, t, "float32", **options)
    for name, wrong in wrong_gradients.items():
        if (kind, name) != ("tv", "as autograd has it"):  # signs have all their digits
            with pytest.raises(AssertionError):
                judged(value, wrong, s, t, "float32", **options)
    if kind != "forward_kl":  # the mean of u is of the second order where rows are close
        s, t = pairs(129, "float32")["elsewhere"]
        value, gradient = ours(s, t, "float32", **options)
        mean = reference.divergence_parts(s, t, **options)[1].sum(-1, keepdims=True)
        with pytest.raises(AssertionError):
            judged(value, gradient + reference.softmax(s) * mean, s, t, "float32", **options)


def test_an_uncorrected_shift_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "serves", lambda x, dim: False)
    s, t = pairs(129, "float32")["a millionth"]
    judged(*ours(s, t, "float32"), s, t, "float32")
    monkeypatch.setattr(rows, "_less", lambda d, p, q: torch.zeros_like(d))
    with pytest.raises(AssertionError):
        judged(ours(s, t, "float32")[0], ours(s, t, "float32")[1], s, t, "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_reference_in_fifty_digits(kind: str) -> None:
    mp = mpmath.mp.clone()
    mp.dps = 50
    for name, (s, t) in pairs(5, "float64").items():
        got = reference.divergence(s, t, kind=kind, beta=BETA, reduction="none")
        for row, other, value in zip(s, t, got, strict=True):
            a, b = ([mp.exp(mp.mpf(float(v))) for v in z] for z in (row, other))
            p, q = [v / sum(a) for v in a], [v / sum(b) for v in b]
            m = [BETA * y + (1 - mp.mpf(BETA)) * x for x, y in zip(p, q, strict=True)]
            truth = {
                "forward_kl": lambda p=p, q=q: sum(y * mp.log(y / x) for x, y in zip(p, q, strict=True)),
                "reverse_kl": lambda p=p, q=q: sum(x * mp.log(x / y) for x, y in zip(p, q, strict=True)),
                "tv": lambda p=p, q=q: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
                "jsd": lambda p=p, q=q, m=m: sum(
                    BETA * y * mp.log(y / z) + (1 - mp.mpf(BETA)) * x * mp.log(x / z)
                    for x, y, z in zip(p, q, m, strict=True)
                ),
            }[kind]()
            assert abs(value - float(truth)) <= 4e-15 * float(truth), name


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
    gradgradcheck(f, (x, tw), check_fwd_over_rev=True, check_rev_over_rev=True)
    w = tw.detach()
    for derive in (torch.func.grad, torch.func.hessian, lambda h: torch.func.jacfwd(torch.func.hessian(h))):
        mine, theirs = (derive(lambda x, of=of: of(x, w))(IN) for of in (f, g))  # pyright: ignore
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    each = torch.func.vmap(torch.func.grad(lambda a, b: torch_ops.divergence(a, b, kind=kind)))(IN, OF)  # pyright: ignore
    x = IN.clone().requires_grad_()
    whole = torch.autograd.grad(torch_ops.divergence(x, OF, kind=kind, reduction="sum"), x)[0]  # pyright: ignore
    torch.testing.assert_close(each, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_axis_anywhere(kind: str, served: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, t = (torch.randn(2, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    keep = torch.tensor([[True] * 3 + [False], [True] * 4])
    value = torch_ops.divergence(x, t, kind=kind, dim=1, keep=keep, reduction="none")  # pyright: ignore
    truth = composed(x.movedim(1, -1), t.movedim(1, -1), kind) * keep
    torch.testing.assert_close(value, truth)
    up = torch.rand(2, 4, generator=g, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((v * up).sum(), x)[0] for v in (value, truth)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fact", FACTS)
def test_data_facts(fact: str, dtype: str, served: str) -> None:
    """docs/data.md has the table; -1 here stands for a finite value, the reference's."""
    student, teacher, expected = FACTS[fact]
    s, t = np.array([student, [0.0, 1.0, 2.0]]), np.array([teacher, [0.5, 1.0, 2.0]])
    for kind, value in zip(KINDS, expected, strict=True):
        got, gradient = ours(s, t, dtype, kind=kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            truth = reference.divergence(s, t, kind=kind, reduction="none")
            right = reference.divergence_grad(s, t, kind=kind, reduction="none", dloss=np.ones(2))
        if value == -1:
            assert np.isfinite(got[0])
        else:
            np.testing.assert_array_equal(got[0], value)
        np.testing.assert_allclose(got, truth, rtol=1e-6)
        np.testing.assert_allclose(gradient, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_rows_not_kept_reach_nothing(memory: Any, served: str) -> None:
    x, t = IN.clone(), OF.clone()
    x[1], t[1] = NAN, NAN
    x.requires_grad_()
    value = torch_ops.divergence(x, t, keep=KEEP)
    assert value.isfinite()
    (gradient,) = torch.autograd.grad(value, x)
    assert not gradient[1].any()
    assert gradient[[0, 2]].all()
    assert torch_ops.divergence(x, t, keep=torch.zeros(3, dtype=torch.bool)).isnan()
    w = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6).requires_grad_()
    value = torch_ops.linear_divergence(x, w, t, w.detach().flip(0), keep=KEEP, memory=memory)
    for g in torch.autograd.grad(value, (x, w)):
        assert g.isfinite().all()
        assert g.any()


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


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "kind": ({"kind": "kl"}, ValueError, "kind must be one of 'forward_kl', 'reverse_kl', 'jsd', 'tv'; got 'kl'."),
    "beta": ({"beta": 1.0}, ValueError, "beta must be a Python number in (0, 1); got 1.0."),
    "scale": ({"teacher_scale": 0}, ValueError, "teacher_scale must be a Python number > 0, finite; got 0."),
    "cap": ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap must be a Python number > 0, finite; got -1.0."),
    "keep": ({"keep": torch.ones(3)}, TypeError, "keep must have type bool; got float32."),
    "rows": ({"keep": KEEP[:2]}, ValueError, "keep must have shape (3,); got (2,)."),
    "weights": ({"token_weight": IN}, ValueError, "token_weight must have shape (3,); got (3, 6)."),
    "shape": ({"teacher": OF[:2]}, ValueError, "teacher must have the input's shape (3, 6); got (2, 6)."),
    "dim": ({"dim": 2}, IndexError, "dim must be in [-2, 1] for an input of 2 dimensions; got 2."),
    "reduction": (
        {"reduction": "batchmean"},
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none'; got 'batchmean'.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_sentence(name: str) -> None:
    given, error, sentence = MISTAKES[name]
    with pytest.raises(error) as caught:
        torch_ops.divergence(**{"input": IN, "teacher": OF, **given})
    assert str(caught.value) == f"divergence: {sentence}"
