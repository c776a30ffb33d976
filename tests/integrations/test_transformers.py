"""fuse_loss: loss and every gradient of transformers' causal language models, and that no (N, V) array is alive."""

from __future__ import annotations

import copy
import doctest
import inspect
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

tf = pytest.importorskip("transformers")

from torch_ops.integrations import _recipe  # noqa: E402
from torch_ops.integrations import transformers as integration  # noqa: E402
from torch_ops.integrations._head import enter  # noqa: E402
from torch_ops.integrations.transformers import fuse_loss, restore_loss  # noqa: E402

B, L, V, D = 2, 32, 384, 16
LLAMA: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {**LLAMA, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "is_decoder": True}
GPT: dict[str, Any] = {"vocab_size": V, "n_embd": D, "n_layer": 1, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
GPT |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {**LLAMA, "ffn_dim": 24, "word_embed_proj_dim": D, "dropout": 0.0, "attention_dropout": 0.0}
XLM: dict[str, Any] = {
    "n_words": V,
    "emb_dim": D,
    "n_layers": 1,
    "n_heads": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}

# What is special about the way from the head to the loss.
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "Gemma2, soft cap": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=3.0, query_pre_attn_scalar=8)
    ),
    "Qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, head_dim=8)),
    "GPT-2, tied": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)),
    "Mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA)),
    "Phi, bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**LLAMA)),
    "Cohere, logits multiplied": lambda: tf.CohereForCausalLM(tf.CohereConfig(**LLAMA, logit_scale=0.25)),
    "OPT, tied": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT)),
    "Granite, logits divided": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**LLAMA, logits_scaling=3.0)),
    "GPT-J, cast": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPT, rotary_dim=4)),
    "BERT, head in a module": lambda: tf.BertLMHeadModel(tf.BertConfig(**BERT)),
    "XLM, loss in the head": lambda: tf.XLMWithLMHeadModel(tf.XLMConfig(**XLM, pad_index=0)),
}  # fmt: skip
TOKENS = torch.randint(3, V, (B, L), generator=torch.Generator().manual_seed(1))
LABELS = TOKENS.clone()
LABELS[0, :3] = LABELS[1, 7] = -100


def make(name: str = "Llama") -> Any:
    """A model with loud weights, in training mode."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().train()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return model


class Largest(TorchDispatchMode):
    """The most elements of a storage that operations under it made."""

    most = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.most = max(self.most, t.untyped_storage().nbytes() // t.itemsize)
        return out


def train(model: Any, **options: Any) -> tuple[Any, dict[str, Tensor], int]:
    """(what a call with labels returns, the gradients by name, the largest array in elements)."""
    model.zero_grad()
    torch.manual_seed(2)  # for dropout in adapters
    with Largest() as largest:
        out = model(input_ids=TOKENS, labels=LABELS, **options)
        out["loss"].backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, largest.most


def same(ours: tuple[Any, dict[str, Tensor], int], theirs: tuple[Any, dict[str, Tensor], int]) -> None:
    """To float32's rounding; a gradient that is rounding alone (a bias that softmax cancels) by the largest one."""
    torch.testing.assert_close(ours[0]["loss"], theirs[0]["loss"], rtol=2e-6, atol=0.0)
    assert ours[1].keys() == theirs[1].keys()
    top = max(float(g.abs().max()) for g in theirs[1].values())
    for name, g in theirs[1].items():
        bound = 2e-5 * float(g.abs().max()) + 1e-6 * top
        assert float((ours[1][name] - g).abs().max()) <= bound, name


