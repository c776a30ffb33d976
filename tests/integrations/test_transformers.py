"""fuse_loss: loss and every gradient of transformers' models against the same model as it was."""

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

tf = pytest.importorskip("transformers")
from tests.integrations.models import ARCHITECTURES, LABELS, TOKENS, B, D, L, V, make, same, train  # noqa: E402
from torch_ops.integrations import _recipe  # noqa: E402
from torch_ops.integrations import transformers as integration  # noqa: E402
from torch_ops.integrations.transformers import fuse_loss, restore_loss  # noqa: E402


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
