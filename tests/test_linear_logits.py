"""`LinearLogits`: what a model may do between its head and its loss, against the same done to a tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_ops.integrations._linear_logits import DeferringLinear, Pass

V, D = 7, 4
G = torch.Generator().manual_seed(3)
X = torch.randn(2, 5, D, dtype=torch.float64, generator=G)
T = torch.tensor([[0, 6, -100, 3, 1], [5, 2, 4, -100, 6]])
WEIGHT = torch.rand(V, dtype=torch.float64, generator=G) + 0.5
FEW = T.clamp(max=4)


def ce(z: Any, t: Tensor = T, **options: Any) -> Any:
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), t.flatten(), **options)


def assigned(z: Any, _: Any) -> Any:
    z[..., 3] = -2.0
    return ce(z * 2.0)


def scaled_in_place(z: Any, _: Any) -> Any:
    z *= 3.0
    z /= 2.0
    return ce(z)


def scaled_in_place_once_computed(z: Any, _: Any) -> Any:
    whole = z.detach()
    z *= 3.0
    return ce(z) + whole.sum()  # the same memory


Expression = Callable[[Any, Any], Any]
FUSED: dict[str, Expression] = {
    "plain": lambda z, _: ce(z),
    "sum": lambda z, _: ce(z, reduction="sum"),
    "each": lambda z, _: ce(z, reduction="none"),
    "weights and smoothing": lambda z, _: F.cross_entropy(z.view(10, V), T.flatten(), WEIGHT, label_smoothing=0.2),
    "another ignored class": lambda z, _: F.cross_entropy(z.view(-1, V), T.clamp(0).flatten(), ignore_index=6),
    "probabilities": lambda z, _: F.cross_entropy(z.view(-1, V), torch.softmax(torch.arange(70.0).view(10, V), 1)),
    "module": lambda z, _: nn.CrossEntropyLoss(reduction="sum")(z.view(-1, V), T.view(-1)),
    "shift": lambda z, _: ce(z[..., :-1, :].contiguous(), T[:, 1:]),
    "scale": lambda z, _: ce(z * 0.5),
    "scale from the left": lambda z, _: ce(0.5 * (z / 3)),
    "cap": lambda z, _: ce(torch.tanh(z / 2.0) * 2.0),
    "scale in place": scaled_in_place,
    "scale and cap": lambda z, _: ce((z * 3 / 2.0).tanh() * 2.0 / 3.0),
    "types": lambda z, _: ce(z.float().to(torch.float64).to(dtype=torch.float64).to("cpu").to(z.device)),
    "last size left open": lambda z, _: F.cross_entropy(z.view(10, -1), T.flatten()),
    "sizes as a list": lambda z, _: F.cross_entropy(z.reshape([-1, V]), T.flatten()),
    "flatten": lambda z, _: F.cross_entropy(z.flatten(0, 1), T.flatten()),
    "sizes": lambda z, _: F.cross_entropy(z.view(z.size(0) * z.shape[1], z.size(-1)), T.flatten()) * z.dim() * len(z),
    "by a mask": lambda z, _: F.cross_entropy(z[T >= 0], T[T >= 0]),
    "by indices": lambda z, _: F.cross_entropy(z[torch.tensor([0, 1, 1]), [0, 2, 3]], T[[0, 1, 1], [0, 2, 3]]),
    "one example": lambda z, _: F.cross_entropy(z[1], T[1]),
    "one token": lambda z, _: F.cross_entropy(z[1, 2], T[1, 2]),
    "the last token": lambda z, _: F.cross_entropy(z[:, -1, :], T[:, -1]),
    "a new dimension": lambda z, _: ce(z[None, :, 1:], T[:, 1:]),
    "the first classes": lambda z, _: ce(z[..., :5], FEW),
    "rows and the first classes": lambda z, _: ce(z[:, 1:, :5], FEW[:, 1:]),
    "more classes than there are": lambda z, _: ce(z[:, :, :100]),
    "two layers": lambda z, other: ce(z + other),
    "two layers, scaled": lambda z, other: ce((z * 2.0 + other * 0.5) / 1.5),
    "two layers, shifted and capped": lambda z, other: ce((z + other)[:, 1:].tanh(), T[:, 1:]),
}  # fmt: skip
COMPUTED: dict[str, Expression] = {
    "scale below 0": lambda z, _: ce(z * -1.0),
    "scale of 0": lambda z, _: ce(z * 0),
    "scale in a tensor": lambda z, _: ce(z * torch.tensor(2.0, dtype=torch.float64)),
    "a tensor's scale": lambda z, _: ce(torch.tensor(2.0, dtype=torch.float64) * z),
    "scale of each class": lambda z, _: ce(z / WEIGHT),
    "two caps": lambda z, _: ce(z.tanh().tanh()),
    "cap before a sum": lambda z, other: ce(z.tanh() + other),
    "a layer and a tensor": lambda z, other: ce(z + 1.0) + ce(other.exp()),
    "classes in the middle": lambda z, _: F.cross_entropy(z.transpose(1, 2), T),
    "classes in dimension 1": lambda z, _: F.cross_entropy(z, torch.ones(2, V, dtype=torch.int64)),
    "log_softmax": lambda z, _: F.nll_loss(F.log_softmax(z.view(-1, V), 1), T.flatten()),
    "old reduction": lambda z, _: F.cross_entropy(z.view(-1, V), T.flatten(), size_average=False),
    "the last classes": lambda z, _: ce(z[..., 1:], FEW),
    "all but one class": lambda z, _: ce(z[..., :-1], FEW),
    "one class": lambda z, _: z[..., 2].sum(),
    "every second class": lambda z, _: ce(z[..., ::2], T.clamp(max=3)),
    "other rows": lambda z, _: z.view(5, -1).logsumexp(1).sum() + z.view(-1, 35).logsumexp(1).sum(),
    "flat": lambda z, _: z.flatten().square().sum() + z.flatten(1).sin().sum(),
    "centred": lambda z, _: ce(z - z.mean(-1, keepdim=True)),
    "from above": lambda z, _: ce(1.0 - z),
    "powers": lambda z, _: ce(z**2 + (-z) % 3),
    "where": lambda z, _: ce(torch.where(z > 0.1, z, 0.1)),
    "stack": lambda z, _: torch.stack([z, z * 2.0]).logsumexp(-1).sum(),
    "an attribute": lambda z, _: z.mT.sin().sum(),
    "written": assigned,
    "scaled once computed": scaled_in_place_once_computed,
    "rows": lambda z, _: sum(ce(row, t) for row, t in zip(z, T, strict=True)),
}  # fmt: skip


def layers() -> list[DeferringLinear]:
    torch.manual_seed(5)
    return [DeferringLinear(D, V, dtype=torch.float64) for _ in range(2)]


def run(expression: Expression, made_in: Pass | None) -> tuple[Tensor, list[Tensor]]:
    x, both = X.clone().requires_grad_(), layers()
    for layer in both:
        layer.current = made_in
    out = expression(both[0](x), both[1](x))
    leaves = [x, *(p for layer in both for p in layer.parameters())]
    up = torch.linspace(1.0, 2.0, out.numel(), dtype=out.dtype).view(out.shape)
    return out.detach(), [*torch.autograd.grad(out, leaves, up, allow_unused=True, materialize_grads=True)]


def same(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]], u: float = 1e-11) -> None:
    tight: dict[str, Any] = {"rtol": u, "atol": u}
    torch.testing.assert_close(ours[0], theirs[0], **tight)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, **tight)


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("name", [*FUSED, *COMPUTED])
def test_value_and_gradients_are_those_of_a_tensor(name: str) -> None:
    expression = {**FUSED, **COMPUTED}[name]
    made_in = Pass("fast", 3)
    theirs = run(expression, None)
    # Through float32 the tensor is rounded, the formula is not.
    same(run(expression, made_in), theirs, 1e-6 if name == "types" else 1e-11)
    assert made_in.fused == (name in FUSED)
    assert bool(made_in.why_not) == (name in COMPUTED)
    assert theirs[1][0].abs().max() > 1e-3 or name == "scale of 0", "a gradient that zeros would pass for"


def test_the_checks_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each note that could be lost is missed by the check of the expression that takes it."""
    from torch_ops.integrations import _linear_logits as module

    def broken(name: str, expression: str, wrong: Any) -> None:
        theirs = run(FUSED[expression], None)
        with monkeypatch.context() as patch:
            patch.setattr(module.LinearLogits, name, wrong)
            ours = run(FUSED[expression], Pass("fast", 3))
        with pytest.raises(AssertionError):
            same(ours, theirs)

    right = module.LinearLogits.__getitem__
    broken("__mul__", "scale", lambda self, by: self)
    broken("__truediv__", "cap", lambda self, by: self)
    broken("tanh", "cap", lambda self: self)
    broken("__add__", "two layers", lambda self, other: self)
    broken("__getitem__", "shift", lambda self, at: right(self, (..., slice(1, None), slice(None))))
    broken("__getitem__", "the first classes", lambda self, at: self)


