"""The language model in PyTorch."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_ops
from examples.recipe import Recipe, Weights

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {"built-in": F.cross_entropy, "ours": torch_ops.cross_entropy}


class LM(nn.Module):
    """Embedding, causal attention, MLP, and the embedding again as the head."""

    def __init__(self, weights: Weights, heads: int):
        super().__init__()
        self.heads = heads
        self.embedding, self.position, self.qkv, self.out, self.up, self.down = (
            nn.Parameter(torch.from_numpy(weights[name]))
            for name in ("embedding", "position", "qkv", "out", "up", "down")
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) token ids to (batch, length, V) logits of the next ones."""
        x = F.embedding(tokens, self.embedding) + self.position
        q, k, v = F.linear(_norm(x), self.qkv).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).flatten(-2), self.out)
        x = x + F.linear(F.gelu(F.linear(_norm(x), self.up)), self.down)
        return F.linear(_norm(x), self.embedding)


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def train(recipe: Recipe, tokens: np.ndarray, loss: str) -> Iterator[float]:
    """Trains; yields the loss in nats of each step once that step is done."""
    cross_entropy = LOSSES[loss]
    model = LM(recipe.initial_weights(), recipe.heads)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum)
    for windows in recipe.batches(tokens):
        batch = torch.from_numpy(windows).long()
        optimizer.zero_grad()
        logits = model(batch[:, :-1]).flatten(0, 1)
        value = cross_entropy(logits, batch[:, 1:].flatten())
        del logits  # autograd keeps what the loss's backward needs, and no more
        value.backward()
        optimizer.step()
        yield value.item()
