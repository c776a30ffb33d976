"""The ops on a GPU beside the built-ins, other libraries and the machine's limits: benchmarks/results/<device>.csv.

    python -m benchmarks.gpu [--part rows heads chunks] [--device cpu --results FOLDER ...]

rows: softmax, log_softmax and cross_entropy; their limit is a copy of the logits. heads: linear_cross_entropy; its
limit is the three bare matmuls. chunks: the head's time against chunk_size. Times are medians by device events of calls
that take turns; each answer is checked first, against float64. With --device cpu everything runs likewise, by the
host's clock and without counting memory: a rehearsal, at --entries and --heads of its own.

On an H200 at 790 TFLOP/s rows are expected to take 4 minutes (70 compilations), heads 3 (50 s of float64, 40 s of
compilations, 60 s of rounds), chunks 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import gpu_heads, gpu_lines, gpu_rows
from benchmarks.check import WrongAnswer
from benchmarks.gpu_clock import name_of
from benchmarks.heads import HeadCase, head_of
from benchmarks.table import file_of
from benchmarks.torch_calls import VERSION

PARTS = ("heads", "chunks", "rows")
RESULTS = Path("benchmarks", "results")


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print and keep, a cell at a time; 1 if an answer of ours is wrong."""
    options = arguments(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA or ROCm device: nothing to measure")
    console = Console(width=None if sys.stdout.isatty() else 120)
    file = file_of(name_of(options.device), options.results)
    try:
        for cell in cells(options):
            console.print(gpu_lines.show(cell))
            gpu_lines.keep(cell, file)
    except WrongAnswer as error:
        console.print(f"not timed, {error}", markup=False)
        return 1
    return 0


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--seconds", type=float, default=0.4, help="of an op's rounds; a head has ten times as many")
    parser.add_argument("--dtypes", nargs="+", default=gpu_rows.DTYPES, choices=gpu_rows.DTYPES, help="of the rows")
    parser.add_argument("--classes", nargs="+", type=int, default=gpu_rows.CLASSES, help="of the rows")
    parser.add_argument("--entries", type=int, default=gpu_rows.ENTRIES, help="of the rows' logits")
    parser.add_argument("--heads", nargs="+", type=_head, help="N x D @ V, in bfloat16 (default: Llama, Gemma)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs (default: %(default)s)")
    return parser.parse_args(given)


def cells(options: argparse.Namespace) -> Iterator[list[gpu_lines.Line]]:
    """The lines of what is measured together, one after the other."""
    about = {"device": name_of(options.device), "framework": VERSION}
    settings = gpu_rows.Settings(options.device, options.seconds, options.backend)
    longer = gpu_rows.Settings(options.device, 10 * options.seconds, options.backend)
    swept = gpu_heads.SWEPT if options.heads is None else options.heads
    given = gpu_heads.CASES if options.heads is None else [HeadCase(shape, "bfloat16") for shape in swept]
    wanted = [case for case in given if "heads" in options.part or case.shape in swept]
    for case in gpu_heads.sharing(wanted) if {"heads", "chunks"} & {*options.part} else ():
        on = gpu_heads.OnDevice(case, options.device)
        if "heads" in options.part:
            yield gpu_heads.measure(about, longer, case, on)
        if "chunks" in options.part and case.shape in swept:
            yield gpu_heads.sweep(about, longer, case, on)
        del on
    if "rows" in options.part:
        yield from gpu_rows.measure(about, settings, options.dtypes, options.classes, options.entries)


def _head(text: str) -> tuple[int, int, int]:
    shape = head_of(text)
    if shape is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no N x D @ V")
    return shape


if __name__ == "__main__":
    sys.exit(main())
