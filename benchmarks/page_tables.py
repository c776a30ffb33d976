"""What `make figures` writes into pages: a function for each table, from what was measured to Markdown."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks import fresh as fresh_memory
from benchmarks import gpu_lines, leaderboard, sample_error, table
from benchmarks.accuracy import ALL, CALLS, QUANTITIES, UNITS, Error
from benchmarks.features import Answer
from benchmarks.overview_plot import Pair
from benchmarks.sample_error import SampleError
from benchmarks.scaling import crossings
from benchmarks.table import LIMITS, Line, markdown, rivals
from benchmarks.weight_error import WeightError
from examples import confident, sampled_gradient

LARGE, LARGER, HEAD, SMALL = "1024x32000", "512x128256", "2048x576@49152", "1x50"
GRADIENT = "cross_entropy_grad"


@dataclass(frozen=True)
class Machine:
    """What `make bench` has kept on one machine."""

    lines: list[Line]

    @property
    def name(self) -> str:
        """Device and threads."""
        return table.machine(self.lines)

    def cells(self, **about: str) -> list[list[Line]]:
        """Lines measured together, ours first, with all cores."""
        threads = max(line.threads for line in self.lines)
        cells: dict[tuple, list[Line]] = {}
        for line in self.lines:
            if line.threads == threads and all(getattr(line, name) == value for name, value in about.items()):
                cells.setdefault(line.cell, []).append(line)
        return list(cells.values())

    def cell(self, door: str, op: str, shape: str, dtype: str = "float32") -> list[Line]:
        """One framework's; empty where it was not measured."""
        found = self.cells(op=op, shape=shape, dtype=dtype)
        return next((cell for cell in found if cell[0].framework.startswith(door)), [])


@dataclass(frozen=True)
class Kept:
    """All that was measured; the first machine is the one that README shows."""

    machines: list[Machine]
    scaling: list[Line]
    errors: list[Error]
    weights: list[WeightError]
    samples: list[SampleError]
    trainings: list[confident.Point]
    gradients: list[sampled_gradient.Point]
    moved: list[sampled_gradient.Moved]
    answers: list[Answer]
    devices: list[list[gpu_lines.DeviceLine]]  # each one's of `python -m benchmarks.gpu`
    fresh: list[list[fresh_memory.Fresh]]  # each machine's

    @property
    def shown(self) -> Machine:
        """README's."""
        return self.machines[0]

    def worst(self, quantity: str, dtype: str, call: str) -> Error:
        """Over all cases."""
        key = (quantity, dtype, call, ALL)
        return next(e for e in self.errors if (e.quantity, e.dtype, e.call, e.case) == key)


PAIRS = (  # of the first picture
    ("torch", "PyTorch: softmax\n1024 x 32,000 (Llama 2's classes)", "softmax", LARGE),
    ("torch", "PyTorch: cross_entropy and gradient\n1024 x 32,000 (Llama 2's classes)", GRADIENT, LARGE),
    ("torch", "PyTorch: the same, inplace_backward\n512 x 128,256 (Llama 3's classes)", f"{GRADIENT}_inplace", LARGER),
    ("torch", "PyTorch: linear_cross_entropy\n2048 x 576 @ 49,152 (SmolLM's head)", "linear_cross_entropy", HEAD),
    (
        "jax",
        "JAX: cross_entropy and gradient\n1024 x 32,000 (Llama 2's classes)",
        "cross_entropy_value_and_grad",
        LARGE,
    ),
    ("jax", "JAX: linear_cross_entropy\n2048 x 576 @ 49,152 (SmolLM's head)", "linear_cross_entropy", HEAD),
)


def is_whole(machine: Machine) -> bool:
    """Does it have all that README and its picture show?"""
    cells = [machine.cell(door, op, shape) for door, _, op, shape in PAIRS] + [machine.cell("torch", GRADIENT, SMALL)]
    return all(cell and rivals(cell) for cell in cells)


