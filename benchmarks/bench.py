"""`make bench`: our ops beside the frameworks' own, in one process, taking turns, each answer checked first.

For each op, shape and type: how many times as long as ours each rival takes; ours in copies, the time of copying
the logits into memory that was there before; the least bytes the op can read and write, and the speed at which
ours goes through them as a share of the copy's speed in the same rounds (above 100 %: a copy's stores cost more
than loads); the most memory a call needs, in arrays of the logits' size. Medians over rounds. A wrong answer is
not timed, and fails the run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from benchmarks import table
from benchmarks.cases import DTYPES, OPS, PLAN, SHAPES, Case, shape_of
from benchmarks.check import WrongAnswer, check
from benchmarks.timing import peak_bytes, take_turns

DOORS = ("torch", "jax")
RESULTS = Path("benchmarks", "results")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    named = ", ".join(f"{name} ({'x'.join(map(str, shape))})" for name, shape in SHAPES.items())
    plan = ", ".join(f"{shape} {dtype}" for shape, dtype in PLAN)
    parser = argparse.ArgumentParser(
        "python -m benchmarks.bench",
        description=__doc__,
        epilog=f"Shapes by name: {named}.\nWithout --shape and --dtype: {plan}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--door", nargs="+", choices=DOORS, default=DOORS, help="whose ops (default: both)")
    parser.add_argument("--shape", nargs="+", help="names, or sizes as in 1024x32000; the second is the class axis")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="(default: float32; float64 is PyTorch's only)")
    parser.add_argument("--threads", type=_count, help="cores to run on (default: all there are)")
    parser.add_argument("--seconds", type=float, default=1.5, help="for the rounds of an op (default: %(default)s)")
    parser.add_argument("--rounds", type=_count, default=5, help="at least so many (default: %(default)s)")
    parser.add_argument("--device", default=None, help="the machine's name in the results (default: its CPU's)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs (default: %(default)s)")
    options = parser.parse_args(given)
    try:
        options.cases = _cases(options.shape, options.dtype)
    except ValueError as error:
        parser.error(str(error))
    return options


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def _cases(shapes: list[str] | None, dtypes: list[str] | None) -> list[tuple[str, Case]]:
    """(the shape as it was asked for, the case)"""
    plan = PLAN
    if shapes or dtypes:
        shapes = shapes or list(dict.fromkeys(shape for shape, _ in PLAN))
        plan = [(shape, dtype) for dtype in dtypes or ["float32"] for shape in shapes]
    return [(shape, Case(shape_of(shape), dtype)) for shape, dtype in plan]


def limit(threads: int | None) -> int:
    """Keep both frameworks on so many cores: before they are loaded, for their pools are made then."""
    if not hasattr(os, "sched_setaffinity"):
        return threads or os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))[:threads]
    if threads:
        os.sched_setaffinity(0, cores)
    return len(cores)


def cpu() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2] if names else f"{sys.platform} CPU"
    return " ".join(re.sub(r"\((R|TM)\)|@.*", " ", name).split())


def measure(
    about: dict[str, Any], case: Case, door: Any, inputs: Any, copy: Any, options: argparse.Namespace
) -> list[table.Line]:
    """One op of one door on one case: judged, then timed."""
    op = OPS[about["op"]]
    calls = door.CALLS[about["op"]](inputs)
    for name, call in calls.items():
        try:
            check(case, about["op"], [door.numpy(answer) for answer in call()], ours=name == table.OURS)
        except WrongAnswer as error:
            raise WrongAnswer(f"{name}: {error}") from None
    # Resident memory is counted by the page, in batches for each thread.
    peaks = {name: peak_bytes(call) for name, call in calls.items() if case.logits_bytes > 2**23}
    turns = take_turns({**calls, table.COPY: copy}, budget=options.seconds, least=options.rounds)
    least = case.least_bytes(op, door.INDEX_BYTES)
    return table.lines(about, turns, peaks, least_bytes=least, copied_bytes=2 * case.logits_bytes)


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print and keep; 1 if an answer was wrong."""
    options = arguments(given)
    threads = limit(options.threads)
    torch_calls, *_ = doors = [importlib.import_module(f"benchmarks.{door}_calls") for door in DOORS]
    doors = [door for name, door in zip(DOORS, doors, strict=True) if name in options.door]
    gc.freeze()  # the frameworks need not be looked at by each collection
    device = options.device or cpu()
    console = Console(width=None if sys.stdout.isatty() else 150)
    file = table.file_of(device, options.results)
    wrong: list[str] = []
    console.print(f"{device}, {threads} threads, {', '.join(door.VERSION for door in doors)}")
    todo = [
        (shape, case, [(d, op) for d in doors if case.dtype in d.DTYPES for op in options.op if op in d.CALLS])
        for shape, case in options.cases
    ]
    with Progress(
        SpinnerColumn(), *Progress.get_default_columns()[:3], TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        bar = progress.add_task("", total=sum(len(cells) for *_, cells in todo))
        for shape, case, cells in todo:
            title = f"{shape} {case.shape} {case.dtype}"
            inputs: dict[Any, Any] = {torch_calls: torch_calls.Inputs(case)}
            copy = torch_calls.copy(inputs[torch_calls])
            found, refused = [], []
            for door, op in cells:
                progress.update(bar, description=f"{title}: {op}")
                if door not in inputs:
                    inputs = {door: door.Inputs(case)}  # one door's arrays at a time
                about = {"device": device, "threads": threads, "framework": door.VERSION, "op": op}
                about |= {"dtype": case.dtype, "shape": "x".join(map(str, case.shape))}
                try:
                    found.append(measure(about, case, door, inputs[door], copy, options))
                except WrongAnswer as error:
                    refused.append(table.cell_of(about))
                    wrong.append(f"{title}, {door.VERSION}, {op}: {error}")
                progress.advance(bar)
            table.keep([line for cell in found for line in cell], file, refused=refused)
            console.print(table.show(title, found, case.logits_bytes))
    console.print(f"kept in {file}")
    for what in wrong:
        console.print(f"[bold red]not timed, the answer is wrong:[/] {what}", soft_wrap=True)
    gc.unfreeze()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
