"""JAX's programs elsewhere: for several platforms at once, of open sizes, in other processes, on several devices.

Each kind has a saboteur: the fault is put back, and what the test asserts must no longer hold.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402

import jax_ops  # noqa: E402
from jax_ops._rows import native, primitive  # noqa: E402
from tests.judging import quick  # noqa: E402
from tests.rules.jax_zoo import ZOO, D, H, T, V, W, X, agree  # noqa: E402


@pytest.mark.parametrize("op", ZOO)
def test_several_platforms_at_once(op: str) -> None:
    f, x = ZOO[op]
    both = jax.value_and_grad(f)
    exported = export.export(jax.jit(both), platforms=("cpu", "cuda", "tpu"))(jnp.asarray(x))
    for a, b in zip(exported.call(x), jax.jit(both, **quick.QUICK)(x), strict=True):
        agree(a, b)
    assert "custom_call @softmax_ext" not in exported.mlir_module()


@pytest.mark.skipif(bool(native.missing), reason=f"no kernels to tell apart: {native.missing}")
def test_saboteur_of_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that serves whatever the platform puts the CPU's kernels into a program for others."""
    lowered = lambda: jax.jit(lambda x: jax_ops.softmax(x)).trace(X).lower(lowering_platforms=("cpu", "tpu")).as_text()  # noqa: E731
    assert "softmax_ext_softmax_fwd" not in lowered()
    monkeypatch.setattr(primitive, "serves", lambda ctx: True)
    assert "softmax_ext_softmax_fwd" in lowered()


def test_the_number_of_classes_may_be_open() -> None:
    b, v = export.symbolic_shape("b, v")
    S = jax.ShapeDtypeStruct
    f4, i4, u1 = jnp.float32, jnp.int32, jnp.uint8
    ce = lambda **o: lambda x, t: jax_ops.cross_entropy(x, t, **o)  # noqa: E731
    head = lambda **o: lambda h, w, t: jax_ops.linear_cross_entropy(h, w, t, **o)  # noqa: E731
    names = ("entropy", "argmax")
    logits, rows = (S((b, v), f4), S((b,), i4)), (S((b, D), f4), S((v, D), f4), S((b,), i4))
    cases: list[tuple[Any, Any, Any]] = [
        (ce(), logits, (X, T)),
        (ce(label_smoothing=0.1, stats=names), logits, (X, T)),
        (ce(), (logits[0], S((b,), u1)), (X, (T % V).astype("u1"))),
        (ce(), logits, (X, np.array([0, 99, -1, 3]))),
        (jax_ops.softmax_cross_entropy_with_integer_labels, logits, (X, T % V)),
        (head(), rows, (H, W, T)),
        (head(memory="lean", stats=names, label_smoothing=0.1), rows, (H, W, T)),
        (jax.grad(head()), rows, (H, W, T)),
    ]
    for f, specs, arrays in cases:
        arrays = [a.astype(s.dtype) for a, s in zip(arrays, specs, strict=True)]
        ours, theirs = export.export(jax.jit(f))(*specs).call(*arrays), jax.jit(f, **quick.QUICK)(*arrays)
        for p, q in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-6)


SAVE = """
import pickle, sys, jax, jax.numpy as jnp, jax_ops
from jax.experimental import serialize_executable
f = jax.jit(jax.grad(lambda x: jax_ops.cross_entropy(x, jnp.array([3, 1, -100, 9]))))
x = jnp.linspace(-1, 1, 40).reshape(4, 10)
pickle.dump(serialize_executable.serialize(f.lower(x).compile()), open(sys.argv[1], "wb"))
"""
LOAD = """
import pickle, sys, jax, jax.numpy as jnp
from jax._src import xla_bridge
if sys.argv[2] == "jax_ops":
    import jax_ops
assert not xla_bridge.backends_are_initialized()
from jax.experimental import serialize_executable
f = serialize_executable.deserialize_and_load(*pickle.load(open(sys.argv[1], "rb")))
assert f(jnp.linspace(-1, 1, 40).reshape(4, 10)).shape == (4, 10)
"""


@pytest.mark.long
@pytest.mark.skipif(bool(native.missing), reason=f"no kernels to find: {native.missing}")
def test_a_saved_executable_finds_the_kernels_of_a_fresh_process(tmp_path: Path) -> None:
    """And not those of a process that has not imported jax_ops, which is this test's saboteur."""
    path, root = str(tmp_path / "step"), Path(__file__).parents[2]
    call = lambda *args: subprocess.run([sys.executable, "-c", *args], cwd=root, capture_output=True, text=True)  # noqa: E731
    assert (done := call(SAVE, path)).returncode == 0, done.stderr
    assert (done := call(LOAD, path, "jax_ops")).returncode == 0, done.stderr
    assert "No FFI handler registered" in call(LOAD, path, "jax").stderr


@pytest.mark.slow
def test_on_several_devices() -> None:
    command, root = [sys.executable, "-m", "tests.parallel.jax_meshes"], Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("all checks on meshes ran")
