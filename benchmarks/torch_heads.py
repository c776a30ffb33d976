"""PyTorch's calls of the linear head with its loss and the gradients of input and linear_weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from benchmarks.heads import PAIR, HeadCase
from benchmarks.table import OURS_SAMPLED
from benchmarks.timing import Call
from benchmarks.torch_calls import VERSION, numpy

__all__ = [
    "CALLS",
    "DTYPES",
    "PARTS",
    "VERSION",
    "Inputs",
    "call",
    "limit",
    "numpy",
    "reading",
    "skipped",
    "workspace_bytes",
]

DTYPES = ("float32", "bfloat16")
Loss = Callable[[Tensor, Tensor, Any], Tensor]


class Inputs:
    """One case's tensors."""

    def __init__(self, case: HeadCase) -> None:
        self.case, dtype = case, getattr(torch, case.dtype)
        self.input = torch.from_numpy(case.input()).to(dtype).requires_grad_()
        self.linear_weight = torch.from_numpy(case.linear_weight()).to(dtype).requires_grad_()
        self.target = torch.from_numpy(case.target())

    @cached_property
    def teacher(self) -> tuple[Tensor, Tensor]:
        """A teacher's input and weight."""
        y, u = (torch.from_numpy(a).to(self.input.dtype) for a in self.case.teacher())
        return y, u

    @cached_property
    def sparse(self) -> tuple[Tensor, Tensor]:
        """Targets of K classes a row."""
        ids, probabilities = self.case.sparse()
        return torch.from_numpy(ids), torch.from_numpy(probabilities)


