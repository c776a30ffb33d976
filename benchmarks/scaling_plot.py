"""docs/scaling.png: a column for each size that grows; time of a row op, time and memory of the linear head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.table import LIMITS, OURS, Line

if TYPE_CHECKING:
    from benchmarks.scaling import Sweep

COLUMNS = ("N", "V", "D")
Swept = tuple["Sweep", dict[str, int], list[Line]]
COLOUR = {
    ("torch", OURS): "tab:orange",
    ("torch", f"{OURS}, lean"): "gold",
    ("torch", "torch"): "tab:gray",
    ("torch", "F.linear + F.cross_entropy"): "tab:gray",
    ("torch", "F.linear_cross_entropy, auto"): "tab:brown",
    ("torch", "F.linear_cross_entropy, long chunks"): "tab:purple",
    ("jax", OURS): "tab:blue",
    ("jax", f"{OURS}, lean"): "tab:cyan",
    ("jax", "jax.nn"): "tab:green",
    ("jax", "optax"): "tab:green",
    ("jax", "optax(x @ W.T)"): "tab:green",
}


def draw(path: Path, sweeps: Sequence[Swept]) -> None:
    """Write the picture."""
    figure = Figure(figsize=(13, 14), dpi=110, layout="constrained")
    panels: list[tuple[str, Callable[[Line], bool], Callable[[Line], float | None]]] = [
        ("softmax: ms", lambda line: line.op == "softmax", _milliseconds),
        ("loss and gradient: ms", lambda line: line.op.startswith("cross_entropy"), _milliseconds),
        ("linear head: ms", lambda line: line.op == "linear_cross_entropy", _milliseconds),
        ("linear head: MB beyond inputs and gradients", lambda line: line.op == "linear_cross_entropy", _megabytes),
    ]
    grid = figure.subplots(len(panels), len(COLUMNS), squeeze=False)
    for axes_row, (title, wanted, value) in zip(grid, panels, strict=True):
        for axes, name in zip(axes_row, COLUMNS, strict=True):
            drawn = False
            for sweep, sizes, lines in sweeps:
                mine = [line for line in lines if wanted(line) and value(line) is not None]
                if sweep.name == name and mine:
                    _draw(axes, sizes, mine, value)
                    axes.set_title(sweep.shape.format(name), fontsize="small")
                    drawn = True
            axes.set_visible(drawn)
            axes.set_xlabel(name)
            axes.set_ylabel(title if axes is axes_row[0] else "")
    handles = {str(h.get_label()): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=3,
        fontsize="small",
        title="solid: all cores, dashed: one core; dotted: the limit, a copy of the logits or three bare matmuls",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw(axes: Axes, sizes: dict[str, int], lines: Sequence[Line], value: Callable[[Line], float | None]) -> None:
    most = max(line.threads for line in lines)
    for door, threads, call in dict.fromkeys((line.framework.split()[0], line.threads, line.call) for line in lines):
        limit = call in LIMITS
        if limit and door != "torch":
            continue
        mine = [(line.framework.split()[0], line.threads, line.call) == (door, threads, call) for line in lines]
        points = sorted(
            (sizes[line.shape], value(line) or math.nan) for line, it in zip(lines, mine, strict=True) if it
        )
        axes.plot(
            [n for n, _ in points],
            [y for _, y in points],
            ":" if limit else "-" if threads == most else "--",
            color="black" if limit else COLOUR.get((door, call)),
            marker=None if limit else "o",
            markersize=3,
            alpha=1.0 if threads == most else 0.5,
            label=f"{door}: {call}" if threads == most and not limit else None,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")


def _milliseconds(line: Line) -> float:
    return line.microseconds / 1e3


def _megabytes(line: Line) -> float | None:
    return None if line.workspace_bytes is None else line.workspace_bytes / 1e6
