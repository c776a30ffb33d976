"""One training run in a process of its own, so that its peak memory is its own."""

import importlib
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from examples.recipe import Recipe, Weights


@dataclass(frozen=True)
class Run:
    """What one run measured.

    Attributes:
        losses: in nats, by step.
        weights: after the last step, in the order of the corpus's ids.
        seconds_per_step: median.
        loss_mib: the most that one call of head and loss and their gradients holds, counted.
        peak_mib: of the resident memory while training.
        before_mib: resident memory with the framework loaded and nothing trained.
    """

    losses: list[float]
    weights: Weights
    seconds_per_step: float
    loss_mib: float
    peak_mib: float
    before_mib: float


def run(framework: str, loss: str, recipe: Recipe, tokens_path: Path, on_step: Callable[[float], None]) -> Run:
    """Trains with `examples.<framework>_lm` in a new process and waits for it.

    Args:
        framework: "torch" or "jax".
        loss: "built-in", "cross_entropy" or "linear_cross_entropy".
        recipe: what is trained, and how long.
        tokens_path: .npy file of the corpus.
        on_step: called here with the loss after each step.

    Raises:
        RuntimeError: the process ended without a result (its traceback is on stderr).
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, framework, loss, recipe, tokens_path))
    child.start()
    sender.close()  # or the end of the child would never be seen here
    try:
        while not isinstance(message := receiver.recv(), Run):
            on_step(message)
        return message
    except EOFError:
        child.join()
        name = f"{framework}, {loss} loss"
        raise RuntimeError(f"the run ({name}) ended with exit code {child.exitcode}") from None
    finally:
        if sys.exc_info()[0] is not None:
            child.terminate()
        child.join()


def _child(sender: Connection, framework: str, loss: str, recipe: Recipe, tokens_path: Path) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # resident memory says nothing about a GPU's
    lm = importlib.import_module(f"examples.{framework}_lm")
    tokens = np.load(tokens_path)
    before, _ = _resident_mib()
    losses, seconds = [], []
    training = lm.Training(recipe, loss)
    for windows in recipe.batches(tokens):
        started = time.perf_counter()
        value = training.step(windows)
        seconds.append(time.perf_counter() - started)
        losses.append(value)
        sender.send(value)
    _, peak = _resident_mib()
    counted = importlib.import_module(f"examples.{framework}_memory").loss_bytes(recipe, loss)
    weights = recipe.in_corpus_order(training.weights())
    # The first step also compiles.
    sender.send(Run(losses, weights, statistics.median(seconds[1:] or seconds), counted / 2**20, peak, before))


def _resident_mib() -> tuple[float, float]:
    """This process's resident memory in MiB: (now, peak).

    On Linux ru_maxrss starts at the peak of the process that started this one, which has trained a
    tokenizer; VmHWM starts at zero. Without /proc, "now" is the peak so far.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in fields:
            now, peak = (int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
            return now, peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak /= 2**20 if sys.platform == "darwin" else 2**10
    return peak, peak
