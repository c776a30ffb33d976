"""Mutants of the Triton kernels in the interpreter: each is a mistake that was made somewhere, and a check sees it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rows.gpu import interpreter

if interpreter.why_not():
    pytest.skip(f"Triton's interpreter: {interpreter.why_not()}", allow_module_level=True)

rows: Any = importlib.import_module("tests.rows.gpu.test_rows")
ops: Any = rows.ops


@pytest.fixture(autouse=True)
def ran() -> Iterator[list[str]]:
    with interpreter.interpreted() as names:
        yield names


WIDE = 1 << 20
ONE: Any = None  # no request: the width is the mutant's

CHECKS: dict[str, Callable[[], None]] = {
    "sure": rows.test_log_softmax_of_a_confident_row,
    "accuracy": lambda: rows.test_ops.test_accuracy(rows.FW, "float32", 100),
    "hard": lambda: rows.loss_by_hand("hard weighted", 65, "all"),
    "soft": lambda: rows.loss_by_hand("soft weighted", 65, "all"),
    "plain soft": lambda: rows.loss_by_hand("soft", 33, "plain"),
    "canonical": lambda: rows.test_rows.test_canonical_targets(rows.FW),
    "masks": lambda: rows.test_masks_of_the_smallest_number("float32", "one", ONE),
    "nan": lambda: rows.test_a_row_of_nan_alone_is_told_from_one_of_masks("one", ONE),
    "confident": lambda: rows.test_ops.test_confident_row_keeps_its_loss_and_gradient(rows.FW, "float32", 0, "hard"),
}
KERNELS = ("arithmetic", "rows", "softmax", "visit", "factors", "gradient", "cross_entropy")
# A mutant of the kernels: what is replaced, and by what; the check that must fail, and the widest block it is run with.
MUTANTS: dict[str, tuple[str, str, str, str, int]] = {
    "padding enters the sums": ("softmax", 'other=-float("inf")', "other=0.0", "accuracy", WIDE),
    "older tiles keep their origin": ("rows", "(rest + top) * carry", "(rest + top)", "accuracy", 32),
    "ties counted once": ("rows", "(ties(total(e, 1), less, top) - 1.0)", "0.0", "accuracy", WIDE),
    "ties of a lane counted once": ("rows", "(times - 1.0) * new_top", "0.0 * new_top", "accuracy", 32),
    "ties of lanes counted once": ("rows", "(ties(everything, less, new_top) - 1.0)", "0.0", "accuracy", 32),
    "lanes keep their origin": ("rows", "tl.sum(rest * carry, axis=2", "tl.sum(rest, axis=2", "accuracy", 32),
    "one lane is the row": ("rows", "tl.reshape(most, ", "tl.reshape(tl.min(m, 2), ", "accuracy", 32),
    "last block unread": ("softmax", "range(0, V, COLS)", "range(0, V - COLS, COLS)", "accuracy", 32),
    "sum term dropped": ("softmax", "total(a * g, 1)", "0.0", "accuracy", WIDE),
    "no pivot": ("softmax", "tl.where(c == 0.0, mean, total(a * g, 1) / whole)", "mean - c", "accuracy", WIDE),
    "no pivot in blocks": ("softmax", "mean = of_row(rest, LANES) / whole", "mean -= c", "accuracy", 32),
    "pivot of another lane": ("softmax", "tl.where(top == highest, at_top, none)", "at_top", "accuracy", 32),
    "upstream's sum dropped": ("softmax", "over(-(others + own), top", "over(0.0 * m, top", "accuracy", WIDE),
    "log_softmax's maximum as all": ("softmax", "confident = rest < 1.0", "confident = rest < 0.0", "sure", WIDE),
    "the same in blocks": ("softmax", "confident = rest < 1.0", "confident = rest < 0.0", "sure", 32),
    "1 + rest instead of log1p": ("arithmetic", "ratio(lost, u, F)", "0.0 * u", "accuracy", WIDE),
    "scale forgotten in the slope": ("arithmetic", "(1.0 + e)) * scale)", "(1.0 + e)))", "hard", WIDE),
    "soft cap's derivative missing": ("arithmetic", "return dz * (4.0 * e", "return dz + 0.0 * (4.0 * e", "hard", WIDE),
    "shift rounded": ("arithmetic", "tl.abs(shift) >= 256.0", "tl.abs(shift) >= 0.0", "accuracy", WIDE),
    "one-hot dropped": (
        "gradient",
        "others * p - d_nll * (q_high + q_low)",
        "(others + d_nll) * p",
        "confident",
        WIDE,
    ),
    "1 subtracted from p": (
        "gradient",
        "tl.where(target_z == m, rest, (top - e_t) + rest)",
        "top + rest - e_t",
        "confident",
        WIDE,
    ),
    "-inf times 0": ("visit", "tl.where(free, tl.zeros_like(d), mass * d)", "mass * d", "canonical", WIDE),
    "entropy's sum not moved": (
        "visit",
        "carry * (ed + by * (old_top + old_rest))",
        "carry * ed",
        "hard",
        32,
    ),
    "entropy's sum not moved among lanes": (
        "visit",
        "carry * (ed + by * (lane_top + lane_rest))",
        "carry * ed",
        "hard",
        32,
    ),
    "-inf carried on": (
        "visit",
        "tl.where(carry > 0.0, carry",
        "tl.where(carry >= 0.0, carry",
        "masks",
        32,
    ),
    "NaN taken for a mask": (
        "visit",
        "tl.where(ignored, zero, told)",
        "tl.where(ignored, zero, m)",
        "nan",
        32,
    ),
    "smooth's sum not moved": ("visit", "(wd + _moved(ws, by))", "wd", "hard", 32),
    "smooth's sum not moved among lanes": ("visit", "wd = wd + _moved(ws, by)", "wd = wd", "hard", 32),
    "soft sum not moved among lanes": ("visit", "ad = ad + _moved(asum, by)", "ad = ad", "soft", 32),
    "soft targets sum to 1": ("factors", "others + d_nll * asum", "others + d_nll", "plain soft", WIDE),
    "ignored row's loss": ("visit", "tl.where(ignored, zero, nll)", "nll", "canonical", WIDE),
    "invalid row's gradient": (
        "cross_entropy",
        "high + dead, lost + dead, at_target + dead",
        "high, lost, at_target",
        "canonical",
        WIDE,
    ),
    "weights forgotten": ("visit", "a = a * w", "a = a * 1.0", "soft", WIDE),
}


@pytest.mark.parametrize("name", [None, *MUTANTS])
@pytest.mark.long
def test_no_mutant_passes(name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(ops.gpu.__file__).parent
    files = {stem: (folder / f"{stem}.py").read_text() for stem in KERNELS}
    caught, width = None, 32
    if name is not None:
        stem, right, wrong, caught, width = MUTANTS[name]
        assert right in files[stem], "the kernels no longer say this"
        files[stem] = files[stem].replace(right, wrong)
    tag = f"mutant_{abs(hash(name))}"
    (tmp_path / tag).mkdir()
    for stem, text in files.items():
        (tmp_path / tag / f"{stem}.py").write_text(text.replace("softmax_ext.gpu.", f"{tag}."))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ops, "gpu", importlib.import_module(f"{tag}.rows"))
    monkeypatch.setattr(ops, "gpu_softmax", importlib.import_module(f"{tag}.softmax"))
    monkeypatch.setattr(ops, "ce", importlib.import_module(f"{tag}.cross_entropy"))
    plan = ops.gpu.plan
    monkeypatch.setattr(ops.gpu, "plan", lambda o, v, i, widest, *rest: plan(o, v, i, min(widest, width), *rest))
    if caught is not None:
        with pytest.raises(AssertionError):
            CHECKS[caught]()
        return
    for check in CHECKS.values():
        check()
