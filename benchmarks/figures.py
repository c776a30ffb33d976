"""`make figures`: the tables and pictures of README and docs, from the CSVs that the other commands keep.

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->` and is written anew; nothing else of a page is
touched, and nothing is measured. `tests/test_readme.py` fails where a page shows other numbers than the CSVs hold.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import accuracy_plot, records, speed_plot, table
from benchmarks.accuracy import ALL, CALLS, QUANTITIES, UNITS, Error
from benchmarks.scaling import CROSSOVERS, Crossover
from benchmarks.table import LIMITS, Line, rivals
from benchmarks.weight_error import WeightError
from examples import confident

RESULTS = Path("benchmarks", "results")
DEVICE = "intel-xeon-processor.csv"  # whose speed the pages show
PAGES = ("README.md", "docs/index.md", "docs/accuracy.md", "docs/performance.md")
LARGE, HEAD = "1024x32000", "2048x576@49152"


@dataclass(frozen=True)
class Kept:
    """All that was measured."""

    speed: list[Line]
    errors: list[Error]
    weights: list[WeightError]
    trainings: list[confident.Point]
    crossovers: list[Crossover]

    def cells(self, **about: str) -> list[list[Line]]:
        """Lines measured together, ours first, with all cores."""
        threads = max(line.threads for line in self.speed)
        cells: dict[tuple, list[Line]] = {}
        for line in self.speed:
            if line.threads == threads and all(getattr(line, name) == value for name, value in about.items()):
                cells.setdefault(line.cell, []).append(line)
        return list(cells.values())

    def worst(self, quantity: str, dtype: str, call: str) -> Error:
        """Over all cases."""
        key = (quantity, dtype, call, ALL)
        return next(e for e in self.errors if (e.quantity, e.dtype, e.call, e.case) == key)


def main() -> int:
    """Write tables and pictures."""
    kept = read(RESULTS)
    for name in PAGES:
        page = Path(name)
        page.write_text(filled(page.read_text(), kept))
        print(f"{page} written")
    docs = Path("docs")
    speed_plot.draw(docs / "speed.png", [cell for cell in kept.cells() if len(rivals(cell))])
    accuracy_plot.draw(docs / "accuracy.png", kept.errors, kept.weights)
    confident.draw(docs / "confident.png", kept.trainings)
    return 0


def read(folder: Path) -> Kept:
    """The CSVs of a folder."""
    crossings = folder / "scaling" / CROSSOVERS
    return Kept(
        table.read(folder / DEVICE),
        records.read(Error, folder / "accuracy.csv"),
        records.read(WeightError, folder / "weight_error.csv"),
        records.read(confident.Point, folder / "confident.csv"),
        records.read(Crossover, crossings) if crossings.exists() else [],
    )


def filled(page: str, kept: Kept) -> str:
    """The page with each of its tables as the CSVs have it."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]](kept)}\n{match[3]}"

    return re.sub(r"(<!-- begin: (\w+) -->)\n.*?(<!-- end: \2 -->)", block, page, flags=re.DOTALL)


def overview(kept: Kept) -> str:
    """The README's first table: speed, memory and error of each op at one large shape."""
    rows = []
    for name, op, quantity in (
        ("softmax", "softmax", "softmax"),
        ("log_softmax", "log_softmax", "log_softmax"),
        ("cross_entropy", "cross_entropy", "loss"),
        ("cross_entropy and its gradient", "cross_entropy_grad", "gradient"),
        ("the same, `inplace_backward=True`", "cross_entropy_grad_inplace", "gradient"),
    ):
        (torch,) = _cells_of(kept, "torch", op, LARGE)
        jax = _cells_of(kept, "jax", op.replace("_grad", "_value_and_grad"), LARGE)
        eager, compiled = (_line(torch, call) for call in ("torch", "torch.compile"))
        jax_ratio = _ratio(rivals(jax[0])[0]) if jax else ""
        memory = " : ".join(_mb(line.peak_bytes) for line in (torch[0], eager, compiled) if line)
        errors = [_ulp(kept.worst(quantity, "float32", call).worst_ulp) for call in ("torch_ops", "torch")]
        rows.append((name, LARGE, _ratio(eager), _ratio(compiled), jax_ratio, memory, " : ".join(errors)))
    (torch,), (jax,) = (_cells_of(kept, door, "linear_cross_entropy", HEAD) for door in ("torch", "jax"))
    eager, compiled = (_line(torch, call) for call in ("F.linear + F.cross_entropy", "torch.compile"))
    memory = " : ".join(_mb(line.workspace_bytes) for line in (torch[0], eager, compiled) if line)
    rows.append(("linear_cross_entropy", HEAD, *map(_ratio, (eager, compiled, rivals(jax)[0])), memory, ""))
    for rival in rivals(torch):
        if rival.call.startswith("F.linear_cross_entropy"):
            memory = f"{_mb(torch[0].workspace_bytes)} : {_mb(rival.workspace_bytes)}"
            rows.append((f"the same beside {rival.call}", HEAD, _ratio(rival), "", "", memory, ""))
    times = ("PyTorch's time / ours", "torch.compile's", "JAX's")
    return _markdown(("float32", "shape", *times, "memory, MB", "worst error, ulp"), rows)


