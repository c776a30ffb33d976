"""The experiment on sampled gradients, small: every gradient trains, is told apart, kept and drawn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from benchmarks import records
from examples import sampled_gradient
from examples.sampled_gradient import LOSSES, Moved, Point


@pytest.mark.slow
def test_every_gradient_trains(tmp_path: Path) -> None:
    sizes = ["--steps", "4", "--every", "2", "--seeds", "0", "1", "--vocab", "500", "--bytes", "100000"]
    where = ["--cache", str(tmp_path), "--results", str(tmp_path), "--picture", str(tmp_path / "sampled.png")]
    points, moved = sampled_gradient.main([*sizes, *where])
    found = [(p.step, p.seed, p.gradient) for p in points]
    assert found == [(step, seed, name) for step in (2, 4) for seed in (0, 1) for name in LOSSES]
    for seed in (0, 1):
        first, last = ({p.gradient: p for p in points if (p.step, p.seed) == (step, seed)} for step in (2, 4))
        for name in LOSSES:
            assert last[name].held_out_loss < first[name].held_out_loss < math.log(500) + 0.3, name
            assert last[name].processor_seconds > 0
        assert len({(p.train_loss, p.held_out_loss) for p in last.values()}) > 3, "they are not all one gradient"
    for p in points:
        mine = [m for m in moved if (m.gradient, m.seed, m.step) == (p.gradient, p.seed, p.step)]
        assert [(m.first_rank, m.last_rank) for m in mine] == [(1, 16), (17, 64), (65, 256), (257, 500)]
        assert all(0 < m.update < m.distance * 1.01 for m in mine if p.step == 2)
    assert records.read(Point, tmp_path / "sampled.csv") == points
    assert records.read(Moved, tmp_path / "sampled_updates.csv") == moved
    assert (tmp_path / "sampled.png").stat().st_size > 10_000


def test_a_rank_has_its_classes() -> None:
    torch = pytest.importorskip("torch")
    moved = sampled_gradient._moved("exact", 0, 1, torch.arange(20.0), torch.ones(20))
    assert [(m.first_rank, m.last_rank, m.update, m.distance) for m in moved] == [(1, 16, 7.5, 1), (17, 20, 17.5, 1)]
    other = sampled_gradient._moved("K = 4", 0, 1, torch.arange(20.0), 2 * torch.ones(20))
    assert sampled_gradient.of_exact([*moved, *other], other[1]) == 2.0
