"""docs/speed.png: every measured cell's rivals by ours, an op a line, a shape a mark; the built-in's is full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from benchmarks.table import Line, rivals

TITLE = {"torch": "PyTorch", "jax": "JAX"}
MARKERS = "osD^v<>phP*Xd"


def draw(path: Path, cells: Sequence[Sequence[Line]]) -> None:
    """Write the picture."""
    figure = Figure(figsize=(11, 5.5), dpi=120, layout="constrained")
    shapes = list(dict.fromkeys((cell[0].shape, cell[0].dtype) for cell in cells))
    for axes, door in zip(figure.subplots(1, 2), TITLE, strict=True):
        _draw(axes, [cell for cell in cells if cell[0].framework.startswith(door)], shapes)
        axes.set_title(TITLE[door], loc="left")
    handles = {str(h.get_label()): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw(axes: Axes, cells: Sequence[Sequence[Line]], shapes: Sequence[tuple[str, str]]) -> None:
    ops = list(dict.fromkeys(cell[0].op for cell in cells))
    for i, (shape, dtype) in enumerate(shapes):
        colour, marker = f"C{i % 10}", MARKERS[i % len(MARKERS)]
        place = (i / max(1, len(shapes) - 1) - 0.5) * 0.6
        mine = [cell for cell in cells if (cell[0].shape, cell[0].dtype) == (shape, dtype)]
        found = [rivals(cell) for cell in mine]
        for others, points in ((False, [lines[:1] for lines in found]), (True, [lines[1:] for lines in found])):
            shown = [line for lines in points for line in lines]
            at = [ops.index(line.op) + place for line in shown]
            label = None if others or not shown else f"{shape} {dtype}"
            fill = {"markerfacecolor": "none", "alpha": 0.6} if others else {}
            axes.hlines(
                at, [p.ratio_low for p in shown], [p.ratio_high for p in shown], colour, alpha=0.2 if others else 0.4
            )
            axes.plot([p.ratio for p in shown], at, marker, color=colour, label=label, markersize=5, **fill)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_yticks(range(len(ops)), ops, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("its time / ours, with quartiles; full: the built-in")
    axes.set_title("ours is faster to the right of 1", fontsize="small", loc="right")
    axes.grid(axis="x", alpha=0.3)
