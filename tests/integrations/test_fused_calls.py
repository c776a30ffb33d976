"""fuse_loss beside what else runs: precision, checkpoints, threads, callbacks, wrapped forwards, hooks."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

tf = pytest.importorskip("transformers")

from torch_ops.integrations import _call, _head, _logits  # noqa: E402
from torch_ops.integrations import transformers as integration  # noqa: E402
from torch_ops.integrations.transformers import fuse_loss, restore_loss  # noqa: E402

V, D = 96, 16
SIZES = {"vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = torch.randint(3, V, (2, 8), generator=torch.Generator().manual_seed(1))
BOTH = {"input_ids": TOKENS, "labels": TOKENS, "use_cache": False}
Body = Callable[[Any, Tensor, Tensor], Any]


def make(body: Body | None = None) -> Any:
    """A tiny model with loud weights; `body` is what its forward does with the hidden states."""

    class Model(tf.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, labels: Any = None, **_: Any) -> Any:
            hidden = self.model(input_ids=input_ids).last_hidden_state
            out = body(self, hidden, labels)  # pyright: ignore[reportOptionalCall]
            return out if isinstance(out, dict) else tf.modeling_outputs.CausalLMOutputWithPast(loss=out)

    torch.manual_seed(0)
    model = (tf.LlamaForCausalLM if body is None else Model)(tf.LlamaConfig(**SIZES)).train()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return model


def ce(z: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(z[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))


def trained(model: Any, autocast: bool = False) -> tuple[Tensor, Tensor, Any]:
    """(the loss, all gradients, the output) of a call with labels."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**BOTH)
    out.loss.backward()
    return out.loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), out


def compare(body: Body, *, autocast: bool = False) -> tuple[bool, list[str]]:
    """Whether the fused model gave no logits, and what it said; loss and gradients are the model's own."""
    theirs = trained(make(body), autocast)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = trained(fuse_loss(make(body)), autocast)
    loose: Any = (
        {"rtol": 2e-2, "atol": 1e-2 * float(theirs[1].abs().max())} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-2 if autocast else 1e-5, atol=0.0)
    torch.testing.assert_close(ours[1], theirs[1], **loose)
    kinds = [{type(v) for v in tree_leaves(dict(out))} for out in (ours[2], theirs[2])]
    assert kinds[0] <= kinds[1] | {type(None)}
    return "logits" not in ours[2], [str(w.message) for w in said if "fuse_loss" in str(w.message)]


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


def compiled(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def wrapped(model: Any) -> Any:
    old = model.forward
    model.forward = functools.wraps(old)(lambda *args, **kwargs: old(*args, **kwargs))
    return model


def prepared(model: Any, unwrap: bool = False) -> Any:
    accelerate = pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = by.prepare(model)
    return by.unwrap_model(model, keep_fp32_wrapper=False) if unwrap else model


SETTERS: dict[str, Callable[[Any], Any]] = {
    "accelerate": prepared,
    "accelerate, undone": functools.partial(prepared, unwrap=True),
    "a wrapper": wrapped,
    "torch.compile": compiled,
}


@pytest.mark.parametrize("name", [*list(SETTERS)[:3], pytest.param("torch.compile", marks=pytest.mark.slow)])
def test_a_forward_on_the_instance(name: str) -> None:
    """Set before or after: fused, or a warning; and restore_loss gives the model back."""
    put = SETTERS[name]
    own = put(make())(**BOTH)
    first = fuse_loss(put(make()))
    if name == "torch.compile":
        with pytest.warns(UserWarning, match="fuse_loss: the loss is not fused"):
            first(**BOTH)
    else:
        out = first(**BOTH)
        assert "logits" not in out
        torch.testing.assert_close(out.loss, own.loss, rtol=1e-2, atol=0.0)
    last = put(fuse_loss(make()))
    assert "logits" not in last(**BOTH)
    for model in (first, last):
        restore_loss(model)
        torch.testing.assert_close(dict(model(**BOTH)), dict(own))


def test_a_forward_that_passes_ours_by_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    old = model.forward
    fuse_loss(model)
    with pytest.warns(UserWarning, match="not fused from here on, because the model's forward was replaced"):
        model.forward = old
    assert "logits" not in fuse_loss(model)(**BOTH)
    monkeypatch.setattr(integration, "leads_to", lambda function, ours: True)
    model = fuse_loss(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.forward = old


def test_the_head_keeps_its_class() -> None:
    """What goes by the exact class (dynamic quantisation) treats it as ever."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        small = [quantize_dynamic(model.eval(), {nn.Linear}) for model in (make(), fuse_loss(make()))]
    assert type(small[0].lm_head) is type(small[1].lm_head) is not nn.Linear
    with pytest.warns(UserWarning, match="not fused, because its head is now a Linear"):
        out = small[1](**BOTH, return_logits=False)
    torch.testing.assert_close(out.loss, small[0](**BOTH).loss)
    heads = [torch.nn.utils.parametrizations.weight_norm(model.lm_head) for model in (make(), fuse_loss(make()))]
    assert type(heads[0]) is type(heads[1]) or type(heads[0]).__name__ == type(heads[1]).__name__


def test_a_parametrised_head() -> None:
    both = [make(), fuse_loss(make())]
    for model in both:
        torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    theirs, ours = trained(both[0]), trained(both[1])
    assert "logits" not in ours[2]
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-4, atol=1e-5)


REGISTER: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "forward": lambda hook: everywhere.register_module_forward_hook(lambda m, args, out: hook(m, out)),
    "backward": lambda hook: everywhere.register_module_full_backward_hook(lambda m, gi, go: hook(m, gi)),
    "before backward": lambda hook: everywhere.register_module_full_backward_pre_hook(lambda m, go: hook(m, go)),
}


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_on_all_modules(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def both() -> tuple[Any, Any]:
        kinds: list[set[type]] = [set(), set()]
        results = []
        for model, seen in zip((make(), fuse_loss(make())), kinds, strict=True):

            def hook(m: Any, values: Any, seen: set[type] = seen) -> Any:
                if getattr(m, "out_features", 0) != V:
                    return None
                seen.update(type(v) for v in tree_leaves(values))
                return tree_map_only(Tensor, lambda v: 2.0 * v, values)

            handle = REGISTER[kind](hook)
            try:
                results.append(trained(model))
            finally:
                handle.remove()
        return results, kinds

    with pytest.warns(UserWarning, match="not fused, because its head has hooks"):
        results, kinds = both()
    assert kinds[0] == kinds[1] == {Tensor}
    torch.testing.assert_close(results[1][:2], results[0][:2])
    for module in (integration, _call):
        monkeypatch.setattr(module, "is_watched", lambda *modules: False)
    results, kinds = both()
    assert kinds[0] != kinds[1] or "logits" in results[1][2]


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
