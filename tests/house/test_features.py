"""Who has what: ours has all, a wrong answer is seen, and the libraries installed still answer as the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")

import torch
import torch.nn.functional as F

from benchmarks import feature_jax, feature_torch, features, records
from benchmarks.feature_cases import Absent

ROOT = Path(__file__).parents[2]
KEPT = records.read(features.Answer, ROOT / features.RESULTS)
PEERS = [*feature_torch.PEERS, *feature_jax.PEERS]
COMPILED = {"cut-cross-entropy", *feature_jax.PEERS}


@pytest.mark.parametrize(
    "peer",
    [pytest.param(name, marks=pytest.mark.slow if name in COMPILED else pytest.mark.long) for name in PEERS],
)
def test_peers_answer_as_the_page_says(peer: str) -> None:
    found, missing = features.everybody(lambda name: name == peer)
    if missing:
        pytest.skip(f"{peer} does not import here: {missing[peer]}")
    kept = {(a.version.split("+")[0], a.feature): a.answer for a in KEPT if a.peer == peer}
    if peer.startswith("softmax-ext"):
        assert {a.answer for a in found} == {"yes"}
        assert {feature for _, feature in kept} == {a.feature for a in found}
        return
    version = found[0].version.split("+")[0]
    if not any(known == version for known, _ in kept):
        pytest.skip(f"{peer} {version} is not the version asked for the page")
    assert {a.feature: a.answer for a in found} == {feature: answer for (_, feature), answer in kept.items()}


def test_every_peer_was_asked() -> None:
    assert {answer.peer for answer in KEPT} == set(PEERS)
    assert {answer.answer for answer in KEPT} == {"yes", "absent", "error", "wrong"}


def _rows(wrong: str) -> feature_torch.Rows:
    def rows(x: torch.Tensor, head: torch.Tensor, target: torch.Tensor, **options: object) -> torch.Tensor:
        if wrong == "absent":
            raise Absent("no loss at all")
        if wrong == "error":
            raise RuntimeError("first line\nsecond line")
        loss = F.cross_entropy(F.linear(x, head), target, reduction="none")
        changed = {
            "value": loss * 1.001,
            "gradient": loss.detach() + 1.001 * (loss - loss.detach()),
            "rows": loss.flip(0),
            "upstream": loss.mean().expand_as(loss),
            "NaN": torch.where(torch.arange(len(loss)) == 3, torch.nan, loss),
        }
        return changed[wrong]

    return rows


@pytest.mark.parametrize("wrong", ["value", "gradient", "rows", "upstream", "NaN", "absent", "error"])
def test_a_wrong_answer_is_seen(wrong: str) -> None:
    question = feature_torch.QUESTIONS[0]
    _, answer, why = features.ask(question, feature_torch.Peer("0", _rows(wrong)))
    assert answer == (wrong if wrong in ("absent", "error") else "wrong")
    assert "second line" not in why


def test_a_right_answer_counts() -> None:
    right = feature_torch.PEERS["torch: F.linear, F.cross_entropy"]()
    assert features.ask(feature_torch.QUESTIONS[0], right) == ("loss and gradient of each row", "yes", "")


def test_lines_of_absent_peers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> feature_torch.Peer:
        raise ImportError("No module named 'gone'")

    old = features.Answer("gone", "1", "torch", "forward mode", "yes", "")
    records.write(features.Answer, [old], tmp_path / "features.csv")
    one = "torch: F.linear, F.cross_entropy"
    monkeypatch.setattr(feature_torch, "PEERS", {one: feature_torch.PEERS[one], "gone": gone})
    monkeypatch.setattr(feature_jax, "PEERS", {})
    assert features.main(["--results", str(tmp_path / "features.csv")]) == 0
    kept = records.read(features.Answer, tmp_path / "features.csv")
    assert old in kept
    assert len(kept) == 1 + len(feature_torch.QUESTIONS)
