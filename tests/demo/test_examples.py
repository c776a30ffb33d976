"""Every example runs, and asserts its own claim; in this process, where the frameworks are loaded already."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("matplotlib")

import torch
import torch.nn.functional as F

import jax_ops
import torch_ops
from benchmarks import records
from examples import confident

ROOT = Path(__file__).parents[2]
SLOW = {"transformer_step", "flax_training"}
EXAMPLES = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
    for name in (
        *("transformer_step", "flax_training", "policy_gradient", "segmentation", "distillation", "hessian_vector"),
    )
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(f"examples.{name}").main()
    assert capsys.readouterr().out


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.long
def test_notebook(framework: str) -> None:
    runpy.run_path(str(ROOT / "examples" / f"notebook_{framework}.py"))


def test_every_example_is_run_and_shown() -> None:
    shown = (ROOT / "docs" / "examples.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in [*(str(example.values[0]) for example in EXAMPLES), "notebook_torch", "notebook_jax"]:
        assert f'"examples/{name}.py"' in shown
    for path in (ROOT / "examples").glob("*.py"):
        if "def main(" in path.read_text():
            assert re.search(rf"\b{path.stem}\b", tests), f"{path.name} is run by no test"


@pytest.mark.parametrize("name", ["segmentation", "policy_gradient", "hessian_vector", "distillation"])
def test_an_example_fails_where_the_loss_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    door = jax_ops if name == "distillation" else torch_ops
    for op in ("cross_entropy", "linear_cross_entropy"):
        right = getattr(door, op)

        def wrong(input, *arrays, right=right, **options):
            return right(input * 1.01, *arrays, **options)

        monkeypatch.setattr(door, op, wrong)
    with pytest.raises(AssertionError):
        importlib.import_module(f"examples.{name}").main()


def test_collapse_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confident, "MODULUS", 11)
    monkeypatch.setattr(confident, "RATE", 0.05)
    given = ["--steps", "100", "--every", "50", "--share", "0.5", "--results", str(tmp_path)]
    threads = torch.get_num_threads()
    points = confident.main([*given, "--picture", str(tmp_path / "c.png")])
    torch.set_num_threads(threads)
    assert (tmp_path / "c.png").stat().st_size > 10_000
    assert records.read(confident.Point, tmp_path / "confident.csv") == points
    last = {point.loss: point for point in points if point.step == 100}
    assert set(last) == set(confident.LOSSES)
    assert all(point.train_accuracy == 1 for point in last.values())
    assert last["built-in"].zero_target_gradient > 0.5
    assert last["built-in"].zero_loss > 0.5
    # exp(-87), float32's smallest normal number, is 0 in ours too.
    assert last["ours"].zero_target_gradient < 0.1
    assert last["ours"].zero_loss < 0.1


def test_a_row_that_is_right_by_18_keeps_its_gradient_in_ours_alone() -> None:
    logits = torch.tensor([[18.0, 0.0, 0.0]], requires_grad=True)
    gradients = {
        name: torch.autograd.grad(loss(logits, torch.tensor([0])), logits)[0][0, 0].item()
        for name, loss in confident.LOSSES.items()
    }
    assert gradients["built-in"] == 0
    truth = torch.autograd.grad(F.cross_entropy(logits.double(), torch.tensor([0])), logits)[0][0, 0].item()
    assert gradients["ours"] == pytest.approx(truth, rel=1e-6)
    assert truth < 0
