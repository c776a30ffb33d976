"""JAX's linear head on a device: ours in both memory modes, optax, and bare matmuls, of PyTorch's own tensors.

Judged and told as gpu_heads' calls are; times are the host's, around a call that is waited for.
"""

from __future__ import annotations

import os

import torch

from benchmarks.gpu_clock import DeviceCall, take_turns
from benchmarks.gpu_heads import LINEAR_MATMULS, OP, OnDevice, judged, judgement
from benchmarks.gpu_lines import MATMULS, OURS, DeviceLine, lines
from benchmarks.gpu_rows import Settings


def measure(about: dict[str, str], settings: Settings, on: OnDevice) -> list[DeviceLine]:
    """One case's lines."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is on the device, too
    import jax
    import jax.numpy as jnp

    from benchmarks import jax_heads

    arrays = [jnp.from_dlpack(x.detach()) for x in (on.input, on.linear_weight)]
    arrays.append(jnp.from_dlpack(on.target.int()))
    memory: dict[str, int | None] = {}

    def call(name: str, loss: jax_heads.Loss) -> DeviceCall:
        program = jax_heads.compiled(loss, *arrays)
        memory[name] = jax_heads.workspace_bytes(program)
        return lambda: _answers(jax.block_until_ready(program(*arrays)))

    made = {name: call(name, loss) for name, loss in jax_heads.LOSSES.items()}
    calls, remarks = judged(on, {name: run for name, run in made.items() if name.startswith(OURS)})
    for name, run in made.items():
        if name not in calls and name not in remarks:
            why, ran = judgement(on, run)
            remarks |= {name: why} if why else {}
            calls |= {name: run} if ran else {}
    matmuls = jax.jit(jax_heads.matmuls)
    calls[MATMULS] = lambda: (jax.block_until_ready(matmuls(*arrays[:2])), ())[1]
    times = take_turns(calls, "cpu", seconds=settings.seconds)
    work = {name: LINEAR_MATMULS["lean" if "lean" in name else "fast"] / 3 for name in calls}
    cell = about | {"framework": jax_heads.VERSION, "part": "jax", "op": OP, "dtype": on.case.dtype}
    return lines(
        cell | {"shape": str(on.case)}, times, ours=OURS, limit=MATMULS, work=work, memory=memory, remarks=remarks
    )


def _answers(found: object) -> tuple[torch.Tensor, ...]:
    value, (dx, dw) = found  # pyright: ignore[reportGeneralTypeIssues]
    return tuple(map(torch.from_dlpack, (value, dx, dw)))
