"""Policy-gradient fine-tuning in PyTorch: per-token log-probabilities and entropy from the fused head.

    python -m examples.policy_gradient

`stats=("logprob", "entropy")` gives both per token, differentiable, without the (N, V) logits: here a clipped
objective (PPO, GRPO) with an entropy bonus. The temperature of sampling goes into `logit_scale`.
"""

import torch
from torch import Tensor

import torch_ops

TOKENS, WIDTH, VOCAB = 64, 32, 1000
TEMPERATURE, CLIP, BONUS = 0.7, 0.2, 0.01


def token_statistics(hidden: Tensor, head: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log p(action) and the policy's entropy in nats, one of each per token."""
    _, stats = torch_ops.linear_cross_entropy(
        hidden,
        head,
        actions,
        reduction="none",
        logit_scale=1 / TEMPERATURE,
        stats=("logprob", "entropy"),
    )
    return stats["logprob"], stats["entropy"]


def objective(logprob: Tensor, entropy: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """What is minimised: the clipped surrogate, less the entropy's bonus."""
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -(torch.minimum(ratio * advantage, clipped * advantage) + BONUS * entropy).mean()


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    head = torch.randn(VOCAB, WIDTH).mul_(WIDTH**-0.5).requires_grad_()
    actions, advantage = torch.randint(VOCAB, (TOKENS,)), torch.randn(TOKENS)
    with torch.no_grad():
        old, _ = token_statistics(hidden + 0.1 * torch.randn_like(hidden), head, actions)

    loss = objective(*token_statistics(hidden, head, actions), old, advantage)
    ours = torch.autograd.grad(loss, (hidden, head))

    # The same by all log-probabilities, which is what it replaces.
    log_p = torch.log_softmax(hidden @ head.T / TEMPERATURE, -1)
    logprob, entropy = log_p.gather(-1, actions[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    theirs = objective(logprob, entropy, old, advantage)
    torch.testing.assert_close(loss, theirs)
    for found, expected in zip(ours, torch.autograd.grad(theirs, (hidden, head)), strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    print(f"objective {loss.item():.6f}, mean entropy {entropy.mean().item():.3f} nats: as by log_softmax")


if __name__ == "__main__":
    main()
