"""What the demo says under its table."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from examples import demo, report
from examples.own_process import Run

CURVE = list(np.linspace(9.7, 7.0, 20))
MEMORY = {"built-in": 77.1, "cross_entropy": 66.2, "linear_cross_entropy": 5.3}


def _runs(parted: tuple[str, str] | None = None) -> report.Runs:
    """Trainings that are alike but for one; the fused head takes a third of the time."""
    runs = {}
    for framework in demo.FRAMEWORKS:
        for loss in demo.losses_of(framework):
            losses = [value + 1e-3 * ((framework, loss) == parted) for value in CURVE]
            seconds = {"linear_cross_entropy": 0.1, report.SAMPLED: 0.06}.get(loss, 0.3)
            runs[framework, loss] = Run(losses, {"w": np.ones(2)}, seconds, MEMORY.get(loss, 77.1), 200.0, 100.0)
    return runs


def test_sentence() -> None:
    said = report.sentence(_runs(), demo.verdicts_of(_runs()))
    one = "same curve, a third of the step time, 1/15 of the memory of head and loss"
    assert said == f"PyTorch: {one}, a fifth of the step time by grad_samples=64; JAX: {one}."


@pytest.mark.parametrize("loss", demo.OURS)
def test_sentence_tells_another_curve(loss: str) -> None:
    runs = _runs(("jax", loss))
    said = report.sentence(runs, demo.verdicts_of(runs))
    assert "PyTorch: same curve" in said
    assert "JAX: another curve" in said


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        *((1 / 3, "a third of the"), (0.08, "a twelfth of the"), (0.5, "half of the"), (0.24, "a quarter of the")),
        *((0.05, "1/20 of the"), (0.7, "0.7 of the"), (1.02, "the same"), (0.96, "the same"), (1.3, "1.3 times the")),
    ],
)
def test_quotients_in_words(ratio: float, words: str) -> None:
    assert report.part_of(ratio) == words
