"""Small transformers models, and what is compared of two trainings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

tf = pytest.importorskip("transformers")

from tests.storages import Largest  # noqa: E402

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


def train(model: Any, **options: Any) -> tuple[Any, dict[str, Tensor], int]:
    """(what a call with labels returns, the gradients by name, the largest array in elements)."""
    model.zero_grad()
    torch.manual_seed(2)  # for dropout in adapters
    with Largest() as largest:
        out = model(input_ids=TOKENS, labels=LABELS, **options)
        out["loss"].backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, largest.bytes // 4


def same(ours: tuple[Any, dict[str, Tensor], int], theirs: tuple[Any, dict[str, Tensor], int]) -> None:
    """To float32's rounding; a gradient that is rounding alone (a bias that softmax cancels) by the largest one."""
    torch.testing.assert_close(ours[0]["loss"], theirs[0]["loss"], rtol=2e-6, atol=0.0)
    assert ours[1].keys() == theirs[1].keys()
    top = max(float(g.abs().max()) for g in theirs[1].values())
    for name, g in theirs[1].items():
        bound = 2e-5 * float(g.abs().max()) + 1e-6 * top
        assert float((ours[1][name] - g).abs().max()) <= bound, name
