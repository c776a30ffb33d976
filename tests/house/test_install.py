"""What an installation says: what was built and why not, one version, a report for programs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import softmax_ext
from softmax_ext import __main__ as report
from softmax_ext import built

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def _configured(folder: Path, **environment: str) -> dict[str, str]:
    """What CMake says it will build of each door."""
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / "built.txt").read_text().splitlines()
    assert all(line in done.stdout for line in lines)
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.long
@pytest.mark.skipif(CMAKE is None, reason="no cmake: pip install --group test")
def test_what_is_built_is_said(tmp_path: Path) -> None:
    doors = _configured(tmp_path)
    assert set(doors) == {"torch", "jax"}
    for name, package in (("torch", "torch"), ("jax", "jaxlib")):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            assert doors[name].startswith("not built: no ")
        else:
            assert doors[name].startswith("built with ")


@pytest.mark.skipif(CMAKE is None, reason="no cmake: pip install --group test")
def test_why_nothing_is_built_is_said(tmp_path: Path) -> None:
    """An installation without a compiler goes through, and says so of each door."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "make").symlink_to(shutil.which("make") or "/usr/bin/make")
    doors = _configured(tmp_path / "build", PATH=str(tools), CXX="no-such-compiler", CC="no-such-compiler")
    assert doors == dict.fromkeys(("torch", "jax"), "not built: no C++ compiler (GCC or Clang)")


def test_the_reason_reaches_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [str(tmp_path / "elsewhere"), str(tmp_path)]
    assert built.doors(folders) == {}
    assert built.why_not("jax", folders).startswith("not built: the package was not installed")
    (tmp_path / built.FILE).write_text("torch: built with GNU 12\njax: not built: no jaxlib\n")
    assert built.doors(folders) == {"torch": "built with GNU 12", "jax": "not built: no jaxlib"}
    assert built.why_not("jax", folders) == "not built: no jaxlib"
    monkeypatch.setattr(report, "__path__", folders)
    assert report.report()["built"] == {"torch": "built with GNU 12", "jax": "not built: no jaxlib"}


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    place = project["tool"]["scikit-build"]["metadata"]["version"]["input"]
    assert re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"', (ROOT / place).read_text(), re.M) == [
        softmax_ext.__version__
    ]
    try:
        assert importlib.metadata.version("softmax-ext") == softmax_ext.__version__
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("softmax-ext is not installed, only on the path")


class TestJson:
    """`python -m softmax_ext --json`."""

    def test_says_what_the_report_for_people_says(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert report.main(["--json"]) == 0
        about = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert about["version"] == softmax_ext.__version__
        assert about["holds"] is True
        assert report.main() == 0
        printed = capsys.readouterr().out
        for name, door in about["doors"].items():
            if not door["open"]:
                assert f"{name}: not available ({door['why']})" in printed
                continue
            assert f"{name} {door['version']}, {door['threads']}" in printed
            assert all(row["why"] in printed for row in door["kernels"])
            errors = {quantity: row[name] for quantity, row in about["check"]["worst"].items()}
            assert len(errors) == 5
            assert all(0 <= error <= about["check"]["bound"] for error in errors.values())

    def test_a_wrong_answer_is_null(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        for wrong in (np.nan, np.inf):
            monkeypatch.setattr(report, "_open", lambda name, wrong=wrong: _Door(wrong))
            assert report.main(["--json"]) == 1
            about = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
            assert about["holds"] is False
            assert {error for row in about["check"]["worst"].values() for error in row.values()} == {None}
            assert report.main() == 1
            assert "wrong" in capsys.readouterr().out

    def test_another_word_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert report.main(["--jsn"]) == 2
        assert "--jsn" in capsys.readouterr().err


class _Door:
    """A framework whose every answer is one number."""

    def __init__(self, answer: float) -> None:
        self.answer = answer

    def version(self) -> str:
        return "0"

    def threads(self) -> str:
        return "no threads"

    def kernels(self) -> list[tuple[str, str, str]]:
        return [("cpu", "none", "it is not real")]

    def self_check(self, logits: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
        shapes = {name: np.shape(truth) for name, truth in report._truth().items()}
        return {name: np.full(shape, self.answer) for name, shape in shapes.items()}
