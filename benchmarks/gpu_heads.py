"""The linear head on a device: ours beside what everyone writes, Liger-Kernel and Cut Cross-Entropy, and bare matmuls.

Of a sweep over chunk sizes come the times that the default is set from.
"""

from __future__ import annotations

import importlib
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

import torch_ops
from benchmarks import torch_heads
from benchmarks.check import WrongAnswer
from benchmarks.gpu_clock import DeviceCall, take_turns, workspace_bytes
from benchmarks.gpu_lines import MATMULS, OURS, WRONG, DeviceLine, lines
from benchmarks.gpu_rows import Settings
from benchmarks.heads import BLOCK, HEAD_OPS, HeadCase
from benchmarks.torch_heads import Inputs, Loss, gradients

OP = "linear_cross_entropy"
# Llama-3's head, Gemma-2 2B's, Qwen3.5's, and Llama-3's with more rows than a chunk has.
SHAPES = ((8192, 4096, 128256), (8192, 2304, 256000), (16384, 2048, 248320), (32768, 4096, 128256))
CASES = (*(HeadCase(shape, "bfloat16") for shape in SHAPES), HeadCase((2048, 1024, 32000), "float32"))
# Rows (fast) and classes (lean) at a time; more than there are is left out, all there are is taken.
SWEEP = {"fast": (512, 1024, 2048, 4096, 8192, 16384, 32768), "lean": (2048, 4096, 8192, 16384, 32768, 128256)}
SWEPT = SHAPES[:1]
SAMPLES = 64
SAMPLED = f"ours, grad_samples={SAMPLES}"
LINEAR_MATMULS = {"fast": 3, "lean": 4}


class OnDevice(Inputs):
    """One case's tensors on a device, its bare matmuls, and the truth its answers are judged by."""

    def __init__(self, case: HeadCase, device: str) -> None:
        super().__init__(case)
        self.input = self.input.detach().to(device).requires_grad_()
        self.linear_weight = self.linear_weight.detach().to(device).requires_grad_()
        self.target = self.target.to(device)

    def call(self, loss: Loss) -> DeviceCall:
        """The loss and its gradients."""
        return partial(gradients, loss, self)

    def limit(self) -> DeviceCall:
        """The yardstick: logits, dX and dW by bare matmuls into memory that was there before."""
        run = torch_heads.limit(self)
        return lambda: run() or ()

    def check(self, call: DeviceCall, *, ours: bool) -> None:
        """Raise WrongAnswer unless loss and gradients are the truth's: benchmarks.check, where the answers are.

        A gigabyte on its way to the host, and there in float32, would take longer than all that is timed.
        """
        for name, given in zip(HEAD_OPS[OP].answers, call(), strict=True):
            answer = given.detach()
            if answer.shape != self.case.due(name):
                raise WrongAnswer(f"an answer of shape {tuple(answer.shape)} where {self.case.due(name)} is due")
            found = answer[self._judged] if name == "d_linear_weight" else answer.reshape(-1, *answer.shape[1:])
            self._compare(name, found, *self._judges[name, ours])

    def _compare(self, name: str, found: Tensor, truth: Tensor, allowed: Tensor) -> None:
        for first, block in zip(range(0, len(found), BLOCK), found.split(BLOCK), strict=True):
            lines = torch.arange(first, first + len(block), device=block.device) % len(truth)
            # Not `any(off > allowed)`: a NaN is greater than nothing.
            good = (block.double() - truth[lines]).abs() <= allowed[lines]
            if not bool(good.all()):
                at = [int(i) for i in (~good).nonzero()[0]]
                where = [self.case.place(name, first + at[0]), *at[1:]]
                due = float(truth[lines][tuple(at)])
                raise WrongAnswer(f"{name}{where} is {float(block[tuple(at)]):.9g}, in truth {due:.9g}")

    def check_sampled(self, call: DeviceCall) -> None:
        """Raise WrongAnswer unless the loss is the truth's and the gradients are what K points a row can tell.

        A row of dX is off by the points' noise, about 1 / sqrt(K) of it; the rows of dW sum to 0, as those of the
        exact one do, since each row's dz does.
        """
        loss, dx, dw = (answer.detach() for answer in call())
        self._compare("loss", loss.reshape(1), *self._judges["loss", True])
        truth = self._judges["d_input", True][0]
        truth = truth[torch.arange(len(dx), device=dx.device) % len(truth)]
        off = float((dx.double() - truth).norm() / truth.norm())
        if not off < 4 / SAMPLES**0.5:
            raise WrongAnswer(f"d_input is off by {off:.3g} of its size")
        size = sum(float(block.double().abs().sum()) for block in dw.split(BLOCK))
        left = float(torch.stack([block.double().sum(0) for block in dw.split(BLOCK)]).sum(0).abs().sum())
        if not left < 1e-2 * size:
            raise WrongAnswer(f"d_linear_weight's rows sum to {left:.3g} where their entries do to {size:.3g}")

    @cached_property
    def _judged(self) -> Tensor:
        return torch.from_numpy(self.case.judged).to(self.target.device)

    @cached_property
    def _judges(self) -> dict[tuple[str, bool], tuple[Tensor, Tensor]]:
        """(answer, whether ours): what it is in truth, and how far off it may be."""
        found = {}
        for name, ours in product(HEAD_OPS[OP].answers, (True, False)):
            value, scale = self.case.truth(name)
            # Matmuls in float32 are the device's for everybody, and its sums of 32000 terms are long ones.
            strict = ours and self.case.dtype != "float32"
            both = (np.atleast_1d(value), np.atleast_1d(self.case.allowed(scale, ours=strict)))
            found[name, ours] = tuple(torch.from_numpy(v).to(self.target.device) for v in both)
        return found