def pairs(kept: Kept) -> list[Pair]:
    """The first picture's bars."""
    cells = [(door, title, kept.shown.cell(door, op, shape)) for door, title, op, shape in PAIRS]
    return [Pair(door, title, cell[0], rivals(cell)[0]) for door, title, cell in cells]


def machine(kept: Kept) -> str:
    """The first picture's caption."""
    loss, head, small = (
        kept.shown.cell("torch", op, shape)
        for op, shape in ((GRADIENT, LARGE), ("linear_cross_entropy", HEAD), (GRADIENT, SMALL))
    )
    versions = loss[0].framework.split("+")[0], kept.shown.cell("jax", "softmax", LARGE)[0].framework
    compiled = [_ratio(_line(cell, "torch.compile")) for cell in (loss, head)]
    beside = f"`torch.compile`, not drawn, takes {compiled[0]} and {compiled[1]} of our time in rows 2 and 4. "
    times = _first(small)
    home = "Small calls are the built-in's home: on" if times and times.ratio < 1 else "On"
    errors = [_ulp(kept.worst("gradient", "float32", call).worst_ulp) for call in ("torch_ops", "torch")]
    said = (
        f"{kept.shown.name}, {versions[0]}, {versions[1]}, float32. The built-ins: `torch.softmax`, `F.cross_entropy`, "
        f"`F.linear` before it, optax under jit. {beside if all(compiled) else ''}"
        f"{home} one row of 50 classes `F.cross_entropy` takes {_ratio(times)} of our time. "
        f"Worst error of the gradient: ours {errors[0]} ulp, PyTorch's {errors[1]} (no correct digit)."
    )
    return textwrap.fill(said, 120, break_on_hyphens=False, break_long_words=False)


def overview(kept: Kept) -> str:
    """Speed, memory and error of each op at one large shape, on the machine that README shows."""
    rows = []
    for name, op, quantity in (
        ("softmax", "softmax", "softmax"),
        ("log_softmax", "log_softmax", "log_softmax"),
        ("cross_entropy", "cross_entropy", "loss"),
        ("cross_entropy and its gradient", GRADIENT, "gradient"),
        ("the same, `inplace_backward=True`", f"{GRADIENT}_inplace", "gradient"),
    ):
        torch = kept.shown.cell("torch", op, LARGE)
        jax = kept.shown.cell("jax", op.replace("_grad", "_value_and_grad"), LARGE)
        eager, compiled = (_line(torch, call) for call in ("torch", "torch.compile"))
        memory = (_mb(line and line.peak_bytes) for line in (torch[0], eager, compiled))
        errors = (_ulp(kept.worst(quantity, "float32", call).worst_ulp) for call in ("torch_ops", "torch"))
        rows.append((name, LARGE, _ratio(eager), _ratio(compiled), _ratio(_first(jax)), *memory, *errors))
    torch, jax = (kept.shown.cell(door, "linear_cross_entropy", HEAD) for door in ("torch", "jax"))
    eager, compiled = (_line(torch, call) for call in ("F.linear + F.cross_entropy", "torch.compile"))
    memory = (_mb(line and line.workspace_bytes) for line in (torch[0], eager, compiled))
    rows.append(("linear_cross_entropy", HEAD, *map(_ratio, (eager, compiled, _first(jax))), *memory, "", ""))
    for rival in rivals(torch):
        if rival.call.startswith("F.linear_cross_entropy"):
            memory = (_mb(torch[0].workspace_bytes), _mb(rival.workspace_bytes))
            rows.append((f"the same beside {rival.call}", HEAD, _ratio(rival), "", "", *memory, "", "", ""))
    times = ("PyTorch's time / ours", "torch.compile's", "JAX's")
    memory = ("our memory, MB", "PyTorch's", "torch.compile's")
    head = ("float32", "shape", *times, *memory, "our worst error, ulp", "PyTorch's")
    return f"{kept.shown.name}:\n\n{markdown(head, rows)}"


def _line(cell: Iterable[Line], call: str) -> Line | None:
    return next((line for line in cell if line.call == call), None)


