"""A step of group-relative policy optimisation (GRPO) in PyTorch: clipped ratios, a KL term and an entropy bonus.

    python -m examples.recipes_torch.group_policy

`stats=("logprob", "entropy")` gives both of every token, each with its gradient, at the sampling temperature. What the
sampler and the reference model gave the tokens are constants.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from examples.beside import beside

GROUP, LENGTH, WIDTH, VOCAB = 6, 12, 24, 500
TEMPERATURE, CLIP, KL, BONUS = 0.8, 0.2, 0.04, 0.01


def token_statistics(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log p, entropy) of each label one position ahead, in nats."""
    _, stats = torch_ops.linear_cross_entropy(
        hidden,
        head,
        labels,
        shift=1,
        reduction="none",
        logit_scale=1 / TEMPERATURE,
        stats=("logprob", "entropy"),
    )
    return stats["logprob"], stats["entropy"]


def plain_statistics(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same by all log-probabilities."""
    log_p, labels = F.log_softmax((hidden @ head.T)[:, :-1] / TEMPERATURE, -1), labels[:, 1:]
    each = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return tuple(x.masked_fill(labels == -100, 0.0) for x in (each, entropy))  # pyright: ignore[reportReturnType]


def loss_of(log_p: Tensor, entropy: Tensor, old: Tensor, reference: Tensor, rewards: Tensor, labels: Tensor) -> Tensor:
    """The mean over the answers' tokens; one reward an answer, relative to its group's."""
    judged = labels[:, 1:] != -100
    advantage = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).unsqueeze(-1)
    ratio = (log_p - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    divergence = torch.expm1(reference - log_p) - (reference - log_p)
    return (KL * divergence - gain - BONUS * entropy)[judged].mean()


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(GROUP, LENGTH, WIDTH, requires_grad=True)
    head = torch.randn(VOCAB, WIDTH).mul_(WIDTH**-0.5).requires_grad_()
    labels, rewards = torch.randint(VOCAB, (GROUP, LENGTH)), torch.randn(GROUP)
    labels[:, :4] = -100  # the prompt
    labels[2, -3:] = -100  # a shorter answer
    with torch.no_grad():
        old, reference = (token_statistics(hidden + 0.1 * torch.randn_like(hidden), head, labels)[0] for _ in range(2))
    found = []
    for way in (token_statistics, plain_statistics):
        log_p, entropy = way(hidden, head, labels)
        loss = loss_of(log_p, entropy, old, reference, rewards, labels)
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    beside("GRPO", *found)


if __name__ == "__main__":
    main()
