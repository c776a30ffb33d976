"""The demo: its corpus, its models, and above all that its check can fail."""

import importlib
import json
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
from tokenizers import Tokenizer

import jax_ops
import torch_ops
from examples import corpus, demo, own_process, palette, report
from examples.own_process import Run
from examples.recipe import CHUNKS, Recipe, Weights
from examples.torch_memory import Alive, loss_bytes
from examples.verdict import FACTOR, judge, judge_curve, judge_weights

ROOT = Path(__file__).resolve().parents[2]
TINY = Recipe(vocab=300, width=16, heads=2, length=16, batch=4, steps=12)
CURVE = list(np.linspace(9.7, 7.0, 20))
ULP = 9.5367431640625e-07  # float32 spacing at 9.7


@pytest.fixture(scope="module")
def tokens_path(tmp_path_factory) -> Path:
    return corpus.tokens_file(TINY.vocab, 50_000, tmp_path_factory.mktemp("cache"))[0]


# The corpus


def test_default_vocabulary_is_large():
    assert corpus.VOCAB >= 16_000
    assert Recipe().vocab == corpus.VOCAB


def test_tokens_are_ids_of_the_sources(tokens_path):
    tokens = np.load(tokens_path)
    assert tokens.dtype == np.int32
    assert tokens.ndim == 1
    assert tokens.min() >= 0
    assert tokens.max() < TINY.vocab
    assert len(np.unique(tokens)) > 100
    tokenizer = json.loads(tokens_path.with_suffix(".json").read_text())
    assert len(tokenizer["model"]["vocab"]) == TINY.vocab


def test_tokens_spell_the_sources(tokens_path):
    tokenizer = Tokenizer.from_file(str(tokens_path.with_suffix(".json")))
    text = "".join(corpus.read_sources(50_000))
    assert tokenizer.decode(np.load(tokens_path).tolist()) == text


def test_second_call_reads_the_cache(tokens_path, monkeypatch):
    def no_training(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(corpus, "train_tokenizer", no_training)
    assert corpus.tokens_file(TINY.vocab, 50_000, tokens_path.parent)[0] == tokens_path
    with pytest.raises(AssertionError, match="trained again"):
        corpus.tokens_file(TINY.vocab + 1, 50_000, tokens_path.parent)


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path, array):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "_save_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus.tokens_file(TINY.vocab, 50_000, tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    assert not list(tmp_path.glob("*.part"))


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="subwords"):
        corpus.tokens_file(16_384, 1, tmp_path)


# The recipe


def test_renumbering_is_the_same_model_and_data():
    tokens = np.arange(TINY.vocab, dtype=np.int32)
    other = replace(TINY, relabel=True)
    assert sorted(other.new_ids()) == list(range(TINY.vocab))
    assert not np.array_equal(other.new_ids(), TINY.new_ids())
    here, there = TINY.initial_weights(), other.initial_weights()
    for batch, renamed in zip(TINY.batches(tokens), other.batches(tokens), strict=True):
        assert batch.shape == (TINY.batch, TINY.length + 1)
        np.testing.assert_array_equal(here["embedding"][batch], there["embedding"][renamed])
    for name in here.keys() - {"embedding"}:
        np.testing.assert_array_equal(here[name], there[name])


# The check


def test_check_accepts_rounding():
    ours = [x + ULP * (-1) ** i for i, x in enumerate(CURVE)]
    assert judge_curve(CURVE, ours, CURVE).ok
    assert judge_curve(CURVE, CURVE, CURVE).ok


def test_check_follows_the_control():
    control = [x + 1e-4 * (i >= 10) for i, x in enumerate(CURVE)]
    late = [x + 5e-4 * (i >= 10) for i, x in enumerate(CURVE)]
    early = [x + 5e-4 for x in CURVE]
    assert judge_curve(CURVE, late, control).ok
    assert not judge_curve(CURVE, early, control).ok


@pytest.mark.parametrize("bad", [1e-3, -1e-3, FACTOR * ULP * 1.1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 7, -1])
def test_check_rejects(bad, at):
    ours = list(CURVE)
    ours[at] += bad
    assert not judge_curve(CURVE, ours, CURVE).ok


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_check_rejects_what_all_curves_share(bad):
    curve = [*CURVE, bad]
    assert not judge_curve(curve, curve, curve).ok
    assert not judge_curve(CURVE, CURVE, [bad] * len(CURVE)).ok
    assert not judge_curve([], [], []).ok
    with pytest.raises(ValueError, match="lengths"):
        judge_curve(CURVE, CURVE[:-1], CURVE)


