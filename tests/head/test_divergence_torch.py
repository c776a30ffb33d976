"""Divergences between two linear heads in PyTorch: every derivative, and what lives at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_ops
from softmax_ext.contract import KINDS
from tests.ops.test_divergence_torch import composed
from tests.storages import Alive
from torch_ops._head import ops
from torch_ops._rows import divergence_parts as parts

CAPPED: dict[str, Any] = {"logit_scale": 1.2, "softcap": 3.0, "teacher_scale": 0.9, "teacher_softcap": 2.0}
IN = torch.linspace(-2.0, 2.0, 18, dtype=torch.float64).reshape(3, 6).sin() * 3.0
OF = torch.linspace(1.0, 4.0, 18, dtype=torch.float64).reshape(3, 6).cos() * 2.0


HEAD: dict[str, Tensor] = {
    "input": IN[:, :3].reshape(1, 3, 3).expand(2, 3, 3) * torch.tensor([[[1.0]], [[0.5]]]).double(),
    "linear_weight": IN.reshape(6, 3) * 0.5,
    "linear_bias": torch.linspace(-1, 1, 6, dtype=torch.float64),
    "teacher_input": OF[:, :4].reshape(1, 3, 4).expand(2, 3, 4) * torch.tensor([[[1.0]], [[-0.5]]]).double(),
    "teacher_weight": torch.linspace(-1, 2, 24, dtype=torch.float64).cos().reshape(6, 4),
    "teacher_bias": torch.linspace(1, 2, 6, dtype=torch.float64),
}
HEAD_KEEP = torch.tensor([[True, False, True], [True, True, False]])


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_head_derivatives(kind: str, memory: str) -> None:
    fixed = {k: v for k, v in HEAD.items() if k.startswith("teacher")}
    tw = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(2, 3)

    def f(x: Tensor, w: Tensor, b: Tensor, tw: Tensor) -> Tensor:
        more: Any = {"keep": HEAD_KEEP, "token_weight": tw, "kind": kind, "memory": memory, "chunk_size": 2, "shift": 1}
        return torch_ops.linear_divergence(x, w, linear_bias=b, **fixed, **more)

    def g(x: Tensor, w: Tensor, b: Tensor, tw: Tensor) -> Tensor:
        t = fixed["teacher_input"] @ fixed["teacher_weight"].T + fixed["teacher_bias"]
        weight = (tw * HEAD_KEEP)[:, 1:]
        return (composed((x @ w.T + b)[:, :-1], t[:, :-1], kind) * weight).sum() / weight.sum()

    args = [HEAD[k].clone().requires_grad_() for k in ("input", "linear_weight", "linear_bias")]
    args.append(tw.clone().requires_grad_())
    gradcheck(f, args, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    gradgradcheck(f, args, check_fwd_over_rev=True, fast_mode=True)
    x, w, b, tw = (a.detach() for a in args)
    for derive in (torch.func.hessian, lambda h: torch.func.vmap(torch.func.grad(lambda w: h(w).sum()))):
        at = w if derive is torch.func.hessian else torch.stack([w, 2 * w])
        mine, theirs = (derive(lambda w, of=of: of(x, w, b, tw))(at) for of in (f, g))
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops are shown to who counts, though he is one who looks on."""
    monkeypatch.setattr(ops, "is_observed", lambda *arrays: False)


