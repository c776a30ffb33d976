"""Calls that take turns, and the most memory one of them needs."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLICE = 1e-3  # seconds: calls shorter than this are repeated, the clock and one interruption being too coarse
LARGE = 2**23  # bytes: resident memory is counted by the page, in batches for each thread


@dataclass(frozen=True)
class Call:
    """One rival's call. A call that destroys its argument is made a new one each time, outside the time."""

    run: Callable[..., Any]
    fresh: Callable[[], Any] | None = None
    workspace: Callable[[bool], int] | None = None  # bytes beyond arguments and answers; with the weight frozen?
    # Of a call that another process makes:
    peak: Callable[[], int | None] | None = None  # what `peak_bytes` saw there
    answers: Callable[[], Any] | None = None  # as arrays of NumPy
    op: str | None = None  # whose answers it has, where they are not those of the op it stands beside

    def __call__(self) -> Any:
        """Once, on its own argument."""
        return self.run() if self.fresh is None else self.run(self.fresh())


@dataclass(frozen=True)
class Turns:
    """What `take_turns` saw."""

    seconds: dict[str, list[float]]  # of each call in each round
    repeats: dict[str, int]  # how often each call was made within a round
    others: float | None  # cores that other programs kept busy meanwhile; None where Linux is not


def take_turns(calls: Mapping[str, Call], *, budget: float, least: int = 5, most: int = 101) -> Turns:
    """Time the calls in turn, round after round.

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
        start, before = time.perf_counter(), _busy_elsewhere()
        end = start + budget
        for done in range(most):
            if done >= least and time.perf_counter() > end:
                break
            for name in order:
                seen[name].append(_seconds(calls[name], repeats[name]))
            order.reverse()
        after = _busy_elsewhere()
    finally:
        gc.enable()
    others = None
    if before is not None and after is not None:
        others = max(0.0, (after - before) / (time.perf_counter() - start))
    return Turns(seen, repeats, others)


def _busy_elsewhere() -> float | None:
    """Seconds all cores together have worked, but for this process: a busy neighbour makes figures of no worth."""
    try:
        user, nice, system, _, _, *interrupts_and_steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    tick = os.sysconf("SC_CLK_TCK")
    mine = time.process_time()
    for process in multiprocessing.active_children():
        mine += sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / tick
    return (user + nice + system + sum(interrupts_and_steal)) / tick - mine


def _repeats(call: Call) -> int:
    first = _seconds(call, 1)
    return 1 if first > 10 * SLICE else max(1, math.ceil(SLICE / _seconds(call, 1)))


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
    try:
        # JAX may free an earlier result during the call, which then seems to need less.
        return max(_growth(call) for _ in range(2))
    except (OSError, AttributeError):
        return None


def _growth(call: Call) -> int:
    argument = () if call.fresh is None else (call.fresh(),)
    # Free memory that malloc has kept would serve the call, and not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    answer = call.run(*argument)
    peak = _resident("VmHWM")
    del answer
    return max(0, peak - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
