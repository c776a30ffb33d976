"""What was measured: one line a call, kept as CSV per device, shown as a table per shape and type."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import records
from benchmarks.timing import Turns

COPY, GEMMS, GEMMS_OF_PAIR, READING, OURS = "copy", "three matmuls", "four matmuls", "rows read", "ours"
OURS_SAMPLED = "ours, sampled"  # the head's exact loss with a gradient at K points
LIMITS = (COPY, GEMMS, GEMMS_OF_PAIR, READING)


@dataclass(frozen=True)
class Line:
    """One call's figures: medians over the rounds, each quotient taken within its round."""

    device: str
    threads: int
    framework: str
    op: str
    dtype: str
    shape: str
    call: str  # ours, the limit's, or the rival's name
    microseconds: float
    ratio: float  # its time / ours
    ratio_low: float  # the quartiles of that
    ratio_high: float
    limits: float  # its time / that of the limit: copying the logits, the bare matmuls, or rows of the weight read
    work: int  # the bytes that must be read and written, or the matmuls' floating-point operations
    share: float  # its work by its time, of the limit's work by the limit's time
    peak_bytes: int | None  # resident, beyond the arguments
    workspace_bytes: int | None  # in arrays beyond arguments and gradients
    frozen_bytes: int | None  # that with linear_weight frozen
    rounds: int
    repeats: int  # calls within a round
    others: float | None  # cores that other programs kept busy meanwhile

    @property
    def cell(self) -> tuple[Any, ...]:
        """What is measured together."""
        return cell_of(asdict(self))


def rivals(cell: Iterable[Line]) -> list[Line]:
    """The calls that are not ours."""
    return [line for line in cell if not line.call.startswith(OURS) and line.call not in LIMITS]


def cell_of(about: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of what is measured together; another version of a framework measures the same cell."""
    framework = about["framework"].split()[0]
    return (framework, *(about[name] for name in ("device", "threads", "op", "dtype", "shape")))


def lines(
    about: Mapping[str, Any],
    turns: Turns,
    memory: Mapping[str, Mapping[str, int | None]],
    *,
    limit: str,
    work: Mapping[str, int],
) -> list[Line]:
    """A cell's lines from its rounds; what `memory` does not know of a call is None."""
    found = []
    for name, times in turns.seconds.items():
        ratios = _quotients(times, turns.seconds[OURS])
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        known = memory.get(name, {})
        limits = statistics.median(_quotients(times, turns.seconds[limit]))
        found.append(
            Line(
                **about,
                call=name,
                microseconds=_short(statistics.median(times) * 1e6),
                ratio=_short(statistics.median(ratios)),
                ratio_low=_short(low),
                ratio_high=_short(high),
                limits=_short(limits),
                work=work[name],
                share=_short(work[name] / work[limit] / limits),
                peak_bytes=known.get("peak_bytes"),
                workspace_bytes=known.get("workspace_bytes"),
                frozen_bytes=known.get("frozen_bytes"),
                rounds=len(times),
                repeats=turns.repeats[name],
                others=None if turns.others is None else round(turns.others, 2),
            )
        )
    return found


def _quotients(times: Iterable[float], others: Iterable[float]) -> list[float]:
    return [a / b for a, b in zip(times, others, strict=True)]


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def file_of(device: str, folder: Path) -> Path:
    """The device's CSV."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.csv"


def keep(new: Sequence[Line], file: Path, *, refused: Iterable[tuple[Any, ...]] = ()) -> None:
    """Put the lines in the file; a cell measured again, or refused, loses what it was."""
    replaced = {line.cell for line in new} | set(refused)
    known = [] if not file.exists() else [line for line in read(file) if line.cell not in replaced]
    records.write(Line, [*known, *new], file)


def read(file: Path) -> list[Line]:
    """The lines of a CSV."""
    return records.read(Line, file)


def machine(lines: Sequence[Line]) -> str:
    """Whose figures these are."""
    threads = max(line.threads for line in lines)
    return f"{lines[0].device}, {threads} thread{'s' if threads > 1 else ''}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a page."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines)


def show(title: str, cells: Sequence[list[Line]], logits_bytes: int) -> Table:
    """One shape and type: an op a row, and one more for each further rival."""
    table = _titled(title, cells)
    for name in ("", "op"):
        table.add_column(name, no_wrap=True)
    for name in ("rival / ours (quartiles)", "ours", "in copies", "least bytes", "of copy speed", "peak, ours : rival"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        ours = next(line for line in cell if line.call == OURS)
        for i, rival in enumerate(rivals(cell) or [None]):
            ratio = (
                ""
                if rival is None
                else f"{rival.call} {rival.ratio:.2f} ({rival.ratio_low:.2f}-{rival.ratio_high:.2f})"
            )
            figures = (_time(ours.microseconds), f"{ours.limits:.2f}", _size(ours.work), f"{ours.share:.0%}")
            both = [line for line in (ours, rival) if line is not None and line.peak_bytes is not None]
            peak = " : ".join(f"{(line.peak_bytes or 0) / logits_bytes:.1f}" for line in both)
            first = (ours.framework.split()[0], ours.op) if i == 0 else ("", "")
            table.add_row(*first, ratio, *(figures if i == 0 else [""] * 4), peak)
    return table


def show_head(title: str, cells: Sequence[list[Line]]) -> Table:
    """One op on one shape and type of the linear head: a call a row."""
    table = _titled(title, cells)
    for name in ("", "call"):
        table.add_column(name, no_wrap=True)
    reads = any(line.call == READING for cell in cells for line in cell)
    work = ("bytes", "of reading's speed") if reads else ("flops", "of matmul speed")
    columns = ("time", "its time / ours (quartiles)", *work, "workspace", "weight frozen")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        for i, line in enumerate(cell):
            times = f"{line.ratio:.2f} ({line.ratio_low:.2f}-{line.ratio_high:.2f})"
            memory = ("" if size is None else _size(size) for size in (line.workspace_bytes, line.frozen_bytes))
            framework = "" if i else line.framework.split()[0]
            table.add_row(
                framework, line.call, _time(line.microseconds), times, f"{line.work:.3g}", f"{line.share:.0%}", *memory
            )
    return table


def _titled(title: str, cells: Sequence[list[Line]]) -> Table:
    others = statistics.median([cell[0].others or 0.0 for cell in cells] or [0.0])
    if others > 0.1:
        title += f"; other programs kept {others:.1f} cores busy: not to be trusted"
    return Table(title=title, title_justify="left", header_style="")


def _time(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 1e3 else f"{microseconds:.3g} us"


def _size(count: float) -> str:
    steps = 0
    while count >= 1e3 and steps < 3:
        count, steps = count / 1e3, steps + 1
    return f"{count:.3g} {('B', 'kB', 'MB', 'GB')[steps]}"
