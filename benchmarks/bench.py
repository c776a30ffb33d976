"""`make bench`: our ops beside the frameworks' own, each answer checked first, rivals interleaved in one process.

    python -m benchmarks.bench [--rounds 9] [--threads 2] [--shapes 1024x32000 ...]

A row is one call on float32 logits (N, V): the median over rounds of the built-in's time divided by ours, and
ours in copies: the time of copying the logits into memory that was there before. Absolute times of a shared
machine mean nothing and are not printed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import jax_ops
import torch_ops
from softmax_ext import reference

SHAPES = ("1024x32000", "512x128256", "8192x1000", "65536x10")
Call = Callable[[], Any]


def torch_rows(x: np.ndarray, t: np.ndarray) -> dict[str, tuple[Call, Call]]:
    """name: (the built-in, ours), as calls that return what is to be checked."""
    logits, target = torch.from_numpy(x), torch.from_numpy(t)
    leaf = logits.clone().requires_grad_()
    with torch.no_grad():
        y = torch.softmax(logits, -1)

    def trained(loss: Callable[..., torch.Tensor], **options: Any) -> Call:
        def call() -> torch.Tensor:
            return torch.autograd.grad(loss(leaf, target, **options), leaf)[0]

        return call

    return {
        "softmax": (lambda: torch.softmax(logits, -1), lambda: torch_ops.softmax(logits)),
        "log_softmax": (lambda: torch.log_softmax(logits, -1), lambda: torch_ops.log_softmax(logits)),
        "softmax backward": (
            lambda: torch.ops.aten._softmax_backward_data(logits, y, -1, torch.float32),
            lambda: torch_ops._rows.softmax_bwd(logits, y, dim=1),  # pyright: ignore
        ),
        "cross_entropy": (
            lambda: F.cross_entropy(logits, target),
            lambda: torch_ops.cross_entropy(logits, target),
        ),
        "cross_entropy + gradient": (trained(F.cross_entropy), trained(torch_ops.cross_entropy)),
    }


def jax_rows(x: np.ndarray, t: np.ndarray) -> dict[str, tuple[Call, Call]]:
    """The same for JAX, both sides under jit."""
    logits, target = jnp.asarray(x), jnp.asarray(t, jnp.int32)

    def timed(fn: Callable[..., Any], *args: Any) -> Call:
        compiled = jax.jit(fn)
        return lambda: jax.block_until_ready(compiled(*args))

    def gradient(loss: Callable[..., jax.Array]) -> Call:
        return timed(jax.grad(lambda x: loss(x, target).mean()), logits)

    theirs = optax.softmax_cross_entropy_with_integer_labels
    ours = jax_ops.softmax_cross_entropy_with_integer_labels
    return {
        "jax softmax": (timed(jax.nn.softmax, logits), timed(jax_ops.softmax, logits)),
        "jax cross_entropy": (timed(lambda x: theirs(x, target), logits), timed(lambda x: ours(x, target), logits)),
        "jax cross_entropy gradient": (gradient(theirs), gradient(ours)),
    }


def check(name: str, answer: Any, x: np.ndarray, t: np.ndarray, rows: slice) -> None:
    """Refuse to time a wrong answer (judged on a few rows: the reference is slow)."""
    few, n = x[rows], len(x)
    found = np.asarray(answer)
    if "gradient" in name:
        truth, found = reference.cross_entropy_grad(few, t[rows], reduction="sum") / n, found[rows]
    elif "backward" in name:
        truth, found = reference.softmax_vjp(reference.softmax(few), few), found[rows]
    elif "cross_entropy" in name:
        truth = np.asarray(reference.cross_entropy(x, t, reduction="none" if found.ndim else "mean"))
    else:
        truth, found = getattr(reference, name.split()[-1])(few), found[rows]
    np.testing.assert_allclose(found, truth, rtol=2e-5, atol=1e-7 * float(np.abs(truth).max()), err_msg=name)


def medians(calls: list[Call], rounds: int) -> list[float]:
    """Median seconds of each call, taking turns."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, seen in zip(calls, times, strict=True):
            gc.collect()
            start = time.perf_counter()
            call()
            seen.append(time.perf_counter() - start)
    return [statistics.median(seen) for seen in times]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(title="built-in time / ours (ours in copies of the logits)")
    table.add_column("")
    columns: list[dict[str, str]] = []
    for shape in options.shapes:
        table.add_column(f"({shape.replace('x', ', ')})", justify="right")
        n, v = map(int, shape.split("x"))
        rng = np.random.default_rng(0)
        x, t = rng.standard_normal((n, v), np.float32) * 3, rng.integers(0, v, n)
        old, source = torch.empty(n, v), torch.from_numpy(x)
        cells = {}
        for name, (theirs, ours) in {**torch_rows(x, t), **jax_rows(x, t)}.items():
            check(name, ours(), x, t, slice(0, 4))
            builtin, mine, copy = medians([theirs, ours, partial(old.copy_, source)], options.rounds)
            cells[name] = f"{builtin / mine:.2f} ({mine / copy:.1f})"
        columns.append(cells)
    for name in columns[0]:
        table.add_row(name, *(cells[name] for cells in columns))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
