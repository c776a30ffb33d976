"""Tiny models whose forward does what a test says with the hidden states, trained as they are and fused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

tf = pytest.importorskip("transformers")

from torch_ops.integrations.transformers import fuse_loss  # noqa: E402

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
