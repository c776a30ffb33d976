"""What README and docs show was measured: every number of their tables stands in a CSV of benchmarks/results."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")
pytest.importorskip("matplotlib")

from benchmarks import figures, page_tables, records, table

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [ROOT / name for name in figures.PAGES]
NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e-?\d+)?)( %| MB| GB| MiB| GiB| ms| s| us)?")
UNITS = {None: 1, " %": 1e-2, " MB": 1e6, " GB": 1e9, " MiB": 2**20, " GiB": 2**30, " ms": 1e3, " s": 1e6, " us": 1}


@cache
def _kept() -> figures.Kept:
    return figures.read(ROOT / figures.RESULTS, figures.shown(README))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert re.search(r"<!-- begin: \w+ -->", text)
    assert figures.filled(text, _kept()) == text, "run `make figures`"


def test_another_number_is_seen() -> None:
    page = ROOT / "docs" / "performance.md"
    text = page.read_text()
    ratio = next(line for line in text.splitlines() if line.startswith("| softmax | 1024x32000"))
    number = re.findall(r"\d+\.\d\d", ratio)[0]
    spoilt = text.replace(ratio, ratio.replace(number, f"{float(number) + 0.01:.2f}"))
    assert figures.filled(spoilt, _kept()) == text != spoilt


def test_first_screen() -> None:
    """A sentence, an installation, code with its result in each framework and a picture, within 45 lines of 160."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 160
    screen = "\n".join(lines[:45])
    assert "pip install" in screen
    assert screen.count("```python") == 2
    assert "](docs/overview.png)" in screen
    assert _kept().shown.name in README.read_text()


def _answers(block: str) -> list[tuple[str, str]]:
    """(what a block prints, what a remark beside the print says it prints)."""
    said = [match[1] for match in re.finditer(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block, "README.md", "exec"), {})
    return list(zip(out.getvalue().splitlines(), said, strict=True))


@pytest.mark.parametrize("number", range(2))
def test_first_code_prints_what_it_says(number: int) -> None:
    pytest.importorskip("jax")
    block = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[number]
    answers = _answers(block)
    assert answers
    assert all(printed == said for printed, said in answers), answers


def test_another_result_is_seen() -> None:
    assert _answers("print(1 + 1)  # 2") == [("2", "2")]
    assert _answers("print(1 + 1)  # 3") == [("2", "3")]
    with pytest.raises(ValueError, match="argument"):
        _answers("print(1 + 1)")


def test_shown_is_the_machine_measured_last(tmp_path: Path) -> None:
    """Of those with all that README needs; other CSVs, and machines with a part, do not count."""
    lines = _kept().shown.lines
    for i, name in enumerate(("old.csv", "new.csv", "part.csv")):
        mine = [replace(line, device=name) for line in lines if name != "part.csv" or line.op == "softmax"]
        records.write(table.Line, mine, tmp_path / name)
        os.utime(tmp_path / name, (i, i))
    (tmp_path / "accuracy.csv").write_text("quantity,dtype\nsoftmax,float32\n")
    assert [file.name for file in figures.files(tmp_path)] == ["new.csv", "old.csv", "part.csv"]
    assert figures.last(tmp_path) == "new.csv"
    os.utime(tmp_path / "old.csv", (9, 9))
    assert figures.last(tmp_path) == "old.csv"
    (tmp_path / "old.csv").unlink()
    (tmp_path / "new.csv").unlink()
    with pytest.raises(SystemExit, match="make bench"):
        figures.last(tmp_path)


def test_pages_list_every_machine() -> None:
    kept = _kept()
    other = page_tables.Machine([replace(line, device="Other CPU") for line in kept.shown.lines])
    both = replace(kept, machines=[kept.shown, other])
    for table_of in (page_tables.speed, page_tables.heads):
        assert other.name in table_of(both)
        assert kept.shown.name in table_of(both)
    assert other.name not in page_tables.machine(both)


def _numbers(text: str) -> list[tuple[str, str]]:
    """(line, number) of each cell that holds nothing but numbers, outside of what is written by `make figures`."""
    text = re.sub(r"<!-- begin: (\w+) -->.*?<!-- end: \1 -->", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [(line, cell.strip()) for line in lines for cell in line.strip("|").split("|")]
    pure = [(line, cell) for line, cell in cells if re.sub(NUMBER, "", cell).strip(" :()/") == "" and cell]
    return [(line, match[0]) for line, cell in pure for match in re.finditer(NUMBER, cell)]


def _measured() -> list[float]:
    found = []
    for file in sorted((ROOT / figures.RESULTS).rglob("*.csv")):
        with file.open(newline="") as source:
            for row in csv.reader(source):
                found += [float(cell) for cell in row if re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", cell)]
    return found


def _is_measured(number: str, values: list[float]) -> bool:
    match = re.fullmatch(NUMBER, number)
    assert match
    digits = len(re.sub(r"e.*|^0\.0*|\.", "", match[1]))
    shown, unit = float(match[1]), UNITS[match[2]]
    return any(float(f"{value / unit:.{digits - 1}e}") == shown for value in values)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_of_other_tables_are_measured(page: Path) -> None:
    values = _measured()
    unknown = [(line, number) for line, number in _numbers(page.read_text()) if not _is_measured(number, values)]
    assert not unknown


def test_a_number_that_nobody_measured_is_seen() -> None:
    assert _numbers("| call | 1.25 | 8.4e6 (3.1) | 319 MB : 12 % | 2 calls |") == [
        ("| call | 1.25 | 8.4e6 (3.1) | 319 MB : 12 % | 2 calls |", number)
        for number in ("1.25", "8.4e6", "3.1", "319 MB", "12 %")
    ]
    assert _is_measured("1.25", [1.2493])
    assert _is_measured("319 MB", [319350788.0])
    assert not _is_measured("1.25", [1.2593])
    assert not _is_measured("12 %", [0.1251])


def test_every_page_is_in_the_menu() -> None:
    menu = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert menu == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
