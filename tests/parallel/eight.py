"""Eight forced host devices: what the programs that run on them share, and are judged by."""

from __future__ import annotations

import os
import re
import sys
import time

# Not tests.judging.quick's, which asks XLA for them and so starts it: they come from who runs this.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

N, D, V = 6, 4, 16
R = np.random.default_rng(7)
# Loud rows: one logit of about half of its row's mass, and of 40 in one of them.
X = R.normal(size=(N, D)) * 1.5
X[1] *= 20
TARGET = np.array([1, 14, -100, 15, 0, 7])
ARRAYS: dict[str, np.ndarray] = {
    "x": X,
    "w": R.normal(size=(V, D)),
    "b": R.normal(size=V),
    "y": R.uniform(0.1, 1.1, (N, V)),
    "cw": R.uniform(0.5, 1.5, V),
    "tw": R.uniform(0.5, 1.5, N),
    "s": R.uniform(0.5, 1.5, N),
    "v": R.uniform(0.1, 1.1, (N, 3)),
    "down": R.standard_normal((2, X.shape[1])),
    "up": R.standard_normal((V, 2)),
}
# K classes a row: a repeated one, one of another device each, an ignored slot and row
IDS = np.array([[1, 14, 1], [14, 3, 9], [-100, -100, -100], [15, -100, 2], [0, 8, 7], [7, 6, 5]])


def total(out: Any) -> Any:
    """One number that every differentiable result enters, unevenly."""
    loss, stats = out if isinstance(out, tuple) else (out, {})
    loss = (loss * jnp.linspace(0.5, 1.5, loss.size).reshape(loss.shape)).sum()
    return loss + sum(
        (0.3 + 0.2 * i) * v.sum() for i, (k, v) in enumerate(sorted(stats.items())) if k not in ("argmax", "rank")
    )


def same(ours: Any, truth: Any, what: str, tol: float = 1e-11) -> None:
    flat = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(truth), strict=True)
    for (path, a), b in flat:
        label = f"{what}{jax.tree_util.keystr(path)}"
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, label
        assert np.isfinite(b).all(), label
        assert np.abs(b).max() > 1e-3, f"{label}: the truth is too small for the comparison to see anything"
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol * np.abs(b).max(), err_msg=label)


def along(a: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.cos(3.0 * v) for name, v in a.items()}


def compiled(f: Callable[..., Any], *args: Any) -> tuple[Any, list[tuple[str, list[tuple[int, ...]]]]]:
    """The answer, and what the devices tell each other for it: (collective, shapes)."""
    program = jax.jit(f).lower(*args).compile()
    found = []
    for line in (program.as_text() or "").splitlines():
        words = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
        if m := re.search(rf"= (.*?) ({words})(-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", m[1])
            found.append((m[2], [tuple(int(i) for i in shape.split(",") if i) for shape in shapes]))
    return program(*args), found


def derivatives(f: Callable[[Any], Any], second: bool = False) -> Callable[[Any], Any]:
    """All of f's results, the gradient of one number of them, and its derivatives along a direction."""

    def loss(a: Any) -> Any:
        out = f(a)
        return total(out), out

    def run(a: Any) -> Any:
        if not second:
            return jax.grad(loss, has_aux=True)(a)
        gradient, along_it, out = jax.jvp(lambda a: jax.grad(loss, has_aux=True)(a), (a,), (along(a),), has_aux=True)
        return gradient, along_it, out, jax.jvp(lambda a: loss(a)[0], (a,), (along(a),))[1]

    return run


def main(*checks: tuple[Callable[[Any], None], int]) -> None:
    """Each with a mesh of one axis or of two; the arguments are the names of those to run, none for all."""
    jax.config.update("jax_enable_x64", True)
    auto = jax.sharding.AxisType.Auto
    meshes = {1: jax.make_mesh((8,), ("v",), axis_types=(auto,))}
    meshes[2] = jax.make_mesh((2, 4), ("b", "v"), axis_types=(auto, auto))
    assert jax.device_count() == 8
    started = time.process_time()
    for check, axes in checks:
        if not sys.argv[1:] or check.__name__ in sys.argv[1:]:
            check(meshes[axes])
            print(f"{check.__name__}: {time.process_time() - started:.0f} s of processor time so far", flush=True)
    print("all sharded checks ran")
