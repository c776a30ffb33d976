"""Calls that take turns, and the most memory one of them needs."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLICE = 1e-3  # seconds: calls shorter than this are repeated, the clock and one interruption being too coarse


@dataclass(frozen=True)
class Call:
    """One rival's call. A call that destroys its argument is made a new one each time, outside the time."""

    run: Callable[..., Any]
    fresh: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        """Once, on its own argument."""
        return self.run() if self.fresh is None else self.run(self.fresh())


def take_turns(
    calls: Mapping[str, Call], *, budget: float, least: int = 5, most: int = 101
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each call in each round, and how often each is repeated within one.

    Rounds go on for `budget` seconds. Every second round runs backwards, so that no call is always the one after
    the same other. What a call returns is freed within its time, as in a training loop: a large result costs its
    page faults and the return of its pages each time.
    """
    repeats = {name: _repeats(call) for name, call in calls.items()}
    seen: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    gc.collect()
    gc.disable()  # a collection takes 100 ms with both frameworks loaded
    try:
        end = time.perf_counter() + budget
        for done in range(most):
            if done >= least and time.perf_counter() > end:
                break
            for name in order:
                seen[name].append(_seconds(calls[name], repeats[name]))
            order.reverse()
    finally:
        gc.enable()
    return seen, repeats


def _repeats(call: Call) -> int:
    _seconds(call, 1)
    return max(1, math.ceil(SLICE / _seconds(call, 1)))


def _seconds(call: Call, repeats: int) -> float:
    if call.fresh is not None:
        arguments = [call.fresh() for _ in range(repeats)]
        start = time.perf_counter()
        for argument in arguments:
            call.run(argument)
        return (time.perf_counter() - start) / repeats
    if repeats > 1:
        call.run()  # the threads of the other framework's pool spin for a while after their last work
    start = time.perf_counter()
    for _ in range(repeats):
        call.run()
    return (time.perf_counter() - start) / repeats


def peak_bytes(call: Call) -> int | None:
    """Resident memory a call needs at most above what there was, its result included; None where Linux is not."""
    status, marks = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    argument = () if call.fresh is None else (call.fresh(),)
    try:
        # Free memory that malloc has kept would serve the call, and not be seen.
        ctypes.CDLL(None).malloc_trim(0)
        marks.write_text("5")  # the peak starts again from here
        before = _field(status, "VmRSS")
        answer = call.run(*argument)
        peak = _field(status, "VmHWM")
    except (OSError, AttributeError):
        return None
    del answer
    return max(0, peak - before)


def _field(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
