"""`python -m benchmarks.gpu` rehearsed on the CPU: every line is there, and a wrong answer is not timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")

import torch

from benchmarks import gpu, gpu_clock, gpu_heads, gpu_lines, gpu_rows, records
from benchmarks.check import WrongAnswer
from benchmarks.heads import HeadCase

SMALL = ["--device", "cpu", "--backend", "eager", "--seconds", "0", "--classes", "30", "--entries", "120"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # waking the others costs more than these calls
    yield
    torch.set_num_threads(before)


def _run(folder: Path, *given: str) -> tuple[int, list[gpu_lines.Line]]:
    status = gpu.main([*SMALL, "--results", str(folder), *given])
    file = folder / "cpu.csv"
    return status, records.read(gpu_lines.Line, file) if file.exists() else []


def test_a_rehearsal_writes_every_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_heads, "LIBRARIES", {"nobody's": ("no_such_module", "loss", {})})
    status, found = _run(tmp_path, "--heads", "6x5@40", "5x5@40", "--dtypes", "bfloat16")
    assert status == 0
    keys = {(line.part, line.op, line.shape, line.call) for line in found}
    assert len(keys) == len(found)
    for op in ("softmax", "log_softmax", "cross_entropy", "softmax + backward", "cross_entropy + backward"):
        assert {("rows", op, "4x30", call) for call in ("ours", "eager", "compiled", "copy")} <= keys
    for shape, rows in (("6x5@40", 6), ("5x5@40", 5)):
        calls = {line.call: line for line in found if (line.part, line.shape) == ("heads", shape)}
        built_in = "F.linear + F.cross_entropy"
        assert {"ours", "ours, one chunk", "ours, lean", built_in, f"{built_in}, compiled", "nobody's"} < set(calls)
        assert any(name.startswith("F.linear_cross_entropy") for name in calls)
        assert calls["ours"].ratio == calls["three matmuls"].limits == 1
        assert calls["ours, one chunk"].chunk == rows
        assert calls["nobody's"].remark.startswith("ModuleNotFoundError")
        assert calls["nobody's"].milliseconds is None
        swept = {(line.call, line.chunk) for line in found if (line.part, line.shape) == ("chunks", shape)}
        every = {("fast, default", None), (f"fast, {rows}", rows), ("lean, default", None), ("lean, 40", 40)}
        assert swept == every | {("three matmuls", None)}
    for line in found:
        assert line.remark or (line.milliseconds and line.milliseconds > 0 and line.rounds >= 4), line
        assert line.workspace_bytes is None  # nobody counts here
    printed = capsys.readouterr().out
    assert "no_such_module" in printed
    again = _run(tmp_path, "--part", "rows", "--dtypes", "bfloat16")[1]
    assert {(line.part, line.op, line.shape, line.call) for line in again} == keys, "a part measured anew keeps others"


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
    assert _run(tmp_path, "--part", part, "--heads", "6x5@40") == (1, [])


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
    status, found = _run(tmp_path, "--part", "rows", "--dtypes", "float32")
    assert status == 1
    assert op not in {line.op for line in found}


def test_a_wrong_backward_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_rows.torch_ops.softmax

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return right(x.detach()) + (x - x.detach())  # the right values with the gradient of the identity

    monkeypatch.setattr(gpu_rows.torch_ops, "softmax", wrong)
    status, found = _run(tmp_path, "--part", "rows", "--dtypes", "bfloat16")
    assert status == 1
    assert "softmax" in {line.op for line in found}
    assert "softmax + backward" not in {line.op for line in found}


def test_data_is_made_once_for_heads_that_differ_in_rows() -> None:
    given = [HeadCase((n, 5, 2**20), "bfloat16") for n in (9, 8)] + [HeadCase((9, 6, 2**20), "bfloat16")]
    first, second, third = (vars(case).get("_distinct") for case in gpu_heads.sharing(given) if case._distinct)
    assert first is second
    assert second is not third
    assert "_distinct" not in vars(given[0])


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: (order.append(name), ())[1] for name in "ab"}
    times = gpu_clock.take_turns(calls, "cpu", seconds=0, least=4, batch=2)
    assert order == list("ab" + "abba" * 2)
    assert {len(these) for these in times.values()} == {4}
    assert all(t >= 0 for these in times.values() for t in these)
