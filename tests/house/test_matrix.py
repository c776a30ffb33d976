"""`make matrix`: what is not there is a line with its reason, a failure is seen, and the page keeps the last table."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests import fresh, matrix


def _asked(*only: str) -> argparse.Namespace:
    return argparse.Namespace(debian=None, only=list(only), emulate=False)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """No index is asked."""
    monkeypatch.setattr(matrix, "_offered", lambda name, since: [Version("3.6.0"), Version("3.7.0"), Version("3.7.1")])


@pytest.mark.usefixtures("offered")
def test_what_is_lacking_is_a_line_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix.shutil, "which", lambda program: None)
    clang, neon = matrix.lines(tmp_path, tmp_path, _asked("Clang", "NEON"))
    assert clang.outcome == "not run: clang++ is not installed"
    assert neon.outcome == "not run: aarch64-linux-gnu-g++ is not installed"
    assert not clang.failed


@pytest.mark.usefixtures("offered")
def test_a_failure_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: Any) -> Any:
        raise subprocess.CalledProcessError(1, ["pytest"], output="E   assert 1 == 2\n= 3 failed, 9 passed in 1.0s =\n")

    monkeypatch.setattr(matrix, "rows_by", fails)
    page = tmp_path / "page.md"
    page.write_text(f"above\n{matrix.BEGIN}\nold\n{matrix.END}\nbelow\n")
    assert matrix.main(["--only", "Clang", "--home", str(tmp_path), "--page", str(page)]) == 1
    assert "assert 1 == 2" in capsys.readouterr().err
    text = page.read_text()
    assert "| Clang | | FAILED: 3 failed, 9 passed in 1.0s | 0 |" in text.replace("|  |", "| |")
    assert text.startswith(f"above\n{matrix.BEGIN}\n20")
    assert text.endswith(f"{matrix.END}\nbelow\n")
    assert "old" not in text
    monkeypatch.setattr(matrix, "rows_by", lambda *_: ("clang 14", "1 calls right by AVX2"))
    assert matrix.main(["--only", "Clang", "--home", str(tmp_path)]) == 0


def test_no_test_is_not_taken_for_a_pass() -> None:
    assert matrix._counts("=== 12 passed, 3 skipped, 5 warnings in 4.20s ===\n") == "12 passed, 3 skipped"
    assert matrix._counts("12 passed in 4.20s\n") == "12 passed"
    for said in ("", "=== no tests ran in 0.01s ===\n"):
        with pytest.raises(matrix.Lacking, match="no test ran"):
            matrix._counts(said)


@pytest.mark.usefixtures("offered")
def test_the_newest_of_each_minor_version() -> None:
    versions = matrix._minors(matrix._offered("triton", Version("3.6")))
    assert list(map(str, versions)) == ["3.6.0", "3.7.1"]
    assert matrix._floor("torch") == Version("2.11")
    assert matrix._floor("jax") == Version("0.10")


def test_a_link_whose_checkout_is_gone_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "pytest").symlink_to(tmp_path / "gone")
    fresh.link("pytest", tmp_path)
    fresh.link("pytest", tmp_path)
    assert (tmp_path / "pytest" / "__init__.py").exists()


@pytest.mark.long
def test_the_tests_of_triton_are_collected_where_jax_is_absent() -> None:
    absent = "import pytest, sys; sys.modules['jax'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", absent, "-q", "-p", "no:cacheprovider", "--collect-only", *matrix.TESTS_OF_TRITON]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-2000:]
