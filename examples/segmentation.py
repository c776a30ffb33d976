"""Semantic segmentation in PyTorch: a class per pixel, unlabelled pixels ignored, rare classes weighted.

    python -m examples.segmentation

The logits are (batch, classes, height, width) as a convolution leaves them: the kernels read the middle axis in memory
order, nothing is transposed. An ignored pixel reaches no result, even where its logits are not finite.
"""

import torch
import torch.nn.functional as F
from torch import nn

import torch_ops

CLASSES, SIZE, UNLABELLED = 21, 32, 255


def main() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.randint(CLASSES, (4, SIZE, SIZE))
    labels[torch.rand(labels.shape) < 0.2] = UNLABELLED
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, CLASSES, 1))
    weight = torch.rand(CLASSES) + 0.5

    logits = net(images)
    loss = torch_ops.cross_entropy(logits, labels, weight, ignore_index=UNLABELLED)
    ours = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    theirs = F.cross_entropy(logits, labels, weight, ignore_index=UNLABELLED)
    torch.testing.assert_close(loss, theirs)
    for found, expected in zip(ours, torch.autograd.grad(theirs, list(net.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    # A sensor's dead pixels are labelled as such, and need not be repaired.
    ignored = (labels == UNLABELLED)[:, None].expand_as(logits)
    broken = logits.detach().masked_fill(ignored, torch.nan).requires_grad_()
    loss = torch_ops.cross_entropy(broken, labels, weight, ignore_index=UNLABELLED)
    loss.backward()
    torch.testing.assert_close(loss, theirs)
    assert broken.grad is not None
    assert (broken.grad[ignored] == 0).all()
    assert (broken.grad[~ignored] != 0).any()
    print(f"loss {loss.item():.4f} with {ignored[:, 0].float().mean().item():.0%} of the pixels ignored and NaN")


if __name__ == "__main__":
    main()
