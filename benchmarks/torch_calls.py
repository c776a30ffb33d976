"""PyTorch's calls by op: ours, and the built-in's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from benchmarks.cases import Case
from benchmarks.timing import Call
from torch_ops._rows import native

VERSION = f"torch {torch.__version__}"
DTYPES = ("float32", "float64", "bfloat16", "float16")
INDEX_BYTES = 8
Function = Callable[..., Tensor]


class Inputs:
    """One case's tensors."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, getattr(torch, case.dtype)
        self.logits = torch.from_numpy(case.logits()).to(self.dtype)
        self.target = torch.from_numpy(case.target())

    @cached_property
    def sparse(self) -> tuple[Tensor, Tensor]:
        """Targets of K classes a row."""
        ids, probabilities = self.case.sparse()
        return torch.from_numpy(ids), torch.from_numpy(probabilities)

    @cached_property
    def leaf(self) -> Tensor:
        """Logits as a parameter is: their gradient goes to memory of its own."""
        return self.logits.clone().requires_grad_()

    @cached_property
    def teacher(self) -> Tensor:
        """Logits of a teacher."""
        return torch.from_numpy(self.case.teacher()).to(self.dtype)

    @cached_property
    def upstream(self) -> Tensor:
        """A gradient of the logits' shape."""
        return torch.from_numpy(self.case.upstream()).to(self.dtype)


def numpy(answer: Tensor) -> np.ndarray:
    """For `check`: NumPy has no bfloat16."""
    answer = answer.detach()
    return (answer if answer.dtype == torch.float64 else answer.float()).numpy()


def copy(on: Inputs) -> Call:
    """The yardstick: the logits copied into memory that was there before."""
    return Call(partial(torch.empty_like(on.logits).copy_, on.logits))


def _forward(softmax: Function, on: Inputs) -> Call:
    return Call(lambda: (softmax(on.logits, 1),))


def _backward(softmax: Function, on: Inputs) -> Call:
    """The backward alone, through autograd, of a forward that has been."""
    y = softmax(on.leaf, 1)
    return Call(lambda: torch.autograd.grad(y, on.leaf, on.upstream, retain_graph=True))


def _value(loss: Function, on: Inputs) -> Call:
    return Call(lambda: (loss(on.logits, on.target),))


def _gradient(loss: Function, on: Inputs) -> Call:
    return Call(lambda: _value_and_gradient(loss, on, on.leaf))


def _gradient_inplace(loss: Function, on: Inputs) -> Call:
    """Of logits just computed, as a linear layer hands them on: not a leaf, pages in place, used once."""
    return Call(partial(_value_and_gradient, loss, on), fresh=lambda: on.leaf.clone())


def _value_and_gradient(loss: Function, on: Inputs, logits: Tensor) -> tuple[Tensor, ...]:
    value = loss(logits, on.target)
    return value, *torch.autograd.grad(value, logits)


def _cross_entropy_one_visit(on: Inputs) -> dict[str, Call]:
    """The row kernel that leaves the gradient where the logits were; nothing built in does, a copy is its rival."""
    half = on.case.dtype in ("bfloat16", "float16")
    d_nll = torch.full(on.target.shape, 1 / on.case.rows, dtype=torch.float32 if half else on.dtype)

    def run(logits: Tensor) -> tuple[Tensor, Tensor]:
        nll, *_ = torch.ops.softmax_ext.cross_entropy_fwd_bwd_(
            logits, on.target, None, d_nll, None, None, None, 1, 1.0, None, False, False
        )
        return nll, logits

    return {"ours": Call(run, fresh=on.logits.clone)}


def _kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    """What everyone writes; classes stand second."""
    if student.dtype in (torch.bfloat16, torch.float16):
        student, teacher = student.float(), teacher.float()
    p, q = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    return F.kl_div(p, q, reduction="sum", log_target=True) / (student.numel() // student.shape[1])


def _of_teacher(divergence: Function, on: Inputs) -> Call:
    return Call(lambda: (divergence(on.logits, on.teacher),))


def _of_teacher_gradient(divergence: Function, on: Inputs) -> Call:
    def run() -> tuple[Tensor, ...]:
        value = divergence(on.leaf, on.teacher)
        return value, *torch.autograd.grad(value, on.leaf)

    return Call(run)


# op: what is timed of a function, ours, the built-in.
PARTS: dict[str, tuple[Callable[[Function, Any], Call], Function, Function]] = {
    "softmax": (_forward, torch_ops.softmax, torch.softmax),
    "softmax_bwd": (_backward, torch_ops.softmax, torch.softmax),
    "log_softmax": (_forward, torch_ops.log_softmax, torch.log_softmax),
    "log_softmax_bwd": (_backward, torch_ops.log_softmax, torch.log_softmax),
    "cross_entropy": (_value, torch_ops.cross_entropy, F.cross_entropy),
    "cross_entropy_grad": (_gradient, torch_ops.cross_entropy, F.cross_entropy),
    "cross_entropy_grad_inplace": (
        _gradient_inplace,
        partial(torch_ops.cross_entropy, inplace_backward=True),
        F.cross_entropy,
    ),
    "divergence": (_of_teacher, partial(torch_ops.divergence, dim=1), _kl_div),
    "divergence_grad": (_of_teacher_gradient, partial(torch_ops.divergence, dim=1), _kl_div),
}


def _dense(logits: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    """The built-in's way to such targets."""
    return F.cross_entropy(logits, torch.zeros_like(logits).scatter_(1, pair[0], pair[1].to(logits.dtype)))


def _sparse_grad(on: Inputs) -> dict[str, Call]:
    """Beside the same logits' integer targets."""

    def call(loss: Function, target: Any, op: str | None = None) -> Call:
        def run() -> tuple[Tensor, ...]:
            value = loss(on.leaf, target)
            return value, *torch.autograd.grad(value, on.leaf)

        return Call(run, op=op)

    found = {"ours": call(torch_ops.cross_entropy, on.sparse), "torch, dense targets": call(_dense, on.sparse)}
    return {**found, "integer targets": call(torch_ops.cross_entropy, on.target, "cross_entropy_grad")}


def _both(op: str, on: Inputs) -> dict[str, Call]:
    call, ours, built_in = PARTS[op]
    return {"ours": call(ours, on), "torch": call(built_in, on)}


CALLS: dict[str, Callable[[Any], dict[str, Call]]] = {
    **{op: partial(_both, op) for op in PARTS},
    "sparse_grad": _sparse_grad,
    **({} if native.missing else {"cross_entropy_one_visit": _cross_entropy_one_visit}),
}
