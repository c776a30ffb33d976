"""fuse_loss: adapters, hooks, checkpoints, Trainer and torch.compile."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

tf = pytest.importorskip("transformers")
from tests.integrations.models import LABELS, TOKENS, B, L, V, make, same, train  # noqa: E402
from torch_ops.integrations import _recipe  # noqa: E402
from torch_ops.integrations._head import enter  # noqa: E402
from torch_ops.integrations.transformers import fuse_loss, restore_loss  # noqa: E402


@pytest.fixture(autouse=True)
def _loud() -> Any:
    """No loss is left unfused in silence, nor with a word, but where a test says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fuse_loss")
        yield


def adapted(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    at = {"target_modules": ["lm_head", "q_proj"], "lora_dropout": 0.3}
    config = peft.LoraConfig(r=4, init_lora_weights=False, **{**at, **options})
    return peft.get_peft_model(model, config).train()


@pytest.mark.filterwarnings("ignore:.*lora_bias", "ignore:.*gradient_checkpointing")
@pytest.mark.parametrize(
    "options",
    [{}, {"lora_bias": True, "lora_alpha": 3}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["low rank", "low rank with bias", "a copy of the head"],
)
def test_adapters_on_the_head(options: Any) -> None:
    theirs = train(adapted(make(), **options))
    assert len(theirs[1]) >= 3
    for fused in (
        fuse_loss(adapted(make(), **options), chunk_size=4),
        adapted(fuse_loss(make(), chunk_size=4), **options),
    ):
        ours = train(fused)
        same(ours, theirs)
        assert ours[0].logits is None
        assert ours[2] < B * L * V / 2
        attended = [m for m in fused.modules() if enter in m._forward_pre_hooks.values()]
        assert attended
        assert all(m.out_features == V for m in attended)
    restore_loss(fused)
    assert fused(input_ids=TOKENS, labels=LABELS).logits is not None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_an_adapter_joins_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither W beside B in one array, nor a gradient for a frozen W."""
    fused = fuse_loss(adapted(make()))
    monkeypatch.setattr(_recipe, "_one_layer", lambda terms: pytest.fail("the head's weights are joined"))
    same(train(fused), train(adapted(make())))
    frozen = [p for n, p in fused.named_parameters() if "lm_head" in n and "lora" not in n]
    assert frozen
    assert not any(p.requires_grad or p.grad is not None for p in frozen)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_what_is_not_served_is_said_and_right() -> None:
    """A head that is more than linear layers: the model's own loss, and which operation needed the logits."""
    theirs = train(adapted(make(), use_dora=True))
    with pytest.warns(UserWarning, match="fuse_loss: the loss is not fused, because the model used its logits in"):
        ours = train(fuse_loss(adapted(make(), use_dora=True)))
    same(ours, theirs)
    assert ours[0].logits.shape == (B, L, V)

    model = fuse_loss(make())
    model.loss_function = lambda logits, labels, vocab_size, **_: logits[..., 1:].logsumexp(-1).mean()
    with pytest.warns(UserWarning, match="used its logits in `indexing`"):
        out = model(input_ids=TOKENS, labels=LABELS)
    torch.testing.assert_close(out.loss, model(input_ids=TOKENS).logits[..., 1:].logsumexp(-1).mean())


def test_hooks_on_the_head_get_tensors() -> None:
    """Tensor parallelism and ZeRO gather there what the head alone does not have."""
    theirs = make()
    ours = fuse_loss(make())
    for model in (theirs, ours):
        model.lm_head.register_forward_hook(lambda module, args, out: out + torch.arange(V) / V)
    with pytest.warns(UserWarning, match="not fused, because its head has hooks"):
        found = train(ours)
    same(found, train(theirs))
    assert found[0].logits.shape == (B, L, V)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_checkpointed_layers() -> None:
    models = [make(), fuse_loss(make(), chunk_size=4)]
    for model in models:
        model.gradient_checkpointing_enable()
    same(train(models[1], use_cache=False), train(models[0], use_cache=False))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool) -> None:
    """As far from the model in float32 as its own loss in bfloat16 is."""
    truth = train(make())
    results = []
    for fuse in (lambda m: m, fuse_loss):
        model = fuse(make() if autocast else make().bfloat16())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, grads, _ = train(model)
        assert out.loss.dtype == torch.float32
        top = max(float((grads[n].float() - g).abs().max() / g.abs().max()) for n, g in truth[1].items() if "head" in n)
        results.append((abs(out.loss.item() - truth[0].loss.item()), top))
    (own_loss, own_grad), (loss, grad) = results
    assert loss <= 2.0 * own_loss + 0.01
    assert grad <= 1.5 * own_grad


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_trainer_with_accumulated_gradients(tmp_path: Any) -> None:
    """Uneven numbers of labels over three micro-batches: each counted once; metrics in evaluation."""
    pytest.importorskip("accelerate")
    data = [
        {"input_ids": row, "labels": row.where(torch.arange(L) >= i % 9, -100)}
        for i, row in enumerate(TOKENS.repeat(6, 1))
    ]

    def accuracy(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (4, L, V)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    def run(model: Any) -> tuple[list[float], dict[str, float], Tensor]:
        options = {"gradient_accumulation_steps": 3, "max_steps": 2, "logging_steps": 1, "gradient_checkpointing": True}
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 0}
        size = {"per_device_train_batch_size": 2, "learning_rate": 1e-2}
        trainer = tf.Trainer(
            model=model,
            args=tf.TrainingArguments(output_dir=str(tmp_path), **options, **quiet, **size),
            train_dataset=data,  # pyright: ignore
            eval_dataset=data[:4],  # pyright: ignore
            compute_metrics=accuracy,
        )
        trainer.train()
        found = {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_accuracy")}
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return losses, found, torch.cat([p.detach().flatten() for p in model.parameters()])

    start = torch.cat([p.detach().flatten() for p in make().parameters()])
    theirs, ours = run(make()), run(fuse_loss(make(), chunk_size=4))
    assert len(ours[0]) == len(ours[1]) == 2
    assert (theirs[2] - start).abs().max() > 1e-3, "the steps moved something"
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(ours[2], theirs[2], rtol=0.0, atol=1e-4)


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    model = fuse_loss(make("Gemma2, soft cap"), chunk_size=4)
    theirs = train(make("Gemma2, soft cap"), use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(input_ids=TOKENS, labels=LABELS, use_cache=False)
    out.loss.backward()
    assert out.logits is None
    same((out, {n: p.grad for n, p in model.named_parameters()}, 0), theirs)
    assert compiled(input_ids=TOKENS, use_cache=False).logits.shape == (B, L, V)
    restore_loss(compiled)  # pyright: ignore
    assert type(model) is tf.Gemma2ForCausalLM
