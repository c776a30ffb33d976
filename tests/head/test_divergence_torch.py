"""Divergences between two linear heads in PyTorch: every derivative, what lives at a time, compiled and exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_ops
from examples.torch_memory import Alive
from softmax_ext.contract import KINDS
from tests.ops.test_divergence_torch import composed

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


@pytest.mark.slow
def test_compiled_and_exported() -> None:
    arrays = {k: v.clone() for k, v in HEAD.items()}
    x, w = arrays["input"].requires_grad_(), arrays["linear_weight"].requires_grad_()

    class Both(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            given: dict[str, Any] = {**arrays, "input": x, "linear_weight": w, "kind": "jsd"}
            head = torch_ops.linear_divergence(**given)
            return head + torch_ops.divergence(x @ w.T, arrays["teacher_input"] @ arrays["teacher_weight"].T)

    eager, compiled = Both(), torch.compile(Both(), fullgraph=True)
    torch.testing.assert_close(compiled(x, w), eager(x, w))
    grads = [torch.autograd.grad(f(x, w), (x, w)) for f in (compiled, eager)]
    torch.testing.assert_close(*grads)
    exported = torch.export.export(eager, (x.detach(), w.detach()))
    assert not [n for n in exported.graph.nodes if "softmax_ext" in str(n.target)]
    torch.testing.assert_close(exported.module()(x, w), eager(x, w))
