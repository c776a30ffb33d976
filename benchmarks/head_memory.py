"""`make bench-head`: a head too large for its logits, once in each memory mode.

Gemma-2 2B's head with its loss and the gradients of input and linear_weight, each mode in a process of its own:
seconds, bytes of arrays beyond inputs and gradients (as in `make bench`), the process's peak, and the error of
dL/dinput in a few rows against float64. Beside them what the built-in path would need beyond inputs and gradients:
in PyTorch by the shapes, in JAX by its compiler; it is not run. Minutes, and 24 GiB of memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.heads import BLOCK, HeadCase, head_of

GEMMA2_2B = "8192x2304@256000"
MODES = ("fast", "lean")
DOORS = ("torch", "jax")
SAMPLE = 4  # rows
FAR = 0.03  # a row's relative error in bfloat16: p alone is off by the roundoff of a logit near 6
Result = dict[str, Any]


def built_in_bytes(case: HeadCase) -> int:
    """What F.cross_entropy(F.linear(x, w), t) needs at its worst moment, in arrays of the logits' size.

    The backward pass holds log-probabilities, their gradient (zeros but for the targets) and the logits' gradient.
    """
    return 3 * case.logits_bytes


def main(given: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if an answer is wrong or a process did not end well."""
    parser = argparse.ArgumentParser("python -m benchmarks.head_memory", description=__doc__)
    parser.add_argument("--shape", default=GEMMA2_2B, help="rows x features @ classes (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="(default: %(default)s)")
    parser.add_argument("--door", nargs="+", choices=DOORS, default=DOORS, help="whose ops (default: both)")
    options = parser.parse_args(given)
    shape = head_of(options.shape)
    if shape is None:
        parser.error(f"argument --shape: {options.shape!r} is no N x D @ V")
    case = HeadCase(shape, options.dtype)
    console = Console(width=None if sys.stdout.isatty() else 120)
    ended_well = True
    table = Table(title=f"{case} {case.dtype}, 6NDV = {case.flops():.3g} flops", title_justify="left")
    for name in ("", "memory", "seconds", "beyond inputs and gradients", "process", "of it before", "dL/dinput off by"):
        table.add_column(name, justify="left" if name in ("", "memory") else "right")
    for door in options.door:
        for mode in MODES:
            found = in_a_process(door, mode, case)
            if "exit" in found:
                table.add_row(door, mode, f"ended with exit code {found['exit']}")
                ended_well = False
                continue
            console.print(f"{door}, {mode}: {found['seconds']:.1f} s")  # the table is minutes away
            sizes = (_gib(found[name]) for name in ("workspace", "process", "before"))
            table.add_row(door, mode, f"{found['seconds']:.1f}", *sizes, f"{found['off']:.2g}")
            ended_well &= found["off"] < FAR
        needs = built_in_bytes(case) if door == "torch" else in_a_process(door, "built-in", case).get("workspace")
        table.add_row(door, "built-in, not run", "", "?" if needs is None else _gib(needs))
    console.print(table)
    return 0 if ended_well else 1


def _gib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def in_a_process(door: str, mode: str, case: HeadCase) -> Result:
    """What `measure` finds in a new process, or {"exit": code}."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, door, mode, case))
    child.start()
    sender.close()  # or the end of the child would never be seen here
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        return {"exit": child.exitcode}
    finally:
        child.join()


def _child(sender: Connection, door: str, mode: str, case: HeadCase) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # resident memory says nothing about a GPU's
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler need not say that it starts
    sender.send({"torch": with_torch, "jax": with_jax}[door](mode, case))


def with_torch(mode: str, case: HeadCase) -> Result:
    """One call, counted and timed at once: at this size the counting takes no time."""
    import torch

    import torch_ops
    from benchmarks.torch_heads import workspace_bytes

    n, d, v = case.shape
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    w = torch.empty(v, d, dtype=dtype)
    for rows in w.split(BLOCK):
        rows.copy_(torch.randn(rows.shape, generator=generator) / d**0.5)
    w.requires_grad_()
    target = torch.randint(v, (n,), generator=generator)

    def run(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss: Any = torch_ops.linear_cross_entropy
        value = loss(x, w, target, memory=mode)
        return value, *torch.autograd.grad(value, (x, w))

    run(x[:1], w[:1], target[:1] * 0)  # threads are made, and what is loaded late is there
    before, _ = _resident()
    start = time.perf_counter()
    (_, dx, dw), workspace = workspace_bytes(partial(run, x, w, target))
    seconds = time.perf_counter() - start
    _, peak = _resident()
    assert dw.shape == w.shape
    with torch.no_grad():
        blocks = (block.double().numpy() for block in w.split(BLOCK))
        off = _off(x[:SAMPLE].double().numpy(), blocks, target[:SAMPLE].numpy(), dx[:SAMPLE].double().numpy() * n)
    return {"seconds": seconds, "workspace": workspace, "process": peak, "before": before, "off": off}


def with_jax(mode: str, case: HeadCase) -> Result:
    """One call of the compiled program; of the built-in path the compilation alone."""
    import jax
    import jax.numpy as jnp

    from benchmarks import jax_heads

    n, d, v = case.shape
    shapes = [jax.ShapeDtypeStruct(s, case.dtype) for s in ((n, d), (v, d))]
    loss = jax_heads.LOSSES[{"fast": "ours", "lean": "ours, lean"}.get(mode, "optax(x @ W.T)")]
    program = jax_heads.compiled(loss, *shapes, jax.ShapeDtypeStruct((n,), jnp.int32))
    workspace = jax_heads.workspace_bytes(program)
    if mode not in MODES:
        return {"workspace": workspace}
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((n, d), np.float32), case.dtype)
    w = np.empty((v, d), jnp.dtype(case.dtype))
    for i in range(0, v, BLOCK):
        block = w[i : i + BLOCK]
        block[:] = rng.standard_normal(block.shape, np.float32) / d**0.5
    target = rng.integers(0, v, n)
    given = jax.block_until_ready((x, jnp.asarray(w), jnp.asarray(target, jnp.int32)))
    before, _ = _resident()
    start = time.perf_counter()
    _, (dx, dw) = jax.block_until_ready(program(*given))
    seconds = time.perf_counter() - start
    _, peak = _resident()
    assert dw.shape == w.shape
    blocks = (w[i : i + BLOCK].astype(np.float64) for i in range(0, v, BLOCK))
    sample = (np.asarray(a[:SAMPLE]).astype(np.float64) for a in (x, dx))
    off = _off(next(sample), blocks, target[:SAMPLE], next(sample) * n)
    return {"seconds": seconds, "workspace": workspace, "process": peak, "before": before, "off": off}


def _off(x: np.ndarray, blocks: Any, target: np.ndarray, found: np.ndarray) -> float:
    """The largest relative error of a row of N dL/dinput = p W - W_t, p by blocks of classes; NaN counts as 1."""
    total, mean, at_target, first = np.zeros((len(x), 1)), np.zeros_like(x), np.zeros_like(x), 0
    for block in blocks:  # logits are of standard normal size: no maximum need be taken off
        e = np.exp(x @ block.T)
        total, mean = total + e.sum(-1, keepdims=True), mean + e @ block
        here = (target >= first) & (target < first + len(block))
        at_target[here] = block[target[here] - first]
        first += len(block)
    truth = mean / total - at_target
    off = np.linalg.norm(found - truth, axis=-1) / np.linalg.norm(truth, axis=-1)
    return float(np.max(np.where(np.isfinite(off), off, 1.0)))


def _resident() -> tuple[int, int]:
    """(now, peak) of this process's memory; 0 where Linux is not."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    fields = {name: int(rest.split()[0]) * 1024 for name, _, rest in (s.partition(":") for s in lines) if "kB" in rest}
    return fields.get("VmRSS", 0), fields.get("VmHWM", 0)


if __name__ == "__main__":
    sys.exit(main())
