"""fuse_loss beside what else runs in a call: precision, checkpoints, threads, callbacks, gradients of their own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

tf = pytest.importorskip("transformers")

from tests.integrations.bodies import BOTH, TOKENS, Body, D, V, ce, compare, make, trained  # noqa: E402
from torch_ops.integrations import _call, _head, _logits  # noqa: E402
from torch_ops.integrations import transformers as integration  # noqa: E402
from torch_ops.integrations.transformers import fuse_loss  # noqa: E402


class Penalty(torch.autograd.Function):
    """A gradient of its own for the logits, beside the loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return loss * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], 1e-2 * ctx.saved_tensors[0]


@torch.jit.script  # pyright: ignore[reportPrivateImportUsage]
def scripted(z: Tensor, t: Tensor):
    return torch.nn.functional.cross_entropy(z, t)


def teacher(self: Any, h: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        target = self.lm_head(h * 1.5).softmax(-1)
    return F.kl_div(self.lm_head(h).log_softmax(-1), target, reduction="batchmean")


def only_read(self: Any, h: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        z = self.lm_head(h)
    return ce(z, labels) + h.square().mean()


def nested(self: Any, h: Tensor, labels: Tensor) -> Any:
    z = self.lm_head(h)
    return tf.modeling_outputs.CausalLMOutputWithPast(loss=ce(z, labels), hidden_states=(h, {"z": [z]}))


def head_in_float32(self: Any, h: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        z = self.lm_head(h.float())
        assert z.dtype == torch.float32
    return ce(z, labels)


def loss_in_float32(self: Any, h: Tensor, labels: Tensor) -> Tensor:
    z = self.lm_head(h.bfloat16())
    with torch.autocast("cpu", enabled=False):
        return ce(z.float(), labels)


def kept_hidden(hook: Callable[[Tensor], Tensor]) -> Body:
    def body(self: Any, h: Tensor, labels: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, hook):
            z = self.lm_head(h)
        return ce(z, labels)

    return body


FUSED: dict[str, Body] = {
    "a teacher beside": lambda self, h, t: ce(self.lm_head(h), t) + teacher(self, h, t).detach(),
    "float32 head": head_in_float32,
    "float32 loss": loss_in_float32,
    "nested": nested,
    "penalty": lambda self, h, t: (lambda z: Penalty.apply(ce(z, t), z))(self.lm_head(h)),
}
NOT_FUSED: dict[str, Body] = {
    "frozen teacher": teacher,
    "only read": only_read,
    "a branch": lambda self, h, t: (lambda z: ce(z - 1.0 * z.mean() if torch.is_tensor(z) else z, t))(self.lm_head(h)),
    "a map": lambda self, h, t: ce(tree_map_only(Tensor, lambda v: v.sin(), {"z": self.lm_head(h)})["z"], t),
    "scripted": lambda self, h, t: scripted(self.lm_head(h)[:, :-1].reshape(-1, V), t[:, 1:].reshape(-1)),
    "checkpoint": lambda self, h, t: checkpoint(lambda h: ce(self.lm_head(h), t), h, use_reentrant=False),
    "old checkpoint": lambda self, h, t: checkpoint(lambda h: ce(self.lm_head(h), t), h, use_reentrant=True),
    "loss in a checkpoint": lambda self, h, t: checkpoint(ce, self.lm_head(h), t, use_reentrant=False),
    "loss in an old checkpoint": lambda self, h, t: checkpoint(ce, self.lm_head(h), t, use_reentrant=True),
    "saved tensors changed": kept_hidden(lambda t: t * 2.0 if t.shape[-1] == D else t),
    "torch.func": lambda self, h, t: torch.func.vmap(lambda h, t: ce(self.lm_head(h)[None], t[None]))(h, t).mean(),
}


@pytest.mark.parametrize("name", [*FUSED, *NOT_FUSED])
def test_loss_and_gradients_whatever_the_model_does(name: str) -> None:
    fused, said = compare({**FUSED, **NOT_FUSED}[name], autocast="float32" in name)
    assert any("not fused, because" in s for s in said) == (name in NOT_FUSED)
    assert fused


SABOTAGE: dict[str, tuple[str, Any, str, Any]] = {
    "autocast of the loss": ("float32 head", _head, "_autocast", lambda arrays: tuple(a.bfloat16() for a in arrays)),
    "gradient mode of the loss": ("only read", _call.Call, "has_begun_as_now", lambda call: True),
    "hooks of the loss": ("saved tensors changed", _call.Call, "has_begun_as_now", lambda call: True),
    "checkpoints": ("checkpoint", _call.Call, "has_begun_as_now", lambda call: True),
    "nested logits": ("nested", integration, "_plain", lambda value: value),
    "the penalty": ("penalty", _head._Head, "backward", lambda ctx, *grads: (None,) * 4),
}


@pytest.mark.filterwarnings("ignore:fuse_loss")
@pytest.mark.parametrize("fault", SABOTAGE)
def test_the_checks_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, where, what, wrong = SABOTAGE[fault]
    monkeypatch.setattr(where, what, staticmethod(wrong) if isinstance(where, type) and what == "backward" else wrong)
    try:
        _, said = compare({**FUSED, **NOT_FUSED}[name], autocast="float32" in name)
    except (AssertionError, RuntimeError):
        return
    assert any("not fused" in s for s in said) != (name in NOT_FUSED), "neither another number nor another word"


def test_what_is_computed_beside_is_said_once() -> None:
    model = fuse_loss(make(lambda self, h, t: (lambda z: ce(z, t) + 0.0 * z.argmax(-1).sum())(self.lm_head(h))))
    with pytest.warns(UserWarning, match="logits were computed beside the fused loss, because .* in `argmax`"):
        model(**BOTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**BOTH)


def seen_by_others(model: Any) -> dict[str, str]:
    """The type of the logits that others get while a call with labels runs."""
    seen: dict[str, str] = {}

    def ask(where: str, what: Callable[[], Any]) -> None:
        seen[where] = type(what()).__name__

    def callback(module: nn.Module, args: Any, out: Tensor) -> None:
        if not seen:
            seen["begun"] = "Tensor"
            ask("callback", lambda: model(input_ids=TOKENS).logits)
            ask("head alone", lambda: model.lm_head(out))
            thread = threading.Thread(target=ask, args=("thread", lambda: model.lm_head(out)))
            thread.start()
            thread.join()

    handle = model.model.norm.register_forward_hook(callback)
    assert "logits" not in model(**BOTH)
    handle.remove()
    return seen


def test_a_call_is_seen_by_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(seen_by_others(fuse_loss(make())).values()) == {"Tensor"}

    class Everywhere:
        call: Any = None

        def get(self) -> Any:
            return self.call

        def set(self, call: Any) -> Any:
            before, self.call = self.call, call or self.call
            return before

        def reset(self, before: Any) -> None:
            self.call = before

    with monkeypatch.context() as patch:
        patch.setattr(_head, "asked_by_model", lambda layer, call: True)
        assert seen_by_others(fuse_loss(make()))["head alone"] == "LinearLogits"
        shared = Everywhere()
        patch.setattr(_head, "CALL", shared)
        patch.setattr(integration, "CALL", shared)
        assert seen_by_others(fuse_loss(make()))["thread"] == "LinearLogits"


def test_the_recipe_holds_for_the_very_tensor_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that outlive their call are those of the call, whatever became of the weights."""
    kept: list[Tensor] = []
    model = fuse_loss(make(lambda self, h, t: (kept.append(self.lm_head(h)), ce(kept[0], t))[1]))
    model(**BOTH).loss.backward()
    assert type(kept[0]) is _logits.LinearLogits
    with torch.no_grad():
        before = model.lm_head(model.model(input_ids=TOKENS).last_hidden_state)
        model.lm_head.weight.mul_(3.0)
    torch.testing.assert_close(kept[0].detach(), before, rtol=0.0, atol=0.0)


def test_sampled_gradient() -> None:
    """The exact loss; gradients of other bits, whose mean over draws comes nearer to the exact ones."""
    loss, exact, _ = trained(fuse_loss(make()))
    draws = []
    for seed in range(30):
        torch.manual_seed(seed)
        model = fuse_loss(make(), grad_samples=4)
        torch.manual_seed(seed)
        same, found, out = trained(model)
        torch.testing.assert_close(same, loss)
        assert out.logits is None
        draws.append(found)
    apart, mean = (float((g - exact).norm()) for g in (draws[0], torch.stack(draws).mean(0)))
    assert 0.02 * float(exact.norm()) < apart
    assert mean < 0.4 * apart
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"grad_samples": 0}, "be a Python integer >= 1"),
        ({"grad_samples": 4, "memory": "lean"}, "be None"),
    )
    for wrong, words in refused:
        with pytest.raises(ValueError, match=f"^fuse_loss: grad_samples must {words}"):
            fuse_loss(make(), **wrong)
