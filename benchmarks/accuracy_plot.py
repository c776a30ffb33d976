"""docs/accuracy.png: worst and mean errors of every quantity and type, and what chunks do to a weight's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import StrMethodFormatter

from examples import palette

if TYPE_CHECKING:
    from benchmarks.errors import Error
    from benchmarks.weight_error import WeightError

STYLE = {  # colour, marker, place within the line of a quantity
    "torch_ops": (palette.OURS_TORCH, "o", -0.27),
    "torch": (palette.TORCH, "s", -0.09),
    "jax_ops": (palette.OURS_JAX, "o", 0.09),
    "jax, optax": (palette.JAX, "s", 0.27),
}
LABEL = {"torch_ops": "ours, PyTorch", "torch": "PyTorch", "jax_ops": "ours, JAX", "jax, optax": "jax.nn, optax"}
FLOOR = 1e-3  # a logarithmic axis has no 0


def draw(path: Path, errors: Sequence[Error], weights: Sequence[WeightError]) -> None:
    """Write the picture."""
    whole = [e for e in errors if e.case == "all"]
    dtypes = list(dict.fromkeys(e.dtype for e in whole))
    quantities = list(dict.fromkeys(e.quantity for e in whole))
    with palette.sizes():
        figure = palette.canvas(0.5 * len(quantities) + 6.2)
        heights = (0.5 * len(quantities) + 1.6, 4.6)
        upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
        upper.suptitle(
            "error in ulp of the type: worst full, mean hollow, 0.001 and less at the edge; left is better",
            x=0.01,
            ha="left",
        )
        row = upper.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        for axes, dtype in zip(row, dtypes, strict=True):
            _draw_ulps(axes, [e for e in whole if e.dtype == dtype], quantities)
            axes.set_title(dtype, loc="left")
        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="", label=LABEL[call])
            for call, (colour, marker, _) in STYLE.items()
        ]
        handles.append(Line2D([], [], color=palette.LIMIT, linestyle=":", label="rounded once"))
        upper.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        _draw_weights(lower.subplots(), weights)
        palette.save(figure, path)


def _draw_ulps(axes: Axes, errors: Sequence[Error], quantities: Sequence[str]) -> None:
    """A line for each quantity."""
    for call, (colour, marker, place) in STYLE.items():
        mine = {e.quantity: e for e in errors if e.call == call}
        at = [i + place for i, quantity in enumerate(quantities) if quantity in mine]
        worst = [max(mine[quantity].worst_ulp, FLOOR) for quantity in quantities if quantity in mine]
        mean = [max(mine[quantity].mean_ulp, FLOOR) for quantity in quantities if quantity in mine]
        axes.hlines(at, mean, worst, color=colour, linewidth=1.5, alpha=0.5)
        axes.plot(worst, at, marker, color=colour, markersize=5)
        axes.plot(mean, at, marker, color=colour, markersize=5, markerfacecolor="white")
    axes.axvline(0.5, color=palette.LIMIT, linestyle=":", linewidth=1)
    both = [max(size, FLOOR) for e in errors for size in (e.worst_ulp, e.mean_ulp)]
    palette.logarithmic(axes.xaxis, min(both) / 2, max(both) * 2)
    axes.set_yticks(range(len(quantities)), quantities)
    axes.set_ylim(len(quantities) - 0.5, -0.5)
    palette.plain(axes)


def _draw_weights(axes: Axes, weights: Sequence[WeightError]) -> None:
    for call in dict.fromkeys(e.call for e in weights):
        mine = [e for e in weights if e.call == call]
        ours = "ours" in call
        door, _, name = call.partition(", ") if ours else ("torch", "", call)
        axes.plot(
            [e.chunks for e in mine],
            [e.relative for e in mine],
            ("-" if "fast" in call else "--") if ours else ":",
            color=palette.of(door, name),
            marker=palette.mark(name),
            markersize=5,
            linewidth=1.4 if name == "ours, fast" else 2.4,
            zorder=3 if name == "ours, fast" else 2,
            label=call,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    sizes = [e.relative for e in weights]
    palette.logarithmic(axes.yaxis, min(sizes) / 1.2, max(sizes) * 1.2)
    axes.set_xlabel("chunks")
    axes.set_title(f"relative error of a weight's gradient, {weights[0].shape} {weights[0].dtype}", loc="left")
    palette.plain(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
