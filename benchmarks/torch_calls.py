"""PyTorch's calls by op: ours, and each rival's."""

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
from torch_ops import _native as native

VERSION = f"torch {torch.__version__}"
DTYPES = ("float32", "float64", "bfloat16", "float16")
INDEX_BYTES = 8


class Inputs:
    """One case's tensors."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, getattr(torch, case.dtype)
        self.logits = torch.from_numpy(case.logits()).to(self.dtype)
        self.target = torch.from_numpy(case.target())

    @cached_property
    def leaf(self) -> Tensor:
        """Logits as a parameter is: their gradient goes to memory of its own."""
        return self.logits.clone().requires_grad_()

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


def _forward(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], on: Inputs) -> dict[str, Call]:
    return {"ours": Call(lambda: (ours(on.logits, 1),)), "torch": Call(lambda: (theirs(on.logits, 1),))}


def _backward(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], on: Inputs) -> dict[str, Call]:
    """The backward alone, through autograd, of a forward that has been."""

    def call(y: Tensor) -> Call:
        return Call(lambda: torch.autograd.grad(y, on.leaf, on.upstream, retain_graph=True))

    return {"ours": call(ours(on.leaf, 1)), "torch": call(theirs(on.leaf, 1))}


def _cross_entropy(on: Inputs) -> dict[str, Call]:
    return {
        "ours": Call(lambda: (torch_ops.cross_entropy(on.logits, on.target),)),
        "torch": Call(lambda: (F.cross_entropy(on.logits, on.target),)),
    }


def _gradient(loss: Callable[..., Tensor], on: Inputs, logits: Tensor) -> tuple[Tensor, ...]:
    value = loss(logits, on.target)
    return value, *torch.autograd.grad(value, logits)


def _cross_entropy_grad(on: Inputs) -> dict[str, Call]:
    return {
        "ours": Call(lambda: _gradient(torch_ops.cross_entropy, on, on.leaf)),
        "torch": Call(lambda: _gradient(F.cross_entropy, on, on.leaf)),
    }


def _cross_entropy_grad_inplace(on: Inputs) -> dict[str, Call]:
    """Both on logits just computed, as a linear layer hands them on: not a leaf, pages in place, used once."""
    inplace = partial(torch_ops.cross_entropy, inplace_backward=True)
    return {
        "ours": Call(partial(_gradient, inplace, on), fresh=lambda: on.leaf.clone()),
        "torch": Call(partial(_gradient, F.cross_entropy, on), fresh=lambda: on.leaf.clone()),
    }


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


CALLS: dict[str, Callable[[Any], dict[str, Call]]] = {
    "softmax": partial(_forward, torch_ops.softmax, torch.softmax),
    "softmax_bwd": partial(_backward, torch_ops.softmax, torch.softmax),
    "log_softmax": partial(_forward, torch_ops.log_softmax, torch.log_softmax),
    "log_softmax_bwd": partial(_backward, torch_ops.log_softmax, torch.log_softmax),
    "cross_entropy": _cross_entropy,
    "cross_entropy_grad": _cross_entropy_grad,
    "cross_entropy_grad_inplace": _cross_entropy_grad_inplace,
    **({} if native.missing else {"cross_entropy_one_visit": _cross_entropy_one_visit}),
}
