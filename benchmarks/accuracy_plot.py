"""docs/accuracy.png: worst and mean errors of every quantity and type, and what chunks do to a weight's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from benchmarks.accuracy import Error
    from benchmarks.weight_error import WeightError

STYLE = {  # colour, marker, place within the line of a quantity
    "torch_ops": ("tab:orange", "o", -0.24),
    "torch": ("tab:gray", "s", -0.08),
    "jax_ops": ("tab:blue", "o", 0.08),
    "jax, optax": ("black", "s", 0.24),
}
RIVALS = ("tab:gray", "tab:brown", "tab:purple", "black")
FLOOR = 1e-3  # a logarithmic axis has no 0


def draw(path: Path, errors: Sequence[Error], weights: Sequence[WeightError]) -> None:
    """Write the picture."""
    figure = Figure(figsize=(11, 6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_ulps(left, errors)
    _draw_weights(right, weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_ulps(axes: Axes, errors: Sequence[Error]) -> None:
    """A line for each type and quantity: worst filled, mean hollow."""
    whole = [e for e in errors if e.case == "all"]
    lines = list(dict.fromkeys((e.dtype, e.quantity) for e in whole))
    for call, (colour, marker, place) in STYLE.items():
        mine = {(e.dtype, e.quantity): e for e in whole if e.call == call}
        at = [i + place for i, line in enumerate(lines) if line in mine]
        worst = [max(mine[line].worst_ulp, FLOOR) for line in lines if line in mine]
        mean = [max(mine[line].mean_ulp, FLOOR) for line in lines if line in mine]
        axes.hlines(at, mean, worst, color=colour, linewidth=1, alpha=0.5)
        axes.plot(worst, at, marker, color=colour, markersize=5, label=call)
        axes.plot(mean, at, marker, color=colour, markersize=5, markerfacecolor="white")
    axes.axvline(0.5, color="tab:green", linestyle=":", label="half an ulp: rounded once")
    axes.set_xscale("log")
    axes.set_yticks(range(len(lines)), [f"{quantity}\n{dtype}" for dtype, quantity in lines], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(f"error in ulp of the type: worst (filled), mean (hollow); below {FLOOR:g} drawn there")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")


def _draw_weights(axes: Axes, weights: Sequence[WeightError]) -> None:
    rivals = iter(RIVALS)
    for call in dict.fromkeys(e.call for e in weights):
        mine = [e for e in weights if e.call == call]
        ours = "ours" in call
        colour = ("tab:orange" if "torch" in call else "tab:blue") if ours else next(rivals)
        style = ("-" if "fast" in call else "--") if ours else ":"
        axes.plot(
            [e.chunks for e in mine],
            [e.relative for e in mine],
            style,
            color=colour,
            marker="o" if ours else "s",
            markersize=4,
            label=call,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("chunks")
    axes.set_ylabel(f"relative error of dL/dlinear_weight, {weights[0].shape} {weights[0].dtype}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12))
