"""`make bench`: our ops beside the frameworks' own and other libraries', taking turns, each answer checked first.

For each op, shape and type: how many times as long as ours each rival takes; ours in copies, the time of copying
the logits into memory that was there before; the least bytes the op can read and write, and the speed at which
ours goes through them as a share of the copy's speed in the same rounds (above 100 %: a copy's stores cost more
than loads); the most memory a call needs, in arrays of the logits' size. Medians over rounds. A wrong answer is
not timed, and fails the run.

The linear head with its loss and gradients is measured by three bare matmuls instead: 6NDV flops, which all calls do,
and 8NDV of "lean", which forms the logits twice; the divergence of two heads by four, and six of "lean". Its memory is
that of arrays beyond arguments and gradients, with linear_weight trained and frozen: at the worst moment (torch), or as
the compiler planned it (jax). "ours, sampled" is one of its calls: the exact loss with its gradient at 64 points a row,
whose answer is right if its loss is, and its gradients are within what their variance allows; its flops are those it
does. Targets of 64 classes a row stand beside the same logits' integer targets; `linear_at` beside the time of reading
the rows of linear_weight that it names. A head's shape may end in another number of classes a row:
2048x576@49152/16.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from benchmarks import table
from benchmarks.cases import DTYPES, OPS, PLAN, SHAPES, Case, shape_of
from benchmarks.check import WrongAnswer, check
from benchmarks.heads import HEAD_OPS, HEAD_PLAN, HEADS, PAIR, HeadCase, head_of, kept_of
from benchmarks.timing import LARGE, Call, peak_bytes, take_turns
from softmax_ext import machine

DOORS = ("torch", "jax")
RESULTS = Path("benchmarks", "results")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    named = ", ".join(f"{name} ({'x'.join(map(str, shape))})" for name, shape in SHAPES.items())
    heads = ", ".join(f"{name} ({HeadCase(shape)})" for name, shape in HEADS.items())
    plan = ", ".join(f"{shape} {dtype}" for shape, dtype in [*PLAN, *HEAD_PLAN])
    parser = argparse.ArgumentParser(
        "python -m benchmarks.bench",
        description=__doc__,
        epilog=f"Shapes by name: {named}.\nOf linear heads: {heads}.\nWithout --shape and --dtype: {plan}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ops = [*OPS, *HEAD_OPS]
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, metavar="OP", help=", ".join(ops))
    parser.add_argument("--door", nargs="+", choices=DOORS, default=DOORS, help="whose ops (default: both)")
    parser.add_argument(
        "--shape",
        nargs="+",
        help="names, or sizes: 1024x32000, the second is the class axis; a head's: rows x features @ classes, 256x64@9",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="(default: float32; float64 is PyTorch's only)")
    parser.add_argument("--built-ins", action="store_true", help="beside these alone, no compiler, no other library")
    parser.add_argument("--threads", type=_count, help="cores to run on (default: all there are)")
    parser.add_argument("--seconds", type=float, default=1.5, help="for the rounds of an op (default: %(default)s)")
    parser.add_argument("--rounds", type=_count, default=5, help="at least so many (default: %(default)s)")
    parser.add_argument("--device", default=None, help="the machine's name in the results (default: its CPU's)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs (default: %(default)s)")
    options = parser.parse_args(given)
    try:
        options.cases = _cases(options.shape, options.dtype, options.op)
    except ValueError as error:
        parser.error(str(error))
    return options


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def _cases(shapes: list[str] | None, dtypes: list[str] | None, ops: list[str]) -> list[tuple[str, Case | HeadCase]]:
    """(the shape as it was asked for, the case), where one of the ops takes it."""
    plan = [*PLAN, *HEAD_PLAN]
    if shapes or dtypes:
        shapes = shapes or list(dict.fromkeys(shape for shape, _ in plan))
        plan = [(shape, dtype) for dtype in dtypes or ["float32"] for shape in shapes]
    found = []
    for shape, dtype in plan:
        head = head_of(shape)
        case = Case(shape_of(shape), dtype) if head is None else HeadCase(head, dtype, kept_of(shape))
        if set(ops) & set(OPS if head is None else HEAD_OPS):
            found.append((shape, case))
    if not found:
        raise ValueError(
            f"{', '.join(ops)}: no such shape; a linear head's is written 256x64@1000, all others 256x1000"
        )
    return found


def limit(threads: int | None) -> int:
    """Keep both frameworks on so many cores: before they are loaded, for their pools are made then."""
    if not hasattr(os, "sched_setaffinity"):
        return threads or os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))[:threads]
    if threads:
        os.sched_setaffinity(0, cores)
    return len(cores)


def measure(
    about: dict[str, Any],
    case: Case | HeadCase,
    door: Any,
    calls: Mapping[str, Call],
    limit: Call,
    options: argparse.Namespace,
) -> list[table.Line]:
    """One op of one door on one case: judged, then timed."""
    for name, call in calls.items():
        try:
            answers = call.answers() if call.answers else [door.numpy(answer) for answer in call()]
            check(case, call.op or about["op"], answers, ours=name.startswith(table.OURS))
        except WrongAnswer as error:
            raise WrongAnswer(f"{name}: {error}") from None
    memory: dict[str, dict[str, int | None]] = {}
    if isinstance(case, HeadCase):
        name_of_limit, work = head_work(case, about["op"], calls)
        for name, call in calls.items():
            if call.workspace is not None:
                memory[name] = {"workspace_bytes": call.workspace(False), "frozen_bytes": call.workspace(True)}
    else:
        name_of_limit = table.COPY
        work = dict.fromkeys(calls, case.least_bytes(OPS[about["op"]], door.INDEX_BYTES))
        work[name_of_limit] = 2 * case.logits_bytes
        if case.logits_bytes > LARGE:
            memory = {
                name: {"peak_bytes": call.peak() if call.peak else peak_bytes(call)} for name, call in calls.items()
            }
    turns = take_turns({**calls, name_of_limit: limit}, budget=options.seconds, least=options.rounds)
    return table.lines(about, turns, memory, limit=name_of_limit, work=work)


def head_work(case: HeadCase, op: str, calls: Iterable[str]) -> tuple[str, dict[str, int]]:
    """The limit's name, and what each call has to do: bytes to read, or flops."""
    if op == "linear_at":
        return table.READING, dict.fromkeys((*calls, table.READING), case.row_bytes)
    limit, least, lean = (table.GEMMS_OF_PAIR, 4, 6) if op == PAIR else (table.GEMMS, 3, 4)
    work = {name: case.flops(lean if name == "ours, lean" else least) for name in (*calls, limit)}
    return limit, {**work, **({table.OURS_SAMPLED: case.sampled_flops} if table.OURS_SAMPLED in work else {})}


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print and keep; 1 if an answer was wrong."""
    options = arguments(given)
    threads = limit(options.threads)
    # Before the profiler, which counts the head's memory, writes to stderr that it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch_calls, torch_heads = (importlib.import_module(f"benchmarks.torch_{room}") for room in ("calls", "heads"))
    modules = {
        room: [importlib.import_module(f"benchmarks.{door}_{room}") for door in DOORS if door in options.door]
        for room in ("calls", "heads", "rivals")
    }
    doors = modules["calls"]
    gc.freeze()  # the frameworks need not be looked at by each collection
    device = options.device or machine.name()
    console = Console(width=None if sys.stdout.isatty() else 150)
    file = table.file_of(device, options.results)
    wrong: list[str] = []
    console.print(f"{device}, {threads} threads, {', '.join(door.VERSION for door in doors)}")
    todo = [
        (
            shape,
            case,
            [(d, op) for d in modules[case.ROOM] if case.dtype in d.DTYPES for op in options.op if op in d.CALLS],
        )
        for shape, case in options.cases
    ]
    rivals = {
        door: module
        for room in ("calls", "heads")
        for door, module in zip(modules[room], modules["rivals"], strict=True)
    }
    if options.built_ins:
        rivals = {}
    for reason in dict.fromkeys(r for _, case, _ in todo for module in rivals.values() for r in module.skipped(case)):
        console.print(reason)
    with Progress(
        SpinnerColumn(), *Progress.get_default_columns()[:3], TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        bar = progress.add_task("", total=sum(len(cells) for *_, cells in todo))
        for shape, case, cells in todo:
            title = f"{shape} {case} {case.dtype}"
            head = isinstance(case, HeadCase)
            inputs: dict[Any, Any] = {} if head else {torch_calls: torch_calls.Inputs(case)}
            copy = None if head else torch_calls.copy(inputs[torch_calls])
            found, refused = [], []
            for door, op in cells:
                progress.update(bar, description=f"{title}: {op}")
                if door not in inputs:
                    inputs = {door: door.Inputs(case)}  # one door's arrays at a time
                about = {"device": device, "threads": threads, "framework": door.VERSION, "op": op}
                about |= {"dtype": case.dtype, "shape": str(case)}
                calls = door.CALLS[op](inputs[door])
                if door in rivals:
                    calls = {**calls, **rivals[door].more(op, inputs[door])}
                limit_call: Any = copy
                if head and op == PAIR:
                    limit_call = door.limit(inputs[door], op)
                elif head:
                    limit_call = (torch_heads.reading if op == "linear_at" else door.limit)(inputs[door])
                try:
                    found.append(measure(about, case, door, calls, limit_call, options))
                except WrongAnswer as error:
                    refused.append(table.cell_of(about))
                    wrong.append(f"{title}, {door.VERSION}, {op}: {error}")
                progress.advance(bar)
            table.keep([line for cell in found for line in cell], file, refused=refused)
            if not head:
                console.print(table.show(title, found, case.logits_bytes))
            for op in options.op if head else ():
                if mine := [cell for cell in found if cell[0].op == op]:
                    console.print(table.show_head(f"{title}: {op}", mine))
    console.print(f"kept in {file}")
    for what in wrong:
        console.print(f"[bold red]not timed, the answer is wrong:[/] {what}", soft_wrap=True)
    gc.unfreeze()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
