"""fuse_loss in masked, encoder-decoder and image-text models: loss, every gradient, no (N, V) array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

tf = pytest.importorskip("transformers")

from tests.integrations.models import LLAMA, D, L, V, same  # noqa: E402
from tests.integrations.test_transformers import steps  # noqa: E402
from tests.storages import Largest  # noqa: E402
from torch_ops.integrations.transformers import fuse_loss  # noqa: E402

B = 2
NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "activation_dropout"), 0.0
)
MASKED: dict[str, Any] = {**LLAMA, **NO_DROPOUT, "max_position_embeddings": 48}
MODERN = {**LLAMA, "attention_dropout": 0.0, "global_attn_every_n_layers": 1, "cls_token_id": 1, "sep_token_id": 2}
BART: dict[str, Any] = {**NO_DROPOUT, "vocab_size": V, "d_model": D, "max_position_embeddings": 48, "pad_token_id": 0}
BART |= {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 24))}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "eos_token_id": 2, "bos_token_id": 1}
BART |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}
T5: dict[str, Any] = {"vocab_size": V, "d_model": D, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0}
VISION = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAVA: dict[str, Any] = {"image_token_id": 5, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
TOKENS = torch.randint(6, V, (B, L), generator=torch.Generator().manual_seed(4))
# A masked model judges 15 % of its tokens.
LABELS = TOKENS.where(torch.rand(B, L, generator=torch.Generator().manual_seed(5)) < 0.15, -100)
TEXT = {"input_ids": TOKENS, "labels": LABELS}


def llava() -> Any:
    text = tf.LlamaConfig(**LLAMA)
    vision = tf.CLIPVisionConfig(**VISION, image_size=4, patch_size=2, attention_dropout=0.0)
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=text, **LLAVA))


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "BERT": (lambda: tf.BertForMaskedLM(tf.BertConfig(**MASKED)), TEXT),
    "RoBERTa": (lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**MASKED)), TEXT),
    "ModernBERT": (lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**MODERN)), TEXT),
    "DeBERTa": (lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**MASKED)), TEXT),
    "T5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), TEXT),
    "BART, added bias": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)), TEXT),
    "Marian, added bias": (lambda: tf.MarianMTModel(tf.MarianConfig(**BART)), TEXT),
    "Whisper": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(**BART, num_mel_bins=4, max_source_positions=8, max_target_positions=48)
        ),
        {"input_features": torch.randn(B, 4, 16, generator=torch.Generator().manual_seed(6)), "labels": LABELS},
    ),
    "LLaVA, an image": (
        llava,
        {
            "input_ids": torch.cat([torch.full((B, 5), 5), TOKENS[:, 5:]], 1),
            "labels": LABELS,
            "pixel_values": torch.randn(B, 3, 4, 4, generator=torch.Generator().manual_seed(7)),
        },
    ),
}  # fmt: skip


def make(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name][0]().train()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
        if "bias" in name:
            model.final_logits_bias.copy_(torch.linspace(-2.0, 2.0, V)[None])
    return model


def train(model: Any, name: str) -> tuple[Any, dict[str, torch.Tensor], int]:
    with Largest() as largest:
        out = model(**MODELS[name][1])
        out["loss"].backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, largest.bytes // 4


@pytest.mark.filterwarnings("error:fuse_loss")
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_without_the_logits(name: str) -> None:
    theirs = train(make(name), name)
    ours = train(fuse_loss(make(name), chunk_size=4), name)
    same(ours, theirs)
    assert theirs[2] >= B * L * V, "the count must see the logits of the model's own loss"
    assert ours[0].get("logits") is None
    assert ours[2] < B * L * V / 2, "half an (N, V) array"


@pytest.mark.parametrize("name", ["BART, added bias", "Marian, added bias"])
def test_the_check_sees_the_added_bias(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = train(make(name), name)
    steps(add=lambda recipe, z, other: recipe)(monkeypatch)
    with pytest.raises(AssertionError):
        same(train(fuse_loss(make(name)), name), theirs)