def built_in(x: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """What everyone writes."""
    return F.cross_entropy(F.linear(x, linear_weight), target)


def chunked(**options: Any) -> Loss:
    """PyTorch's own chunked head."""
    given = torch.nn.LinearCrossEntropyOptions(**options)  # pyright: ignore[reportAttributeAccessIssue]
    return lambda x, w, t: F.linear_cross_entropy(x, w, t, options=given)  # pyright: ignore[reportAttributeAccessIssue]


def skipped() -> str | None:
    """Why a rival is missing."""
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"F.linear_cross_entropy with its chunked options is not timed: {VERSION} lacks it"


def rivals(case: HeadCase) -> dict[str, Loss]:
    """Every loss by its name."""
    found: dict[str, Loss] = {
        "ours": torch_ops.linear_cross_entropy,
        "ours, lean": partial(torch_ops.linear_cross_entropy, memory="lean"),
        "F.linear + F.cross_entropy": built_in,
    }
    if skipped() is None:
        # Its own choice is very short chunks; beside it the longest that fit the workspace ours has.
        rows = max(1, 2**28 // (4 * case.classes))
        accurate = {"acc_policy": "accurate", "acc_dtype": torch.float32}
        found["F.linear_cross_entropy, auto"] = chunked()
        found["F.linear_cross_entropy, long chunks"] = chunked(batch_chunk_size=rows, **accurate)
    return found


def gradients(loss: Loss, on: Inputs, *, frozen: bool = False, target: Any = None) -> tuple[Tensor, ...]:
    """(loss, dL/dinput, dL/dlinear_weight), the last not with a frozen weight."""
    weight = on.linear_weight.detach() if frozen else on.linear_weight
    value = loss(on.input, weight, on.target if target is None else target)
    return value, *torch.autograd.grad(value, (on.input,) if frozen else (on.input, weight))


def call(loss: Loss, on: Inputs, *, target: Any = None, op: str | None = None) -> Call:
    """Loss and gradients."""
    run = partial(gradients, loss, on, target=target)
    return Call(run, workspace=lambda frozen: workspace_bytes(partial(run, frozen=frozen))[1], op=op)


def _head(on: Inputs) -> dict[str, Call]:
    calls = {name: call(loss, on) for name, loss in rivals(on.case).items()}
    sampled = partial(torch_ops.linear_cross_entropy, grad_samples=on.case.kept)
    return {**calls, OURS_SAMPLED: call(sampled, on, op="linear_cross_entropy, sampled")}


def _dense(x: Tensor, linear_weight: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    """The built-in's way to targets of K classes a row."""
    logits = F.linear(x, linear_weight)
    return F.cross_entropy(logits, torch.zeros_like(logits).scatter_(1, pair[0], pair[1].to(logits.dtype)))


def _sparse(on: Inputs) -> dict[str, Call]:
    """Beside the same head's integer targets."""
    ours, op = torch_ops.linear_cross_entropy, "linear_cross_entropy"
    found = {
        "ours": call(ours, on, target=on.sparse),
        "F.linear, dense targets": call(_dense, on, target=on.sparse),
    }
    return {**found, "integer targets": call(ours, on, op=op)}


def _at(on: Inputs) -> dict[str, Call]:
    x, w, ids = on.input.detach(), on.linear_weight.detach(), torch.from_numpy(on.case.at())
    return {
        "ours": Call(lambda: (torch_ops.linear_at(x, w, ids),)),
        "F.linear, gathered": Call(lambda: (F.linear(x, w).gather(1, ids).float(),)),
    }


def reading(on: Any) -> Call:
    """The yardstick of `linear_at`: the same rows of linear_weight read, and added up, by PyTorch's own kernel."""
    w, ids = torch.from_numpy(on.case.linear_weight()).to(getattr(torch, on.case.dtype)), torch.from_numpy(on.case.at())
    return Call(lambda: F.embedding_bag(ids, w, mode="sum"))


def workspace_bytes(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], int]:
    """(the answers, the most bytes of tensors alive at a time beyond those there were before and the answers).

    By the allocator's own record: to a dispatch mode a custom op, such as PyTorch's chunked head, is one call.
    """
    from torch._C._profiler import _EventType  # pyright: ignore[reportMissingImports]
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        answers = run()

    def walk(nodes: Any) -> Iterator[tuple[int, int, int]]:
        for node in nodes:
            if node.tag == _EventType.Allocation:
                yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size
            yield from walk(node.children)

    tree = seen.profiler.kineto_results.experimental_event_tree()  # pyright: ignore[reportOptionalMemberAccess]
    events = sorted(walk(tree), key=lambda event: event[0])
    last = {pointer: i for i, (_, pointer, _) in enumerate(events)}
    kept = {last.get(answer.untyped_storage().data_ptr()) for answer in answers}
    alive = most = 0
    for i, (_, _, size) in enumerate(events):
        alive += 0 if i in kept else size
        most = max(most, alive)
    return answers, most


def _pair(on: Inputs) -> dict[str, Call]:
    """Two heads: the loss of another target, whose gradients are of the same arguments."""

    def call_of(divergence: Callable[..., Tensor]) -> Call:
        return call(lambda x, w, _: divergence(x, w, *on.teacher), on)

    return {
        "ours": call_of(torch_ops.linear_divergence),
        "ours, lean": call_of(partial(torch_ops.linear_divergence, memory="lean")),
        "F.linear + F.kl_div": call_of(kl_div),
    }


def kl_div(x: Tensor, w: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """What everyone writes."""
    p, q = (F.log_softmax(F.linear(*head).float(), 1) for head in ((x, w), (y, u)))
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


def limit(on: Inputs, op: str = "linear_cross_entropy") -> Call:
    """The yardstick: the matmuls alone, into memory that was there before; a teacher's logits are one more."""
    x, w = on.input.detach(), on.linear_weight.detach()
    z, dx, dw = x.new_empty(on.case.rows, on.case.classes), torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        if op == PAIR:
            y, u = on.teacher
            torch.mm(y, u.t(), out=z)
        torch.mm(x, w.t(), out=z)
        torch.mm(z, w, out=dx)
        torch.mm(z.t(), x, out=dw)

    return Call(run)


PARTS = {"linear_cross_entropy": (call, torch_ops.linear_cross_entropy, built_in)}
CALLS: dict[str, Callable[[Any], dict[str, Call]]] = {
    "linear_cross_entropy": _head,
    "linear_cross_entropy_sparse": _sparse,
    "linear_at": _at,
    PAIR: _pair,
}
