"""Where the fused head once went wrong: shared tensors, square shapes, float16's range, weights without positions."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

import torch_ops  # noqa: E402
from torch_ops._head import lean  # noqa: E402
from torch_ops._rows import dispatch as rows  # noqa: E402

MODES = pytest.mark.parametrize("memory", ["fast", "lean"])
head: Any = torch_ops.linear_cross_entropy


@MODES
def test_an_input_made_from_the_weight(memory: str) -> None:
    """Tied embeddings: the way from the input to the weight counts once, in a gradient that is differentiated too."""
    table = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    ids, target = torch.tensor([0, 3, 6, 2]), torch.tensor([1, 2, 3, 4])

    def ours(w: Any) -> Any:
        return head(w[ids], w, target, memory=memory)

    def theirs(w: Any) -> Any:
        return F.cross_entropy(F.linear(w[ids], w), target)

    for create_graph in (False, True):
        (found,) = torch.autograd.grad(ours(table), table, create_graph=create_graph)
        (truth,) = torch.autograd.grad(theirs(table), table)
        torch.testing.assert_close(found, truth)
    found, truth = (torch.autograd.functional.hessian(f, table) for f in (ours, theirs))
    torch.testing.assert_close(found, truth)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [24, 25])
def test_compiled_half_precision_with_as_many_rows_as_classes(rows: int) -> None:
    """The weight's gradient is known by its place, not by its shape."""
    x, w = (torch.randn(n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (rows, 24))
    target = torch.randint(0, 24, (rows,))
    compiled = torch.compile(head, fullgraph=True)
    found = torch.autograd.grad(compiled(x, w, target), [x, w])
    assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(head(x, w, target), [x, w]), strict=True))


@pytest.mark.parametrize("options", [{}, {"memory": "lean"}, {"stats": ("lse",)}, {"chunk_size": 15000}], ids=str)
def test_float16_weight_gradient_of_many_rows(options: dict[str, Any]) -> None:
    """A sum over rows beyond 65504, which the mean brings back into float16's range."""
    rows = 20000
    x, w = torch.full((rows, 4), 10.0, dtype=torch.float16), torch.zeros(2, 4, dtype=torch.float16)
    w[1] = 0.2
    loss = head(x, w.requires_grad_(), torch.zeros(rows, dtype=torch.int64), **options)
    (found,) = torch.autograd.grad(loss[0] if "stats" in options else loss, w)
    torch.testing.assert_close(found, torch.tensor([[-10.0] * 4, [10.0] * 4], dtype=torch.float16), rtol=2e-3, atol=0)


@MODES
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e5])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.01}, {"label_smoothing": 0.2}], ids=str)
def test_float16_token_weights_of_any_size(memory: str, size: float, options: dict[str, Any]) -> None:
    """Neither flushed nor overflown before the mean divides by them."""
    torch.manual_seed(1)
    x, w = (torch.randn(n, 16, dtype=torch.float16, requires_grad=True) for n in (64, 50))
    target, tokens = torch.randint(0, 50, (64,)), torch.rand(64) * size
    found = torch.autograd.grad(head(x, w, target, token_weight=tokens, memory=memory, **options), [x, w])
    wide = [v.detach().double().requires_grad_() for v in (x, w)]
    truth = torch.autograd.grad(head(*wide, target, token_weight=tokens.double(), **options), wide)
    for a, b in zip(found, truth, strict=True):
        assert ((a - b).abs().max() <= 4e-3 * b.abs().max()).item()


@MODES
def test_float16_smoothing_alone_over_a_large_vocabulary(memory: str) -> None:
    x, w = torch.ones(2, 2, dtype=torch.float16, requires_grad=True), torch.zeros(70000, 2, dtype=torch.float16)
    w[3] = 15.0
    loss = head(x, w, torch.tensor([3, 3]), label_smoothing=1.0, memory=memory)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.full_like(x, 7.5))


@MODES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_weight_without_positions(memory: str, reduction: str) -> None:
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 0, 4, requires_grad=True)
    target = torch.zeros(3, 0, dtype=torch.int64)
    loss, stats = head(x, w, target, reduction=reduction, memory=memory, stats=("lse", "argmax"))
    torch.testing.assert_close(loss, F.cross_entropy(torch.zeros(3, 5, 0), target, reduction=reduction), equal_nan=True)
    assert stats["lse"].shape == stats["argmax"].shape == (3, 0)
    found = torch.autograd.grad(head(x, w, target, reduction="sum", memory=memory), [x, w])
    assert not found[0].any()
    assert found[1].shape == w.shape


@pytest.mark.parametrize("slices", [(0, 2), (0, 4), (2, 6)])
def test_classes_that_are_nan_in_whole_slices(slices: tuple[int, int]) -> None:
    """A first slice of NaN is not a slice that was never seen."""
    x, w = torch.randn(3, 2, requires_grad=True), torch.randn(8, 2)
    w[slice(*slices)] = torch.nan
    loss, stats = head(x, w, torch.tensor([0, 5, 7]), memory="lean", chunk_size=2, reduction="none", stats=("entropy",))
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().all()
    assert stats["entropy"].isnan().all()
    assert dx.isnan().all()


@pytest.mark.parametrize("target", ["indices", "pairs"])
@pytest.mark.parametrize(
    ("classes", "more"), [(1, {}), (1, {"logit_scale": 1.7}), (64, {}), (300, {"logit_scale": 0.9})]
)
@pytest.mark.parametrize("another", [False, True])
def test_a_capped_target_is_capped_as_the_maximum_is(
    target: str, classes: int, more: dict[str, Any], another: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of exp(-20) keeps its digits in slices; the saboteur caps the target by another tanh."""
    if another:
        wrong = lambda z, plan: rows.capped(z, plan.scale, plan.softcap) * (1 - 2.0**-23)  # noqa: E731
        monkeypatch.setattr(lean, "_as_maximum", wrong)
    x = torch.linspace(21.0, 24.0, 31).unsqueeze(1)
    w = torch.zeros(classes, 1)
    w[0] = 1.0
    t: Any = torch.zeros(31, dtype=torch.int64)
    if target == "pairs":
        t = t.unsqueeze(1), torch.ones(31, 1)
    options: dict[str, Any] = {"softcap": 40.0, "reduction": "none", **more}
    found = head(x, w, t, memory="lean", chunk_size=max(1, classes // 3), **options).double()
    cap = 40.0 * torch.tanh(x[:, 0].double() * more.get("logit_scale", 1.0) / 40.0)
    due = torch.log1p((classes - 1) * torch.exp(-cap))
    assert bool(((found - due).abs() <= 2e-5 * due).all()) != another
