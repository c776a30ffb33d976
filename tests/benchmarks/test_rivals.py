"""The benchmark's further rivals are judged and timed, and a missing one is named with its reason."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")
pytest.importorskip("rich")

import torch

from benchmarks import bench, huge_pages, jax_rivals, table, torch_rivals
from benchmarks.cases import Case
from benchmarks.heads import HeadCase
from benchmarks.timing import Call

ELSEWHERE = pytest.mark.skipif(bool(huge_pages.why_not(Case((2**10, 2**14)))), reason="Linux alone has huge pages")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case is large enough for the other process."""
    monkeypatch.setattr(huge_pages, "LARGE", -1)


@pytest.fixture(scope="module")
def elsewhere() -> huge_pages.Process:
    return huge_pages.Process("tests.benchmarks.rival_door", Case((3, 5)))


def _run(folder: Path, *given: str) -> tuple[int, list[table.Line]]:
    status = bench.main(["--rounds", "1", "--seconds", "0", "--device", "cpu", "--results", str(folder), *given])
    file = folder / "cpu.csv"
    return status, table.read(file) if file.exists() else []


@pytest.mark.slow
@ELSEWHERE
@pytest.mark.usefixtures("small")
def test_rivals_are_judged_timed_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ops = ("softmax_bwd", "cross_entropy_grad_inplace", "cross_entropy_one_visit", "linear_cross_entropy")
    status, lines = _run(tmp_path, "--op", *ops, "--shape", "3x5", "6x5@40", "--dtype", "float32")
    assert status == 0
    printed = capsys.readouterr().out
    assert "Liger-Kernel is not timed: its kernels need a GPU" in printed
    found = {(line.framework.split()[0], line.op, line.call): line for line in lines}
    everywhere = {torch_rivals.COMPILED, torch_rivals.HUGE_PAGES}
    for op, further in (
        ("softmax_bwd", everywhere),
        ("cross_entropy_grad_inplace", everywhere),
        ("linear_cross_entropy", {*everywhere, torch_rivals.CUT}),
    ):
        for call in further:
            assert found["torch", op, call].microseconds > 0, (op, call)
            assert call in printed
    assert ("torch", "cross_entropy_one_visit", torch_rivals.COMPILED) not in found
    assert found["jax", "linear_cross_entropy", jax_rivals.TOKAMAX].workspace_bytes
    by_name = {call: line for (_, op, call), line in found.items() if op == "linear_cross_entropy"}
    assert by_name[torch_rivals.HUGE_PAGES].workspace_bytes == by_name["F.linear + F.cross_entropy"].workspace_bytes


@pytest.mark.parametrize("name", [torch_rivals.COMPILED, torch_rivals.HUGE_PAGES])
def test_a_wrong_rival_is_not_timed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = np.full((4, 6), 1 / 6)
    calls = {
        torch_rivals.COMPILED: Call(lambda: (torch.from_numpy(wrong),)),
        torch_rivals.HUGE_PAGES: Call(lambda: None, answers=lambda: [wrong]),
    }
    monkeypatch.setattr(torch_rivals, "more", lambda op, on: {name: calls[name]})
    status, lines = _run(tmp_path, "--door", "torch", "--op", "softmax", "--shape", "4x6")
    assert (status, lines) == (1, [])
    assert f"softmax: {name}: softmax[0, 0] is 0.16666" in capsys.readouterr().out


@ELSEWHERE
def test_the_other_process_has_the_variable(elsewhere: huge_pages.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    call = elsewhere.call("about", Call(print))
    assert call.answers
    assert call.peak
    assert call.run() is None
    value, process, runs, shape = call.answers()
    assert value == "1"
    assert process != os.getpid()
    assert runs == 2
    assert shape.tolist() == [3, 5]
    assert call.peak() is not None
    assert call.answers()[2] > 3
    assert huge_pages.VARIABLE not in os.environ
    monkeypatch.setenv(huge_pages.VARIABLE, "0")
    huge_pages.Process("tests.benchmarks.rival_door", Case((3, 5)))
    assert os.environ[huge_pages.VARIABLE] == "0"


@ELSEWHERE
def test_its_failure_is_ours(elsewhere: huge_pages.Process) -> None:
    call = elsewhere.call("fails", Call(print))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"THP_MEM_ALLOC_ENABLE=1: KeyError.*NO_SUCH_VARIABLE"):
            call.run()


@ELSEWHERE
def test_its_arguments_are_made_outside_of_the_time(elsewhere: huge_pages.Process) -> None:
    call = elsewhere.call("spent", Call(print, fresh=lambda: None, workspace=int))
    assert call.fresh
    assert call.workspace
    assert call.answers
    first, second = call.fresh(), call.fresh()
    for argument in (first, second):
        call.run(argument)
    assert call.answers()[0].tolist() == [1, 0, 2]  # two were waiting; the last it made for itself
    assert [call.workspace(frozen) for frozen in (False, True)] == [2, 3]


def _gone(name: str) -> Any:
    raise ImportError(f"No module named {name!r}")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiler and no other library."""
    for function in (torch_rivals._no_cut, jax_rivals._missing):
        function.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib, "import_module", _gone)
    yield
    for function in (torch_rivals._no_cut, jax_rivals._missing):
        function.cache_clear()


@pytest.mark.usefixtures("alone")
def test_a_missing_rival_has_its_reason() -> None:
    small, head = Case((2, 3)), HeadCase((2, 3, 4))
    assert {reason.split(" is not timed: ")[0] for reason in torch_rivals.skipped(small)} == {
        torch_rivals.COMPILED,
        torch_rivals.HUGE_PAGES,
    }
    assert any("No module named 'cut_cross_entropy'" in reason for reason in torch_rivals.skipped(head))
    assert jax_rivals.skipped(small) == []
    assert jax_rivals.skipped(head) == ["tokamax is not timed: No module named 'tokamax'"]
    assert torch_rivals.more("softmax", torch_rivals.torch_calls.Inputs(small)) == {}
    assert torch_rivals.more("linear_cross_entropy", torch_rivals.torch_heads.Inputs(head)) == {}
    assert jax_rivals.more("linear_cross_entropy", jax_rivals.jax_heads.Inputs(head)) == {}
