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
from collections.abc import Sequence
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
CONDITIONS = ALONE, AFTER, KEPT = "alone", "after others", "kept"
BUILT_IN = "built-in"


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


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser("python -m benchmarks.fresh", description=__doc__)
    parser.add_argument("--door", nargs="+", choices=DOORS, default=DOORS, help="whose ops (default: both)")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help=f"of {CLASSES} float32 classes")
    parser.add_argument("--condition", nargs="+", choices=CONDITIONS, default=CONDITIONS)
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


HEAD = ("", "op", "result, MiB", *(text for one in CONDITIONS for text in (one, "slow calls")), "kept, in copies")


def told(lines: Sequence[Fresh]) -> list[tuple[str, ...]]:
    """A row for each op and size: the built-in's median by ours, and its 90th percentile by ours, in each condition."""
    rows: dict[tuple[str, str, float], dict[tuple[str, str], Fresh]] = {}
    places = {cell: place for place, cell in enumerate((door, op) for door in OPS for op in OPS[door])}
    for line in sorted(lines, key=lambda line: (places[line.framework.split()[0], line.op], line.mebibytes)):
        calls = rows.setdefault((line.framework.split()[0], line.op, line.mebibytes), {})
        calls[line.condition, line.call if line.call in (table.OURS, table.COPY) else BUILT_IN] = line
    return [
        (
            door,
            f"`{op}`",
            f"{size:g}",
            *(text for one in CONDITIONS for text in _by(calls.get((one, BUILT_IN)), calls.get((one, table.OURS)))),
            _by(calls.get((KEPT, table.OURS)), calls.get((KEPT, table.COPY)))[0],
        )
        for (door, op, size), calls in rows.items()
    ]


def _by(one: Fresh | None, other: Fresh | None) -> tuple[str, str]:
    """Quotients of medians and of slow calls."""
    if one is None or other is None:
        return "", ""
    return f"{one.median_ms / other.median_ms:.2f}", f"{one.high_ms / other.high_ms:.2f}"


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
