"""What `python -m softmax_ext` asks of this door."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np

import jax_ops
from jax_ops._rows import native


def version() -> str:
    """The framework's version."""
    return jax.__version__


def threads() -> str:
    """The thread pool the kernels use: XLA starts a thread for each core that the process may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} threads of XLA's pool"


def kernels() -> list[tuple[str, str, str]]:
    """(device, kernel, why) for each device found and for those that would be used if they were."""
    platform = jax.default_backend()
    if native.missing:
        rows = [("cpu", "plain", f"analytic rules in jax.numpy: {native.missing}")]
    else:
        rows = [("cpu", "native", f"{native.instruction_set()} kernels; jax.numpy for higher derivatives")]
    if platform != "cpu":
        rows.append((platform, "plain", "analytic rules in jax.numpy, fused by XLA"))
    else:
        rows.append(("gpu", "none", "JAX sees no accelerator"))
    return rows


def self_check(logits: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """Each quantity of the report's table, from the public functions."""
    x, t = jnp.asarray(logits), jnp.asarray(target)
    loss, stats = jax_ops.cross_entropy(x, t, reduction="none", stats=("entropy",))
    gradient = jax.grad(lambda x: jax_ops.cross_entropy(x, t, reduction="sum"))(x)
    values = {
        "softmax": jax_ops.softmax(x),
        "log_softmax": jax_ops.log_softmax(x),
        "loss": loss,
        "gradient": gradient,
        "entropy": stats["entropy"],
    }
    return {name: np.asarray(value) for name, value in values.items()}
