"""CLIP's contrastive loss in PyTorch: the other side's embeddings are the head, and the temperature is learned.

    python -m examples.recipes_torch.contrastive

`logit_scale` may be an array with a gradient, here one number. The (N, N) similarities exist by the chunk, once for
each direction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from examples.beside import beside

ROWS, WIDTH = 64, 24


def loss_of(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """The mean of both directions' losses; the i-th image and the i-th text belong together."""
    pairs, scale = torch.arange(len(images)), log_scale.exp()
    of_images = torch_ops.linear_cross_entropy(images, texts, pairs, logit_scale=scale)
    of_texts = torch_ops.linear_cross_entropy(texts, images, pairs, logit_scale=scale)
    return 0.5 * (of_images + of_texts)


def plain(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """The same by all similarities."""
    pairs, logits = torch.arange(len(images)), log_scale.exp() * images @ texts.T
    return 0.5 * (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs))


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(ROWS, WIDTH, requires_grad=True)
    texts = (images.detach() + torch.randn(ROWS, WIDTH)).requires_grad_()
    log_scale = torch.tensor(2.0, requires_grad=True)
    found = []
    for way in (loss_of, plain):
        loss = way(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), log_scale)
        found.append((loss.detach(), *torch.autograd.grad(loss, (images, texts, log_scale))))
    beside("a learned temperature", *found)


if __name__ == "__main__":
    main()
