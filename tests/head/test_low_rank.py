"""The head's loops take a head as one value: one of low rank, without a (V, D) weight, goes through both unchanged."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_ops._head import fast, lean
from torch_ops._rules.plan import Plan


class LowRank(NamedTuple):
    """z = (x downT) upT."""

    up: Tensor  # (V, R)
    down: Tensor  # (R, D)

    @property
    def classes(self) -> int:
        return self.up.shape[0]

    def part(self, i: int, j: int) -> LowRank:
        return LowRank(self.up[i:j], self.down)

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.mm(x @ self.down.t(), self.up.t(), out=out)

    def set_input_gradient(self, dx: Tensor, dz: Tensor) -> None:
        torch.mm(dz @ self.up, self.down, out=dx)

    def add_input_gradient(self, dx: Tensor, dz: Tensor) -> None:
        dx.addmm_(dz @ self.up, self.down)

    def gradient(self, *_: Any, summed: bool) -> LowRankGradient:
        return LowRankGradient(self, torch.zeros_like(self.up), torch.zeros_like(self.down))


class LowRankGradient(NamedTuple):
    """d_up and d_down, summed chunk by chunk."""

    head: LowRank
    d_up: Tensor
    d_down: Tensor

    def part(self, i: int, j: int) -> LowRankGradient:
        return LowRankGradient(self.head.part(i, j), self.d_up[i:j], self.d_down)

    def add(self, dz: Tensor, x: Tensor) -> None:
        self.d_up.addmm_(dz.t(), x @ self.head.down.t())
        self.d_down.addmm_((dz @ self.head.up).t(), x)

    def unrounded(self) -> list[Tensor]:
        return [self.d_up, self.d_down]

    rounded = unrounded


def _given() -> tuple[Tensor, Any, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((9, 6), (17, 2), (2, 6)))
    target, a = torch.arange(9) * 5 % 17, torch.rand(9, dtype=torch.float64, generator=g)
    target[4] = -1  # ignored
    return x, LowRank(up, down), target, a


def _truth(x: Tensor, head: LowRank, target: Tensor, a: Tensor) -> list[Tensor]:
    leaves = [v.clone().requires_grad_() for v in (x, head.up, head.down)]
    z = leaves[0] @ leaves[2].t() @ leaves[1].t()
    loss = a * F.cross_entropy(z, target, ignore_index=-1, reduction="none")
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_fast_goes_by_any_head(chunk_size: int | None) -> None:
    x, head, target, a = _given()
    plan = Plan(1.0, None, False, False, chunk_size=chunk_size)
    values, grads = fast.fwd_bwd(x, head, target, None, a, None, None, None, (True, True, True), plan, fast.visit)
    for found, want in zip([a * values[0], *grads], _truth(x, head, target, a), strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("loops", [fast, lean])
def test_both_recompute_by_any_head(loops: Any) -> None:
    x, head, target, a = _given()
    plan = Plan(1.0, None, False, False, lean=loops is lean, chunk_size=5)
    nll, _, m, rest = loops.fwd(x, head, target, None, plan)
    needs = (True, True, True, False, False, False)
    grads = loops.bwd(x, head, target, None, m, rest, None, [a, None, None, None], needs, plan)
    for found, want in zip([a * nll, *grads[:3]], _truth(x, head, target, a), strict=True):
        torch.testing.assert_close(found, want)
