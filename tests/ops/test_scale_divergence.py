"""Divergences in PyTorch whose scale is an array: by pieces of the product, beside the product as it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_ops
from softmax_ext.contract import KINDS
from tests.storages import Alive
from torch_ops._rules import scaled_divergence, scaled_pieces

INF, NAN = torch.inf, torch.nan


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    return 2.0 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", ["middle", "last", "alone", "many pieces"])
@pytest.mark.parametrize("scale", ["rows", "one, learnt", "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_shape_by_any_piece(layout: str, scale: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not kept may hold NaN, in the scale too; the teacher may have another type."""
    if layout == "many pieces":
        monkeypatch.setattr(scaled_pieces, "_PIECE", 20)
    shape = {"middle": (4, 7, 3), "last": (1, 7, 6), "alone": (7,), "many pieces": (6, 7, 2)}[layout]
    dim = 1 if len(shape) > 1 else 0
    rows = shape[:dim] + shape[dim + 1 :]
    x, t = drawn(*shape).requires_grad_(), drawn(*shape, seed=3)
    s = (0.2 + drawn(*rows if scale == "rows" else (), seed=4).abs()).requires_grad_(scale != "one")
    keep = torch.ones(rows, dtype=torch.bool)
    spoilt, at = x.detach().clone(), s.detach().clone()
    if rows:
        keep[..., -1] = False
        spoilt.movedim(dim, 0)[:, ~keep] = NAN
        if scale == "rows":
            at[~keep] = NAN
    spoilt.requires_grad_()
    at.requires_grad_(scale != "one")
    each: list[dict[str, Any]] = [{}, {"softcap": 3.0, "teacher_scale": 0.5}, {"reduction": "none"}]
    for options in each:
        how: dict[str, Any] = {"kind": kind, "keep": keep, "dim": dim, **options}
        for teacher in (t, t.float()):
            found = torch_ops.divergence(spoilt, teacher, logit_scale=at, **how)
            want = torch_ops.divergence(x * (s.unsqueeze(dim) if scale == "rows" else s), teacher.double(), **how)
            torch.testing.assert_close(found, want)
            wrt = [(spoilt, at), (x, s)] if scale != "one" else [(spoilt,), (x,)]
            grads = (torch.autograd.grad(v.sum(), leaves) for v, leaves in zip((found, want), wrt, strict=True))
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("one", [False, True])
def test_every_derivative(cap: float | None, one: bool) -> None:
    x, t, w = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=3), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    s = torch.tensor(0.7 if one else [0.7, 1.2, 0.4], dtype=torch.float64, requires_grad=True)

    def f(x: Any, s: Any) -> Any:
        return torch_ops.divergence(x, t, kind="jsd", logit_scale=s, softcap=cap, token_weight=w)

    assert gradcheck(f, (x, s), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, (x, s), check_fwd_over_rev=True, fast_mode=True)
    xs, ss = torch.stack([x, 2 * x]), torch.stack([s, s + 0.3])
    mapped = torch.func.vmap(torch.func.grad(f, (0, 1)))(xs, ss)
    for i, found in enumerate(zip(*mapped, strict=True)):
        torch.testing.assert_close(found, torch.func.grad(f, (0, 1))(xs[i], ss[i]))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    both = [torch.autograd.grad(call(x, s), (x, s)) for call in (compiled, f)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("scale", ["rows", "one, learnt", "one"])
def test_no_array_of_the_product(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, classes = 64, 4096
    x, t = (drawn(rows, classes, dtype=torch.float32, seed=i) for i in (1, 2))
    s = torch.full((rows,) if scale == "rows" else (), 0.5).requires_grad_(scale != "one")

    def peak() -> int:
        leaf = x.clone().requires_grad_()
        with Alive(leaf, t, s) as alive:
            value = torch_ops.divergence(leaf, t, logit_scale=s)
            assert alive.peak < x.nbytes / 4
            value.backward()
        return alive.peak

    monkeypatch.setattr(scaled_pieces, "_PIECE", 1 << 14)
    assert peak() < 1.3 * x.nbytes
    if scale == "one":
        return
    monkeypatch.setattr(scaled_pieces, "_PIECE", 1 << 30)  # the saboteur: one piece of all
    with pytest.raises(AssertionError):
        peak()


def test_a_common_offset_takes_no_digits_of_the_scale() -> None:
    """All x of a row have it in common, and sum_j g_j is 0: what meets it is rounding."""
    x, t = 1e4 + drawn(8, 100).round(decimals=2), drawn(8, 100, seed=3)
    s = torch.full((8,), 0.5, dtype=torch.float64, requires_grad=True)
    (due,) = torch.autograd.grad(torch_ops.divergence(x, t, logit_scale=s), s)
    low = torch.full((8,), 0.5, requires_grad=True)
    (found,) = torch.autograd.grad(torch_ops.divergence(x.float(), t.float(), logit_scale=low), low)
    torch.testing.assert_close(found.double(), due, rtol=2e-2, atol=1e-4)


FAULTS: dict[str, tuple[str, Any]] = {
    "the scale's part is left out": ("along", lambda x, *_: torch.zeros(x.shape[0], *x.shape[2:]).double()),
    "pieces are put together along another dimension": ("place", lambda at, x, logits, dim: 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_saboteurs_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = FAULTS[fault]
    monkeypatch.setattr(scaled_divergence, name, wrong)
    layout = "many pieces" if name == "along" else "middle"
    if layout == "middle":
        monkeypatch.setattr(scaled_pieces, "_PIECE", 20)
        monkeypatch.setattr(scaled_divergence, "cut_along", lambda logits, dim: 2)
        monkeypatch.setattr(scaled_pieces, "cut_along", lambda logits, dim: 2)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        test_any_shape_by_any_piece(layout, "rows", "jsd", monkeypatch)