def measure(about: dict[str, str], settings: Settings, case: HeadCase, on: OnDevice) -> list[DeviceLine]:
    """One case's lines: every call judged, timed in turns, its memory counted."""
    calls, remarks = judged(on, {name: on.call(loss) for name, loss in ours(case.rows).items()})
    remarks |= missing()
    torch._dynamo.reset()
    for name, loss in rivals(case, settings.backend).items():
        call = on.call(loss)
        why, ran = judgement(on, call)
        if why:
            remarks[name] = why
        if ran:
            calls[name] = call
        else:
            torch.cuda.empty_cache()
    memory = {name: workspace_bytes(call, settings.device) for name, call in calls.items()}
    calls[MATMULS] = on.limit()
    times = take_turns(calls, settings.device, seconds=settings.seconds)
    work = {name: (4 if "lean" in name else 1 if name == SAMPLED else 3) / 3 for name in calls}
    chunks = {name: case.rows for name in calls if "one chunk" in name}
    cell = about | {"part": "heads", "op": OP, "dtype": case.dtype, "shape": str(case)}
    return lines(cell, times, ours=OURS, limit=MATMULS, work=work, chunks=chunks, memory=memory, remarks=remarks)


def sweep(about: dict[str, str], settings: Settings, case: HeadCase, on: OnDevice) -> list[DeviceLine]:
    """Time and memory against chunk_size in both memory modes, the default among them."""
    calls, chunks, work = {}, {}, {MATMULS: 1.0}
    head: Any = torch_ops.linear_cross_entropy
    for mode, sizes in SWEEP.items():
        most = case.rows if mode == "fast" else case.classes
        for size in (None, *sorted({min(size, most) for size in sizes})):
            name = f"{mode}, {size or 'default'}"
            calls[name] = on.call(partial(head, memory=mode, chunk_size=size))
            chunks[name], work[name] = size, LINEAR_MATMULS[mode] / 3
    calls, remarks = judged(on, calls)
    memory = {name: workspace_bytes(call, settings.device) for name, call in calls.items()}
    calls[MATMULS] = on.limit()
    times = take_turns(calls, settings.device, seconds=settings.seconds)
    cell = about | {"part": "chunks", "op": OP, "dtype": case.dtype, "shape": str(case)}
    return lines(
        cell, times, ours="fast, default", limit=MATMULS, work=work, chunks=chunks, memory=memory, remarks=remarks
    )


def judged(on: OnDevice, calls: dict[str, DeviceCall]) -> tuple[dict[str, DeviceCall], dict[str, str]]:
    """(our calls that fit the device and are right, why others do not or are not)."""
    fit, remarks = {}, {}
    for name, call in calls.items():
        try:
            if name == SAMPLED:
                on.check_sampled(call)
            else:
                on.check(call, ours=True)
            fit[name] = call
        except WrongAnswer as error:
            remarks[name] = f"{WRONG}: {error}"
        except torch.OutOfMemoryError as error:
            remarks[name] = _first_line(error)
            torch.cuda.empty_cache()
    return fit, remarks


def ours(rows: int) -> dict[str, Loss]:
    """Ours, with the default chunk, all rows in one, lean, and with a sampled gradient."""
    head = torch_ops.linear_cross_entropy
    return {
        OURS: head,
        "ours, one chunk": partial(head, chunk_size=rows),
        "ours, lean": partial(head, memory="lean"),
        SAMPLED: partial(head, grad_samples=SAMPLES),
    }


def rivals(case: HeadCase, backend: str) -> dict[str, Loss]:
    """What else there is here, by name."""
    found = {name: loss for name, loss in torch_heads.rivals(case).items() if not name.startswith(OURS)}
    found["F.linear + F.cross_entropy, compiled"] = torch.compile(torch_heads.built_in, backend=backend)
    for name, (module, function, options) in LIBRARIES.items():
        if not _why_not(module):
            found[name] = partial(getattr(importlib.import_module(module), function), **options)
    return found


# Losses by their own kernels, of (input, linear_weight, target).
LIBRARIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Liger-Kernel": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", {}),
    "Cut Cross-Entropy": ("cut_cross_entropy", "linear_cross_entropy", {}),
    "Cut Cross-Entropy, nothing left out": ("cut_cross_entropy", "linear_cross_entropy", {"filter_eps": None}),
}


def missing() -> dict[str, str]:
    """Rivals that are not here, and why."""
    found = {name: why for name, (module, *_) in LIBRARIES.items() if (why := _why_not(module))}
    why = torch_heads.skipped()
    return found | ({"F.linear_cross_entropy": why} if why else {})


def judgement(on: OnDevice, call: DeviceCall) -> tuple[str, bool]:
    """(what is to be said of a rival, whether it ran). One that answers wrongly is timed, with a remark.

    Cut Cross-Entropy leaves out gradients below its type's roundoff, by design.
    """
    try:
        on.check(call, ours=False)
    except WrongAnswer as error:
        return f"its answer is wrong: {error}", True
    except Exception as error:  # a rival may fail in any way: out of memory, a type it does not take, its compiler
        return _first_line(error), False
    return "", True


def _why_not(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # not installed, or not for this Triton or this machine
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
