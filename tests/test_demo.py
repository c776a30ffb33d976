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
from tokenizers import Tokenizer

from examples import corpus, demo, own_process
from examples.own_process import Run
from examples.recipe import Recipe
from examples.verdict import FACTOR, judge

ROOT = Path(__file__).resolve().parents[1]
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
    assert judge(CURVE, ours, CURVE).ok
    assert judge(CURVE, CURVE, CURVE).ok


def test_check_follows_the_control():
    control = [x + 1e-4 * (i >= 10) for i, x in enumerate(CURVE)]
    late = [x + 5e-4 * (i >= 10) for i, x in enumerate(CURVE)]
    early = [x + 5e-4 for x in CURVE]
    assert judge(CURVE, late, control).ok
    assert not judge(CURVE, early, control).ok


@pytest.mark.parametrize("bad", [1e-3, -1e-3, FACTOR * ULP * 1.1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 7, -1])
def test_check_rejects(bad, at):
    ours = list(CURVE)
    ours[at] += bad
    assert not judge(CURVE, ours, CURVE).ok


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_check_rejects_what_all_curves_share(bad):
    curve = [*CURVE, bad]
    assert not judge(curve, curve, curve).ok
    assert not judge(CURVE, CURVE, [bad] * len(CURVE)).ok
    assert not judge([], [], []).ok
    with pytest.raises(ValueError, match="lengths"):
        judge(CURVE, CURVE[:-1], CURVE)


# The models


@pytest.fixture(scope="module")
def tokens(tokens_path) -> np.ndarray:
    """The corpus without the last class, so that a loss may wrongly drop that column."""
    ids = np.load(tokens_path)
    return np.where(ids == TINY.vocab - 1, 0, ids)


@cache
def _model(framework: str):
    return importlib.import_module(f"examples.{framework}_lm")


@pytest.fixture(scope="module")
def built_in(tokens) -> dict[str, list[float]]:
    return {f: list(_model(f).train(TINY, tokens, "built-in")) for f in ("torch", "jax")}


def test_frameworks_agree_and_learn(built_in):
    assert abs(built_in["torch"][0] - math.log(TINY.vocab)) < 0.1
    assert built_in["torch"][-1] < built_in["torch"][0] - 0.3
    np.testing.assert_allclose(built_in["torch"], built_in["jax"], rtol=1e-5)


def _wrong_losses(framework: str):
    """Wrong losses by what is wrong with them; the first one's values are right."""
    right = _model(framework).LOSSES["built-in"]
    constant = jax.lax.stop_gradient if framework == "jax" else torch.Tensor.detach

    def wrong_gradient(logits, target):
        value = right(logits, target)
        return constant(value) + 1.001 * (value - constant(value))

    return {
        "gradient": wrong_gradient,
        "last class": lambda logits, target: right(logits[:, :-1], target),
    }


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_ours_passes_and_wrong_losses_do_not(framework, tokens, built_in, monkeypatch):
    lm = _model(framework)
    control = list(lm.train(replace(TINY, relabel=True), tokens, "built-in"))
    assert judge(built_in[framework], list(lm.train(TINY, tokens, "ours")), control).ok
    for wrong, loss in _wrong_losses(framework).items():
        monkeypatch.setitem(lm.LOSSES, "wrong", loss)
        verdict = judge(built_in[framework], list(lm.train(TINY, tokens, "wrong")), control)
        assert not verdict.ok, f"{framework}: a loss with a wrong {wrong} passes"


# The command


def _fake_runs(monkeypatch, tmp_path, change) -> int:
    """Runs the command with training replaced; `change` is added to our JAX curve."""

    def run(framework, loss, recipe, _tokens_path, on_step):
        losses = list(CURVE)
        if (framework, loss) == ("jax", "ours"):
            losses[5] += change
        for value in losses:
            on_step(value)
        return Run(losses, 0.1, 200.0, 100.0)

    monkeypatch.setattr(own_process, "run", run)
    monkeypatch.setattr(corpus, "tokens_file", lambda *_, **__: (tmp_path, tmp_path))
    return demo.main(["--steps", "20", "--out", str(tmp_path / "demo.png")])


def test_command_passes_and_draws(monkeypatch, tmp_path, capsys):
    assert _fake_runs(monkeypatch, tmp_path, 0.0) == 0
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for word in ("PyTorch, built-in", "PyTorch, ours", "JAX, built-in", "JAX, ours", "final loss"):
        assert word in out


@pytest.mark.parametrize("change", [1e-3, math.nan])
def test_command_fails_when_curves_part(monkeypatch, tmp_path, capsys, change):
    assert _fake_runs(monkeypatch, tmp_path, change) == 1
    assert (tmp_path / "demo.png").exists()
    error = capsys.readouterr().err
    assert "JAX: the curves part" in error
    assert "PyTorch" not in error


def test_command_refuses_no_steps():
    with pytest.raises(SystemExit) as stop:
        demo.main(["--steps", "0"])
    assert stop.value.code == 2


def test_own_process_reports_memory(tokens_path):
    seen = []
    run = own_process.run("torch", "built-in", TINY, tokens_path, seen.append)
    assert seen == run.losses
    assert len(seen) == TINY.steps
    assert 0 < run.before_mib <= run.peak_mib
    assert run.seconds_per_step > 0


def test_dead_process_is_an_error(tokens_path):
    with pytest.raises(RuntimeError, match="exit code 1"):
        own_process.run("no_such", "ours", TINY, tokens_path, lambda _: None)


def test_failure_reaches_the_exit_code(tmp_path):
    """The command as make calls it: a failing one is non-zero for the shell."""
    code = (
        "import math, runpy, sys\n"
        "from examples import corpus, own_process\n"
        "run = own_process.Run([math.nan], 0.1, 2.0, 1.0)\n"
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
