"""docs/scaling.png: a column for each size that grows; time of the row ops, time and memory of the linear head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.table import LIMITS, OURS, Line
from examples import palette

if TYPE_CHECKING:
    from benchmarks.sweeps import Sweep

COLUMNS = ("N", "V", "D", "K")
TITLE = {"torch": "PyTorch", "jax": "JAX"}
Swept = tuple["Sweep", dict[str, int], list[Line]]


@dataclass(frozen=True)
class Row:
    """A row of panels."""

    title: str
    ops: tuple[str, ...]
    doors: tuple[str, ...]
    value: Callable[[Line], float | None]


def _milliseconds(line: Line) -> float:
    return line.microseconds / 1e3


def _megabytes(line: Line) -> float | None:
    return None if line.workspace_bytes is None else line.workspace_bytes / 1e6


ROWS = (
    Row("softmax: ms", ("softmax",), ("torch", "jax"), _milliseconds),
    Row(
        "loss and gradient: ms", ("cross_entropy_grad", "cross_entropy_value_and_grad"), ("torch", "jax"), _milliseconds
    ),
    Row("linear head, PyTorch: ms", ("linear_cross_entropy",), ("torch",), _milliseconds),
    Row("linear head, JAX: ms", ("linear_cross_entropy",), ("jax",), _milliseconds),
    Row("workspace, PyTorch: MB", ("linear_cross_entropy",), ("torch",), _megabytes),
    Row("workspace, JAX: MB", ("linear_cross_entropy",), ("jax",), _megabytes),
)


def draw(path: Path, sweeps: Sequence[Swept], machine: str) -> None:
    """Write the picture, of all cores; the crossovers on one core stand in the table."""
    threads = max((line.threads for _, _, lines in sweeps for line in lines), default=1)
    sweeps = [(sweep, sizes, [line for line in lines if line.threads == threads]) for sweep, sizes, lines in sweeps]
    with palette.sizes():
        figure = palette.canvas(2.15 * len(ROWS))
        figure.suptitle(f"time and memory as one size grows; lower is better\n{machine}", x=0.01, ha="left")
        grid = figure.add_gridspec(len(ROWS), 12)
        for i, row in enumerate(ROWS):
            panels = [panel for name in COLUMNS for panel in _panels(row, name, sweeps)]
            for j, (sweep, sizes, lines) in enumerate(panels):
                width = 12 // len(panels)
                axes = figure.add_subplot(grid[i, j * width : (j + 1) * width])
                axes.set_title(sweep.shape.format(sweep.name).replace("x", " x "), fontweight="normal")
                axes.set_ylabel("" if j else row.title)
                _curves(axes, sizes, lines, row.value)
        shown = {op for row in ROWS for op in row.ops}
        drawn = [line for _, _, lines in sweeps for line in lines if line.op in shown]
        figure.legend(handles=_legend(drawn), loc="outside lower center", ncols=3)
        palette.save(figure, path)


def _panels(row: Row, name: str, sweeps: Sequence[Swept]) -> Iterator[Swept]:
    """What a row shows of the sweeps over a size: one, or nothing."""
    for sweep, sizes, lines in sweeps:
        mine = [line for line in lines if line.op in row.ops and line.framework.split()[0] in row.doors]
        mine = [line for line in mine if row.value(line) is not None]
        if sweep.name == name and mine:
            yield sweep, sizes, mine


def _curves(axes: Axes, sizes: dict[str, int], lines: Sequence[Line], value: Callable[[Line], float | None]) -> None:
    for door, call in dict.fromkeys((line.framework.split()[0], line.call) for line in lines):
        if call in LIMITS and door != lines[0].framework.split()[0]:
            continue  # one limit a panel
        points = sorted(
            (sizes[line.shape], value(line) or math.nan)
            for line in lines
            if (line.framework.split()[0], line.call) == (door, call)
        )
        axes.plot([n for n, _ in points], [y for _, y in points], **_style(door, call))
    values = [value(line) or math.nan for line in lines]
    palette.logarithmic(axes.yaxis, min(values) / 1.4, max(values) * 1.4)
    palette.logarithmic(axes.xaxis, min(sizes.values()) / 1.3, max(sizes.values()) * 1.3)
    palette.plain(axes)


def _style(door: str, call: str) -> dict[str, Any]:
    if call in LIMITS:
        return {"linestyle": ":", "color": palette.LIMIT}
    ours = call == OURS  # above the others, and thinner: where two lines are one, both can be seen
    look = {"color": palette.of(door, call), "marker": palette.mark(call), "zorder": 2 + call.startswith(OURS) + ours}
    return {**look, "markersize": 4 if ours else 6, "linewidth": 1.4 if ours else 2.4}


def _legend(lines: Sequence[Line]) -> list[Line2D]:
    calls = sorted(
        {(line.framework.split()[0], line.call) for line in lines if line.call not in LIMITS},
        key=lambda it: (it[0] != "torch", not it[1].startswith("ours"), it[1]),
    )
    known: dict[tuple[str, str], list[str]] = {}  # what looks alike is one line
    for door, call in calls:
        known.setdefault((palette.of(door, call), palette.mark(call)), []).append(f"{TITLE[door]}: {call}")
    short = {
        look: names[0] if len(names) == 1 else f"{names[0].split(':')[0]}: the built-in"
        for look, names in known.items()
    }
    limit = Line2D([], [], linestyle=":", color=palette.LIMIT, label="a copy, or three bare matmuls")
    return [
        *(Line2D([], [], color=c, marker=m, linewidth=1.4, markersize=4.5, label=short[c, m]) for c, m in known),
        limit,
    ]
