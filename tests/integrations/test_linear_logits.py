"""`LinearLogits`: what a model may do between its head and its loss, against the same done to a tensor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_ops.integrations import _recipe
from torch_ops.integrations._call import CALL, Call, surroundings
from torch_ops.integrations._head import attend
from torch_ops.integrations._later import Held, Later
from torch_ops.integrations._logits import LinearLogits

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


def biased_in_place(z: Any, _: Any) -> Any:
    z += WEIGHT
    z *= 2.0
    return ce(z)


def a_view_is_written(z: Any, _: Any) -> Any:
    rows, twice = z.view(-1, V), z * 2.0
    rows[2:4].mul_(-3.0)
    return ce(z) + ce(rows) + twice.logsumexp(-1).sum()  # the write is seen in the first two, not in the third


def written_through_another_name(z: Any, _: Any) -> Any:
    name = z
    name *= 3.0
    return ce(z[:, 1:], T[:, 1:])


class Doubled(torch.autograd.Function):
    """Another gradient than its values say."""

    @staticmethod
    def forward(ctx: Any, z: Any, how: str) -> Any:
        if how == "written":
            ctx.mark_dirty(z)
        return z * 1.0 if how == "new" else z.view(z.shape) if how == "view" else z

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2.0 * grads[0], None


def hooked(z: Any, _: Any) -> Any:
    z.register_hook(lambda g: 3.0 * g)
    return ce(z * 2.0)


def hooked_on_the_way(z: Any, _: Any) -> Any:
    twice = z * 2.0
    z.grad_fn.register_prehook(lambda grads: (3.0 * grads[0],))
    return ce(twice)


def with_gradients_kept(z: Any, _: Any) -> Any:
    z.retain_grad()
    g = torch.autograd.grad(ce(z), z, retain_graph=True)[0]
    return ce(z) + g.square().sum()


def cut_off(z: Any, _: Any) -> Any:
    return ce(z.detach().requires_grad_()) + ce(z)


def beheaded(z: Any, other: Any) -> Any:
    z.requires_grad_(True)
    with torch.no_grad():
        seen = z * 3.0
    return ce(seen) + ce(other)


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
    "a bias": lambda z, _: ce(z + WEIGHT),
    "a bias of one row": lambda z, _: ce(2.0 * (WEIGHT[None] + z * 3.0)),
    "a bias, shifted and capped": lambda z, _: ce((z + WEIGHT.view(1, 1, V))[:, 1:].tanh(), T[:, 1:]),
    "a bias in place": biased_in_place,
    "in place under another name": written_through_another_name,
    "other memory": lambda z, _: ce(z.clone().contiguous().reshape(2, 5, V)),
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
    "a layer and a number": lambda z, other: ce(z + 1.0) + ce(other.exp()),
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
    "a view written": a_view_is_written,
    "a Function": lambda z, _: ce(Doubled.apply(z, "new")),
    "a Function of itself": lambda z, _: ce(Doubled.apply(z, "itself")),
    "a Function that says it wrote": lambda z, _: ce(Doubled.apply(z, "written")),
    "a Function's view": lambda z, _: ce(Doubled.apply(z * 2.0, "view")),
    "a hook": hooked,
    "a hook in the graph": hooked_on_the_way,
    "gradients of the logits": with_gradients_kept,
    "a leaf made of it": cut_off,
    "mixed gradient modes": beheaded,
    "a bias of each row": lambda z, _: ce(z + torch.arange(10.0, dtype=torch.float64).view(2, 5, 1)),
    "a bias after the cap": lambda z, _: ce(z.tanh() + WEIGHT),
    "a floor": lambda z, _: ce(torch.div(z, 2.0, rounding_mode="floor") + z),
    "both": lambda z, _: ce(z) + z.logsumexp(-1).mean(),
    "memory": lambda z, _: ce(z * float(z.detach().numpy().max())) * len(z.tolist()),
    "scaled once computed": scaled_in_place_once_computed,
    "rows": lambda z, _: sum(ce(row, t) for row, t in zip(z, T, strict=True)),
}  # fmt: skip


BESIDE = ("both",)


def layers() -> list[nn.Linear]:
    torch.manual_seed(5)
    return [nn.Linear(D, V, dtype=torch.float64) for _ in range(2)]


def made(chunk_size: int | None = 3) -> Call:
    return Call(nn.Identity(), "fast", chunk_size, None, set())


def run(expression: Expression, call: Call | None) -> tuple[Tensor, list[Tensor]]:
    x, both = X.clone().requires_grad_(), layers()
    if call is not None:
        call.layers, call.context = tuple(both), surroundings()
        for layer in both:
            attend(layer)
    known = CALL.set(call)
    try:
        out = expression(both[0](x * 1.0), both[1](x * 1.0))
    finally:
        CALL.reset(known)
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
    call = made()
    theirs = run(expression, None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # Through float32 the tensor is rounded, the formula is not.
        same(run(expression, call), theirs, 1e-6 if name == "types" else 1e-11)
    beside = any("beside the fused loss" in str(w.message) for w in said)
    assert call.fused == (name in FUSED or beside)
    assert bool(call.why_not or beside) == (name in COMPUTED)
    assert beside == (name in BESIDE)
    assert theirs[1][0].abs().max() > 1e-3 or name == "scale of 0", "a gradient that zeros would pass for"


SABOTAGE: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "scale lost": ("scale", lambda m: m.setitem(_recipe.STEPS, Tensor.mul, lambda recipe, z, by: recipe)),
    "division lost": ("cap", lambda m: m.setitem(_recipe.STEPS, Tensor.div, lambda recipe, z, by: recipe)),
    "cap lost": ("cap", lambda m: m.setitem(_recipe.STEPS, torch.tanh, lambda recipe, z: recipe)),
    "second layer lost": ("two layers", lambda m: m.setitem(_recipe.STEPS, Tensor.add, lambda recipe, z, o: recipe)),
    "bias lost": ("a bias", lambda m: m.setitem(_recipe.STEPS, Tensor.add, lambda recipe, z, o: recipe)),
    "bias in place lost": ("a bias in place", lambda m: m.setitem(_recipe.STEPS, Tensor.add_, lambda r, z, o: r)),
    "shift lost": ("shift", lambda m: m.setitem(_recipe.STEPS, Tensor.__getitem__, _first_rows)),
    "classes lost": ("the first classes", lambda m: m.setitem(_recipe.STEPS, Tensor.__getitem__, lambda r, z, at: r)),
    "a Function passed by": (
        "a Function that says it wrote",
        lambda m: m.setattr(LinearLogits, "current", lambda z: z.recipe),
    ),
    "a hook passed by": ("a hook in the graph", lambda m: m.setattr(Call, "watch", lambda call, name: None)),
    "old memory": ("a view written", lambda m: m.setattr(Later, "settle", lambda later: None)),
}  # fmt: skip


def _first_rows(recipe: Any, z: Any, at: Any) -> Any:
    return recipe.rows(lambda x: x[:, 1:])


@pytest.mark.filterwarnings("ignore:fuse_loss")
@pytest.mark.parametrize("fault", SABOTAGE)
def test_the_checks_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, breaking = SABOTAGE[fault]
    expression = {**FUSED, **COMPUTED}[name]
    theirs = run(expression, None)
    breaking(monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        same(run(expression, made()), theirs)


LATER: dict[str, Callable[[Any, nn.Linear], Any]] = {
    "hidden states": lambda x, layer: x.mul_(2.0),
    "hidden states, unseen by versions": lambda x, layer: x.data.zero_(),
    "weight": lambda x, layer: layer.weight.data.mul_(2.0),
    "weight exchanged": lambda x, layer: setattr(layer.weight, "data", torch.ones(V, D, dtype=torch.float64)),
    "bias": lambda x, layer: layer.bias.data.add_(torch.arange(V)),
    "weight frozen": lambda x, layer: layer.weight.requires_grad_(False),
    "mapped memory": lambda x, layer: layer.weight.data.mul_(2.0),
    "nothing": lambda x, layer: None,
}


def written_later(what: str, call: Call | None, use: Callable[[Any], Any] = ce) -> tuple[Tensor, Any]:
    """(the loss, the weight's gradient or why there is none) where something is written between head and loss."""
    layer = layers()[0]
    if what == "mapped memory":
        layer.weight.data = torch.from_numpy(layer.weight.detach().numpy().copy())
    x = X.clone()
    if call is not None:
        call.layers, call.context = (layer,), surroundings()
        attend(layer)
    known = CALL.set(call)
    z = layer(x)
    LATER[what](x, layer)
    loss = use(z)
    CALL.reset(known)
    try:
        # `.data` goes round autograd's check, so a plain tensor's backward pass is silently another here; so is ours.
        return loss.detach(), torch.autograd.grad(loss, layer.bias)[0]
    except RuntimeError as error:
        return loss.detach(), str(error)[:40]


@pytest.mark.parametrize("what", LATER)
def test_logits_are_those_of_the_moment(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written between head and loss changes no loss: it is what it would have been."""
    if what == "mapped memory":  # cannot be undone: said
        with pytest.raises(RuntimeError, match="fuse_loss: model must not write into its head"):
            written_later(what, made())
        return
    for use in (ce, lambda z: z.logsumexp(-1).sum()):
        ours, theirs = written_later(what, made(), use), written_later(what, None, use)
        torch.testing.assert_close(ours[0], theirs[0])
        assert type(ours[1]) is type(theirs[1])
        torch.testing.assert_close(*(torch.zeros(1) if isinstance(r, str) else r for r in (ours[1], theirs[1])))
    if what not in ("nothing", "weight frozen"):
        monkeypatch.setattr(Held, "is_same", lambda held: True)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(written_later(what, made())[0], written_later(what, None)[0])


def test_writes_cost_no_copy() -> None:
    """A step of an optimizer between two calls writes where it always wrote."""
    layer, call = layers()[0], made()
    address = layer.weight.data_ptr()
    call.layers, call.context = (layer,), surroundings()
    attend(layer)
    known = CALL.set(call)
    ce(layer(X)).backward()
    CALL.reset(known)
    assert call.fused
    with torch.no_grad():
        layer.weight.sub_(layer.weight.grad)  # pyright: ignore
    assert layer.weight.data_ptr() == address


@pytest.mark.parametrize("change", [lambda z: z.unsqueeze_(0), lambda z: z.t_(), lambda z: z.resize_(3)])
def test_another_shape_in_place_is_refused(change: Any) -> None:
    """No error of its own would say that the tensor without memory kept its old shape."""
    layer, call = layers()[0], made()
    call.layers, call.context = (layer,), surroundings()
    attend(layer)
    known = CALL.set(call)
    try:
        with pytest.raises((NotImplementedError, RuntimeError)):
            change(layer(X[0]))
    finally:
        CALL.reset(known)


def test_half_precision_keeps_types() -> None:
    for call in (None, made()):
        layer, small = nn.Linear(D, V, dtype=torch.bfloat16), nn.Linear(D, V)
        if call is not None:
            call.layers, call.context = (layer, small), surroundings()
            attend(layer)
            attend(small)
        known = CALL.set(call)
        z = layer(X.bfloat16())
        assert z.dtype == torch.bfloat16
        assert ce(z).dtype == torch.bfloat16
        assert ce(z.float()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            cast = small(X.float())
            assert cast.dtype == torch.bfloat16
            assert ce(cast.float()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            whole = small.double()(X)
        assert whole.dtype == torch.float64
        CALL.reset(known)
        assert call is None or (call.fused and not call.why_not)
