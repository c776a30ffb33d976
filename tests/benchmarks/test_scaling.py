"""The sweeps of `make scaling`, and the crossovers read off them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import records, scaling, scaling_plot, table
from benchmarks.cases import shape_of
from benchmarks.heads import head_of, kept_of
from benchmarks.scaling import HEADS, KEPT, ROWS, SWEEPS, Crossover, Sweep, crossovers, split


def _line(shape: str, call: str, ratio: float, spread: float = 1.01, **other: object) -> table.Line:
    about = {"device": "cpu", "threads": 2, "framework": "torch 2", "op": "softmax", "dtype": "float32", "shape": shape}
    about |= {"call": call, "microseconds": 100 * ratio, "ratio": ratio}
    about |= {"ratio_low": ratio / spread, "ratio_high": ratio * spread, "limits": 1.0, "work": 1, "share": 1.0}
    memory = {"peak_bytes": None, "workspace_bytes": None, "frozen_bytes": None}
    return table.Line(**{**about, **memory, "rounds": 5, "repeats": 1, "others": 0.0, **other})


def test_sizes_grow_over_two_decades() -> None:
    for sweep in SWEEPS:
        sizes = sweep.sizes()
        assert sizes[-1] == 100 * sizes[0]
        assert sizes == sorted(set(sizes))
        assert all(shape_of(shape) if sweep in ROWS else head_of(shape) for shape in sweep.shapes())
    assert {sweep.name for sweep in HEADS} == {"N", "V", "D"}
    assert [kept_of(shape) for sweep in KEPT for shape in sweep.shapes()] == [4, 13, 40, 126, 400]


def test_a_sweep_finds_its_own_lines() -> None:
    lines = [
        _line(shape, "torch", 2.0) for shape in ("10x8192", "100x8192", "64x8192", "64x1000", "10x64@8192", "x8192")
    ]
    assert split(lines, Sweep("N", 10, "{}x8192"))[0] == {"10x8192": 10, "100x8192": 100, "64x8192": 64}
    assert split(lines, Sweep("V", 10, "64x{}"))[0] == {"64x8192": 8192, "64x1000": 1000}
    assert split(lines, Sweep("N", 10, "{}x64@8192"))[0] == {"10x64@8192": 10}
    more = [*lines, *(_line(f"256x64@8192/{k}", "ours", 1.0) for k in (4, 40))]
    assert split(more, KEPT[0])[0] == {"256x64@8192/4": 4, "256x64@8192/40": 40}
    assert [split(more, sweep)[0] for sweep in HEADS[1:]] == [{}, {}]


def test_crossovers_are_where_the_winner_changes() -> None:
    sweep, sizes = Sweep("N", 1, "{}x8"), {f"{n}x8": n for n in (1, 10, 100, 1000)}
    ratios = {"1x8": 0.25, "10x8": 0.5, "100x8": 2.0, "1000x8": 16.0}
    lines = [_line(shape, "torch", ratio) for shape, ratio in ratios.items()]
    lines += [_line(shape, call, 1.0) for shape in ratios for call in ("ours", "copy")]
    about = ("torch 2", 2, "softmax", "torch", "N", "Nx8")
    assert list(crossovers(sweep, sizes, lines)) == [Crossover(*about, "torch", 32)]  # sqrt(10 * 100)
    wide = [_line(shape, "torch", ratio, spread=3.0) for shape, ratio in ratios.items()]
    assert list(crossovers(sweep, sizes, wide)) == [Crossover(*about, "torch", 10)]  # 1000^(1/3): 10 and 100 are ties
    alone = [_line(shape, "torch", 3.0) for shape in ratios]
    assert list(crossovers(sweep, sizes, alone)) == [Crossover(*about, "ours", None)]
    even = [_line(shape, "torch", 1.0) for shape in ratios]
    assert list(crossovers(sweep, sizes, even)) == [Crossover(*about, "neither", None)]


def test_what_was_measured_is_drawn_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    op = {"op": "linear_cross_entropy", "workspace_bytes": 10**6}
    lines = [_line(f"{n}x64@8192", call, r, **op) for n in (20, 200) for call, r in (("ours", 1.0), ("torch", n / 50))]
    lines += [_line(f"{n}x8192", call, r) for n in (10, 100) for call, r in (("ours", 1.0), ("torch", n / 50))]
    records.write(table.Line, lines, tmp_path / "cpu.csv")
    assert scaling.main(["--draw", "--results", str(tmp_path), "--picture", str(tmp_path / "s.png")]) == 0
    assert "N = 50" in capsys.readouterr().out
    assert (tmp_path / "s.png").stat().st_size > 10_000
    assert {c.size for c in scaling.crossings(lines)} == {50}
    assert set(scaling_plot.COLUMNS) == {sweep.name for sweep in SWEEPS}
