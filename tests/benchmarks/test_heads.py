"""The benchmark of the linear head judges, counts memory and sees what is wrong."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")
pytest.importorskip("rich")

import torch

from benchmarks import bench, head_memory, table, torch_heads, weight_error
from benchmarks.check import WrongAnswer, check
from benchmarks.heads import HEAD_OPS, HEAD_PLAN, PAIR, HeadCase, head_of, kept_of
from benchmarks.timing import Call
from softmax_ext import reference

OP = "linear_cross_entropy"
NAMES = HEAD_OPS[OP].answers


def _run(folder: Path, *given: str) -> tuple[int, list[table.Line]]:
    quick = ["--built-ins", "--op", OP, "--rounds", "1", "--seconds", "0", "--device", "cpu", "--results", str(folder)]
    status = bench.main([*quick, *given])
    file = folder / "cpu.csv"
    return status, table.read(file) if file.exists() else []


def test_every_call_is_judged_timed_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = HeadCase((6, 5, 40))
    status, lines = _run(tmp_path, "--shape", str(case))
    assert status == 0
    printed = capsys.readouterr().out
    for name in ("torch_heads", "jax_heads"):
        door = importlib.import_module(f"benchmarks.{name}")
        cell = {line.call: line for line in lines if line.framework == door.VERSION}
        assert set(cell) == {*door.CALLS[OP](door.Inputs(case)), table.GEMMS}
        assert cell["ours"].ratio == cell[table.GEMMS].limits == cell[table.GEMMS].share == 1
        assert cell["ours"].work == cell[table.GEMMS].work == 6 * 6 * 5 * 40
        assert cell["ours, lean"].work == 8 * 6 * 5 * 40
        assert cell[table.OURS_SAMPLED].work == 2 * 6 * 5 * 40 + 4 * 6 * 5 * 65
        for call, line in cell.items():
            assert call in printed
            assert (line.workspace_bytes is None) == (line.frozen_bytes is None) == (call == table.GEMMS)
    assert {line.shape for line in lines} == {"6x5@40"}


def test_two_heads_are_judged_timed_and_kept(tmp_path: Path) -> None:
    """Beside four matmuls, by the reference's own answers; a wrong gradient is not timed."""
    case = HeadCase((6, 5, 40))
    quick = ["--built-ins", "--op", PAIR, "--rounds", "1", "--seconds", "0", "--device", "cpu"]
    assert bench.main([*quick, "--results", str(tmp_path), "--shape", str(case)]) == 0
    for name in ("torch_heads", "jax_heads"):
        door = importlib.import_module(f"benchmarks.{name}")
        lines = [line for line in table.read(tmp_path / "cpu.csv") if line.framework == door.VERSION]
        cell = {line.call: line for line in lines}
        assert set(cell) == {*door.CALLS[PAIR](door.Inputs(case)), table.GEMMS_OF_PAIR}
        assert cell["ours"].work == cell[table.GEMMS_OF_PAIR].work == 8 * 6 * 5 * 40
        assert cell["ours, lean"].work == 12 * 6 * 5 * 40
        assert all(cell[call].workspace_bytes for call in cell if call != table.GEMMS_OF_PAIR)
    case = HeadCase((40, 9, 129))
    arrays = (case.input(), case.linear_weight(), *case.teacher())
    truth = [np.array(reference.linear_divergence(*arrays)), *reference.linear_divergence_grad(*arrays)[:2]]
    check(case, PAIR, truth, ours=True)
    for spoil in SABOTEURS.values():
        for i in (1, 2):
            wrong = [np.array(v, np.float64) for v in truth]
            spoil(wrong[i])
            with pytest.raises(WrongAnswer):
                check(case, PAIR, wrong, ours=True)


@pytest.mark.parametrize(("op", "shape"), [(OP, "4x6"), ("softmax", "4x6@7")])
def test_a_shape_is_of_one_kind(op: str, shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.arguments(["--op", op, "--shape", shape])
    assert "256x64@1000" in capsys.readouterr().err
    both = bench.arguments(["--op", op, "--shape", "4x6", "4x6@7"]).cases
    assert len(both) == 1


def test_the_plan_is_possible() -> None:
    assert all(head_of(shape) for shape, _ in HEAD_PLAN)
    assert head_of("smollm-head") == (2048, 576, 49152)
    assert head_of("2x3@4/5") == head_of("2x3@4") == (2, 3, 4)
    assert kept_of("2x3@4/5") == 5
    assert kept_of("2x3@4") == kept_of("smollm-head") == 64
    assert head_of("2x3@4/0") is head_of("4x6") is head_of("0x6@7") is head_of("4x-6@7") is None


def test_a_missing_rival_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    case = HeadCase((3, 2, 4))
    everything = set(torch_heads.rivals(case))
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert "lacks" in (torch_heads.skipped() or "")
    gone = everything - set(torch_heads.rivals(case))
    assert all(name.startswith("F.linear_cross_entropy") for name in gone)


def _truth(case: HeadCase) -> list[np.ndarray]:
    """The true answers in the shapes a call gives them, by the reference itself."""
    arrays = (case.input(), case.linear_weight(), case.target())
    dx, dw, _ = reference.linear_cross_entropy_grad(*arrays)
    return [np.array(v, np.float64) for v in (reference.linear_cross_entropy(*arrays), dx, dw)]


def _one_nan(x: np.ndarray) -> None:
    x[-1, -1] = np.nan


SABOTEURS: dict[str, Callable[[np.ndarray], Any]] = {
    "zeros": lambda x: x.fill(0),
    "sign": lambda x: np.negative(x, out=x),
    "one NaN": _one_nan,
    "last line unwritten": lambda x: x[-1].fill(0),
    "last feature unwritten": lambda x: x[:, -1].fill(0),
    "lines shifted": lambda x: np.copyto(x, np.roll(x, 1, 0)),
    "a few per cent": lambda x: np.multiply(x, 1.07, out=x),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(40, 9, 129), (12, 8, 5000)])
