"""Distillation from what a teacher's server sends: log-probabilities of K classes a token, and none of the others.

    python -m examples.recipes_torch.teacher_classes

A pair (ids, probabilities), K last, is a target. Slots of padding have the id -100 and count nothing, whatever stands
beside them; a token of such slots alone is no row. `tail` puts what the teacher gave to all other classes into one
bucket: its own share of the student's probability comes from `stats=("logprob",)`, log p at the K ids.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from examples.beside import beside

ROWS, WIDTH, VOCAB, K = 48, 24, 500, 8


def sparse(hidden: Tensor, head: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """Cross-entropy with the teacher's K classes."""
    return torch_ops.linear_cross_entropy(hidden, head, (ids, log_q.exp()))


def tail(hidden: Tensor, head: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """The divergence KL(teacher, student) of K classes and a bucket of all others."""
    pair = (ids, log_q.exp())
    _, stats = torch_ops.linear_cross_entropy(hidden, head, pair, reduction="none", stats=("logprob",))
    return with_bucket(stats["logprob"], ids, log_q)


def with_bucket(log_p: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """The mean over the tokens of K classes' divergence and the bucket's."""
    named = ids != -100
    log_p, log_q = (x.masked_fill(~named, -torch.inf) for x in (log_p, log_q))
    q = log_q.exp()
    each = torch.where(named, q * (log_q - log_p), 0.0).sum(-1)
    log_p_other, log_q_other = (torch.log1p(-x.exp().sum(-1).clamp(max=1 - 1e-6)) for x in (log_p, log_q))
    rows = each + log_q_other.exp() * (log_q_other - log_p_other)
    return rows[named.any(-1)].mean()


def plain_sparse(hidden: Tensor, head: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """`sparse` by a dense target."""
    named = ids != -100
    q = torch.where(named, log_q.exp(), 0.0)
    dense = torch.zeros(len(hidden), VOCAB).scatter_add_(1, ids.clamp(min=0), q)[named.any(-1)]
    return F.cross_entropy((hidden @ head.T)[named.any(-1)], dense)


def plain_tail(hidden: Tensor, head: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """`tail` by all log-probabilities."""
    return with_bucket(F.log_softmax(hidden @ head.T, -1).gather(-1, ids.clamp(min=0)), ids, log_q)


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    head = torch.randn(VOCAB, WIDTH).mul_(WIDTH**-0.5).requires_grad_()
    log_q, ids = F.log_softmax(2 * torch.randn(ROWS, VOCAB), -1).topk(K)
    unsent = torch.rand(ROWS, K) < 0.2  # a top-p server sends fewer than K
    unsent[:4] = True  # padding
    ids, log_q = ids.masked_fill(unsent, -100), log_q.masked_fill(unsent, torch.nan)
    for name, ways in (("K classes", (sparse, plain_sparse)), ("K classes and a bucket", (tail, plain_tail))):
        answers = []
        for way in ways:
            loss = way(hidden, head, ids, log_q)
            answers.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
        beside(name, *answers)


if __name__ == "__main__":
    main()