@pytest.fixture(autouse=True)
def _loud() -> Any:
    """No loss is left unfused in silence, nor with a word, but where a test says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fuse_loss")
        yield


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_every_gradient_without_the_logits(name: str) -> None:
    model = make(name)
    options: list[dict[str, Any]] = [{}]
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()) and "XLM" not in name:
        options += [{"num_items_in_batch": torch.tensor(11)}]
    theirs = [train(model, **o) for o in options]
    assert all(most >= B * (L - 1) * V for *_, most in theirs), "the count must see the logits of the model's own loss"
    fused = fuse_loss(model, chunk_size=4)
    assert fused is model
    for o, own in zip(options, copy.deepcopy([(t[0]["loss"].detach(), t[1]) for t in theirs]), strict=True):
        out, grads, most = train(fused, **o)
        same((out, grads, most), ({"loss": own[0]}, own[1], 0))
        assert out.get("logits") is None
        assert most < B * (L - 1) * V / 2, "half an (N, V) array"
    assert len(theirs) == 1 or abs(theirs[0][0]["loss"] / theirs[1][0]["loss"] - 1.0) > 0.1


def steps(**wrong: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Operations of tensors, noted down wrongly."""

    def put(patch: pytest.MonkeyPatch) -> None:
        for name, step in wrong.items():
            patch.setitem(_recipe.STEPS, getattr(Tensor, name), step)
            if hasattr(torch, name):
                patch.setitem(_recipe.STEPS, getattr(torch, name), step)

    return put


def layer(wrong: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(_recipe, "_one_layer", lambda terms: wrong(terms[0]))


BREAKS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "cap dropped": ("Gemma2, soft cap", steps(tanh=lambda recipe, z: recipe)),
    "scale dropped": ("Cohere, logits multiplied", steps(mul=lambda recipe, z, by: recipe)),
    "division dropped": ("Granite, logits divided", steps(div=lambda recipe, z, by: recipe)),
    "bias dropped": ("Phi, bias", layer(lambda t: (*t[:2], None))),
    "shift lost": ("Llama", steps(view=lambda r, z, *s: r.rows(lambda x: x.roll(1, 1).reshape(-1, D)))),
    "gradient of the weight lost": ("GPT-2, tied", layer(lambda t: (t[0], t[1].detach(), t[2]))),
}  # fmt: skip


@pytest.mark.parametrize("fault", BREAKS)
def test_the_check_sees_what_it_should(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sabotage = BREAKS[fault]
    theirs = train(copy.deepcopy(make(name)))
    sabotage(monkeypatch)
    with pytest.raises(AssertionError):
        same(train(fuse_loss(make(name))), theirs)


def test_when_logits_are_returned() -> None:
    model = make()
    own = model(input_ids=TOKENS, labels=LABELS)
    fuse_loss(model)
    both = {"input_ids": TOKENS, "labels": LABELS}
    assert model(**both).logits is None
    assert "logits" not in model(**both)
    torch.testing.assert_close(model(input_ids=TOKENS).logits, own.logits, rtol=0.0, atol=0.0)
    asked = model(**both, return_logits=True)
    torch.testing.assert_close((asked.loss, asked.logits), (own.loss, own.logits), rtol=0.0, atol=0.0)
    assert model(**both, return_dict=False)[1] is None, "a tuple keeps its places"
    assert model(TOKENS, None, None, None, None, LABELS).logits is None, "labels given by position"
    model.eval()
    assert model(**both).logits.shape == (B, L, V)
    with torch.no_grad():
        quiet = model(**both, return_logits=False)
        torch.testing.assert_close((quiet.loss, quiet.logits), (own.loss.detach(), None))
        assert model.generate(TOKENS[:, :4], max_new_tokens=2).shape == (B, 6)
    assert fuse_loss(model, return_logits=False)(**both).logits is None
    assert fuse_loss(model.train(), return_logits=True)(**both).logits.shape == (B, L, V)


def test_labels_that_are_shifted_already_and_kept_positions() -> None:
    shifted = nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:].contiguous()
    for options in ({"shift_labels": shifted}, {"logits_to_keep": L}, {"output_hidden_states": True}):
        same(train(fuse_loss(make()), **options), train(make(), **options))


def test_memory_modes_and_sizes() -> None:
    theirs = train(make("Phi, bias"))
    for options in ({"memory": "lean"}, {"memory": "lean", "chunk_size": 100}, {"memory": "fast", "chunk_size": 3}):
        same(train(fuse_loss(make("Phi, bias"), **options)), theirs)  # pyright: ignore


