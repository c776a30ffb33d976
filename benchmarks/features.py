"""Who has what: every peer that imports here is asked each question, and its answer is judged in float64.

    python -m benchmarks.features [--results FOLDER]

A peer answers with per-row losses of hidden states and a head, or of logits. It has a feature if the numbers are right:
an option that is missing, an error and a wrong number are told apart. Keeps benchmarks/results/features.csv; lines of
peers that do not import here stay as they are. `make figures` writes docs/leaderboard.md from it.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import feature_jax, feature_torch, records
from benchmarks.feature_cases import Absent, Question

RESULTS = Path("benchmarks", "results", "features.csv")


@dataclass(frozen=True)
class Answer:
    """One peer's answer to one question."""

    peer: str
    version: str
    door: str  # torch or jax
    feature: str
    answer: str  # yes, absent, error or wrong
    why: str


def main(given: Sequence[str] | None = None) -> int:
    """Ask everybody who is here, print and keep."""
    parser = argparse.ArgumentParser("python -m benchmarks.features", description="Which library has which feature.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: %(default)s)")
    options = parser.parse_args(given)
    found, missing = everybody()
    for name, why in missing.items():
        print(f"{name}: not asked ({why})")
    known = records.read(Answer, options.results) if options.results.exists() else []
    asked = {answer.peer for answer in found}
    records.write(Answer, [*found, *(answer for answer in known if answer.peer not in asked)], options.results)
    for answer in found:
        print(f"{answer.peer:28} {answer.feature:34} {answer.answer} {answer.why}")
    return 0


def everybody(wanted: Callable[[str], bool] = lambda name: True) -> tuple[list[Answer], dict[str, str]]:
    """(the answers of all peers that import here, why the others do not)."""
    found: list[Answer] = []
    missing: dict[str, str] = {}
    for questions, peers in (
        (feature_torch.QUESTIONS, feature_torch.PEERS),
        (feature_jax.QUESTIONS, feature_jax.PEERS),
    ):
        for name, opened in peers.items():
            if not wanted(name):
                continue
            try:
                peer = opened()
            except Exception as error:  # a library that does not start is a line, whatever it raises
                missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            door = "torch" if questions is feature_torch.QUESTIONS else "jax"
            found += [Answer(name, peer.version, door, *ask(question, peer)) for question in questions]
    return found, missing


def ask(question: Question, peer: Any) -> tuple[str, str, str]:
    """(the feature, the answer, why it is no yes)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            answers = question.ask(peer)
        except Absent as absent:
            return question.feature, "absent", str(absent)
        except Exception as error:  # what a peer raises is its answer
            return question.feature, "error", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    for name, (mine, truth) in answers.items():
        if mine is None:
            return question.feature, "error", f"no {name}, and nothing said"
        mine, truth = np.asarray(mine, np.float64), np.asarray(truth, np.float64)
        if mine.shape != truth.shape or not np.allclose(mine, truth, rtol=question.tolerance, atol=question.floor):
            return question.feature, "wrong", name
    return question.feature, "yes", ""


if __name__ == "__main__":
    sys.exit(main())
