"""Distillation from a teacher's head: the divergence of two heads whose logits are never stored.

    python -m examples.recipes_torch.teacher_head

Hinton's loss: T^2 times the forward divergence at temperature T, beside the labels' own loss. The teacher may have
another width; its logits exist by the chunk, as the student's. A token without a label (-100) counts in neither.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from examples.beside import beside

BATCH, LENGTH, WIDTH, TEACHER_WIDTH, VOCAB = 2, 16, 24, 32, 500
TEMPERATURE, SHARE = 2.0, 0.75


def loss_of(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
    """The loss of hidden states (batch, length, width), labels one position ahead."""
    divergence = torch_ops.linear_divergence(
        student,
        head,
        teacher,
        teacher_head,
        logit_scale=1 / TEMPERATURE,
        teacher_scale=1 / TEMPERATURE,
        keep=labels != -100,
        shift=1,
    )
    own = torch_ops.linear_cross_entropy(student, head, labels, shift=1)
    return SHARE * TEMPERATURE**2 * divergence + (1 - SHARE) * own


def plain(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
    """The same by both arrays of logits."""
    logits, others = ((x @ w.T)[:, :-1] for x, w in ((student, head), (teacher, teacher_head)))
    labels = labels[:, 1:]
    log_p, log_q = (F.log_softmax(z / TEMPERATURE, -1) for z in (logits, others))
    each = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    divergence = each[labels != -100].mean()
    own = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return SHARE * TEMPERATURE**2 * divergence + (1 - SHARE) * own


def main() -> None:
    torch.manual_seed(0)
    student = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    head = torch.randn(VOCAB, WIDTH).mul_(WIDTH**-0.5).requires_grad_()
    teacher, teacher_head = torch.randn(BATCH, LENGTH, TEACHER_WIDTH), torch.randn(VOCAB, TEACHER_WIDTH) / 4
    labels = torch.randint(VOCAB, (BATCH, LENGTH))
    labels[0, :5] = -100
    answers = []
    for way in (loss_of, plain):
        loss = way(student, head, teacher, teacher_head, labels)
        answers.append((loss.detach(), *torch.autograd.grad(loss, (student, head))))
    beside("a teacher's head", *answers)


if __name__ == "__main__":
    main()
