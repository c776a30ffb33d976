"""Large results in fresh memory, from 1 MiB to 1 GiB: part of `make bench`, alone `python -m benchmarks.fresh`.

A result's pages are faulted in one by one, and what that costs depends on what the process, the kernel and the host of
a virtual machine did before. So each size is measured in three conditions: "alone", in a process of its own; "after
others", in a process that has gone through all larger sizes; "kept", in a process of its own after `keep_memory`. Ours,
the built-in's and a copy into memory that is there take turns, answers are judged first, and what counts is how the
slow calls compare too: medians and 90th percentiles.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import records, table
from benchmarks.bench import DOORS, limit
from benchmarks.cases import Case
from benchmarks.check import check
from benchmarks.timing import take_turns
from softmax_ext import keep_memory, machine

RESULTS = Path("benchmarks", "results", "fresh")
CLASSES = 1000
# glibc's malloc turns to mmap at 32 MiB: 8192 rows lie below, 8400 above.
ROWS = (262, 1049, 4194, 8192, 8400, 16777, 67109, 134218, 268435)
OPS = {
    "torch": ("softmax", "softmax_bwd", "cross_entropy_grad"),
    "jax": ("softmax", "softmax_bwd", "cross_entropy_value_and_grad"),
}
ALONE, AFTER, KEPT = "alone", "after others", "kept"


@dataclass(frozen=True)
class Fresh:
    """One call's figures at one size, in one condition."""

    device: str
    threads: int
    framework: str
    op: str
    shape: str
    mebibytes: float  # of the logits, and of the result
    condition: str
    call: str  # ours, the built-in's name, or copy
    median_ms: float
    high_ms: float  # the 90th percentile
    rounds: int

    @property
    def cell(self) -> tuple[str, ...]:
        """What is measured together."""
        return self.framework, self.op, self.shape, self.condition


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser("python -m benchmarks.fresh", description=__doc__)
    parser.add_argument("--door", nargs="+", choices=DOORS, default=DOORS, help="whose ops (default: both)")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help=f"of {CLASSES} float32 classes")
    parser.add_argument("--condition", nargs="+", choices=(ALONE, AFTER, KEPT), default=(ALONE, AFTER, KEPT))
    parser.add_argument("--seconds", type=float, default=1.5, help="for the rounds of an op (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="at least so many (default: %(default)s)")
    parser.add_argument("--device", default=machine.name(), help="the machine's name in the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs (default: %(default)s)")
    options = parser.parse_args(given)
    found: list[Fresh] = []
    for door in options.door:
        for condition in options.condition:
            sizes = [sorted(options.rows, reverse=True)] if condition == AFTER else [[rows] for rows in options.rows]
            for some in sizes:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    found += process.submit(measure, door, condition, some, options).result()
    file = table.file_of(options.device, options.results)
    records.write(Fresh, found, file)
    Console(width=None if sys.stdout.isatty() else 150).print(show(found))
    print(f"kept in {file}")
    return 0


def measure(door: str, condition: str, sizes: Sequence[int], options: argparse.Namespace) -> list[Fresh]:
    """One process: its sizes in turn."""
    threads = limit(None)
    if condition == KEPT:
        keep_memory()
    module = importlib.import_module(f"benchmarks.{door}_calls")
    copies = importlib.import_module("benchmarks.torch_calls")
    found = []
    for rows in sizes:
        case = Case((rows, CLASSES))
        mine = module.Inputs(case)
        copy = copies.copy(copies.Inputs(case))
        for op in OPS[door]:
            calls = module.CALLS[op](mine)
            for name, call in calls.items():
                check(case, op, [module.numpy(answer) for answer in call()], ours=name == table.OURS)
            turns = take_turns({**calls, table.COPY: copy}, budget=options.seconds, least=options.rounds)
            about = (options.device, threads, module.VERSION, op, str(case), round(case.logits_bytes / 2**20, 2))
            for name, times in turns.seconds.items():
                high = statistics.quantiles(times, n=10, method="inclusive")[-1]
                median = statistics.median(times)
                found.append(Fresh(*about, condition, name, _short(median), _short(high), len(times)))
            del calls
            gc.collect()
    return found


def _short(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")


def cells(lines: Sequence[Fresh]) -> Iterator[tuple[Fresh, Fresh, Fresh]]:
    """(ours, the built-in's, the copy) of all that was measured together."""
    together: dict[tuple[str, ...], dict[str, Fresh]] = {}
    for line in lines:
        together.setdefault(line.cell, {})[line.call] = line
    for cell in together.values():
        ours, copy = cell.pop(table.OURS), cell.pop(table.COPY)
        (rival,) = cell.values()
        yield ours, rival, copy


HEAD = ("", "op", "result, MiB", "process", "built-in's median / ours", "its 90th percentile / ours", "ours in copies")


def told(lines: Sequence[Fresh]) -> list[tuple[str, ...]]:
    """A line a cell; below 1 the built-in is faster."""
    return [
        (
            ours.framework.split()[0],
            ours.op,
            f"{ours.mebibytes:g}",
            ours.condition,
            f"{rival.median_ms / ours.median_ms:.2f}",
            f"{rival.high_ms / ours.high_ms:.2f}",
            f"{ours.median_ms / copy.median_ms:.2f}",
        )
        for ours, rival, copy in cells(lines)
    ]


def show(lines: Sequence[Fresh]) -> Table:
    """For a terminal."""
    shown = Table(title="large results in fresh memory")
    for name in HEAD:
        shown.add_column(name)
    for row in told(lines):
        shown.add_row(*row)
    return shown


if __name__ == "__main__":
    sys.exit(main())
