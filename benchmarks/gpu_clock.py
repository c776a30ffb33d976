"""Time and memory on a device: events and the allocator's peak on a GPU, the host's clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

DeviceCall = Callable[[], tuple[torch.Tensor, ...]]


class _HostMark:
    """torch.cuda.Event's two methods by the host's clock."""

    seconds = 0.0

    def record(self) -> None:
        """Now."""
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: _HostMark) -> float:
        """Milliseconds from here to a later mark."""
        return (later.seconds - self.seconds) * 1e3


def name_of(device: str) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(
    calls: Mapping[str, DeviceCall], device: str, *, seconds: float, least: int = 5, batch: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; the calls take turns, every second round backwards.

    Before the first round each call has run once, untimed. The device is waited for after `batch` rounds: calls much
    shorter than a millisecond would otherwise be timed with the host's work before them.
    """
    for call in calls.values():
        call()
    wait(device)
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, end, done = list(calls), time.perf_counter() + seconds, 0
    while done < least or time.perf_counter() < end:
        marks = []
        for _ in range(batch):
            for name in order:
                start, stop = _mark(device), _mark(device)
                start.record()
                calls[name]()
                stop.record()
                marks.append((name, start, stop))
            order.reverse()
            done += 1
        wait(device)
        for name, start, stop in marks:
            found[name].append(start.elapsed_time(stop))
    return found


def workspace_bytes(call: DeviceCall, device: str) -> int | None:
    """The most bytes a call has alive beyond what there was and what it returns; None where nobody counts."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answers = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(a.nbytes for a in answers)


def _mark(device: str) -> Any:
    return torch.cuda.Event(enable_timing=True) if device == "cuda" else _HostMark()
