"""Log-probabilities renormalised on the classes that a sampler kept, without the logits of the others.

    python -m examples.recipes_torch.kept_set

A token sampled among the top k or the top p of a row was drawn from what was kept there. Its ratio of importance is of
log-probabilities renormalised on that set: `log_softmax` of `linear_at`. Rows with fewer classes are filled with -100,
which `linear_at` makes -inf.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from examples.beside import beside

ROWS, WIDTH, VOCAB, K, TEMPERATURE = 48, 24, 500, 16, 0.8


def sampled(hidden: Tensor, head: Tensor, kept: Tensor, tokens: Tensor) -> Tensor:
    """log p of each token among the classes kept (rows, K)."""
    log_p = torch_ops.log_softmax(torch_ops.linear_at(hidden, head, kept) / TEMPERATURE, -1)
    place = (kept == tokens.unsqueeze(-1)).int().argmax(-1, keepdim=True)
    return log_p.gather(-1, place).squeeze(-1)


def plain_sampled(hidden: Tensor, head: Tensor, kept: Tensor, tokens: Tensor) -> Tensor:
    """The same by all logits, those not kept at -inf."""
    logits = hidden @ head.T / TEMPERATURE
    named = torch.zeros_like(logits).scatter_add_(-1, kept.clamp(min=0), (kept != -100).float()) > 0
    log_p = F.log_softmax(logits.masked_fill(~named, -torch.inf), -1)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def loss_of(log_p: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """The policy gradient's surrogate."""
    return -((log_p - old).exp() * advantage).mean()


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    head = torch.randn(VOCAB, WIDTH).mul_(WIDTH**-0.5).requires_grad_()
    advantage = torch.rand(ROWS)
    with torch.no_grad():  # the sampler's step: its own weights, top k and top p
        logits = (hidden + 0.1 * torch.randn_like(hidden)) @ head.T / TEMPERATURE
        p, kept = torch.softmax(logits, -1).topk(K)
        kept = kept.masked_fill(p.cumsum(-1) - p > 0.5, -100)
        draws = torch.multinomial(p.masked_fill(kept == -100, 0.0), 1)
        tokens = kept.gather(-1, draws).squeeze(-1)
        old = plain_sampled(hidden, head, kept, tokens) + 0.1 * torch.randn(ROWS)
    found = []
    for way in (sampled, plain_sampled):
        loss = loss_of(way(hidden, head, kept, tokens), old, advantage)
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    beside("a kept set", *found)


if __name__ == "__main__":
    main()
