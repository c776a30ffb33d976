"""Answers are judged before they are timed: every entry, against the float64 reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.cases import DTYPES, ITEMSIZE, OPS, Case

# Roundoffs an entry may be off. Ours are held to more by the tests; here a wrong kernel must not pass for a fast one.
# A rival has to answer the same question, with the digits its formula leaves it (in half precision: few).
OURS, RIVALS = {2: 4, 4: 32, 8: 32}, {2: 64, 4: 2048, 8: 2048}


class WrongAnswer(Exception):
    """A call's answer is not the truth: it is not timed."""


def check(case: Case, op: str, answers: Sequence[np.ndarray], *, ours: bool) -> None:
    """Raise WrongAnswer unless every entry of every answer is near the truth."""
    names = OPS[op].answers
    if len(answers) != len(names):
        raise WrongAnswer(f"{len(answers)} answers where {', '.join(names)} are due")
    roundoff, floor = DTYPES[case.dtype]
    unit = (OURS if ours else RIVALS)[ITEMSIZE[case.dtype]] * roundoff
    for name, found in zip(names, answers, strict=True):
        value, scale = case.truth(name)
        _compare(name, _as_rows(case, found, value), value, unit * scale + floor)


def _as_rows(case: Case, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Class axis last, rows in one axis, as the truth has them."""
    logits, rows = case.shape, (case.shape[0], *case.shape[2:])
    due = (logits, rows, ())[2 - truth.ndim]
    if found.shape != due:
        raise WrongAnswer(f"an answer of shape {found.shape} where {due} is due")
    return np.moveaxis(found, 1, -1).reshape(-1, case.classes) if truth.ndim == 2 else found.reshape(-1)


def _compare(name: str, found: np.ndarray, truth: np.ndarray, allowed: np.ndarray) -> None:
    truth, allowed = np.atleast_1d(truth), np.atleast_1d(allowed)
    for start in range(0, len(found), len(truth)):
        block = found[start : start + len(truth)]
        # Not `any(off > allowed)`: a NaN is greater than nothing.
        good = np.abs(block - truth[: len(block)]) <= allowed[: len(block)]
        if not good.all():
            at = tuple(int(i) for i in np.argwhere(~good)[0])
            where = (start + at[0], *at[1:])
            raise WrongAnswer(f"{name}{list(where)} is {block[at]:.9g}, in truth {truth[at]:.9g}")
