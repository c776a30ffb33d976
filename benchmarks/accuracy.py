"""`make accuracy`: worst error in ulp against the float64 reference, ours beside the frameworks' own ops.

float32 inputs; the truth is computed in extended precision from the same rounded inputs. One ulp here is 2^-23
relative to the true value; numbers below 2^-124, next to float32's smallest normal number, count as 0 (kernels
flush subnormals). The loss is one number per row; the gradient is that of the summed loss, class index targets.
"""

from __future__ import annotations

from collections.abc import Callable

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

ROWS = 16
FLOOR = 2.0**-124
SIZES = (10, 1000, 32000)
QUANTITIES = ("softmax", "log_softmax", "loss", "gradient")
Values = dict[str, np.ndarray]


def cases() -> dict[str, np.ndarray]:
    """Named float32 logits, loud in different ways."""
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for v in SIZES:
        x = rng.standard_normal((ROWS, v)).astype(np.float32)
        for scale in (1, 5, 20):
            found[f"randn x {scale}, V = {v}"] = x * np.float32(scale)
        found[f"offset 1000, V = {v}"] = x + np.float32(1000)
        spike = x.copy()
        spike[np.arange(ROWS), rng.integers(0, v, ROWS)] += 40
        found[f"one spike of 40, V = {v}"] = spike
    return found


def truth(x: np.ndarray, t: np.ndarray) -> Values:
    """The reference's answers."""
    return {
        "softmax": reference.softmax(x),
        "log_softmax": reference.log_softmax(x),
        "loss": np.asarray(reference.cross_entropy(x, t, reduction="none")),
        "gradient": reference.cross_entropy_grad(x, t, reduction="sum"),
    }


def with_torch(softmax: Callable, log_softmax: Callable, loss: Callable) -> Callable[..., Values]:
    """The four quantities by three PyTorch functions."""

    def values(x: np.ndarray, t: np.ndarray) -> Values:
        logits, target = torch.from_numpy(x).requires_grad_(), torch.from_numpy(t)
        rows = loss(logits, target, reduction="none")
        (gradient,) = torch.autograd.grad(rows.sum(), logits)
        found = (softmax(logits, -1), log_softmax(logits, -1), rows, gradient)
        return {name: v.detach().numpy() for name, v in zip(QUANTITIES, found, strict=True)}

    return values


def with_jax(softmax: Callable, log_softmax: Callable, loss: Callable) -> Callable[..., Values]:
    """The four quantities by three JAX functions, under jit."""

    @jax.jit
    def values(x: jax.Array, t: jax.Array) -> tuple[jax.Array, ...]:
        gradient = jax.grad(lambda x: loss(x, t).sum())(x)
        return softmax(x), log_softmax(x), loss(x, t), gradient

    return lambda x, t: {
        name: np.asarray(v) for name, v in zip(QUANTITIES, values(jnp.asarray(x), jnp.asarray(t)), strict=True)
    }


RIVALS: dict[str, Callable[..., Values]] = {
    "torch_ops": with_torch(torch_ops.softmax, torch_ops.log_softmax, torch_ops.cross_entropy),
    "jax_ops": with_jax(jax_ops.softmax, jax_ops.log_softmax, jax_ops.softmax_cross_entropy_with_integer_labels),
    "torch": with_torch(torch.softmax, torch.log_softmax, F.cross_entropy),
    "jax, optax": with_jax(jax.nn.softmax, jax.nn.log_softmax, optax.softmax_cross_entropy_with_integer_labels),
}


def ulp(ours: np.ndarray, true: np.ndarray) -> float:
    """Worst error in ulp of the true value; a NaN anywhere is infinitely wrong."""
    ours, true = (np.where(np.abs(v) < FLOOR, 0.0, v) for v in (ours.astype(np.float64), true))
    worst = float(np.max(np.abs(ours - true) / (2.0**-23 * np.maximum(np.abs(true), FLOOR))))
    return worst if np.isfinite(worst) else np.inf


def main() -> None:
    """Print the worst case over all inputs, and which input it was."""
    worst = {(q, r): (0.0, "") for q in QUANTITIES for r in RIVALS}
    for case, x in cases().items():
        t = np.arange(ROWS) % x.shape[1]
        t[: ROWS // 2] = x.argmax(1)[: ROWS // 2]  # half the rows are right already
        true = truth(x, t)
        for rival, run in RIVALS.items():
            found = run(x, t)
            for q in QUANTITIES:
                worst[q, rival] = max(worst[q, rival], (ulp(found[q], true[q]), case))
    table = Table(title="worst float32 error in ulp (and where)")
    table.add_column("")
    for rival in RIVALS:
        table.add_column(rival)
    for q in QUANTITIES:
        table.add_row(q, *(f"{worst[q, r][0]:.3g}  ({worst[q, r][1]})" for r in RIVALS))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
