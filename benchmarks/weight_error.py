"""What chunks do to accuracy: the relative error of a head's dL/dlinear_weight in bfloat16, by number of chunks.

|dW - truth| / |truth| over all entries; the truth is float64 on the same rounded inputs. A weight's gradient is a sum
over all rows: summed chunk by chunk in bfloat16 it loses digits with every chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from rich.table import Table

import jax_ops
import torch_ops
from benchmarks import jax_heads, torch_heads
from benchmarks.heads import HeadCase

CASE = HeadCase((1024, 64, 512), "bfloat16")
CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)
Gradient = Callable[[int], np.ndarray]  # dL/dlinear_weight by so many chunks


@dataclass(frozen=True)
class WeightError:
    """One call's error with one number of chunks."""

    call: str
    dtype: str
    shape: str
    chunks: int
    relative: float


def measure(case: HeadCase = CASE, chunks: Sequence[int] = CHUNKS) -> list[WeightError]:
    """Every call with every number of chunks."""
    truth, _ = case.truth("d_linear_weight")

    def error(dw: np.ndarray) -> float:
        return float(np.linalg.norm(case.lines("d_linear_weight", dw) - truth) / np.linalg.norm(truth))

    calls = {**_by_torch(case), **_by_jax(case)}
    return [
        WeightError(name, case.dtype, str(case), count, float(f"{error(call(count)):.4g}"))
        for name, call in calls.items()
        for count in chunks
    ]


def _by_torch(case: HeadCase) -> dict[str, Gradient]:
    on = torch_heads.Inputs(case)

    def ours(mode: Any, size: int, count: int) -> np.ndarray:
        loss: Any = partial(torch_ops.linear_cross_entropy, memory=mode, chunk_size=-(-size // count))
        return torch_heads.numpy(torch_heads.gradients(loss, on)[2])

    def theirs(options: dict[str, Any], count: int) -> np.ndarray:
        loss = torch_heads.chunked(batch_chunk_size=-(-case.rows // count), **options)
        return torch_heads.numpy(torch_heads.gradients(loss, on)[2])

    def micro_batches(count: int) -> np.ndarray:
        w = on.linear_weight.detach().clone().requires_grad_()
        for x, t in zip(on.input.detach().chunk(count), on.target.chunk(count), strict=True):
            (F.cross_entropy(F.linear(x, w), t, reduction="sum") / case.rows).backward()
        assert w.grad is not None
        return torch_heads.numpy(w.grad)

    found: dict[str, Gradient] = {
        "torch, ours, fast": partial(ours, "fast", case.rows),
        "torch, ours, lean": partial(ours, "lean", case.classes),
    }
    if torch_heads.skipped() is None:
        found["F.linear_cross_entropy"] = partial(theirs, {})
        half = {"acc_policy": "accurate", "acc_dtype": getattr(torch, case.dtype)}
        found["F.linear_cross_entropy, summed in bfloat16"] = partial(theirs, half)
    return {**found, "F.cross_entropy, micro-batches summed in .grad": micro_batches}


def _by_jax(case: HeadCase) -> dict[str, Gradient]:
    on = jax_heads.Inputs(case)
    arrays = (on.input, on.linear_weight, on.target)

    def ours(mode: str, size: int, count: int) -> np.ndarray:
        loss = partial(jax_ops.linear_cross_entropy, memory=mode, chunk_size=-(-size // count))
        return jax_heads.numpy(jax_heads.compiled(loss, *arrays)(*arrays)[1][1])

    def scanned(count: int) -> np.ndarray:
        def loss(x: jax.Array, w: jax.Array, t: jax.Array) -> jax.Array:
            def part(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
                rows = optax.softmax_cross_entropy_with_integer_labels(chunk[0] @ w.T, chunk[1])
                return total + rows.astype(jnp.float32).sum() / case.rows, None

            chunks = x.reshape(count, -1, x.shape[-1]), t.reshape(count, -1)
            return jax.lax.scan(part, jnp.zeros(()), chunks)[0]

        return jax_heads.numpy(jax_heads.compiled(loss, *arrays)(*arrays)[1][1])

    return {
        "jax, ours, fast": partial(ours, "fast", case.rows),
        "jax, ours, lean": partial(ours, "lean", case.classes),
        "optax, scanned by chunks": scanned,
    }


def table(errors: Sequence[WeightError]) -> Table:
    """A call a row, a number of chunks a column."""
    chunks = sorted({e.chunks for e in errors})
    found = Table(title=f"dL/dlinear_weight off by, {errors[0].shape} {errors[0].dtype}", title_justify="left")
    for name in ("", *(f"{count} chunk{'s' * (count > 1)}" for count in chunks)):
        found.add_column(name, justify="right" if name else "left")
    for call in dict.fromkeys(e.call for e in errors):
        mine = {e.chunks: e.relative for e in errors if e.call == call}
        found.add_row(call, *(f"{mine[count]:.1e}" for count in chunks))
    return found
