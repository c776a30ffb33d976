"""A door for `benchmarks.huge_pages`: its calls say where they are made."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.timing import Call


class Inputs:
    """How often the call was made."""

    def __init__(self, case: Any) -> None:
        self.case, self.runs = case, 0


def numpy(answer: Any) -> np.ndarray:
    return np.asarray(answer)


def _about(variable: str, on: Inputs) -> Call:
    def run() -> tuple[Any, ...]:
        on.runs += 1
        return os.environ[variable], os.getpid(), on.runs, on.case.shape

    return Call(run)


def _spent(_: Any, on: Inputs) -> Call:
    """Its arguments are made one at a time, and used once."""
    made = iter(range(10))
    used: list[int] = []

    def run(argument: int) -> tuple[Any, ...]:
        used.append(argument)
        return (used,)

    return Call(run, fresh=lambda: next(made), workspace=lambda frozen: 2 + frozen)


PARTS: dict[str, tuple[Callable[..., Call], Any, Any]] = {
    "about": (_about, None, "THP_MEM_ALLOC_ENABLE"),
    "fails": (_about, None, "NO_SUCH_VARIABLE"),
    "spent": (_spent, None, None),
}
