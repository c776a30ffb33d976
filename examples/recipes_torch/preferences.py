"""A step of direct preference optimisation (DPO) in PyTorch: log-probabilities of whole answers from the fused head.

    python -m examples.recipes_torch.preferences

Labels of the prompt and of padding are -100: their log-probability is 0 in `stats`, so an answer's is the sum over its
row. The reference model's are constants.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from examples.beside import beside

PAIRS, LENGTH, WIDTH, VOCAB, BETA = 3, 12, 24, 500, 0.1


def answers(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """log p of each sequence's labels, one position ahead."""
    _, stats = torch_ops.linear_cross_entropy(hidden, head, labels, shift=1, reduction="none", stats=("logprob",))
    return stats["logprob"].sum(-1)


def plain_answers(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The same by all log-probabilities."""
    log_p, labels = F.log_softmax((hidden @ head.T)[:, :-1], -1), labels[:, 1:]
    each = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return each.masked_fill(labels == -100, 0.0).sum(-1)


def loss_of(log_p: Tensor, reference: Tensor) -> Tensor:
    """DPO's loss of chosen answers (the first half) and rejected ones (the second)."""
    chosen, rejected = (log_p - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2 * PAIRS, LENGTH, WIDTH, requires_grad=True)
    head = torch.randn(VOCAB, WIDTH).mul_(WIDTH**-0.5).requires_grad_()
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH))
    labels[:, :4] = -100  # the prompt
    labels[1, -3:] = -100  # a shorter answer
    with torch.no_grad():
        reference = answers(hidden + 0.3 * torch.randn_like(hidden), head, labels)
    found = []
    for way in (answers, plain_answers):
        loss = loss_of(way(hidden, head, labels), reference)
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    beside("DPO", *found)


if __name__ == "__main__":
    main()