def _line(cell: Iterable[Line], call: str) -> Line | None:
    return next((line for line in cell if line.call == call), None)


def _cells_of(kept: Kept, door: str, op: str, shape: str, dtype: str = "float32") -> list[list[Line]]:
    return [c for c in kept.cells(op=op, shape=shape, dtype=dtype) if c[0].framework.startswith(door)]


def accuracy(kept: Kept) -> str:
    """Worst and mean errors, a quantity and type a row."""
    rows = []
    for dtype in UNITS:
        for quantity in QUANTITIES:
            errors = [kept.worst(quantity, dtype, call) for call in CALLS]
            rows.append((quantity, dtype, *(f"{_ulp(e.worst_ulp)} ({_ulp(e.mean_ulp)})" for e in errors)))
    return _markdown(("worst (mean)", "", *CALLS), rows)


def weights(kept: Kept) -> str:
    """What chunks do to a weight's gradient, a call a row."""
    counts = sorted({e.chunks for e in kept.weights})
    rows = []
    for call in dict.fromkeys(e.call for e in kept.weights):
        mine = {e.chunks: e.relative for e in kept.weights if e.call == call}
        rows.append((call, *(_power(mine[count], 2) for count in counts)))
    return _markdown(("chunks", *map(str, counts)), rows)


def trainings(kept: Kept) -> str:
    """The collapse of the softmax at a few steps."""
    last = max(point.step for point in kept.trainings)
    due = [step for step in sorted({p.step for p in kept.trainings}) if step and step * 5 % last == 0]
    rows = [
        (
            f"{point.train_share:.0%}".replace("%", " %"),
            point.loss,
            str(point.step),
            _power(point.train_loss, 2),
            *(f"{100 * share:.1f} %" for share in (point.zero_target_gradient, point.zero_gradient)),
            *(f"{100 * share:.1f} %" for share in (point.train_accuracy, point.test_accuracy)),
        )
        for point in kept.trainings
        if point.step in due
    ]
    rows.sort(key=lambda row: (row[0], list(confident.LOSSES).index(row[1])))
    head = (
        "of all pairs",
        "loss",
        "step",
        "training loss, nats",
        "gradient 0 at the target",
        "in every class",
        "right, training",
    )
    return _markdown((*head, "right, test"), rows)


def speed(kept: Kept) -> str:
    """Every shape and op: each rival's time by ours."""
    shapes = list(dict.fromkeys((line.shape, line.dtype) for line in kept.speed if "@" not in line.shape))
    rows = []
    for door in ("torch", "jax"):
        for op in dict.fromkeys(line.op for line in kept.speed):
            mine = [c for c in kept.cells(op=op) if c[0].framework.startswith(door)]
            cells = {(c[0].shape, c[0].dtype): c for c in mine if (c[0].shape, c[0].dtype) in shapes}
            for call in dict.fromkeys(line.call for cell in cells.values() for line in rivals(cell)):
                found = {at: _ratio(line) for at, cell in cells.items() for line in cell if line.call == call}
                rows.append((f"`{op}`", call, *(found.get(at, "") for at in shapes)))
    return _markdown(("its time / ours", "", *(f"{shape} {dtype}" for shape, dtype in shapes)), rows)


def heads(kept: Kept) -> str:
    """The linear head: each call by ours and by three bare matmuls."""
    rows = [
        (
            line.framework.split()[0],
            f"{line.shape} {line.dtype}",
            line.call,
            _ratio(line),
            f"{line.share:.0%}".replace("%", " %"),
            _mb(line.workspace_bytes),
            _mb(line.frozen_bytes),
        )
        for cell in kept.cells(op="linear_cross_entropy")
        for line in cell
        if line.call not in LIMITS
    ]
    head = ("", "shape", "call", "its time / ours", "of matmul speed", "workspace, MB", "weight frozen, MB")
    return _markdown(head, rows)


def scaling(kept: Kept) -> str:
    """Who is faster below which size."""
    if not kept.crossovers:
        return "Not measured yet: `make scaling`."
    rows = [
        (
            c.framework.split()[0],
            str(c.threads),
            f"`{c.op}`",
            c.call,
            c.fixed,
            c.below,
            "every size" if c.size is None else f"{c.grows} = {c.size}",
        )
        for c in kept.crossovers
    ]
    return "![Time and memory by N, V and D](scaling.png)\n\n" + _markdown(
        ("", "cores", "op", "beside", "shape", "faster", "below"), rows
    )


TABLES: dict[str, Callable[[Kept], str]] = {
    f.__name__: f for f in (overview, accuracy, weights, trainings, speed, heads, scaling)
}


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines)


def _ratio(line: Line | None) -> str:
    return "" if line is None else f"{line.ratio:.2f}"


def _mb(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e6:.0f}" if size >= 1e8 else f"{size / 1e6:.2g}"


def _ulp(value: float) -> str:
    if 1 <= value < 1e3:
        return f"{value:.3g}"
    return f"{value:.2g}" if 0.01 <= value < 1 else _power(value, 2)


def _power(value: float, digits: int) -> str:
    digit, _, power = f"{value:.{digits - 1}e}".partition("e")
    return f"{digit}e{int(power)}" if value else "0"


if __name__ == "__main__":
    sys.exit(main())
