"""The language model in PyTorch."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_ops
from examples.recipe import CHUNKS, SAMPLES, Recipe, Weights


def _built_in(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch_ops.cross_entropy(F.linear(hidden, weight), target)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch_ops.linear_cross_entropy(hidden, weight, target, chunk_size=-(-len(target) // CHUNKS))


def _sampled(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    rows = -(-len(target) // CHUNKS)
    return torch_ops.linear_cross_entropy(hidden, weight, target, chunk_size=rows, grad_samples=SAMPLES)


# Head and loss: the last hidden states (N, D), the head's weight (V, D) and the targets (N,) to nats.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "built-in": _built_in,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    f"grad_samples={SAMPLES}": _sampled,
}


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
        """(batch, length) token ids to (batch, length, D), what the head sees."""
        x = F.embedding(tokens, self.embedding) + self.position
        q, k, v = F.linear(_norm(x), self.qkv).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).flatten(-2), self.out)
        x = x + F.linear(F.gelu(F.linear(_norm(x), self.up)), self.down)
        return _norm(x)


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Training:
    """A model, its optimizer and its loss."""

    def __init__(self, recipe: Recipe, loss: str):
        torch.manual_seed(recipe.seed)  # of the sampled gradient's points
        self.loss = LOSSES[loss]
        self.model = LM(recipe.initial_weights(), recipe.heads)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum)

    def step(self, windows: np.ndarray) -> float:
        """Trains on one batch; returns its loss in nats once that is done."""
        batch = torch.from_numpy(windows).long()
        self.optimizer.zero_grad()
        hidden = self.model(batch[:, :-1]).flatten(0, 1)
        value = self.loss(hidden, self.model.embedding, batch[:, 1:].flatten())
        value.backward()
        self.optimizer.step()
        return value.item()

    def weights(self) -> Weights:
        """The weights as they are now."""
        return {name: weight.detach().numpy() for name, weight in self.model.named_parameters()}
