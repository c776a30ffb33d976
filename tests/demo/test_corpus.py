"""The demo's corpus, and the check of its curves and weights."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("equinox")
pytest.importorskip("optax")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from tokenizers import Tokenizer

from examples import corpus
from examples.recipe import Recipe
from examples.verdict import FACTOR, judge_curve, judge_weights
from tests.demo.small import CURVE, TINY, WEIGHTS, _moved

ULP = 9.5367431640625e-07  # float32 spacing at 9.7


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
