"""The ops on a GPU beside the built-ins, eager and compiled, and beside a copy: benchmarks/results/<device>.csv.

    python -m benchmarks.gpu [--seconds 0.1] [--dtypes bfloat16 float32] [--classes 1024 4096 ...]

Times are medians by device events over inputs that together outgrow the cache. `share` is the bytes that must move by
the time they took, of what a copy of the logits moved: 1 is the speed of memory. Each answer is checked first.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import torch_ops

CLASSES = (1024, 4096, 16384, 32000, 65536, 128256, 262144)
ENTRIES = 1 << 28  # of the logits of a call
FIELDS: list[str] = ["device", "torch", "dtype", "rows", "classes", "op", "milliseconds", "share", "eager", "compiled"]
Call = Callable[[torch.Tensor], torch.Tensor]


def calls(t: torch.Tensor) -> dict[str, tuple[Call, Call, bool, float]]:
    """op: (ours, the built-in, whether backwards too, how often the logits' bytes must move)."""
    softmaxes = (lambda x: torch_ops.softmax(x), lambda x: torch.softmax(x, -1))
    log_softmaxes = (lambda x: torch_ops.log_softmax(x), lambda x: torch.log_softmax(x, -1))
    losses = (lambda x: torch_ops.cross_entropy(x, t), lambda x: F.cross_entropy(x, t))
    return {
        "softmax": (*softmaxes, False, 2),
        "log_softmax": (*log_softmaxes, False, 2),
        "cross_entropy": (*losses, False, 1),
        "softmax + backward": (*softmaxes, True, 5),
        "cross_entropy + backward": (*losses, True, 3),
    }


def whole(op: Call, backward: bool, up: torch.Tensor) -> Call:
    """The call that is timed."""
    if not backward:
        return lambda x: op(x.detach())

    def call(x: torch.Tensor) -> torch.Tensor:
        y = op(x)
        return torch.autograd.grad(y, x, up if y.dim() else None)[0]

    return call


def milliseconds(call: Call, inputs: list[torch.Tensor], seconds: float) -> float:
    """Median of one call, the inputs taking turns."""
    for x in inputs:
        call(x)
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or time.perf_counter() < end:
        pairs = []
        for x in inputs * 4:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call(x)
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        times += [start.elapsed_time(stop) for start, stop in pairs]
    return statistics.median(times)


def check(name: str, ours: Call, theirs: Call, x: torch.Tensor, t: torch.Tensor) -> None:
    """Refuse to time a wrong answer: against the built-in in float64 on a few rows (losses: their own type)."""
    found = ours(x).detach()
    assert torch.isfinite(found).all(), name
    if found.dim() == 0:
        torch.testing.assert_close(
            found.float(), theirs(x.detach().float().requires_grad_()).float(), rtol=1e-5, atol=0
        )
    elif name == "cross_entropy + backward":
        few = x[:4].detach().double().requires_grad_()
        loss = F.cross_entropy(few, t[:4], reduction="sum") / len(x)
        truth = torch.autograd.grad(loss, few)[0]
        torch.testing.assert_close(found[:4].double(), truth, rtol=8e-3, atol=1e-3 * truth.abs().max().item())
    elif name in ("softmax", "log_softmax"):
        truth = getattr(torch, name)(x[:4].detach().double(), -1)
        torch.testing.assert_close(found[:4].double(), truth, rtol=8e-3, atol=1e-9)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--classes", nargs="+", type=int, default=CLASSES)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA or ROCm device: nothing to measure")
    device = torch.cuda.get_device_name()
    file = Path(__file__).parent / "results" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.csv"
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, FIELDS)
        writer.writeheader()
        for dtype in options.dtypes:
            for classes in options.classes:
                rows = ENTRIES // classes
                kind = getattr(torch, dtype)
                inputs = [torch.randn(rows, classes, device="cuda", dtype=kind).mul_(3).requires_grad_() for _ in "ab"]
                t = torch.randint(classes, (rows,), device="cuda")
                old = torch.empty_like(inputs[0])
                copy = milliseconds(lambda x, old=old: old.copy_(x.detach()), inputs, options.seconds)
                up = torch.randn_like(inputs[0])
                for name, (ours, theirs, backward, moved) in calls(t).items():
                    torch._dynamo.reset()
                    ran = [whole(op, backward, up) for op in (ours, theirs, torch.compile(theirs))]
                    check(name, ran[0], ran[1], inputs[0], t)
                    mine, *rivals = [milliseconds(call, inputs, options.seconds) for call in ran]
                    line = {
                        "device": device,
                        "torch": torch.__version__,
                        "dtype": dtype,
                        "rows": rows,
                        "classes": classes,
                        "op": name,
                        "milliseconds": f"{mine:.4f}",
                        "share": f"{copy * moved / 2 / mine:.3f}",
                        "eager": f"{rivals[0] / mine:.3f}",
                        "compiled": f"{rivals[1] / mine:.3f}",
                    }
                    writer.writerow(line)
                    out.flush()
                    print(*(line[k] for k in FIELDS[2:]), sep="\t", flush=True)


if __name__ == "__main__":
    main()
