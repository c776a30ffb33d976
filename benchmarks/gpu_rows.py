"""The row ops on a device beside the built-ins, eager and compiled, and beside a copy of the logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from benchmarks.check import WrongAnswer
from benchmarks.gpu_clock import DeviceCall, take_turns, wait, workspace_bytes
from benchmarks.gpu_lines import COPY, OURS, WRONG, DeviceLine, lines

DTYPES = ("bfloat16", "float32")
# (rows, classes) of calls whose two arrays of logits outgrow any cache: those told first, and the sweep over classes.
TOLD = ((8192, 32000), (4096, 128256))
SWEPT = ((262144, 1024), (65536, 4096), (16384, 16384), (4096, 65536), (1024, 262144))
CASES = (
    *((shape, "bfloat16") for shape in TOLD),
    (TOLD[0], "float32"),
    *((shape, "bfloat16") for shape in SWEPT),
    *((shape, "float32") for shape in SWEPT),
)
FEW = 4  # rows that are judged entry by entry
# An entry may be off by this of its scale.
NEAR = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
_Op = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What the command line says about every part."""

    device: str
    seconds: float  # of a cell's rounds
    backend: str  # of torch.compile


def measure(
    about: dict[str, str], settings: Settings, shape: tuple[int, int], dtype: str
) -> Iterator[list[DeviceLine]]:
    """The lines of every op, one after the other."""
    (rows, v), device = shape, settings.device
    generator = torch.Generator(device).manual_seed(0)
    empty = torch.empty(rows, v, device=device, dtype=getattr(torch, dtype))
    inputs = [torch.empty_like(empty).normal_(0, 3, generator=generator).requires_grad_() for _ in "ab"]
    up = torch.empty_like(empty).normal_(generator=generator)
    target = torch.randint(v, (rows,), device=device, generator=generator)
    for name, (ours, theirs, backward, passes) in _ops(target).items():
        cell = about | {"part": "rows", "op": name, "dtype": dtype, "shape": f"{rows}x{v}"}
        try:
            check(name, _once(ours, inputs[0], up, backward), *_truth(name, inputs[0], up, target))
        except WrongAnswer as error:
            yield lines(cell, {}, ours=OURS, limit=COPY, work={}, remarks={OURS: f"{WRONG}: {error}"})
            continue
        torch._dynamo.reset()
        run = {OURS: ours, "eager": theirs, "compiled": torch.compile(theirs, backend=settings.backend)}
        calls = {k: _whole(op, backward, inputs, up) for k, op in run.items()}
        calls[COPY] = partial(_copy, itertools.cycle([x.detach() for x in inputs]), empty)
        times = take_turns(calls, device, seconds=settings.seconds, batch=4)
        memory = {k: workspace_bytes(call, device) for k, call in calls.items() if k != COPY}
        wait(device)
        work = dict.fromkeys(run, passes / 2) | {COPY: 1.0}
        yield lines(cell, times, ours=OURS, limit=COPY, work=work, memory=memory)


def _ops(t: Tensor) -> dict[str, tuple[_Op, _Op, bool, int]]:
    """op: (ours, the built-in, whether backwards too, how often the logits' bytes must move)."""
    softmaxes: tuple[_Op, _Op] = (lambda x: torch_ops.softmax(x), lambda x: torch.softmax(x, -1))
    log_softmaxes: tuple[_Op, _Op] = (lambda x: torch_ops.log_softmax(x), lambda x: torch.log_softmax(x, -1))
    losses: tuple[_Op, _Op] = (lambda x: torch_ops.cross_entropy(x, t), lambda x: F.cross_entropy(x, t))
    return {
        "cross_entropy": (*losses, False, 1),
        "cross_entropy + backward": (*losses, True, 3),
        "softmax": (*softmaxes, False, 2),
        "softmax + backward": (*softmaxes, True, 5),
        "log_softmax": (*log_softmaxes, False, 2),
    }


def _whole(op: _Op, backward: bool, inputs: list[Tensor], up: Tensor) -> DeviceCall:
    """The call that is timed, its inputs taking turns."""
    turns = itertools.cycle(inputs)
    return lambda: (_once(op, next(turns), up, backward),)


def _once(op: _Op, x: Tensor, up: Tensor, backward: bool) -> Tensor:
    if not backward:
        return op(x.detach())
    y = op(x)
    return torch.autograd.grad(y, x, up if y.dim() else None)[0]


def _copy(turns: Iterator[Tensor], to: Tensor) -> tuple[Tensor, ...]:
    to.copy_(next(turns))
    return ()


def _truth(name: str, x: Tensor, up: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(float64 answer, the scale its errors are measured by): of the first rows, or the loss of all by pieces."""
    few, dy = x[:FEW].detach().double(), up[:FEW].double()
    if name == "cross_entropy":
        pieces = zip(x.detach().split(1 << 10), target.split(1 << 10), strict=True)
        loss = sum(float(F.cross_entropy(z.double(), t, reduction="sum")) for z, t in pieces) / len(x)
        return few.new_tensor(loss), few.new_tensor(loss)
    p = torch.softmax(few, -1)
    if name == "cross_entropy + backward":
        value = (p - F.one_hot(target[:FEW], x.shape[1])) / len(x)
    elif name == "softmax + backward":
        both = (p * dy).sum(-1, keepdim=True), (p * dy.abs()).sum(-1, keepdim=True)
        return p * (dy - both[0]), p * (dy.abs() + both[1])
    else:
        value = p if name == "softmax" else torch.log_softmax(few, -1)
    return value, value.abs()


def check(name: str, found: Tensor, truth: Tensor, scale: Tensor) -> None:
    """Refuse to time a wrong answer: WrongAnswer unless all is finite and what is judged is near the truth."""
    if not bool(torch.isfinite(found).all()):
        raise WrongAnswer(f"{name}: not finite")
    near = NEAR[torch.float32 if found.dim() == 0 else found.dtype]
    off = ((found if found.dim() == 0 else found[:FEW]).double() - truth).abs()
    # Not `any(off > allowed)`: a NaN is greater than nothing.
    if off.shape != truth.shape or not bool((off <= near * scale + 1e-30).all()):
        raise WrongAnswer(f"{name}: off by {float((off / scale).max()):.3g} of its scale where {near} is allowed")
