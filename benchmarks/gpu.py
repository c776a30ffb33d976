"""The ops on a GPU beside the built-ins, other libraries and the machine's limits: benchmarks/results/<device>.csv.

    python -m benchmarks.gpu [--part rows heads jax chunks] [--minutes 4] [--device cpu --results FOLDER ...]

rows: softmax, log_softmax and cross_entropy; their limit is a copy of the logits. heads: linear_cross_entropy; its
limit is the three bare matmuls. jax: the same in JAX. chunks: the head's time against chunk_size. The most telling
cells come first, each is kept as it ends, and a table of ours ends the output. Times are medians by device events of
calls that take turns; each answer is checked first, against float64. With --device cpu everything runs likewise, by
the host's clock and without counting memory: a rehearsal, of --rows and --heads of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import gpu_heads, gpu_jax, gpu_lines, gpu_rows
from benchmarks.gpu_clock import name_of
from benchmarks.heads import HeadCase, head_of
from benchmarks.table import file_of
from benchmarks.torch_calls import VERSION

PARTS = ("rows", "heads", "jax", "chunks")
RESULTS = Path("benchmarks", "results")


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print and keep, a cell at a time; 1 if an answer of ours is wrong or a cell fails."""
    options = arguments(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA or ROCm device: nothing to measure")
    console = Console(width=None if sys.stdout.isatty() else 160)
    file = file_of(name_of(options.device), options.results)
    end, failed, found = time.monotonic() + 60 * options.minutes, [], []
    for name, cell in cells(options):
        if time.monotonic() > end:
            console.print(f"{options.minutes} minutes are over: {name} and what follows are left out")
            break
        try:
            for these in cell():
                console.print(gpu_lines.show(these))
                gpu_lines.keep(these, file)
                found += these
        except Exception:  # the cells after it may well run
            console.print(f"{name}:\n{traceback.format_exc()}", markup=False)
            failed.append(name)
    console.print(gpu_lines.summary(found))
    for name in failed:
        console.print(f"failed: {name}")
    return int(bool(failed) or any(line.remark.startswith(gpu_lines.WRONG) for line in found))


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no cell is begun")
    parser.add_argument("--seconds", type=float, default=0.4, help="of an op's rounds; a head has ten times as many")
    parser.add_argument("--rows", nargs="+", type=_rows, help="N x V, in both types (default: told, then swept)")
    parser.add_argument("--heads", nargs="+", type=_head, help="N x D @ V, in bfloat16 (default: Llama, Gemma, Qwen)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs (default: %(default)s)")
    return parser.parse_args(given)


Cell = Callable[[], Iterable[list[gpu_lines.DeviceLine]]]


def cells(options: argparse.Namespace) -> Iterator[tuple[str, Cell]]:
    """(name, what measures it) in the order of their weight; the data of heads is made meanwhile, on a thread."""
    about = {"device": name_of(options.device), "framework": VERSION}
    settings = gpu_rows.Settings(options.device, options.seconds, options.backend)
    rows = gpu_rows.CASES if options.rows is None else [(s, t) for s in options.rows for t in gpu_rows.DTYPES]
    rows = [
        (f"rows {n}x{v} {dtype}", partial(gpu_rows.measure, about, settings, (n, v), dtype)) for (n, v), dtype in rows
    ]
    rows, told = rows if "rows" in options.part else [], len(gpu_rows.TOLD)
    heads = gpu_heads.CASES if options.heads is None else [HeadCase(shape, "bfloat16") for shape in options.heads]
    wanted = list(heads) if "heads" in options.part else list(heads[:1]) if {"jax", "chunks"} & {*options.part} else []
    with ThreadPoolExecutor(1) as beside:
        made = [beside.submit(case.prepare) for case in wanted]
        try:
            yield from rows[:told]
            for case, ready in zip(wanted, made, strict=True):
                ready.result()
                yield from _of_head(about, options, case, first=case is wanted[0])
                case.forget()
            yield from rows[told:]
        finally:
            for future in made:
                future.cancel()


def _of_head(
    about: dict[str, str], options: argparse.Namespace, case: HeadCase, *, first: bool
) -> Iterator[tuple[str, Cell]]:
    settings = gpu_rows.Settings(options.device, 10 * options.seconds, options.backend)
    on = gpu_heads.OnDevice(case, options.device)
    if "heads" in options.part:
        yield f"head {case}", lambda: [gpu_heads.measure(about, settings, case, on)]
    if "jax" in options.part and first and find_spec("jax") is not None:
        yield f"jax {case}", lambda: [gpu_jax.measure(about, settings, on)]
    if "chunks" in options.part and first:
        yield f"chunks {case}", lambda: [gpu_heads.sweep(about, settings, case, on)]


def _head(text: str) -> tuple[int, int, int]:
    shape = head_of(text)
    if shape is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no N x D @ V")
    return shape


def _rows(text: str) -> tuple[int, int]:
    rows, cross, classes = text.partition("x")
    if not (cross and rows.isdigit() and classes.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no N x V")
    return int(rows), int(classes)


if __name__ == "__main__":
    sys.exit(main())
