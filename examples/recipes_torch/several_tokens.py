"""Multi-token prediction in PyTorch: states of several depths, one head, the k-th judged k positions ahead.

    python -m examples.recipes_torch.several_tokens

`shift=k` compares position i with the token k further on, so no depth slices its hidden states or its labels, and
each has one chunk of logits at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from examples.beside import beside

BATCH, LENGTH, WIDTH, VOCAB, DEPTHS, DECAY = 2, 16, 24, 500, 3, 0.5


def loss_of(hidden: list[Tensor], head: Tensor, tokens: Tensor) -> Tensor:
    """The depths' mean losses, each weighing less than the one before."""
    losses = [torch_ops.linear_cross_entropy(h, head, tokens, shift=k) for k, h in enumerate(hidden, 1)]
    return torch.stack([DECAY**k * loss for k, loss in enumerate(losses)]).sum()


def plain(hidden: list[Tensor], head: Tensor, tokens: Tensor) -> Tensor:
    """The same by every depth's logits."""
    losses = [
        F.cross_entropy((h @ head.T)[:, :-k].flatten(0, 1), tokens[:, k:].flatten()) for k, h in enumerate(hidden, 1)
    ]
    return torch.stack([DECAY**k * loss for k, loss in enumerate(losses)]).sum()


def main() -> None:
    torch.manual_seed(0)
    hidden = [torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True) for _ in range(DEPTHS)]
    head = torch.randn(VOCAB, WIDTH).mul_(WIDTH**-0.5).requires_grad_()
    tokens = torch.randint(VOCAB, (BATCH, LENGTH))
    tokens[1, -4:] = -100  # padding
    found = []
    for way in (loss_of, plain):
        loss = way(hidden, head, tokens)
        found.append((loss.detach(), *torch.autograd.grad(loss, (*hidden, head))))
    beside("several tokens", *found)


if __name__ == "__main__":
    main()
