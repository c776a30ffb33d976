"""`python -m benchmarks.gpu` rehearsed on the CPU: every line is there, and a wrong answer is not timed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")

import torch

from benchmarks import gpu, gpu_clock, gpu_heads, gpu_lines, gpu_rows, records
from benchmarks.check import WrongAnswer
from benchmarks.heads import HeadCase

SMALL = ["--device", "cpu", "--backend", "eager", "--seconds", "0", "--rows", "4x30"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # waking the others costs more than these calls
    yield
    torch.set_num_threads(before)


ROWS = ("ours", "eager", "compiled", "copy")


def _key(line: gpu_lines.DeviceLine) -> tuple[str, ...]:
    return line.part, line.op, line.dtype, line.shape, line.call


def _run(folder: Path, *given: str) -> tuple[int, list[gpu_lines.DeviceLine]]:
    status = gpu.main([*SMALL, "--results", str(folder), *given])
    file = folder / "cpu.csv"
    return status, records.read(gpu_lines.DeviceLine, file) if file.exists() else []


def test_a_rehearsal_writes_every_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_heads, "LIBRARIES", {"nobody's": ("no_such_module", "loss", {})})
    status, found = _run(tmp_path, "--heads", "6x5@40", "5x5@40")
    assert status == 0
    keys = set(map(_key, found))
    assert len(keys) == len(found)
    assert {line.shape for line in found if line.part == "jax"} == {"6x5@40"}
    for op in ("softmax", "log_softmax", "cross_entropy", "softmax + backward", "cross_entropy + backward"):
        assert {("rows", op, dtype, "4x30", call) for dtype in gpu_rows.DTYPES for call in ROWS} <= keys
    for shape, rows in (("6x5@40", 6), ("5x5@40", 5)):
        calls = {line.call: line for line in found if (line.part, line.shape) == ("heads", shape)}
        built_in = "F.linear + F.cross_entropy"
        mine = {"ours", "ours, one chunk", "ours, lean", gpu_heads.SAMPLED}
        assert mine | {built_in, f"{built_in}, compiled", "nobody's"} < set(calls)
        assert any(name.startswith("F.linear_cross_entropy") for name in calls)
        assert calls["ours"].ratio == calls["three matmuls"].limits == 1
        assert calls["ours, one chunk"].chunk == rows
        assert calls["nobody's"].remark.startswith("ModuleNotFoundError")
        assert calls["nobody's"].milliseconds is None
        if shape != "6x5@40":
            continue  # the first head's alone
        swept = {(line.call, line.chunk) for line in found if (line.part, line.shape) == ("chunks", shape)}
        every = {("fast, default", None), (f"fast, {rows}", rows), ("lean, default", None), ("lean, 40", 40)}
        assert swept == every | {("three matmuls", None)}
    for line in found:
        assert line.remark or (line.milliseconds and line.milliseconds > 0 and line.rounds >= 4), line
        assert line.part == "jax" or line.workspace_bytes is None  # nobody counts here
    printed = capsys.readouterr().out
    assert "no_such_module" in printed
    table = printed.split("\nours ")[-1]
    assert all(f" {shape} " in table for shape in ("4x30", "6x5@40", "5x5@40")), "the table comes last"
    again = _run(tmp_path, "--part", "rows")[1]
    assert set(map(_key, again)) == keys, "a part measured anew keeps others"


def test_work_is_counted_in_matmuls_and_copies() -> None:
    times = {"ours": [2.0, 4.0, 2.0], "lean": [4.0, 4.0, 4.0], "limit": [1.0, 2.0, 1.0]}
    about: dict[str, str] = dict.fromkeys(("device", "framework", "part", "op", "dtype", "shape"), "")
    work = {"ours": 1.0, "lean": 4 / 3, "limit": 1.0}
    by = {line.call: line for line in gpu_lines.lines(about, times, ours="ours", limit="limit", work=work)}
    assert (by["ours"].limits, by["lean"].limits, by["limit"].limits) == (2, 3, 1)
    assert (by["lean"].ratio, by["limit"].ratio, by["lean"].milliseconds) == (2, 0.5, 4)


@pytest.mark.parametrize("part", ["heads", "chunks"])
def test_a_wrong_head_is_not_timed(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_heads.gradients

    def wrong(loss: gpu_heads.Loss, on: gpu_heads.OnDevice) -> tuple[torch.Tensor, ...]:
        value, dx, dw = right(loss, on)
        return value, dx, dw.roll(1, 0)

    monkeypatch.setattr(gpu_heads, "gradients", wrong)
    status, found = _run(tmp_path, "--part", part, "--heads", "6x5@40")
    assert status == 1
    wrong_ones = [line for line in found if line.remark.startswith(gpu_lines.WRONG)]
    assert len(wrong_ones) >= 3
    assert all(line.milliseconds is None for line in wrong_ones)


def test_a_cell_that_fails_is_told_and_the_next_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[gpu_lines.DeviceLine]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_heads, "measure", broken)
    status, found = _run(tmp_path, "--part", "heads", "chunks", "--heads", "6x5@40")
    assert status == 1
    assert {line.part for line in found} == {"chunks"}
    printed = capsys.readouterr().out
    assert "RuntimeError: no kernel image" in printed
    assert "failed: head 6x5@40" in printed


def test_no_cell_is_begun_when_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, "--part", "rows", "--minutes", "0") == (0, [])
    assert "left out" in capsys.readouterr().out


def test_a_sampled_gradient_is_judged() -> None:
    on = gpu_heads.OnDevice(HeadCase((64, 8, 300), "bfloat16"), "cpu")
    right = on.call(partial(gpu_heads.torch_ops.linear_cross_entropy, grad_samples=gpu_heads.SAMPLES))()
    on.check_sampled(lambda: right)
    loss, dx, dw = (answer.detach() for answer in right)
    for wrong in ((loss * 1.02, dx, dw), (loss, dx.roll(1, 0), dw), (loss, dx * torch.nan, dw), (loss, dx, dw.abs())):
        with pytest.raises(WrongAnswer):
            on.check_sampled(lambda wrong=wrong: wrong)


def test_every_answer_is_judged_where_it_lies() -> None:
    """The verdicts of benchmarks.check, which test_bench_heads tries: rows repeat, and some classes are judged."""
    on = gpu_heads.OnDevice(HeadCase((4099, 6, 5000), "bfloat16"), "cpu")
    right = on.call(gpu_heads.torch_ops.linear_cross_entropy)()
    on.check(lambda: right, ours=True)

    def spoilt(which: int, at: tuple[int, ...], value: float) -> tuple[torch.Tensor, ...]:
        answers = [answer.detach().clone() for answer in right]
        answers[which][at] = value
        return tuple(answers)

    last = int(on.case.judged[-1])
    for which, at, where in ((1, (4098, 5), r"d_input\[4098, 5\]"), (2, (last, 3), rf"d_linear_weight\[{last}, 3\]")):
        for value in (float("nan"), 7.0):
            with pytest.raises(WrongAnswer, match=where):
                on.check(lambda which=which, at=at, value=value: spoilt(which, at, value), ours=True)
    for wrong in (
        (right[0] * 1.02, *right[1:]),
        (right[0] * float("nan"), *right[1:]),
        (right[0], right[1][:-1], right[2]),
        (right[0], right[1] * 0, right[2]),
        (right[0], right[1], -right[2]),
        (right[0], right[1].roll(1, 0), right[2]),
    ):
        with pytest.raises(WrongAnswer):
            on.check(lambda wrong=wrong: wrong, ours=True)


def test_a_rivals_failure_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    on = gpu_heads.OnDevice(HeadCase((6, 5, 40), "bfloat16"), "cpu")
    right = on.call(gpu_heads.torch_heads.built_in)

    def full() -> tuple[torch.Tensor, ...]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    assert gpu_heads.judgement(on, right) == ("", True)
    assert gpu_heads.judgement(on, full) == ("OutOfMemoryError: CUDA out of memory.", False)
    why, ran = gpu_heads.judgement(on, lambda: (right()[0] * 0, *right()[1:]))
    assert ran
    assert "wrong" in why


def test_a_rivals_wrong_answer_stands_in_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return gpu_heads.torch_heads.built_in(x, w.detach(), t) + 0 * w.sum()

    monkeypatch.setattr(gpu_heads, "rivals", lambda case, backend: {"careless": careless})
    status, found = _run(tmp_path, "--part", "heads", "--heads", "6x5@40")
    (line,) = (line for line in found if line.call == "careless")
    assert status == 0
    assert line.milliseconds
    assert "d_linear_weight" in line.remark


@pytest.mark.parametrize("op", ["softmax", "log_softmax", "cross_entropy"])
def test_a_wrong_row_is_refused(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(gpu_rows.torch_ops, op)
    monkeypatch.setattr(gpu_rows.torch_ops, op, lambda *args: right(*args) * 1.05)
    status, found = _run(tmp_path, "--part", "rows")
    assert status == 1
    assert {line.call for line in found if line.op == op} == {"ours"}, "with the reason alone"


def test_a_wrong_backward_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_rows.torch_ops.softmax

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return right(x.detach()) + (x - x.detach())  # the right values with the gradient of the identity

    monkeypatch.setattr(gpu_rows.torch_ops, "softmax", wrong)
    status, found = _run(tmp_path, "--part", "rows")
    assert status == 1
    assert {line.call for line in found if line.op == "softmax"} == set(ROWS)
    assert {line.call for line in found if line.op == "softmax + backward"} == {"ours"}, "with the reason alone"


def test_data_of_a_head_is_made_and_let_go() -> None:
    case = HeadCase((9, 5, 2**10), "bfloat16")
    case.prepare()
    assert {"_distinct", "_truths"} <= vars(case).keys()
    case.forget()
    assert not {"_distinct", "_truths"} & vars(case).keys()


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: (order.append(name), ())[1] for name in "ab"}
    times = gpu_clock.take_turns(calls, "cpu", seconds=0, least=4, batch=2)
    assert order == list("ab" + "abba" * 2)
    assert {len(these) for these in times.values()} == {4}
    assert all(t >= 0 for these in times.values() for t in these)
