"""Answers are judged before they are timed, entry by entry, against the float64 reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.cases import OPS, Case
from benchmarks.heads import HEAD_OPS, SAMPLED, HeadCase


class WrongAnswer(Exception):
    """A call's answer is not the truth: it is not timed."""


def check(case: Case | HeadCase, op: str, answers: Sequence[np.ndarray], *, ours: bool) -> None:
    """Raise WrongAnswer unless every entry of every answer is near the truth."""
    names = (OPS | HEAD_OPS | SAMPLED)[op].answers
    if len(answers) != len(names):
        raise WrongAnswer(f"{len(answers)} answers where {', '.join(names)} are due")
    for name, found in zip(names, answers, strict=True):
        if found.shape != case.due(name):
            raise WrongAnswer(f"an answer of shape {found.shape} where {case.due(name)} is due")
        value, scale = case.truth(name)
        _compare(case, name, case.lines(name, found), value, case.allowed(scale, ours=ours))


def _compare(case: Case | HeadCase, name: str, found: np.ndarray, truth: np.ndarray, allowed: np.ndarray) -> None:
    truth, allowed = np.atleast_1d(truth), np.atleast_1d(allowed)
    for start in range(0, len(found), len(truth)):
        block = found[start : start + len(truth)]
        # Not `any(off > allowed)`: a NaN is greater than nothing.
        good = np.abs(block - truth[: len(block)]) <= allowed[: len(block)]
        if not good.all():
            at = tuple(int(i) for i in np.argwhere(~good)[0])
            where = (case.place(name, start + at[0]), *at[1:])
            raise WrongAnswer(f"{name}{list(where)} is {block[at]:.9g}, in truth {truth[at]:.9g}")
