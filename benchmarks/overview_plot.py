"""docs/overview.png: time and memory beside the built-in, at shapes that people know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.table import Line
from examples import palette


@dataclass(frozen=True)
class Pair:
    """Ours and the built-in, measured in turns."""

    door: str  # torch or jax
    title: str
    ours: Line
    built_in: Line


def draw(path: Path, pairs: Sequence[Pair], machine: str) -> None:
    """Write the picture: two bars a pair, the longer of them the whole width."""
    with palette.sizes():
        figure = palette.canvas(0.62 * len(pairs) + 1.2)
        figure.suptitle(f"ours (coloured) and the built-in (gray), float32\n{machine}", x=0.01, ha="left")
        times, memory = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
        faster = [f"  ({pair.built_in.ratio:.1f}x)" for pair in pairs]
        _draw(times, pairs, lambda line: line.microseconds, _time, faster, 1.2)
        _draw(memory, pairs, _bytes, _memory, [""] * len(pairs), 1.3)
        times.set_title("time of a call (how many times as fast)", loc="left")
        memory.set_title("memory beyond its arguments", loc="left")
        times.set_yticks(range(len(pairs)), [pair.title for pair in pairs])
        times.invert_yaxis()
        palette.save(figure, path)


def _draw(
    axes: Axes,
    pairs: Sequence[Pair],
    value: Callable[[Line], float],
    label: Callable[[float], str],
    remarks: Sequence[str],
    room: float,
) -> None:
    for i, pair in enumerate(pairs):
        ours, theirs = value(pair.ours), value(pair.built_in)
        whole = max(ours, theirs)
        colours = palette.of(pair.door, "ours"), palette.TORCH
        bars = axes.barh((i - 0.19, i + 0.19), (ours / whole, theirs / whole), 0.36, color=colours)
        texts = axes.bar_label(bars, [label(ours) + remarks[i], label(theirs)], padding=3)
        texts[0].set_fontweight("bold")
    axes.set_xlim(0, room)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _bytes(line: Line) -> float:
    return (line.workspace_bytes if line.peak_bytes is None else line.peak_bytes) or 0


def _time(microseconds: float) -> str:
    return f"{microseconds / 1e6:.2f} s" if microseconds >= 1e6 else f"{microseconds / 1e3:#.3g}".rstrip(".") + " ms"


def _memory(size: float) -> str:
    if size < 1e6:
        return "under 1 MB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
