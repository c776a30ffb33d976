"""JAX: an exported training step in a process without this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, export

import jax_ops

pytest.importorskip("flatbuffers")  # what JAX writes the file with, and does not bring

ELSEWHERE = """
import sys
from pathlib import Path
sys.modules["jax_ops"] = sys.modules["softmax_ext"] = None
import numpy as np
from jax import export
folder = Path(sys.argv[1])
step = export.deserialize(bytearray((folder / "step.bin").read_bytes()))
given, losses = np.load(folder / "given.npz"), []
state = {k: given[k] for k in ("hidden", "head", "momentum")}
for _ in range(3):
    state, loss = step.call(state, given["x"], given["t"])
    losses.append(float(loss))
np.savez(folder / "found.npz", losses=losses, **state)
"""


def step(state: dict[str, Array], x: Array, t: Array) -> tuple[dict[str, Array], Array]:
    """The head by momentum, the layer below it by plain descent."""

    def loss(hidden: Array, head: Array) -> Array:
        return jax_ops.linear_cross_entropy(jnp.tanh(x @ hidden), head, t, softcap=5.0, z_loss=1e-3, chunk_size=4)

    value, (d_hidden, d_head) = jax.value_and_grad(loss, (0, 1))(state["hidden"], state["head"])
    momentum = 0.9 * state["momentum"] + d_head
    hidden, head = state["hidden"] - 0.1 * d_hidden, state["head"] - 0.1 * momentum
    return {"hidden": hidden, "head": head, "momentum": momentum}, value


def test_training_step_runs_where_the_package_is_not(tmp_path: Path) -> None:
    """Exported for any number of rows; three steps there are three steps here."""
    r = np.random.default_rng(0)
    shapes = {"hidden": (8, 8), "head": (50, 8), "momentum": (50, 8)}
    state = {k: jnp.asarray(r.normal(size=s) * (k != "momentum"), jnp.float32) for k, s in shapes.items()}
    x, t = jnp.asarray(r.normal(size=(6, 8)), jnp.float32), jnp.array([0, 1, -100, 49, 3, 4])
    (rows,) = export.symbolic_shape("rows")
    kinds = jax.ShapeDtypeStruct((rows, 8), x.dtype), jax.ShapeDtypeStruct((rows,), t.dtype)
    exported = export.export(jax.jit(step))(
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state), *kinds
    )
    (tmp_path / "step.bin").write_bytes(exported.serialize())
    given: dict[str, Any] = {"x": x, "t": t, **state}
    np.savez(tmp_path / "given.npz", **given)
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found, losses, here = np.load(tmp_path / "found.npz"), [], jax.jit(step)
    for _ in range(3):
        state, loss = here(state, x, t)
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
    for name, value in state.items():
        assert float(jnp.abs(value).max()) > 1e-2
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