def _first(cell: Iterable[Line]) -> Line | None:
    return next(iter(rivals(cell)), None)


def accuracy(kept: Kept) -> str:
    """Worst and mean errors, a quantity and type a row."""
    rows = []
    for dtype in UNITS:
        for quantity in QUANTITIES:
            errors = [kept.worst(quantity, dtype, call) for call in CALLS]
            rows.append((quantity, dtype, *(f"{_ulp(e.worst_ulp)} ({_ulp(e.mean_ulp)})" for e in errors)))
    return markdown(("worst (mean)", "", *CALLS), rows)


def weights(kept: Kept) -> str:
    """What chunks do to a weight's gradient, a call a row."""
    counts = sorted({e.chunks for e in kept.weights})
    rows = []
    for call in dict.fromkeys(e.call for e in kept.weights):
        mine = {e.chunks: e.relative for e in kept.weights if e.call == call}
        rows.append((call, *(_power(mine[count], 2) for count in counts)))
    return markdown(("chunks", *map(str, counts)), rows)


def samples(kept: Kept) -> str:
    """What points do to a head's gradient, a call's gradient a row."""
    counts = sorted({e.samples for e in kept.samples})
    found = [(call, quantity, *cells) for call, quantity, cells in sample_error.rows(kept.samples)]
    return markdown(("bias, variance, noise", "", *(f"K = {count}" for count in counts)), found)


def sampled(kept: Kept) -> str:
    """Where each gradient's trainings are at the last step, and how far its rare rows have come."""
    last = max(point.step for point in kept.gradients)
    ends = [point for point in kept.gradients if point.step == last]
    rarest = max(m.first_rank for m in kept.moved)
    rows = []
    for name in dict.fromkeys(point.gradient for point in ends):
        mine = [point for point in ends if point.gradient == name]
        moved = next(m for m in kept.moved if (m.gradient, m.step, m.first_rank) == (name, last, rarest))
        losses = (" / ".join(f"{getattr(p, field):.4g}" for p in mine) for field in ("train_loss", "held_out_loss"))
        time = 1e3 * statistics.fmean(p.processor_seconds for p in mine)
        ratio = sampled_gradient.of_exact(kept.moved, moved)
        rows.append((name, *losses, f"{time:.0f}", f"{ratio:.2f}"))
    seeds = " / ".join(f"seed {seed}" for seed in dict.fromkeys(point.seed for point in ends))
    head = ("gradient", f"training loss, {seeds}", f"held-out loss, {seeds}", "ms of the processor a step")
    return markdown((f"step {last}: {head[0]}", *head[1:], "rare rows have moved, of exact's"), rows)


