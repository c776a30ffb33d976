"""jax_ops with classes sharded over devices: the checks on eight of them, and what one device can tell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jax_ops  # noqa: E402
from tests.judging.quick import FLAGS  # noqa: E402

X = np.linspace(-2.0, 2.0, 12, dtype=np.float32).reshape(3, 4) ** 3
W = np.linspace(1.0, -1.0, 20, dtype=np.float32).reshape(5, 4)
TARGET = np.array([1, -100, 4])
OPS: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda w, **more: jax_ops.cross_entropy(X @ w.T, TARGET, **more),
    "linear_cross_entropy": lambda w, **more: jax_ops.linear_cross_entropy(X, w, TARGET, **more),
    "divergence": lambda w, **more: jax_ops.divergence(X @ w.T, jax.lax.stop_gradient(jnp.cos(X @ w.T)), **more),
    "linear_divergence": lambda w, **more: jax_ops.linear_divergence(X, w, X, jax.lax.stop_gradient(-w), **more),
}


@pytest.mark.slow
@pytest.mark.parametrize("checks", ["jax_devices", "jax_sampled", "jax_divergences", "jax_curved"])
def test_sharded_classes_on_eight_devices(checks: str) -> None:
    command, root = [sys.executable, "-m", f"tests.parallel.{checks}"], Path(__file__).parents[2]
    env = {**os.environ, "XLA_FLAGS": FLAGS}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("all sharded checks ran")


def _on_one_device(op: str, axis_name: Any, **given: Any) -> Callable[[Any], Any]:
    mesh = jax.make_mesh((1,), ("v",), axis_types=(jax.sharding.AxisType.Auto,))
    call = lambda w: OPS[op](w, axis_name=axis_name, **given)  # noqa: E731
    return jax.shard_map(call, mesh=mesh, in_specs=P("v"), out_specs=P())


@pytest.mark.parametrize("op", [*OPS, "sampled"])
def test_an_axis_of_one_device_changes_nothing(op: str) -> None:
    given = {"grad_samples": 3, "key": jax.random.key(0)} if op == "sampled" else {}
    op = "linear_cross_entropy" if given else op
    ours = jax.jit(jax.value_and_grad(_on_one_device(op, "v", **given)))(jnp.asarray(W))
    for p, q in zip(ours, jax.value_and_grad(lambda w: OPS[op](w, **given))(jnp.asarray(W)), strict=True):
        assert np.abs(q).max() > 1e-2
        np.testing.assert_allclose(p, q, rtol=1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("axis_name", "error", "words"),
    [
        (3, TypeError, "be the name of a mesh axis, a tuple of them or None; got 3."),
        (("v", 2), TypeError, "be the name of a mesh axis, a tuple of them or None; got ('v', 2)."),
        (("v", "v"), ValueError, "name each mesh axis once; got ('v', 'v')."),
        ("u", ValueError, "name mesh axes of a jax.shard_map around the call; got 'u'."),
        ("u", NameError, "name mesh axes of a jax.shard_map around the call; got 'u'."),
    ],
)
def test_mistakes(op: str, axis_name: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(f"{op}: axis_name must {words}")):
        _on_one_device(op, axis_name)(W)


@pytest.mark.parametrize("op", OPS)
def test_outside_of_shard_map_there_is_no_axis(op: str) -> None:
    """An axis of vmap is none either: its derivatives would be those of a mesh."""
    words = re.escape(f"{op}: axis_name must name mesh axes of a jax.shard_map around the call; got 'v'.")
    with pytest.raises(NameError, match=words):
        OPS[op](W, axis_name="v")
    with pytest.raises(NameError, match=words):
        jax.vmap(lambda w: OPS[op](w, axis_name="v"), axis_name="v")(W[None])
