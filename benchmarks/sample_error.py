"""What points do to a head's gradient: bias and spread of dL/dinput and dL/dlinear_weight by their number a row.

Of many draws of one gradient. The bias is the distance of their mean from the truth, in the standard errors that the
draws themselves show: about 1 where there is none. The variance is summed over entries, and so is its bound, 1/K of the
variance of a label drawn from the model; the noise of one draw is its standard deviation by the gradient's norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from rich.table import Table

import jax_ops
import torch_ops
from benchmarks import jax_heads, torch_heads
from benchmarks.heads import HeadCase
from softmax_ext import reference

CASE = HeadCase((256, 16, 512))
SAMPLES = (1, 4, 16, 64, 256)
DRAWS = 400
QUANTITIES = ("d_input", "d_linear_weight")
Draws = Callable[
    [int], Iterable[Sequence[np.ndarray]]
]  # of so many points: (dL/dinput, dL/dlinear_weight) again and again


@dataclass(frozen=True)
class SampleError:
    """One gradient of one call with so many points a row."""

    call: str
    quantity: str
    shape: str
    samples: int
    draws: int
    bias: float  # of the mean, in its standard errors
    variance: float  # of its bound
    noise: float  # of one draw, of the gradient's norm


def measure(case: HeadCase = CASE, samples: Sequence[int] = SAMPLES, draws: int = DRAWS) -> list[SampleError]:
    """Every call with every number of points."""
    truth = exact(case)
    found = []
    for call, drawn in {"torch_ops": _by_torch(case, draws), "jax_ops": _by_jax(case, draws)}.items():
        for count in samples:
            every = [np.stack(v) for v in zip(*drawn(count), strict=True)]
            for quantity, values in zip(QUANTITIES, every, strict=True):
                g, bound = truth[quantity]
                spread = values.astype(np.float64).var(0, ddof=1).sum()
                off = np.linalg.norm(values.mean(0, dtype=np.float64) - g) / np.sqrt(spread / draws)
                sizes = (off, spread * count / bound, np.sqrt(spread) / np.linalg.norm(g))
                found.append(
                    SampleError(call, quantity, str(case), count, draws, *(float(f"{size:.4g}") for size in sizes))
                )
    return found


def exact(case: HeadCase) -> dict[str, tuple[np.ndarray, float]]:
    """The gradients of the mean loss, and the variance of a label drawn from the model, summed over the entries."""
    x, w, t = (v.astype(np.float64) for v in (case.input(), case.linear_weight(), case.target()))
    dx, dw, _ = reference.linear_cross_entropy_grad(x, w, t.astype(np.int64))
    p = np.asarray(reference.softmax(x @ w.T), np.float64)
    of_input = (p @ w**2 - (p @ w) ** 2).sum() / case.rows**2
    of_weight = ((p * (1 - p)).T @ x**2).sum() / case.rows**2
    return {"d_input": (dx, of_input), "d_linear_weight": (dw, of_weight)}


def _by_torch(case: HeadCase, draws: int) -> Draws:
    on = torch_heads.Inputs(case)

    def drawn(count: int) -> Iterable[Sequence[np.ndarray]]:
        source = torch.Generator().manual_seed(count)

        def loss(x: Any, w: Any, t: Any) -> Any:
            return torch_ops.linear_cross_entropy(x, w, t, grad_samples=count, generator=source)

        for _ in range(draws):
            yield [torch_heads.numpy(v) for v in torch_heads.gradients(loss, on)[1:]]

    return drawn


def _by_jax(case: HeadCase, draws: int) -> Draws:
    on = jax_heads.Inputs(case)

    def drawn(count: int) -> Iterable[Sequence[np.ndarray]]:
        def loss(x: Any, w: Any, t: Any, key: Any) -> Any:
            return jax_ops.linear_cross_entropy(x, w, t, grad_samples=count, key=key)

        keys = jax.random.split(jax.random.key(count), draws)
        program = jax_heads.compiled(loss, on.input, on.linear_weight, on.target, keys[0])
        for key in keys:
            _, gradients = program(on.input, on.linear_weight, on.target, key)
            yield [np.asarray(v) for v in gradients]

    return drawn


def table(errors: Sequence[SampleError]) -> Table:
    """A call's gradient a row, a number of points a column."""
    samples = sorted({e.samples for e in errors})
    title = f"bias in standard errors, variance of its bound, noise of the gradient: {errors[0].shape}"
    found = Table(title=title, title_justify="left")
    for name in ("", "", *(f"K = {count}" for count in samples)):
        found.add_column(name)
    for call, quantity, cells in rows(errors):
        found.add_row(call, quantity, *cells)
    return found


def rows(errors: Sequence[SampleError]) -> list[tuple[str, str, list[str]]]:
    """(call, quantity, a cell for each number of points)."""
    keys = dict.fromkeys((e.call, e.quantity) for e in errors)
    return [
        (*key, [f"{e.bias:.2f}, {e.variance:.2f}, {e.noise:.2g}" for e in errors if (e.call, e.quantity) == key])
        for key in keys
    ]
