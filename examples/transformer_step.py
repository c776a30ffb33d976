"""A causal transformer's training step in PyTorch: the next token's loss straight from the hidden states.

    python -m examples.transformer_step

The head is tied to the embedding. `shift=1` judges position i by token i + 1; padding has the ignored target, so its
rows reach neither loss nor gradient. No (batch * length, vocabulary) logits are stored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_ops

VOCAB, WIDTH, LENGTH, BATCH, STEPS = 256, 32, 32, 8, 30
PADDING = -100


class LM(nn.Module):
    """One block of a causal transformer; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) token ids to (batch, length, width), what the head sees."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.norm(self.block(self.embedding(tokens) + self.position, src_mask=mask, is_causal=True))


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences that count upwards from a random token, and targets; the last quarter of every other one is padding."""
    start = torch.randint(VOCAB, (BATCH, 1), generator=generator)
    tokens = (start + torch.arange(LENGTH)) % VOCAB
    target = tokens.clone()
    target[::2, -LENGTH // 4 :] = PADDING
    return tokens, target


def main() -> None:
    torch.manual_seed(0)
    model, generator = LM(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        tokens, target = batch(generator)
        loss = torch_ops.linear_cross_entropy(model(tokens), model.embedding.weight, target, shift=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")
    assert losses[-1] < losses[0] / 2

    # The same number by logits, which is what it replaces.
    tokens, target = batch(generator)
    hidden = model(tokens)
    ours = torch_ops.linear_cross_entropy(hidden, model.embedding.weight, target, shift=1)
    logits = F.linear(hidden, model.embedding.weight)
    theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=PADDING)
    torch.testing.assert_close(ours, theirs)


if __name__ == "__main__":
    main()
