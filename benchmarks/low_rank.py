"""LoRA on the head: loss and the gradients of input, A and B beside a frozen weight, three ways that take turns.

    python -m benchmarks.low_rank [--shape 2048x576@49152] [--rank 16] [--results FOLDER]

`low_rank=(A, B)` beside W + BA handed over as one weight, and beside what a LoRA layer does before a loss of its
logits. Answers are compared first; workspace is the most memory of arrays beyond arguments and answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ops
from benchmarks import records
from benchmarks.heads import head_of
from benchmarks.timing import Call, take_turns
from benchmarks.torch_heads import workspace_bytes

RESULTS = Path("benchmarks", "results", "low_rank.csv")
OURS = "low_rank=(A, B)"
APART = 1e-4  # of an answer's largest entry, float32 by other orders of sums


@dataclass(frozen=True)
class LowRank:
    """One way with one size."""

    shape: str
    rank: int
    call: str
    threads: int
    rounds: int
    seconds: float  # median
    ratio: float  # median over rounds of its time by that of ours
    workspace_bytes: int


def ways() -> dict[str, Callable[..., Tensor]]:
    """The losses of (x, W, A, B, target)."""

    def apart(x: Tensor, w: Tensor, a: Tensor, b: Tensor, t: Tensor, memory: Any) -> Tensor:
        return torch_ops.linear_cross_entropy(x, w, t, low_rank=(a, b), memory=memory)

    def joined(x: Tensor, w: Tensor, a: Tensor, b: Tensor, t: Tensor, memory: Any) -> Tensor:
        return torch_ops.linear_cross_entropy(x, w + b @ a, t, memory=memory)

    def layer(x: Tensor, w: Tensor, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w) + F.linear(F.linear(x, a), b), t)

    return {
        OURS: partial(apart, memory="fast"),
        f"{OURS}, lean": partial(apart, memory="lean"),
        "W + BA as one weight": partial(joined, memory="fast"),
        "W + BA as one weight, lean": partial(joined, memory="lean"),
        "a LoRA layer and F.cross_entropy": layer,
    }


def arrays(shape: tuple[int, int, int], rank: int) -> tuple[Tensor, ...]:
    """(x, W, A, B, target); the weight is frozen."""
    n, d, v = shape
    g = torch.Generator().manual_seed(0)
    x, w, a, b = (torch.randn(s, generator=g) for s in ((n, d), (v, d), (rank, d), (v, rank)))
    w, a, b = w / d**0.5, a / d**0.5, 0.1 * b
    return x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_(), torch.randint(v, (n,), generator=g)


def answers(loss: Callable[..., Tensor], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(loss, dx, dA, dB)."""
    x, _, a, b, _ = given
    value = loss(*given)
    return value, *torch.autograd.grad(value, (x, a, b))


def check(found: tuple[Tensor, ...], right: tuple[Tensor, ...], name: str) -> None:
    """Raise where two ways differ by more than rounding."""
    for mine, theirs in zip(found, right, strict=True):
        apart = float((mine - theirs).detach().abs().max() / theirs.detach().abs().max())
        if not apart <= APART:
            raise ValueError(f"{name}: an answer is {apart:.1e} of its largest entry apart")


def measure(shape: tuple[int, int, int], rank: int, *, budget: float = 60.0, least: int = 5) -> list[LowRank]:
    """Every way, after its answers were compared."""
    given, found = arrays(shape, rank), ways()
    right, spaces = answers(found["a LoRA layer and F.cross_entropy"], given), {}
    for name, loss in found.items():
        got, spaces[name] = workspace_bytes(partial(answers, loss, given))
        check(got, right, name)
    turns = take_turns(
        {name: Call(partial(answers, f, given)) for name, f in found.items()}, budget=budget, least=least
    )
    lines = []
    for name, seconds in turns.seconds.items():
        ratio = median(s / o for s, o in zip(seconds, turns.seconds[OURS], strict=True))
        rounded = float(f"{median(seconds):.4g}"), float(f"{ratio:.3f}")
        size = "{}x{}@{}".format(*shape)
        lines.append(LowRank(size, rank, name, torch.get_num_threads(), len(seconds), *rounded, spaces[name]))
    return lines


def markdown(lines: Sequence[LowRank]) -> list[str]:
    """The rows of docs/performance.md."""
    return [
        f"| {line.call} | {line.shape}, r = {line.rank} | {line.ratio:.2f} | {line.workspace_bytes / 1e6:.0f} MB |"
        for line in lines
    ]


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser("python -m benchmarks.low_rank", description="LoRA on the head, three ways.")
    parser.add_argument("--shape", default="2048x576@49152", help="rows x features @ classes (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of turns (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: %(default)s)")
    options = parser.parse_args(given)
    shape = head_of(options.shape)
    if shape is None:
        parser.error(f"argument --shape: {options.shape!r} is no N x D @ V")
    lines = measure(shape, options.rank, budget=options.seconds)
    print(*markdown(lines), sep="\n")
    records.write(LowRank, lines, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
