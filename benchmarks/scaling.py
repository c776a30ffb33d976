"""`make scaling`: time and memory as N, V, D and K grow over two decades, on one core and on all.

Runs `benchmarks.bench` in a process for each number of cores and keeps benchmarks/results/scaling/<device>.csv, draws
docs/scaling.png and prints the crossovers: the sizes at which ours and a rival take the same time, between two measured
sizes on a straight line in the logarithms. The limit is a copy of the logits, or three bare matmuls. K is the number of
points a row of the head's sampled gradient, and of classes a row of its sparse targets.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import scaling_plot, table
from benchmarks.sweeps import Sweep
from benchmarks.table import LIMITS, OURS, Line

RESULTS = Path("benchmarks", "results", "scaling")
PICTURE = Path("docs", "scaling.png")
ROW_OPS = ("softmax", "cross_entropy_grad", "cross_entropy_value_and_grad")
HEAD_OP = "linear_cross_entropy"
KEPT_OPS = (HEAD_OP, "linear_cross_entropy_sparse", "linear_at")

# Largest logits 32 MB (rows), so that a copy goes to memory; the head's largest case takes about a second.
ROWS = (Sweep("N", 10, "{}x8192"), Sweep("V", 1000, "64x{}"))
HEADS = (Sweep("N", 20, "{}x64@8192", 4), Sweep("V", 400, "256x64@{}", 4), Sweep("D", 16, "256x{}@4096", 4))
KEPT = (Sweep("K", 4, "256x64@8192/{}", 5),)
SWEEPS = (*ROWS, *HEADS, *KEPT)


@dataclass(frozen=True)
class Crossover:
    """Where a rival stops being faster, or slower, than ours."""

    framework: str
    threads: int
    op: str
    call: str
    grows: str
    fixed: str  # the shape, with a letter for the size that grows
    below: str  # who is faster below the crossover, or at every size: "ours", the rival or "neither"
    size: int | None  # None: there is none among the sizes measured


def main(given: Sequence[str] | None = None) -> int:
    """Measure, draw and print."""
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--seconds", default="0.25", help="for the rounds of an op (default: %(default)s)")
    parser.add_argument("--rounds", default="5", help="at least so many (default: %(default)s)")
    parser.add_argument("--start", type=int, help="first value of every size that grows, for a quick look")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="(default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="only draw and print what was measured before")
    options = parser.parse_args(given)
    if not options.draw:
        for threads in sorted({1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1}):
            status = _measure(threads, options)
            if status:
                return status
    lines = table.read(max(options.results.glob("*.csv"), key=lambda file: file.stat().st_mtime))
    scaling_plot.draw(options.picture, swept(lines), table.machine(lines))
    Console(width=None if sys.stdout.isatty() else 150).print(show(crossings(lines)))
    return 0


def _measure(threads: int, options: argparse.Namespace) -> int:
    """`make bench` on so many cores: they are chosen before the frameworks are loaded."""
    how = ["--seconds", options.seconds, "--rounds", options.rounds, "--results", str(options.results)]
    for ops, sweeps in (((*ROW_OPS, HEAD_OP), (*ROWS, *HEADS)), (KEPT_OPS, KEPT)):
        shapes = [shape for sweep in sweeps for shape in sweep.shapes(options.start)]
        words = ["--built-ins", "--op", *ops, "--shape", *dict.fromkeys(shapes), "--threads", str(threads), *how]
        status = subprocess.run([sys.executable, "-m", "benchmarks.bench", *words], check=False).returncode
        if status:
            return status
    return 0


def swept(lines: Sequence[Line]) -> list[tuple[Sweep, dict[str, int], list[Line]]]:
    """Each sweep with its sizes and lines."""
    return [(sweep, *split(lines, sweep)) for sweep in SWEEPS]


def crossings(lines: Sequence[Line]) -> list[Crossover]:
    """The crossovers of all sweeps."""
    return [c for sweep, sizes, mine in swept(lines) for c in crossovers(sweep, sizes, mine)]


def split(lines: Sequence[Line], sweep: Sweep) -> tuple[dict[str, int], list[Line]]:
    """({shape: the size that grows}, the lines) of one sweep."""
    before, after = sweep.shape.split("{}")
    sizes = {
        line.shape: int(middle)
        for line in lines
        if line.shape.startswith(before) and line.shape.endswith(after)
        if (middle := line.shape[len(before) : len(line.shape) - len(after)]).isdigit()
    }
    return sizes, [line for line in lines if line.shape in sizes]


def crossovers(sweep: Sweep, sizes: dict[str, int], lines: Sequence[Line]) -> Iterator[Crossover]:
    """Every change of who is faster, and for a rival without one who is faster throughout.

    A size counts for the one that was faster in the middle half of the rounds; others are a tie, and are passed over.
    """
    curves: dict[tuple[str, int, str, str], list[tuple[int, float]]] = {}
    for line in lines:
        if not line.call.startswith(OURS) and line.call not in LIMITS:
            points = curves.setdefault((line.framework, line.threads, line.op, line.call), [])
            if line.ratio_low > 1 or line.ratio_high < 1:
                points.append((sizes[line.shape], line.ratio))
    for (framework, threads, op, call), points in curves.items():
        points.sort()
        about = (framework, threads, op, call, sweep.name, sweep.shape.format(sweep.name))
        winners = [OURS if ratio > 1 else call for _, ratio in points]
        turns = [i for i, (here, there) in enumerate(pairwise(winners)) if here != there]
        for i in turns:
            (n0, r0), (n1, r1) = points[i : i + 2]
            size = math.exp(math.log(n0) - math.log(r0) * math.log(n1 / n0) / math.log(r1 / r0))
            yield Crossover(*about, winners[i], round(size))
        if not turns:
            yield Crossover(*about, winners[0] if winners else "neither", None)


def show(found: Sequence[Crossover]) -> Table:
    """A crossover a line."""
    result = Table(title="who is faster below which size", title_justify="left", header_style="")
    for name in ("", "cores", "op", "rival", "shape", "faster", "below"):
        result.add_column(name)
    for c in found:
        size = "every size" if c.size is None else f"{c.grows} = {c.size}"
        result.add_row(c.framework.split()[0], str(c.threads), c.op, c.call, c.fixed, c.below, size)
    return result


if __name__ == "__main__":
    sys.exit(main())
