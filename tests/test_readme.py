"""What README and docs show was measured: every number of their tables stands in a CSV of benchmarks/results."""

from __future__ import annotations

import csv
import re
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")
pytest.importorskip("matplotlib")

from benchmarks import figures

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in figures.PAGES]
NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e-?\d+)?)( %| MB| GB| MiB| GiB| ms| s| us)?")
UNITS = {None: 1, " %": 1e-2, " MB": 1e6, " GB": 1e9, " MiB": 2**20, " GiB": 2**30, " ms": 1e3, " s": 1e6, " us": 1}


@cache
def _kept() -> figures.Kept:
    return figures.read(ROOT / figures.RESULTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert re.search(r"<!-- begin: \w+ -->", text)
    assert figures.filled(text, _kept()) == text, "run `make figures`"


def test_another_number_is_seen() -> None:
    text = PAGES[0].read_text()
    ratio = next(line for line in text.splitlines() if line.startswith("| softmax | 1024x32000"))
    number = re.findall(r"\d+\.\d\d", ratio)[0]
    spoilt = text.replace(ratio, ratio.replace(number, f"{float(number) + 0.01:.2f}"))
    assert figures.filled(spoilt, _kept()) == text != spoilt


def test_readme_opens_with_a_picture_and_a_table() -> None:
    head = PAGES[0].read_text().split("\n## ")[0]
    assert "](docs/speed.png)" in head
    assert "<!-- begin: overview -->" in head


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
                found += [float(cell) for cell in row if re.fullmatch(r"[\d.]+(e-?\d+)?", cell)]
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
