"""The benchmark of K classes a row: sparse targets, `linear_at`, a gradient at points; what is wrong is not timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")
pytest.importorskip("rich")

from benchmarks import bench, records, sample_error, table, torch_heads
from benchmarks.check import WrongAnswer, check
from benchmarks.heads import HEAD_OPS, HeadCase
from benchmarks.sample_error import SampleError
from softmax_ext import reference
from torch_ops._head import sampled as head

SAMPLED = "linear_cross_entropy, sampled"
RESULTS = Path(__file__).parents[2] / bench.RESULTS


def _run(folder: Path, *given: str) -> tuple[int, list[table.Line]]:
    quick = ["--built-ins", "--rounds", "1", "--seconds", "0", "--device", "cpu", "--results", str(folder)]
    status = bench.main([*quick, *given])
    return status, table.read(folder / "cpu.csv") if (folder / "cpu.csv").exists() else []


def test_every_call_is_judged_timed_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, ops = HeadCase((12, 5, 40), kept=3), ("linear_cross_entropy_sparse", "linear_at")
    status, lines = _run(tmp_path, "--op", *ops, "--shape", str(case))
    assert status == 0
    printed = capsys.readouterr().out
    for name in ("torch_heads", "jax_heads"):
        door = importlib.import_module(f"benchmarks.{name}")
        for op in ops:
            limit = table.READING if op == "linear_at" else table.GEMMS
            cell = {line.call: line for line in lines if (line.framework, line.op) == (door.VERSION, op)}
            assert set(cell) == {*door.CALLS[op](door.Inputs(case)), limit}
            assert cell["ours"].ratio == cell[limit].limits == 1
            assert cell["ours"].work == (12 * 12 * 5 * 4 if op == "linear_at" else 6 * 12 * 5 * 40)
            assert all(call in printed for call in cell)
    assert {line.shape for line in lines} == {"12x5@40/3"}


def test_integer_targets_are_judged_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_heads.CALLS["linear_cross_entropy_sparse"]

    monkeypatch.setitem(
        torch_heads.CALLS,
        "linear_cross_entropy_sparse",
        lambda on: {**right(on), "integer targets": replace(right(on)["ours"], op="linear_cross_entropy")},
    )
    given = ("--door", "torch", "--op", "linear_cross_entropy_sparse", "--shape", "12x5@40/3")
    assert _run(tmp_path, *given) == (1, [])


def _truth(case: HeadCase, op: str) -> list[np.ndarray]:
    """The true answers by the reference itself."""
    x, w = case.input(), case.linear_weight()
    if op == "linear_at":
        return [reference.linear_at(x, w, case.at())]
    dx, dw, _ = reference.linear_cross_entropy_grad(x, w, case.sparse())
    return [np.array(v, np.float64) for v in (reference.linear_cross_entropy(x, w, case.sparse()), dx, dw)]


SABOTEURS: dict[str, Callable[[np.ndarray], Any]] = {
    "zeros": lambda x: x.fill(0),
    "sign": lambda x: np.negative(x, out=x),
    "one NaN": lambda x: x.__setitem__((-1,) * x.ndim, np.nan),
    "rows shifted": lambda x: np.copyto(x, np.roll(x, 1, 0)),
    "last column": lambda x: x[..., -1].fill(0),
    "a few per cent": lambda x: np.multiply(x, 1.07, out=x),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["linear_cross_entropy_sparse", "linear_at"])
@pytest.mark.parametrize("shape", [(40, 9, 129), (12, 8, 5000)])
def test_the_truth_passes_and_what_is_wrong_does_not(shape: tuple[int, int, int], op: str, dtype: str) -> None:
    case = HeadCase(shape, dtype, kept=7)
    truth = _truth(case, op)
    check(case, op, truth, ours=True)
    for i, answer in enumerate(truth):
        for name, spoil in SABOTEURS.items():
            answers = [v.copy() for v in truth]
            if answer.ndim == 0 and name in ("rows shifted", "last column"):
                continue
            spoil(answers[i])
            with pytest.raises(WrongAnswer, match=HEAD_OPS[op].answers[i]):
                check(case, op, answers, ours=True)


@pytest.fixture(scope="module")
def sampled() -> tuple[HeadCase, list[np.ndarray]]:
    case = HeadCase((600, 8, 5000), kept=16)
    call = torch_heads.CALLS["linear_cross_entropy"](torch_heads.Inputs(case))[table.OURS_SAMPLED]
    assert call.op == SAMPLED
    return case, [torch_heads.numpy(v).copy() for v in call()]


WRONG: dict[str, Callable[[HeadCase, list[np.ndarray]], Any]] = {
    "no d_input": lambda _, v: v[1].fill(0),
    "sign of d_input": lambda _, v: np.negative(v[1], out=v[1]),
    "d_input a fourth larger": lambda _, v: np.multiply(v[1], 1.25, out=v[1]),
    "rows of d_input shifted": lambda _, v: np.copyto(v[1], np.roll(v[1], 1, 0)),
    "one NaN": lambda _, v: v[2].__setitem__((-1, -1), np.nan),
    "no d_linear_weight": lambda _, v: v[2].fill(0),
    "nothing sampled": lambda case, v: v[2].__setitem__(np.setdiff1d(np.arange(5000), case.target()), 0),
    "classes shifted": lambda _, v: np.copyto(v[2], np.roll(v[2], 1, 0)),
    "twice the sampled part": lambda case, v: v[2].__setitem__(
        (at := np.setdiff1d(np.arange(5000), case.target())), 2 * v[2][at]
    ),
    "loss": lambda _, v: v.__setitem__(0, v[0] * 1.001),
}


def test_a_sampled_gradient_passes(sampled: tuple[HeadCase, list[np.ndarray]]) -> None:
    case, answers = sampled
    check(case, SAMPLED, answers, ours=True)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sampled_gradient_does_not(name: str, sampled: tuple[HeadCase, list[np.ndarray]]) -> None:
    case, right = sampled
    answers = [v.copy() for v in right]
    WRONG[name](case, answers)
    with pytest.raises(WrongAnswer):
        check(case, SAMPLED, answers, ours=True)


def test_bias_and_variance_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = HeadCase((64, 6, 50))
    for e in sample_error.measure(case, (2, 16), 60):
        assert 0.5 < e.bias < 1.6, e
        assert 0.01 < e.variance < 1.05, e
        assert e.noise > 0
    right = head.points

    def wrong(*args: Any, **options: Any) -> Any:
        ids, q = right(*args, **options)
        return ids, q * 2 / 3  # weight 1 / (K + 1) for two points

    monkeypatch.setattr(head, "points", wrong)
    found = [e for e in sample_error.measure(case, (2,), 60) if e.call == "torch_ops"]
    assert min(e.bias for e in found) > 3


def test_what_was_kept_is_what_is_promised() -> None:
    errors = records.read(SampleError, RESULTS / "sample_error.csv")
    calls = {(e.call, e.quantity, e.samples) for e in errors}
    assert len(calls) == len(errors) == 2 * len(sample_error.QUANTITIES) * len(sample_error.SAMPLES)
    for e in errors:
        assert e.draws == sample_error.DRAWS
        assert 0.7 < e.bias < 1.4, "no bias"
        assert e.variance < 1.02, "at most 1 / K of the labels' own"