@pytest.mark.usefixtures("shown")
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_no_array_of_all_logits(memory: Any) -> None:
    n, v, d = 64, 4096, 8
    x, w, y, u = (torch.randn(*s) for s in ((n, d), (v, d), (n, d), (v, d)))
    _ = x.requires_grad_(), w.requires_grad_()
    with Alive(x, w, y, u) as alive:
        torch_ops.linear_divergence(x, w, y, u, memory=memory, chunk_size=4).backward()
    logits = n * v * 4
    assert alive.peak < 2 * w.numel() * 4 + logits / 4
    with Alive(x, w, y, u) as whole:
        torch_ops.divergence(x @ w.T, y @ u.T).backward()
    assert whole.peak > 2 * logits


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize(
    ("student", "teacher", "eps"),
    [("float32", "float64", 2.0**-22), ("bfloat16", "float64", 2.0**-7), ("float64", "float32", 1e-12)],
)
def test_a_teacher_of_another_type(student: str, teacher: str, eps: float, memory: Any) -> None:
    """Rows are formed in the wider of both heads' types, gradients are of the student's."""
    arrays = {k: v.to(getattr(torch, teacher if "teacher" in k else student)) for k, v in HEAD.items()}

    def found(arrays: dict[str, Tensor], **options: Any) -> Any:
        names = ("input", "linear_weight", "linear_bias")
        leaves = [arrays[k].clone().requires_grad_() for k in names]
        value = torch_ops.linear_divergence(**{**arrays, **dict(zip(names, leaves, strict=True))}, **options)
        return value, torch.autograd.grad(value.sum(), leaves)

    for reduction, chunk_size in (("mean", None), ("sum", 2), ("none", 2)):
        value, grads = found(arrays, reduction=reduction, memory=memory, chunk_size=chunk_size, kind="jsd")
        due, right = found({k: v.double() for k, v in arrays.items()}, reduction=reduction, kind="jsd")
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, due, rtol=eps, atol=0.0)
        for mine, theirs, k in zip(grads, right, ("input", "linear_weight", "linear_bias"), strict=True):
            assert mine.dtype == arrays[k].dtype
            torch.testing.assert_close(mine.double(), theirs, rtol=eps, atol=eps * theirs.abs().max().item())


@pytest.mark.usefixtures("shown")
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("frozen", [False, True])
def test_lean_holds_a_slice_of_both_heads(kind: Any, frozen: bool) -> None:
    """Beside a slice's logits the gradients, and of each row the numbers of some slices; of frozen weights none."""
    n, v, d, chunk = 256, 4096, 8, 128
    x, w, y, u = (torch.randn(*s) for s in ((n, d), (v, d), (n, d), (v, d)))
    _ = x.requires_grad_(), w.requires_grad_(not frozen)

    def peak(**options: Any) -> int:
        with Alive(x, w, y, u) as alive:
            torch_ops.linear_divergence(x, w, y, u, kind=kind, **options).backward()
        return alive.peak

    slices, numbers = 2 * n * chunk * 4, 60 * 8 * n * 4
    grads = x.nbytes + (0 if frozen else w.nbytes)
    assert peak(memory="lean", chunk_size=chunk) <= slices + numbers + 2 * grads
    assert peak(memory="fast") > 2 * n * v * 4  # whole: the counter counts


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_one_part_of_a_row_however_many(kind: Any) -> None:
    """More slices than wait together, of one class each too, some all -inf on one side or both."""
    arrays = {k: v.clone() for k, v in HEAD.items()}
    arrays["linear_bias"][1], arrays["teacher_bias"][1] = -torch.inf, -torch.inf
    if kind in ("forward_kl", "jsd", "tv"):
        arrays["teacher_bias"][3] = -torch.inf
    arrays = {k: torch.cat([v] * 7) if k.endswith(("weight", "bias")) else v for k, v in arrays.items()}

    def found(**options: Any) -> Any:
        leaves = [arrays[k].detach().requires_grad_() for k in ("input", "linear_weight", "linear_bias")]
        given = {**arrays, **dict(zip(("input", "linear_weight", "linear_bias"), leaves, strict=True))}
        value = torch_ops.linear_divergence(**given, kind=kind, **CAPPED, **options)
        return value, *torch.autograd.grad(value, leaves)

    due = found(memory="fast")
    for chunk_size in (1, 2, 5, 40):
        torch.testing.assert_close(found(memory="lean", chunk_size=chunk_size), due, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_next_to_its_teacher_loses_no_digits_by_slices(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shift of whole rows is put right from the parts' own; what their sums alone give is too coarse."""
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(32, 16, generator=g), torch.randn(500, 16, generator=g)
    near = w + 1e-6 * torch.randn(500, 16, generator=g)
    wide = torch_ops.divergence(x.double() @ w.T.double(), x.double() @ near.T.double(), kind=kind)

    def off() -> float:
        # The logits themselves are rounded: their own divergence is the truth.
        eye = torch.eye(500)
        s, t = (x @ v.T for v in (w, near))
        due = torch_ops.divergence(s.double(), t.double(), kind=kind)
        value = torch_ops.linear_divergence(s, eye, t, eye, kind=kind, memory="lean", chunk_size=60)
        return abs(value.item() / due.item() - 1)

    assert wide > 0
    assert off() < 2e-5
    if kind == "tv":
        return
    monkeypatch.setattr(parts, "less", lambda d, p, q: torch.zeros_like(d))
    assert off() > 5e-5
