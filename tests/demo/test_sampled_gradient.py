"""The experiment on sampled gradients, small: every gradient trains, is told apart, kept and drawn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from benchmarks import records
from examples import sampled_gradient
from examples.sampled_gradient import LOSSES, Point


@pytest.mark.slow
def test_every_gradient_trains(tmp_path: Path) -> None:
    sizes = ["--steps", "4", "--every", "2", "--seeds", "0", "--vocab", "500", "--bytes", "100000"]
    where = ["--cache", str(tmp_path), "--results", str(tmp_path), "--picture", str(tmp_path / "sampled.png")]
    points = sampled_gradient.main([*sizes, *where])
    assert [(p.gradient, p.step) for p in points] == [(name, step) for step in (2, 4) for name in LOSSES]
    first, last = ({p.gradient: p for p in points if p.step == step} for step in (2, 4))
    for name in LOSSES:
        assert last[name].held_out_loss < first[name].held_out_loss < math.log(500) + 0.3, name
    assert len({p.held_out_loss for p in last.values()}) > 4, "they are not all one gradient"
    assert records.read(Point, tmp_path / "sampled.csv") == points
    assert (tmp_path / "sampled.png").stat().st_size > 10_000
