"""Large results in fresh memory: every size in every condition, judged, told and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")
pytest.importorskip("rich")

from benchmarks import fresh, records, torch_calls
from benchmarks.cases import Case
from benchmarks.check import WrongAnswer
from benchmarks.fresh import AFTER, ALONE, KEPT, OPS, ROWS, Fresh

MALLOC_MAPS = 32 * 2**20  # glibc's largest threshold
QUICK = ("--seconds", "0", "--rounds", "2", "--device", "Some CPU (R) 3")


def _line(call: str, median: float, high: float) -> Fresh:
    return Fresh("cpu", 2, "torch 2", "softmax", "8x1000", 0.03, ALONE, call, median, high, 5)


def test_sizes_go_from_a_mebibyte_to_a_gibibyte_and_past_mallocs_mmap_on_both_sides() -> None:
    sizes = [Case((rows, fresh.CLASSES)).logits_bytes for rows in ROWS]
    assert round(sizes[0] / 2**20, 1) == 1
    assert round(sizes[-1] / 2**30, 2) == 1
    assert any(0.9 < size / MALLOC_MAPS < 1 for size in sizes)
    assert any(1 < size / MALLOC_MAPS < 1.1 for size in sizes)


@pytest.mark.slow  # three processes that load both frameworks
def test_each_condition_is_measured_in_processes_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[Fresh] = []
    for conditions, rows in (((ALONE, KEPT), ("3",)), ((AFTER,), ("3", "5"))):
        given = ("--door", "torch", "--condition", *conditions, "--rows", *rows, "--results", str(tmp_path))
        assert fresh.main([*QUICK, *given]) == 0
        lines += records.read(Fresh, tmp_path / "some-cpu-r-3.csv")
    seen = {(line.op, line.shape, line.condition, line.call) for line in lines}
    sizes = {ALONE: ("3x1000",), AFTER: ("3x1000", "5x1000"), KEPT: ("3x1000",)}
    calls = ("ours", "torch", "copy")
    assert seen == {(o, s, c, call) for o in OPS["torch"] for c in sizes for s in sizes[c] for call in calls}
    assert next(line.shape for line in lines if line.condition == AFTER) == "5x1000"  # the larger one first
    assert all(0 < line.median_ms <= line.high_ms for line in lines)
    assert "after others" in capsys.readouterr().out


def test_the_median_and_the_slow_calls_are_told_apart() -> None:
    lines = [_line("ours", 2.0, 10.0), _line("torch", 4.0, 5.0), _line("copy", 1.0, 1.0)]
    assert fresh.told(lines) == [("torch", "`softmax`", "0.03", "2.00", "0.50", "", "", "", "", "")]
    kept = [replace(line, condition=KEPT) for line in lines]
    assert fresh.told(lines + kept)[0][3:] == ("2.00", "0.50", "", "", "2.00", "0.50", "2.00")


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    options = type("Options", (), {"device": "cpu", "seconds": 0.0, "rounds": 2})
    monkeypatch.setitem(
        torch_calls.PARTS, "softmax", (*torch_calls.PARTS["softmax"][:1], lambda x, _: x, lambda x, _: x)
    )
    with pytest.raises(WrongAnswer):
        fresh.measure("torch", ALONE, [3], options)  # pyright: ignore[reportArgumentType]