def test_undo_and_do_twice() -> None:
    model, plain = make(), make()
    assert restore_loss(model) is model
    kind, names = type(model), vars(model).keys()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fuse_loss(fuse_loss(model), chunk_size=4)
    assert type(model).__bases__[-1] is kind
    assert (type(model).__name__, repr(type(model))) == (kind.__name__, repr(kind))
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.state_dict().keys() == state.keys()
    assert model(input_ids=TOKENS, labels=LABELS).logits is None
    restore_loss(model)
    assert type(model) is kind
    assert type(model.lm_head) is nn.Linear
    assert not model.lm_head._forward_pre_hooks
    assert vars(model).keys() == names
    assert vars(model.lm_head).keys() == vars(plain.lm_head).keys()
    assert model(input_ids=TOKENS, labels=LABELS).logits is not None


def test_copies_and_files(tmp_path: Any) -> None:
    theirs, model = train(make()), fuse_loss(make())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(again) is type(model)
        assert again.lm_head is not model.lm_head
        same(train(again), theirs)
    replica = model._replicate_for_data_parallel()  # what DataParallel makes of it, device by device
    replica._modules["lm_head"] = copy.deepcopy(model.lm_head)
    replica.lm_head.weight.data.zero_()
    loss = replica(input_ids=TOKENS, labels=LABELS).loss.item()
    assert abs(loss - torch.tensor(float(V)).log()) < 1e-5, "a replica uses its own head"
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is tf.LlamaForCausalLM
    same(train(loaded.train()), theirs)


def test_a_failed_call_leaves_the_head_as_it_was() -> None:
    model = fuse_loss(make())
    with pytest.raises(IndexError, match="target must be in"):
        model(input_ids=TOKENS, labels=LABELS + V)
    assert isinstance(model.lm_head(torch.ones(1, D)), Tensor)
    same(train(model), train(make()))


def test_a_new_head_is_noticed() -> None:
    models = [make(), fuse_loss(make())]
    for model in models:
        torch.manual_seed(0)
        model.resize_token_embeddings(V + 8, mean_resizing=False)
    same(train(models[1]), train(models[0]))


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


NOT_HELD = "model must be or hold a transformers model; got Linear object"
MISTAKES: list[tuple[Callable[..., Any], Any, dict[str, Any], type[Exception], str]] = [
    (fuse_loss, 3, {}, TypeError, "model must be a torch.nn.Module; got int object"),
    (fuse_loss, nn.Linear(2, 3), {}, TypeError, NOT_HELD),
    (restore_loss, nn.Linear(2, 3), {}, TypeError, NOT_HELD),
    (fuse_loss, None, {"memory": "small"}, ValueError, "memory must be one of 'fast', 'lean'; got 'small'"),
    (fuse_loss, None, {"chunk_size": 0}, ValueError, "chunk_size must be a Python integer >= 1 or None; got 0"),
    (fuse_loss, None, {"return_logits": 1}, TypeError, "return_logits must be True or False; got 1"),
]


@pytest.mark.parametrize(("call", "model", "options", "error", "message"), MISTAKES, ids=[m[-1] for m in MISTAKES])
def test_mistakes(call: Any, model: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{call.__name__}: {re.escape(message)}\\.$"):
        call(make() if model is None else model, **options)


def test_models_without_a_head_for_labels() -> None:
    with pytest.raises(ValueError, match="model must have an output layer and take labels; got LlamaModel"):
        fuse_loss(make().model)


def test_a_head_that_is_no_linear_layer() -> None:
    class Head(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2.0

    model = make()
    model.lm_head.__class__ = Head
    with pytest.raises(ValueError, match=r"fuse_loss: model must end in a torch.nn.Linear; got Head\."):
        fuse_loss(model)
    assert type(model) is tf.LlamaForCausalLM
    fused = fuse_loss(make())
    fused.lm_head.__class__ = Head
    with pytest.warns(UserWarning, match="not fused, because its head is now a Head with a forward of its own"):
        same(train(fused), train(model))


def test_docstrings() -> None:
    for function in (fuse_loss, restore_loss):
        doc = inspect.getdoc(function) or ""
        args = re.search(r"^Args:\n((?:    .*\n)+)", doc, re.MULTILINE)
        assert args
        assert re.findall(r"^    (\w+):", args[1], re.MULTILINE) == list(inspect.signature(function).parameters)
    results = doctest.testmod(integration)
    assert results.attempted > 5
    assert not results.failed
