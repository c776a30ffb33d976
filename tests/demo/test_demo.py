"""The demo: its trainings judge our losses and its command; what is faked here is only speed."""

import importlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("equinox")
pytest.importorskip("optax")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
import jax
import torch
from matplotlib.text import Text

import jax_ops
import torch_ops
from examples import corpus, demo, own_process, palette, report
from examples.own_process import Run
from examples.recipe import CHUNKS, Recipe, Weights
from examples.torch_memory import loss_bytes, peak_bytes
from examples.verdict import judge, judge_weights
from tests.demo.small import CURVE, TINY, WEIGHTS, _moved

ROOT = Path(__file__).resolve().parents[2]


@cache
def _model(framework: str):
    return importlib.import_module(f"examples.{framework}_lm")


class Trained(NamedTuple):
    losses: list[float]
    weights: Weights


def _train(framework: str, tokens: np.ndarray, loss: str, recipe: Recipe = TINY) -> Trained:
    training = _model(framework).Training(recipe, loss)
    losses = [training.step(windows) for windows in recipe.batches(tokens)]
    return Trained(losses, recipe.in_corpus_order(training.weights()))


@pytest.fixture(scope="module")
def built_in(tokens) -> dict[str, Trained]:
    return {f: _train(f, tokens, "built-in") for f in demo.FRAMEWORKS}


def test_frameworks_agree_and_learn(built_in):
    ours, other = built_in["torch"], built_in["jax"]
    assert abs(ours.losses[0] - math.log(TINY.vocab)) < 0.1
    assert ours.losses[-1] < ours.losses[0] - 0.3
    np.testing.assert_allclose(ours.losses, other.losses, rtol=1e-5)
    start = TINY.initial_weights()
    assert ours.weights.keys() == other.weights.keys() == start.keys()
    for name, weight in ours.weights.items():
        np.testing.assert_allclose(weight, other.weights[name], rtol=1e-3, atol=1e-5)
        assert not np.array_equal(weight, start[name]), f"{name} was not trained"


def _wrong_losses(framework: str):
    """Wrong losses by what is wrong with them; the first two's values are right."""
    right = _model(framework).LOSSES["built-in"]
    constant = jax.lax.stop_gradient if framework == "jax" else torch.Tensor.detach

    def wrong_gradient(hidden, weight, target):
        value = right(hidden, weight, target)
        return constant(value) + 1.001 * (value - constant(value))

    return {
        "gradient": wrong_gradient,
        "gradient of the head's weight": lambda h, w, target: right(h, constant(w), target),
        "last class": lambda h, w, target: right(h, w[:-1], target),
    }


@pytest.mark.parametrize("framework", demo.FRAMEWORKS)
@pytest.mark.long
def test_ours_pass_and_wrong_losses_do_not(framework, tokens, built_in, monkeypatch):
    control = _train(framework, tokens, "built-in", replace(TINY, relabel=True))
    for loss in demo.OURS:
        assert judge(built_in[framework], _train(framework, tokens, loss), control).ok, loss
    for wrong, loss in _wrong_losses(framework).items():
        monkeypatch.setitem(_model(framework).LOSSES, "wrong", loss)
        verdict = judge(built_in[framework], _train(framework, tokens, "wrong"), control)
        assert not verdict.curve.ok, f"{framework}: a loss with a wrong {wrong} passes"
        assert not verdict.weights.ok, f"{framework}: the weights hide a wrong {wrong}"


@pytest.mark.parametrize("framework", demo.FRAMEWORKS)
def test_third_line_is_the_fused_head_by_chunks(framework, monkeypatch):
    """Its loss could quietly become the second line's: both have the same values."""
    lm = _model(framework)
    ops = {"torch": torch_ops, "jax": jax_ops}[framework]
    array = torch.from_numpy if framework == "torch" else jax.numpy.asarray
    asked = []

    def watched(*args, op=ops.linear_cross_entropy, **options):
        asked.append(options)
        return op(*args, **options)

    monkeypatch.setattr(ops, "linear_cross_entropy", watched)
    hidden, weight = (array(np.ones((n, 2), np.float32)) for n in (64, 5))
    for loss in lm.LOSSES.values():
        assert float(loss(hidden, weight, array(np.zeros(64, np.int64)))) == pytest.approx(math.log(5))
    fused = [{"chunk_size": 8}]
    assert asked == (fused if framework == "jax" else [*fused, {"chunk_size": 8, "grad_samples": 64}])


HEAD = Recipe(vocab=4096, width=8, length=64, batch=4)
LOGITS = 4 * 256 * HEAD.vocab
GRADIENTS = 4 * HEAD.width * (256 + HEAD.vocab)  # less than a chunk of logits


@pytest.mark.parametrize("framework", demo.FRAMEWORKS)
def test_memory_is_that_of_the_logits_but_for_the_fused_head(framework):
    count = importlib.import_module(f"examples.{framework}_memory").loss_bytes
    counted = {loss: count(HEAD, loss) for loss in _model(framework).LOSSES}
    assert counted["built-in"] >= 2 * LOGITS
    assert LOGITS <= counted["cross_entropy"] <= counted["built-in"]
    # More would be no fused head; less would be a count that does not see inside it.
    assert LOGITS / CHUNKS + GRADIENTS <= counted["linear_cross_entropy"] < LOGITS
    if framework == "torch":
        assert LOGITS / CHUNKS <= counted[report.SAMPLED] < LOGITS