def trainings(kept: Kept) -> str:
    """The collapse of the softmax at a few steps."""
    last = max(point.step for point in kept.trainings)
    due = [step for step in sorted({p.step for p in kept.trainings}) if step and step * 5 % last == 0]
    rows = [
        (
            _percent(point.train_share, 0),
            point.loss,
            str(point.step),
            _power(point.train_loss, 2),
            *(_percent(share, 1) for share in (point.zero_target_gradient, point.zero_gradient)),
            *(_percent(share, 1) for share in (point.train_accuracy, point.test_accuracy)),
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
    return markdown((*head, "right, test"), rows)


def speed(kept: Kept) -> str:
    """Every machine's shapes and ops: each rival's time by ours."""
    return "\n\n".join(f"### {one.name}\n\n{_speed(one)}" for one in kept.machines)


def _speed(one: Machine) -> str:
    shapes = list(dict.fromkeys((line.shape, line.dtype) for line in one.lines if "@" not in line.shape))
    rows = []
    for door in ("torch", "jax"):
        for op in dict.fromkeys(line.op for line in one.lines):
            mine = [c for c in one.cells(op=op) if c[0].framework.startswith(door)]
            cells = {(c[0].shape, c[0].dtype): c for c in mine if (c[0].shape, c[0].dtype) in shapes}
            for call in dict.fromkeys(line.call for cell in cells.values() for line in rivals(cell)):
                found = {at: _ratio(line) for at, cell in cells.items() for line in cell if line.call == call}
                rows.append((f"`{op}`", call, *(found.get(at, "") for at in shapes)))
    return markdown(("its time / ours", "", *(f"{shape} {dtype}" for shape, dtype in shapes)), rows)


def heads(kept: Kept) -> str:
    """The linear head on every machine: each call by ours and by three bare matmuls."""
    return "\n\n".join(f"### The head: {one.name}\n\n{_heads(one)}" for one in kept.machines)


def _heads(one: Machine) -> str:
    rows = [
        (
            line.framework.split()[0],
            f"{line.shape} {line.dtype}",
            line.call,
            _ratio(line),
            _percent(line.share, 0),
            _mb(line.workspace_bytes),
            _mb(line.frozen_bytes),
        )
        for cell in one.cells(op="linear_cross_entropy")
        for line in cell
        if line.call not in LIMITS
    ]
    head = ("", "shape", "call", "its time / ours", "of matmul speed", "workspace, MB", "weight frozen, MB")
    return markdown(head, rows)


def classes(kept: Kept) -> str:
    """K classes a row on every machine that has them: each call by ours, and by what limits it."""
    found = [(one, rows) for one in kept.machines if (rows := _classes(one))]
    head = ("", "op", "shape", "call", "its time / ours", "in its limit's")
    blocks = [f"### K classes a row: {one.name}\n\n{markdown(head, rows)}" for one, rows in found]
    return "\n\n".join(blocks) or "Not measured yet: `make bench`."


def _classes(one: Machine) -> list[tuple[str, ...]]:
    return [
        (
            line.framework.split()[0],
            f"`{op}`",
            f"{line.shape} {line.dtype}",
            line.call,
            _ratio(line),
            f"{line.limits:.2f}",
        )
        for op in ("linear_cross_entropy_sparse", "linear_at")
        for cell in one.cells(op=op)
        for line in cell
        if line.call not in LIMITS
    ]


def scaling(kept: Kept) -> str:
    """Who is faster below which size."""
    if not kept.scaling:
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
        for c in crossings(kept.scaling)
    ]
    found = markdown(("", "cores", "op", "beside", "shape", "faster", "below"), rows)
    return f"![Time and memory by N, V, D and K](scaling.png)\n\n{table.machine(kept.scaling)}:\n\n{found}"


def fresh(kept: Kept) -> str:
    """Large results in fresh memory, on every machine."""
    blocks = []
    for lines in kept.fresh:
        name = f"{lines[0].device}, {lines[0].threads} threads"
        blocks.append(f"{name}:\n\n{markdown(fresh_memory.HEAD, fresh_memory.told(lines))}")
    return "\n\n".join(blocks)


def gpu(kept: Kept) -> str:
    """Our calls on each device."""
    blocks = []
    for lines in kept.devices:
        frameworks = ", ".join(dict.fromkeys(line.framework for line in lines))
        rows = [[f"{part}: {op}" if part == "jax" else op, *rest] for part, op, *rest in gpu_lines.told(lines)]
        blocks.append(f"{lines[0].device}, {frameworks}:\n\n{markdown(gpu_lines.HEAD[1:], rows)}")
    return "\n\n".join(blocks)


TABLES: dict[str, Callable[[Kept], str]] = {
    **{f.__name__: f for f in (machine, overview, accuracy, weights, samples, trainings, sampled)},
    **{f.__name__: f for f in (speed, heads, classes, scaling, fresh, gpu)},
    "features": lambda kept: leaderboard.features(kept.answers),
    "refusals": lambda kept: leaderboard.refusals(kept.answers),
    "peers": lambda kept: leaderboard.peers(kept.answers, [one.lines for one in kept.machines]),
}


def _ratio(line: Line | None) -> str:
    return "" if line is None else f"{line.ratio:.2f}"


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f} %"


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
