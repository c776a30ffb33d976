"""JAX's further rivals: other libraries' heads."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax

from benchmarks import jax_heads
from benchmarks.cases import Case
from benchmarks.heads import HeadCase
from benchmarks.timing import Call

TOKAMAX = "tokamax"


def more(op: str, on: Any) -> dict[str, Call]:
    """Calls by name, beside those of `CALLS`."""
    if op != "linear_cross_entropy" or _missing():
        return {}
    return {TOKAMAX: jax_heads.call(_tokamax, on)}


def skipped(case: Case | HeadCase) -> list[str]:
    """Which are missing, and why."""
    reason = _missing() if isinstance(case, HeadCase) else None
    return [f"{TOKAMAX} is not timed: {reason}"] if reason else []


def _tokamax(x: jax.Array, linear_weight: jax.Array, target: jax.Array) -> jax.Array:
    """Its way on a CPU: XLA's, which holds the logits."""
    tokamax = importlib.import_module(TOKAMAX)
    return tokamax.linear_softmax_cross_entropy_loss(x, target, linear_weight.T, reduction="mean")


@functools.cache
def _missing() -> str | None:
    try:
        importlib.import_module(TOKAMAX)
    except ImportError as error:
        return str(error)
    importlib.import_module("absl.flags").FLAGS.mark_as_parsed()  # or it takes this program's options for its own
    return None