def test_the_count_is_of_what_is_held():
    given = torch.zeros(1000)

    def run():
        given.add_(1).view(10, 100).t()
        held = given + 1
        torch.cat([held, given])
        del held
        return given + 2

    few = 64  # bytes of numbers that PyTorch makes on the way
    assert peak_bytes(lambda: given.add_(1).view(10, 100).t()) <= few, "the arguments' own memory"
    assert 3 * given.nbytes <= peak_bytes(run) <= 3 * given.nbytes + few


def _fake_runs(monkeypatch, tmp_path, where=("jax", "linear_cross_entropy"), loss_by=0.0, weight_by=0.0) -> int:
    """Runs the command with training replaced; one run's loss curve and weights are moved."""
    memory = {"built-in": 77.1, "cross_entropy": 66.2, "linear_cross_entropy": 5.3, report.SAMPLED: 4.2}

    def run(framework, loss, recipe, _tokens_path, on_step):
        losses, weights = list(CURVE), WEIGHTS
        if (framework, loss) == where:
            losses[5] += loss_by
            weights = _moved("out", weight_by)
        for value in losses:
            on_step(value)
        return Run(losses, weights, 0.1, memory[loss], 200.0, 100.0)

    monkeypatch.setattr(own_process, "run", run)
    monkeypatch.setattr(corpus, "tokens_file", lambda *_, **__: (tmp_path, tmp_path))
    return demo.main(["--steps", "20", "--out", str(tmp_path / "demo.png")])


def test_command_passes_and_draws(monkeypatch, tmp_path, capsys):
    assert _fake_runs(monkeypatch, tmp_path) == 0
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    table = out[out.index("final loss") : out.index("curve: ")]
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in table, "a column is cut"
    lines = [line.split() for line in table.splitlines() if line.split()]
    assert "head" in table
    for title in ("PyTorch", "JAX"):
        at = lines.index([title])
        assert [(line[0], line[-2]) for line in lines[at + 1 : at + 4]] == [
            ("built-in", "77.1"),
            ("cross_entropy", "66.2"),
            ("linear_cross_entropy", "5.3"),
        ]
    assert next(line for line in lines if line[0] == "grad_samples=64")[-2] == "4.2"


def test_picture_has_a_memory_bar_a_run(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(palette, "save", lambda figure, _: drawn.append(figure))
    _fake_runs(monkeypatch, tmp_path)
    drawn[0].draw_without_rendering()
    curves, differences, memory = drawn[0].axes
    assert len(curves.lines) == 7
    assert len(differences.lines) == 8
    widths = sorted(bar.get_width() for bar in memory.patches)
    assert widths == [4.2, 5.3, 5.3, 66.2, 66.2, 77.1, 77.1]
    assert [bool(axes.get_title("left")) for axes in drawn[0].axes] == [True] * 3
    texts = [text for text in drawn[0].findobj(Text) if text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= palette.SMALLEST
    box = drawn[0].get_tightbbox()
    assert box.x0 >= -0.01
    assert box.x1 <= drawn[0].get_figwidth() + 0.01


@pytest.mark.parametrize("how", [{"loss_by": 1e-3}, {"loss_by": math.nan}, {"weight_by": 1e-3}])
@pytest.mark.parametrize("loss", demo.OURS)
@pytest.mark.parametrize(("framework", "other"), [("torch", "jax"), ("jax", "torch")])
def test_command_fails_when_trainings_part(monkeypatch, tmp_path, capsys, framework, other, loss, how):
    assert _fake_runs(monkeypatch, tmp_path, (framework, loss), **how) == 1
    assert (tmp_path / "demo.png").exists()
    error = capsys.readouterr().err
    assert f"{report.TITLE[framework]}, {loss}: the trainings part" in error
    assert report.TITLE[other] not in error
    assert error.count("\n") == 1


def test_command_refuses_no_steps():
    with pytest.raises(SystemExit) as stop:
        demo.main(["--steps", "0"])
    assert stop.value.code == 2


@pytest.mark.long
def test_own_process_reports_memory_and_weights(tokens_path):
    seen = []
    recipe = replace(TINY, relabel=True)
    run = own_process.run("torch", "built-in", recipe, tokens_path, seen.append)
    assert seen == run.losses
    assert len(seen) == TINY.steps
    assert 0 < run.before_mib <= run.peak_mib
    assert run.seconds_per_step > 0
    assert run.loss_mib == loss_bytes(recipe, "built-in") / 2**20
    trained = _train("torch", np.load(tokens_path), "built-in", recipe)
    assert judge_weights(trained.weights, run.weights, trained.weights).ok


def test_dead_process_is_an_error(tokens_path):
    with pytest.raises(RuntimeError, match="exit code 1"):
        own_process.run("no_such", "built-in", TINY, tokens_path, lambda _: None)


def test_failure_reaches_the_exit_code(tmp_path):
    """The command as make calls it: a failing one is non-zero for the shell."""
    code = (
        "import math, runpy, sys, numpy\n"
        "from examples import corpus, own_process\n"
        "run = own_process.Run([math.nan], {'out': numpy.ones(1)}, 0.1, 1.0, 2.0, 1.0)\n"
        "own_process.run = lambda *_: run\n"
        "corpus.tokens_file = lambda *_, **__: (None, None)\n"
        f"sys.argv = ['demo', '--steps', '1', '--out', {str(tmp_path / 'a.png')!r}]\n"
        "runpy.run_module('examples.demo', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "more than rounding explains" in done.stderr