IN_PLACE = [operator.imul, operator.itruediv, operator.iadd, operator.isub]
WRITES: list[Callable[[Any], Any]] = [
    lambda z: z.fill_(1.0),
    lambda z: z.__setitem__(0, 1.0),
    lambda z: (z.max(), z.mul_(2.0)),
    *(lambda z, f=f: f(z, 2.0) for f in IN_PLACE),
]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_others_would_see_is_refused(write: Any) -> None:
    """A formula noted down before the write would not know of it."""
    layer = layers()[0]
    layer.current = Pass("fast", None)
    source = layer(X)
    _ = source * 2.0
    for z in (source, layer(X)[0]):
        with pytest.raises(NotImplementedError, match=r"fuse_loss: model must not write into logits"):
            write(z)


def test_half_precision_keeps_types() -> None:
    for made_in in (None, Pass("fast", 3)):
        layer = DeferringLinear(D, V, dtype=torch.bfloat16)
        layer.current = made_in
        z = layer(X.bfloat16())
        assert z.dtype == torch.bfloat16
        assert ce(z).dtype == torch.bfloat16
        assert ce(z.float()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            layer = DeferringLinear(D, V)
            layer.current = made_in
            assert layer(X.float()).dtype == torch.bfloat16
            assert ce(layer(X.float()).float()).dtype == torch.float32
