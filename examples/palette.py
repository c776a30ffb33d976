"""How every picture of this repository looks: one colour a call, and text that can be read where pages show it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# GitHub and the documentation show a picture about 830 pixels wide, which are 8.6 inches of CSS: a point is one there.
WIDTH = 8.6
SMALLEST = 9.0  # points
DOTS = 200  # to the inch, for screens that have them
OURS_TORCH, OURS_JAX, TORCH, JAX = "#e8710a", "#1f6fb4", "#8c8c8c", "#262626"
LEAN_TORCH, LEAN_JAX = "#f2b35e", "#7fbde6"
SAMPLED_TORCH, SAMPLED_JAX = "#9e3d06", "#0b3a66"
LIMIT = "#262626"
_CALLS = {  # colour, marker
    "torch": (TORCH, "o"),
    "F.linear + F.cross_entropy": (TORCH, "o"),
    "torch, dense targets": (TORCH, "o"),
    "F.linear, dense targets": (TORCH, "o"),
    "F.linear, gathered": (TORCH, "o"),
    "torch.compile": ("#8e44ad", "s"),
    "torch, huge pages": ("#8d5524", "^"),
    "F.linear_cross_entropy, auto": ("#2e9e4f", "D"),
    "F.linear_cross_entropy, long chunks": ("#9bc53d", "v"),
    "F.linear_cross_entropy": ("#2e9e4f", "D"),
    "F.linear_cross_entropy, summed in bfloat16": ("#9bc53d", "v"),
    "F.cross_entropy, micro-batches summed in .grad": (TORCH, "o"),
    "cut-cross-entropy": ("#d81b77", "P"),
    "jax.nn": (JAX, "o"),
    "optax": (JAX, "o"),
    "optax(x @ W.T)": (JAX, "o"),
    "jax.nn(x @ W.T)": (JAX, "o"),
    "optax, dense targets": (JAX, "o"),
    "x @ W.T, gathered": (JAX, "o"),
    "optax, scanned by chunks": (JAX, "o"),
    "tokamax": ("#12a4a4", "X"),
    "integer targets": ("#b8860b", "<"),
}
_SPARE = (("#5c6bc0", ">"), ("#a83232", "p"), ("#546e7a", "h"))  # calls nobody has given a colour


def of(door: str, call: str) -> str:
    """The colour of a call of `torch` or `jax`."""
    if call.startswith("ours"):
        which = 1 if "lean" in call else 2 if "sampled" in call else 0
        ours = {"torch": (OURS_TORCH, LEAN_TORCH, SAMPLED_TORCH), "jax": (OURS_JAX, LEAN_JAX, SAMPLED_JAX)}
        return ours[door][which]
    return _known(call)[0]


def mark(call: str) -> str:
    """The marker of a call."""
    return "o" if call.startswith("ours") else _known(call)[1]


def _known(call: str) -> tuple[str, str]:
    # by its letters, not by turn: a call looks alike in every picture
    return _CALLS.get(call) or _SPARE[sum(map(ord, call)) % len(_SPARE)]


def sizes() -> AbstractContextManager[None]:
    """Draw within: every text has at least `SMALLEST` points."""
    small = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize"), SMALLEST)
    large = {"font.size": 9.5, "axes.titlesize": 10, "axes.labelsize": 9.5, "figure.titlesize": 11.5}
    sizes: Any = {**small, **large, "axes.titleweight": "bold", "axes.axisbelow": True}
    return matplotlib.rc_context(sizes)


def canvas(height: float) -> Figure:
    """An empty picture as wide as a page."""
    return Figure(figsize=(WIDTH, height), dpi=DOTS, layout="constrained")


def plain(axes: Axes) -> None:
    """No box, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def logarithmic(axis: XAxis | YAxis, low: float, high: float) -> None:
    """A scale of tens from `low` to `high`, with numbers at 1, 2 and 5 where there would be few at 1."""
    if isinstance(axis, XAxis):
        axis.axes.set(xscale="log", xlim=(low, high))
    else:
        axis.axes.set(yscale="log", ylim=(low, high))
    few = high / low < 50
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=6 if few else 4))
    axis.set_major_formatter(
        lambda x, _: f"{x:g}" if 1e-3 <= x < 1e5 else f"{x:.0e}".replace("e+0", "e").replace("e-0", "e-")
    )
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> None:
    """Write the picture, its folder made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