def test_the_truth_passes_and_what_is_wrong_does_not(shape: tuple[int, int, int], dtype: str) -> None:
    case = HeadCase(shape, dtype)
    loss, dx, dw = truth = _truth(case)
    check(case, OP, truth, ours=True)
    for i, spoil in ((i, spoil) for i in (1, 2) for spoil in SABOTEURS.values()):
        answers = [v.copy() for v in truth]
        spoil(answers[i])
        with pytest.raises(WrongAnswer, match=NAMES[i]):
            check(case, OP, answers, ours=True)
    for wrong in ([loss * 1.02, dx, dw], [np.array(np.nan), dx, dw], [loss, dx], [loss, dx[:-1], dw]):
        with pytest.raises(WrongAnswer):
            check(case, OP, wrong, ours=True)
    # A rival may be coarser, but it is no rival without its target's term.
    with pytest.raises(WrongAnswer):
        check(case, OP, [loss, dx * 0, dw], ours=False)


def test_the_place_of_an_error_is_the_answers() -> None:
    case = HeadCase((7, 16, 5000))
    answers = _truth(case)
    answers[2][4999, 3] = np.nan
    with pytest.raises(WrongAnswer, match=r"d_linear_weight\[4999, 3\] is nan"):
        check(case, OP, answers, ours=True)


def test_a_wrong_head_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_heads.CALLS[OP]

    def wrong(on: torch_heads.Inputs) -> dict[str, Call]:
        calls = right(on)
        return {**calls, "ours, lean": Call(lambda: (*calls["ours, lean"]()[:2], on.linear_weight))}

    monkeypatch.setitem(torch_heads.CALLS, OP, wrong)
    status, lines = _run(tmp_path, "--door", "torch", "--shape", "6x5@40")
    assert (status, lines) == (1, [])


def test_memory_is_that_of_arrays_beyond_arguments_and_answers() -> None:
    x = torch.ones(1 << 20)

    def run() -> tuple[torch.Tensor, ...]:
        y = x + 1
        z = y * 2  # the most: y and z
        del y
        return (z + 1,)  # z; the answer is not counted

    (answer,), most = torch_heads.workspace_bytes(run)
    assert float(answer[0]) == 5
    assert most == pytest.approx(2 * x.nbytes, rel=1e-3)


def test_memory_inside_of_one_opaque_op_is_seen() -> None:
    if torch_heads.skipped():
        pytest.skip(torch_heads.skipped() or "")
    on = torch_heads.Inputs(HeadCase((64, 8, 4000)))
    loss = torch_heads.chunked(batch_chunk_size=16)
    _, most = torch_heads.workspace_bytes(partial(torch_heads.gradients, loss, on))
    assert 16 * 4000 * 4 <= most < 64 * 4000 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_built_in_path_needs_what_its_shapes_say(dtype: str) -> None:
    case = HeadCase((512, 8, 4000), dtype)
    on = torch_heads.Inputs(case)
    _, most = torch_heads.workspace_bytes(partial(torch_heads.gradients, torch_heads.built_in, on))
    assert most == pytest.approx(head_memory.built_in_bytes(case), rel=0.01)


@pytest.mark.long
def test_a_head_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    case = HeadCase((70, 16, 5000), "bfloat16")
    found = head_memory.in_a_process("torch", "lean", case)
    assert 0 < found["off"] < head_memory.FAR
    assert found["seconds"] > 0
    assert 0 < found["before"] <= found["process"] or not Path("/proc/self/status").exists()
    assert found["workspace"] < head_memory.built_in_bytes(case)


def test_a_process_that_ends_early_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert head_memory.in_a_process("no such door", "lean", HeadCase((2, 2, 2)))["exit"] == 1


def test_the_sampled_error_is_seen() -> None:
    rng = np.random.default_rng(0)
    x, w, t = rng.standard_normal((4, 8)), rng.standard_normal((50, 8)), np.array([0, 24, 25, 49])
    dx, *_ = reference.linear_cross_entropy_grad(x, w, t, reduction="sum")
    blocks = w[:25], w[25:]
    assert head_memory._off(x, blocks, t, np.asarray(dx, np.float64)) < 1e-14
    assert head_memory._off(x, blocks, t, np.roll(dx, 1, 0).astype(np.float64)) > head_memory.FAR
    assert head_memory._off(x, blocks, t, dx.astype(np.float64) * np.nan) == 1


@pytest.mark.long
def test_chunks_do_not_cost_accuracy() -> None:
    found = weight_error.measure(HeadCase((256, 16, 128), "bfloat16"), (1, 128))
    errors = {call: [e.relative for e in found if e.call == call] for call in dict.fromkeys(e.call for e in found)}
    for name, (whole, chunked) in errors.items():
        assert 0 < whole < 2**-8
        if "ours" in name:
            assert chunked < 1.3 * whole, name
    summed = errors["F.cross_entropy, micro-batches summed in .grad"]
    assert summed[1] > 3 * summed[0], "the measurement sees a sum in bfloat16"
