"""What was measured on a device: one line a call, kept as CSV, shown as a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks import records
from benchmarks.table import OURS

__all__ = [
    "COPY",
    "HEAD",
    "LIMITS",
    "MATMULS",
    "OURS",
    "WRONG",
    "DeviceLine",
    "keep",
    "lines",
    "show",
    "summary",
    "told",
]

WRONG = "not timed, its answer is wrong"
COPY, MATMULS = LIMITS = "copy", "three matmuls"


@dataclass(frozen=True)
class DeviceLine:
    """One call's figures: medians over the rounds, each quotient taken within its round."""

    device: str
    framework: str
    part: str  # rows, heads, jax or chunks
    op: str
    dtype: str
    shape: str
    call: str  # ours and its variants, the limit's or a rival's name
    chunk: int | None  # rows (fast) or classes (lean) at a time; None: the default
    milliseconds: float | None
    ratio: float | None  # its time / ours
    limits: float | None  # its time / the limit's for its work: a copy of its bytes, or bare matmuls of its flops
    workspace_bytes: int | None  # beyond arguments and answers
    rounds: int
    remark: str  # why there are no figures, or what is wrong with a rival's answer


def lines(
    about: Mapping[str, Any],
    times: Mapping[str, Sequence[float]],
    *,
    ours: str,
    limit: str,
    work: Mapping[str, float],
    chunks: Mapping[str, int | None] | None = None,
    memory: Mapping[str, int | None] | None = None,
    remarks: Mapping[str, str] | None = None,
) -> list[DeviceLine]:
    """A cell's lines from its rounds, `work` in units of the limit's; then remarks on calls that could not be made."""
    found, remarks = [], remarks or {}
    for name, these in times.items() if ours in times else ():  # or ours had no room, and says so
        limits = _quotient(these, times[limit]) / work[name]
        size = (memory or {}).get(name)
        chunk = (chunks or {}).get(name)
        figures = (_short(statistics.median(these)), _short(_quotient(these, times[ours])), _short(limits))
        found.append(
            DeviceLine(
                **about, call=name, chunk=chunk, **_figures(*figures, size, len(these)), remark=remarks.get(name, "")
            )
        )
    for name, why in remarks.items():
        if name not in times or ours not in times:
            found.append(DeviceLine(**about, call=name, chunk=None, **_figures(None, None, None, None, 0), remark=why))
    return found


def keep(new: Sequence[DeviceLine], file: Path) -> None:
    """Put the lines in the file; what was measured of the same part, op, type and shape before is replaced."""
    replaced = {_cell(line) for line in new}
    old = records.read(DeviceLine, file) if file.exists() else []
    known = [line for line in old if _cell(line) not in replaced]
    records.write(DeviceLine, [*known, *new], file)


def show(cell: Sequence[DeviceLine]) -> Table | str:
    """A head's cell as a table, a call a row; a row op's as one line."""
    first = cell[0]
    title = f"{first.part}: {first.op} {first.dtype} {first.shape}"
    if first.part == "rows":
        if first.ratio is None:
            return f"{title}: {escape(first.remark)}"
        ours, *rivals = (line for line in cell if line.ratio is not None)
        others = ", ".join(f"{line.call} {line.ratio}" for line in rivals)
        return f"{title}: {ours.milliseconds} ms, {ours.limits} of the limit's time; beside ours {others}"
    remarks = "\n".join(f"{line.call}: {line.remark}" for line in cell if line.remark)
    table = Table(
        title=title, title_justify="left", header_style="", box=None, caption=escape(remarks), caption_justify="left"
    )
    table.add_column("call")
    for name in ("chunk", "ms", "its time / ours", "its time / the limit's", "workspace, MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in cell:
        if line.milliseconds is None:
            continue
        size = "" if line.workspace_bytes is None else f"{line.workspace_bytes / 2**20:.0f}"
        chunk = "" if line.chunk is None else str(line.chunk)
        table.add_row(line.call, chunk, f"{line.milliseconds:.4g}", f"{line.ratio:.3f}", f"{line.limits:.3f}", size)
    return table


HEAD = ("part", "op", "type", "shape", "call", "ms", "of the limit's speed", "MiB", "the fastest of the others, ms")


def told(found: Sequence[DeviceLine]) -> list[tuple[str, ...]]:
    """What HEAD names of each call of ours but the sweeps', the first of a cell beside the fastest right answer."""
    rows = []
    for cell in _cells(line for line in found if line.part != "chunks"):
        mine = [line for line in cell if line.call.startswith(OURS)]
        others = [one for one in cell if one.milliseconds and not one.remark and one.call not in LIMITS]
        best = min((one for one in others if one not in mine), key=lambda one: one.milliseconds or 0.0, default=None)
        for line in mine:
            about = (line.part, line.op, line.dtype, line.shape, line.call)
            if line.milliseconds is None or line.limits is None:
                rows.append((*about, "", "", "", line.remark))
                continue
            size = "" if line.workspace_bytes is None else f"{line.workspace_bytes / 2**20:.0f}"
            rival = f"{best.milliseconds:.4g} {best.call}" if best and line is mine[0] else ""
            rows.append((*about, f"{line.milliseconds:.4g}", f"{1 / line.limits:.3f}", size, rival))
    return rows


def summary(found: Sequence[DeviceLine]) -> Table:
    """A line for each of our calls."""
    table = Table(title="ours", title_justify="left", header_style="", box=None)
    for i, name in enumerate(HEAD):
        table.add_column(name, no_wrap=i < 8, justify="right" if 5 <= i < 8 else "left")
    for row in told(found):
        table.add_row(*map(escape, row))
    return table


def _cells(found: Iterable[DeviceLine]) -> list[list[DeviceLine]]:
    by: dict[tuple[str, ...], list[DeviceLine]] = {}
    for line in found:
        by.setdefault(_cell(line), []).append(line)
    return list(by.values())


def _figures(
    milliseconds: float | None, ratio: float | None, limits: float | None, size: int | None, rounds: int
) -> dict[str, Any]:
    return {
        "milliseconds": milliseconds,
        "ratio": ratio,
        "limits": limits,
        "workspace_bytes": size,
        "rounds": rounds,
    }


def _cell(line: DeviceLine) -> tuple[str, ...]:
    return line.device, line.part, line.op, line.dtype, line.shape


def _quotient(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def _short(x: float) -> float:
    return float(f"{x:.4g}")
