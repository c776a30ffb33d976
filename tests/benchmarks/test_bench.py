"""The benchmark runs, times only what it has judged, and sees a wrong kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")
pytest.importorskip("rich")

import torch

from benchmarks import bench, table, timing, torch_calls
from benchmarks.cases import DTYPES, OPS, PLAN, Case, rounded, shape_of
from benchmarks.check import WrongAnswer, check
from benchmarks.timing import Call, peak_bytes, take_turns

QUICK = ["--rounds", "1", "--seconds", "0", "--device", "Some CPU (R) 3"]


def _run(folder: Path, *given: str) -> tuple[int, list[table.Line]]:
    status = bench.main([*QUICK, "--results", str(folder), *given])
    file = folder / "some-cpu-r-3.csv"
    return status, table.read(file) if file.exists() else []


def test_every_op_is_judged_timed_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = _run(tmp_path, "--built-ins", "--op", *OPS, "--shape", "3x5x2x2", "--dtype", "float32")
    assert status == 0
    printed = capsys.readouterr().out
    for name in ("torch_calls", "jax_calls"):
        door = importlib.import_module(f"benchmarks.{name}")
        for op, calls in door.CALLS.items():
            assert op in printed
            cell = {line.call: line for line in lines if (line.framework, line.op) == (door.VERSION, op)}
            assert set(cell) == {*calls(door.Inputs(Case((2, 3)))), "copy"}
            assert cell["ours"].ratio == cell["copy"].limits == 1
            assert all(line.microseconds > 0 and line.rounds == 1 for line in cell.values())
    assert {line.op for line in lines} == set(OPS)


def test_a_cell_measured_again_replaces_itself_alone(tmp_path: Path) -> None:
    only = ("--built-ins", "--door", "torch", "--op", "softmax", "log_softmax")
    _run(tmp_path, *only, "--shape", "3x5")
    _, before = _run(tmp_path, *only, "--shape", "3x5", "4x5")
    _, after = _run(tmp_path, "--built-ins", "--door", "torch", "--op", "softmax", "--shape", "3x5")
    assert len(before) == len(after) == 12
    assert [line for line in after if line.cell != after[-1].cell] == [
        line for line in before if line.cell != after[-1].cell
    ]


@pytest.mark.parametrize("words", [["--shape", "10"], ["--shape", "3xfive"], ["--op", "sofmax"], ["--rounds", "0"]])
def test_a_wrong_option_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.arguments(words)
    assert words[1] in capsys.readouterr().err


def test_the_plan_is_possible() -> None:
    assert all(len(shape_of(shape)) > 1 and dtype in DTYPES for shape, dtype in PLAN)
    assert bench.limit(None) >= 1


def _truth(case: Case, op: str) -> list[np.ndarray]:
    """The true answers in the shapes a call gives them."""
    answers = []
    for name in OPS[op].answers:
        value = case.truth(name)[0]
        whole = np.resize(value, (case.rows, *value.shape[1:])) if value.ndim else value
        outer, inner = case.shape[0], case.shape[2:]
        if value.ndim == 2:
            whole = np.moveaxis(whole.reshape(outer, *inner, case.classes), -1, 1)
        elif value.ndim == 1:
            whole = whole.reshape(outer, *inner)
        answers.append(np.array(whole))
    return answers


def _last_column(x: np.ndarray) -> None:
    x[:, -1] = 0


def _one_nan(x: np.ndarray) -> None:
    x[(-1,) * x.ndim] = np.nan


SABOTEURS: dict[str, Callable[[np.ndarray], Any]] = {
    "zeros": lambda x: x.fill(0),
    "sign": lambda x: np.negative(x, out=x),
    "one NaN": _one_nan,
    "last column": _last_column,
    "rows shifted": lambda x: np.copyto(x, np.roll(x, 1, 0)),
    "last row as before": lambda x: np.copyto(x[-1], x[-2]),
    "a few per cent": lambda x: np.multiply(x, 1.07, out=x),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 129), (6, 5, 3, 2)])
@pytest.mark.parametrize("op", OPS)
def test_the_truth_passes_and_what_is_wrong_does_not(op: str, shape: tuple[int, ...], dtype: str) -> None:
    case = Case(shape, dtype)
    check(case, op, _truth(case, op), ours=True)
    for i, answer in enumerate(_truth(case, op)):
        for spoil in SABOTEURS.values():
            answers = _truth(case, op)
            if answer.ndim < 2 and spoil is not SABOTEURS["zeros"]:
                continue
            spoil(answers[i])
            with pytest.raises(WrongAnswer):
                check(case, op, answers, ours=True)
    with pytest.raises(WrongAnswer, match="due"):
        check(case, op, _truth(case, op)[1:], ours=True)
    with pytest.raises(WrongAnswer, match="due"):
        check(case, op, [answer[..., None] for answer in _truth(case, op)], ours=True)


@pytest.mark.parametrize("name", ["ours", "torch"])
def test_a_wrong_kernel_is_not_timed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = torch_calls.CALLS["softmax"]

    def wrong(on: torch_calls.Inputs) -> dict[str, Call]:
        calls = right(on)
        return {**calls, name: Call(lambda: (calls[name]()[0] * (1 + 2e-3),))}

    given = ("--built-ins", "--door", "torch", "--op", "softmax", "log_softmax", "--shape", "4x6")
    status, lines = _run(tmp_path, *given)
    assert status == 0
    assert {line.op for line in lines} == {"softmax", "log_softmax"}
    monkeypatch.setitem(torch_calls.CALLS, "softmax", wrong)
    status, lines = _run(tmp_path, *given)
    assert status == 1
    assert {line.op for line in lines} == {"log_softmax"}
    assert f"softmax: {name}: softmax[0, 0] is" in capsys.readouterr().out


def test_rows_repeat_after_a_prime_number_of_rows() -> None:
    case = Case((50, 2**16))
    assert case.period == 7
    assert Case((100, 10)).period == 97
    assert Case((1, 50)).period == 1
    np.testing.assert_array_equal(case.logits()[7:14], case.logits()[:7])
    p = case.truth("softmax")[0]
    np.testing.assert_allclose(p.max(-1), 0.5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_is_the_frameworks(dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal(1000, np.float32)
    np.testing.assert_array_equal(rounded(x, dtype), torch.from_numpy(x).to(getattr(torch, dtype)).float().numpy())


def test_the_gradient_in_place_is_in_place() -> None:
    case = Case((6, 5))
    call = torch_calls.CALLS["cross_entropy_grad_inplace"](torch_calls.Inputs(case))["ours"]
    assert call.fresh
    logits = call.fresh()
    assert call.run(logits)[1].data_ptr() == logits.data_ptr()


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SLICE", 0)
    seen: list[str] = []
    calls = {name: Call(lambda name=name: seen.append(name)) for name in "abc"}
    turns = take_turns(calls, budget=0, least=3)
    assert [len(times) for times in turns.seconds.values()] == [3, 3, 3]
    assert set(turns.repeats.values()) == {1}
    assert turns.others is None or turns.others >= 0
    assert "".join(seen[3:]) == "abc" + "cba" + "abc"
    assert len(take_turns(calls, budget=60, least=3, most=4).seconds["a"]) == 4


def test_a_destroyed_argument_is_never_used_twice() -> None:
    made, used = iter(range(10**6)), []
    turns = take_turns({"once": Call(used.append, fresh=lambda: next(made))}, budget=0, least=3)
    assert turns.repeats["once"] > 1
    assert used == list(range(2 + 3 * turns.repeats["once"]))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone says so")
def test_peak_memory_is_that_of_the_call() -> None:
    size = 2**26
    taken = peak_bytes(Call(lambda: np.ones(size // 8).copy()))
    assert taken is not None
    assert 1.9 * size < taken < 2.2 * size
