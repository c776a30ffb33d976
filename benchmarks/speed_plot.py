"""docs/speed.png: a panel for each op and framework, a shape a line, a rival a mark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from benchmarks.table import Line, rivals
from examples import palette

TITLE = {"torch": "PyTorch", "jax": "JAX"}
NAME = {"torch": "PyTorch's built-in", "jax.nn": "jax.nn and optax, jitted"}
SAME = {  # one question, named by its framework
    "cross_entropy_value_and_grad": "cross_entropy_grad",
    "divergence_value_and_grad": "divergence_grad",
}


def draw(path: Path, cells: Sequence[Sequence[Line]], machine: str) -> None:
    """Write the picture: how many times as long as ours each rival takes."""
    rows = [cell for cell in cells if "@" not in cell[0].shape and rivals(cell)]
    ops = list(dict.fromkeys(SAME.get(cell[0].op, cell[0].op) for cell in rows))
    shapes = list(dict.fromkeys((cell[0].shape, cell[0].dtype) for cell in rows))
    ratios = [ratio for cell in rows for line in rivals(cell) for ratio in (line.ratio_low, line.ratio_high)]
    with palette.sizes():
        figure = palette.canvas(len(ops) * (0.19 * len(shapes) + 0.42) + 1.2)
        figure.suptitle(f"a rival's time by ours: right of 1 ours is faster\n{machine}", x=0.01, ha="left")
        grid = figure.subplots(len(ops), len(TITLE), sharex=True, sharey=True, squeeze=False)
        for row, op in zip(grid, ops, strict=True):
            for axes, door in zip(row, TITLE, strict=True):
                mine = [c for c in rows if SAME.get(c[0].op, c[0].op) == op and c[0].framework.startswith(door)]
                _draw(axes, door, mine, shapes)
                axes.set_title(f"{TITLE[door]}: {op}" if mine else "", loc="left")
        for column in grid.T:
            [axes for axes in column if axes.axison][-1].tick_params(labelbottom=True)
        grid[0][0].set_xlim(min(0.25, *ratios) * 0.9, max(ratios) * 1.1)
        figure.legend(handles=_legend(rows), loc="outside lower center", ncols=4)
        palette.save(figure, path)


def _draw(axes: Axes, door: str, cells: Sequence[Sequence[Line]], shapes: Sequence[tuple[str, str]]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(shapes)), [f"{shape.replace('x', ' x ')} {dtype}" for shape, dtype in shapes])
    axes.set_ylim(len(shapes) - 0.5, -0.5)
    if not cells:
        axes.set_axis_off()
        return
    palette.plain(axes)
    axes.axvline(1, color="black", linewidth=1)
    for cell in cells:
        at = shapes.index((cell[0].shape, cell[0].dtype))
        for line in rivals(cell):
            colour = palette.of(door, line.call)
            axes.hlines(at, line.ratio_low, line.ratio_high, colour, alpha=0.5)
            axes.plot(line.ratio, at, palette.mark(line.call), color=colour, markersize=5.5, alpha=0.9)


def _legend(cells: Sequence[Sequence[Line]]) -> list[Line2D]:
    calls = dict.fromkeys((c[0].framework.split()[0], line.call) for c in cells for line in rivals(c))
    return [
        Line2D(
            [], [], color=palette.of(door, call), marker=palette.mark(call), linestyle="", label=NAME.get(call, call)
        )
        for door, call in calls
        if call != "optax"  # the same mark as jax.nn
    ]