WEIGHTS = {"embedding": np.full((3, 2), 0.5, np.float32), "out": np.full(2, 9.7, np.float32)}


def _moved(name: str, by: float) -> Weights:
    moved = WEIGHTS[name].copy()
    moved[-1:] += np.float32(by)
    return WEIGHTS | {name: moved}


def test_check_of_weights_accepts_rounding_and_follows_the_control():
    assert judge_weights(WEIGHTS, WEIGHTS, WEIGHTS).ok
    assert judge_weights(WEIGHTS, _moved("out", ULP), WEIGHTS).ok
    assert judge_weights(WEIGHTS, _moved("out", 5e-4), _moved("out", 1e-4)).ok
    assert not judge_weights(WEIGHTS, _moved("embedding", 5e-4), _moved("out", 1e-4)).ok


@pytest.mark.parametrize("bad", [1e-3, -1e-3, math.nan, math.inf])
@pytest.mark.parametrize("name", WEIGHTS)
def test_check_of_weights_rejects(bad, name):
    moved = _moved(name, bad)
    assert not judge_weights(WEIGHTS, moved, WEIGHTS).ok
    if not math.isfinite(bad):
        assert not judge_weights(moved, moved, moved).ok
        assert not judge_weights(WEIGHTS, WEIGHTS, moved).ok


def test_check_of_weights_wants_the_same_arrays():
    with pytest.raises(ValueError, match="shapes"):
        judge_weights(WEIGHTS, {"out": WEIGHTS["out"]}, WEIGHTS)
    assert not judge_weights({}, {}, {}).ok


# The models


@pytest.fixture(scope="module")
def tokens(tokens_path) -> np.ndarray:
    """The corpus without the last class, so that a loss may wrongly drop that column."""
    ids = np.load(tokens_path)
    return np.where(ids == TINY.vocab - 1, 0, ids)


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
    assert asked == [{"chunk_size": 8}]


# The memory of head and loss

HEAD = Recipe(vocab=4096, width=8, length=16, batch=4)
LOGITS = 4 * 64 * HEAD.vocab
GRADIENTS = 4 * HEAD.width * (64 + HEAD.vocab)


@pytest.mark.parametrize("framework", demo.FRAMEWORKS)
def test_memory_is_that_of_the_logits_but_for_the_fused_head(framework):
    count = importlib.import_module(f"examples.{framework}_memory").loss_bytes
    counted = {loss: count(HEAD, loss) for loss in _model(framework).LOSSES}
    assert counted["built-in"] >= 2 * LOGITS
    assert LOGITS <= counted["cross_entropy"] <= counted["built-in"]
    # More would be no fused head; less would be a count that does not see inside it.
    assert LOGITS / CHUNKS + GRADIENTS <= counted["linear_cross_entropy"] < LOGITS


def test_alive_counts_what_is_held():
    given = torch.zeros(1000)
    with Alive(given) as alive:
        given.add_(1).view(10, 100).t()
        assert alive.peak == 0, "the arguments' own memory"
        held = given + 1
        assert alive.now == alive.peak == held.nbytes
        torch.cat([held, given])
        del held
        assert alive.now == 0
    assert alive.peak == 3 * given.nbytes


# The command


def _fake_runs(monkeypatch, tmp_path, where=("jax", "linear_cross_entropy"), loss_by=0.0, weight_by=0.0) -> int:
    """Runs the command with training replaced; one run's loss curve and weights are moved."""
    memory = {"built-in": 77.1, "cross_entropy": 66.2, "linear_cross_entropy": 5.3}

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


def test_picture_has_three_memory_bars_a_framework(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(palette, "save", lambda figure, _: drawn.append(figure))
    _fake_runs(monkeypatch, tmp_path)
    drawn[0].draw_without_rendering()
    curves, differences, memory = drawn[0].axes
    assert len(curves.lines) == 6
    assert len(differences.lines) == 8
    widths = sorted(bar.get_width() for bar in memory.patches)
    assert widths == [5.3, 5.3, 66.2, 66.2, 77.1, 77.1]
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
