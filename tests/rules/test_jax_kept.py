"""JAX's ops: what a backward pass keeps, exports, eight devices, what is traced."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from jax import Array, export  # noqa: E402

import jax_ops  # noqa: E402
from jax_ops._rules.autodiff import analytic  # noqa: E402
from tests.judging.quick import FLAGS, QUICK  # noqa: E402
from tests.rules.jax_arrays import CAP, IN, TARGET, S, V, Z, _same  # noqa: E402


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _saved(f: Callable[[Any], Any], x: Any) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and types, larger than a scalar, of what the pullback of f at x holds."""
    _, pull = jax.vjp(f, x)
    return sorted((v.shape, str(v.dtype)) for v in jax.tree.leaves(pull) if v.ndim)


@pytest.mark.parametrize(("dtype", "wrap"), [("bfloat16", lambda f: f), ("float32", jax.jit)], ids=["eager", "jit"])
def test_what_the_backward_pass_keeps(dtype: str, wrap: Any) -> None:
    x, t = jnp.ones((16, 64), dtype), jnp.arange(16, dtype=jnp.int32)
    row, full = ((16,), "float32"), ((16, 64), dtype)
    assert _saved(wrap(jax_ops.softmax), x) == [full]
    assert _saved(wrap(jax_ops.log_softmax), x) == [row, row, full]
    assert _saved(wrap(lambda x: jax_ops.cross_entropy(x, t)), x) == [row, row, ((16,), "int32"), full]
    every = wrap(lambda x: jax_ops.cross_entropy(x, t, label_smoothing=S, softcap=CAP, z_loss=Z, stats=("entropy",))[0])
    assert [s for s in _saved(every, x) if s[0] != (16,)] == [full]


def test_forward_mode_keeps_what_the_backward_pass_keeps() -> None:
    x, t = jnp.ones((16, 64)), jnp.arange(16)
    _, push = jax.linearize(lambda x: jax_ops.cross_entropy(x, t), x)
    held = [v.shape for v in jax.tree.leaves(push) if hasattr(v, "ndim") and v.ndim > 1]
    assert held == [(16, 64)]


def test_export_with_symbolic_rows() -> None:
    def head(x: Any, t: Any) -> Any:
        f = lambda x: jax_ops.cross_entropy(x, t, label_smoothing=S, softcap=CAP)  # noqa: E731
        return f(x), jax.grad(f)(x), jax_ops.softmax(x), jax_ops.log_softmax(x)

    (b,) = export.symbolic_shape("b")
    shapes = jax.ShapeDtypeStruct((b, V), np.float64), jax.ShapeDtypeStruct((b,), np.int64)
    program = export.export(jax.jit(head))(*shapes)  # serialising it needs flatbuffers, which JAX does not bring
    x, t = np.concatenate([IN["x"]] * 2), np.concatenate([TARGET] * 2)
    # What comes out of the program has a derivative as well: that of the loss is the gradient it returns.
    again = jax.jit(jax.grad(lambda x, t: program.call(x, t)[0]), **QUICK)(x, t)
    loss, dx, *others = jax.jit(head, **QUICK)(x, t)
    for ours, direct in zip((*program.call(x, t), again), (loss, dx, *others, dx), strict=True):
        _same(ours, direct)


def test_wrapped_arrays_and_refused_ones() -> None:
    class Parameter:
        def __jax_array__(self) -> Array:
            return jnp.asarray(IN["x"])

    _same(jax_ops.softmax(Parameter()), jax_ops.softmax(IN["x"]))  # pyright: ignore[reportArgumentType]
    _same(jax_ops.cross_entropy(Parameter(), TARGET), jax_ops.cross_entropy(IN["x"], TARGET))  # pyright: ignore
    x, y, one, labels = IN["x"], IN["y"], "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"
    bad: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ("softmax", ([1.0, 2.0],), {}, TypeError, "input must be an array; got list object."),
        ("softmax", (x + 1j,), {}, TypeError, "input must have type"),
        ("softmax", (x > 0,), {}, TypeError, "input must have type"),
        ("softmax", (x,), {"axis": (0, 0)}, ValueError, "axis must name each dimension once; got (0, 0)."),
        ("softmax", (x,), {"axis": 2}, ValueError, "axis must be in [-2, 1] for an input of 2 dimensions; got 2."),
        ("softmax", (x,), {"axis": 0.0}, TypeError, "axis must be a Python integer; got 0.0."),
        ("softmax", (x,), {"where": np.ones(4, bool)}, ValueError, "where must broadcast to shape (3, 5); got (4,)."),
        ("softmax", (x,), {"where": np.ones((2, 3, 5), bool)}, ValueError, "where must broadcast to shape (3, 5)"),
        ("softmax", (x,), {"where": np.ones(5)}, ValueError, "where must be a boolean array or None; got float64."),
        (one, (x, np.ones((4, V))), {}, ValueError, "labels must broadcast to shape (3, 5); got (4, 5)."),
        (one, (x[:, :1], y), {}, ValueError, "labels must broadcast to shape (3, 1); got (3, 5)."),
        (one, (x, "x"), {}, TypeError, "labels must be a real array; got str object."),
        (one, (TARGET, TARGET), {}, TypeError, "logits must have type"),
        (one, (x, y), {"where": np.ones((2, 3, 5), bool)}, ValueError, "where must broadcast to shape (3, 5); got"),
        (labels, (x, TARGET), {"axis": None}, TypeError, "axis must be a Python integer or a tuple of them; got None."),
        (labels, (x, TARGET[:2]), {}, ValueError, "labels must have shape (3,); got (2,)."),
        (labels, (x, IN["tw"]), {}, TypeError, "labels must have an integer type; got float64."),
    ]
    for op, args, options, error, words in bad:
        with pytest.raises(error, match=re.escape(f"{op}: {words}")):
            getattr(jax_ops, op)(*args, **options)


SHARDED = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax import shard_map
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax_ops

assert jax.device_count() == 8
x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 32)), jnp.float32)
t, w = jnp.arange(16) % 32, jnp.linspace(0.5, 1.5, 32)
t = t.at[3].set(-100)

def full(x, t, w):
    stats = ("entropy", "lse", "argmax", "logprob")
    loss, s = jax_ops.cross_entropy(x, t, w, label_smoothing=0.1, softcap=3.0, z_loss=0.1, reduction="sum", stats=stats)
    return loss + 0.1 * s["entropy"].sum()

OPS = {
    "softmax": lambda x, t, w: (jax_ops.softmax(x) ** 2).sum(),
    "log_softmax": lambda x, t, w: (jax_ops.log_softmax(x) ** 2).sum(),
    "labels": lambda x, t, w: jax_ops.softmax_cross_entropy_with_integer_labels(x, t.clip(0)).sum(),
    "full": full,
}
def hvp(f):
    return lambda x, t, w: jax.jvp(jax.grad(f), (x, t, w), (jnp.cos(x), np.zeros(t.shape, jax.dtypes.float0), w))[1]

def same(a, b):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(v).max() > 1e-3
        np.testing.assert_allclose(u, v, rtol=2e-5, atol=2e-5)

truth = jax.jit(jax.value_and_grad(full, (0, 2)))(x, t, w)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("b",), axis_types=(kind,))
    xs, ts = (jax.device_put(a, NamedSharding(mesh, P("b"))) for a in (x, t))
    for name, f in OPS.items():
        wrt = (0, 2) if name == "full" else 0
        if kind == AxisType.Explicit and name != "full":
            continue
        for g in (jax.value_and_grad(f, wrt), *([hvp(f)] if name == "full" else [])):
            compiled = jax.jit(g).lower(xs, ts, w).compile()
            used = set(re.findall(r"(all-gather|all-to-all|all-reduce|collective-permute)", compiled.as_text()))
            assert used <= {"all-reduce"}, (name, used)
            same(compiled(xs, ts, w), jax.jit(g)(x, t, w))
    if kind == AxisType.Auto:
        assert "all-" not in jax.jit(jax_ops.softmax).lower(xs).compile().as_text()
        for vma in (True, False):
            f = full
            specs = dict(mesh=mesh, in_specs=(P("b"), P("b"), P()), check_vma=vma)
            outer = shard_map(lambda *a: jax.lax.psum(f(*a), "b"), out_specs=P(), **specs)
            same(jax.jit(jax.value_and_grad(outer, (0, 2)))(xs, ts, w), truth)
            inner = jax.jit(shard_map(jax.grad(f), out_specs=P("b"), **specs))
            same(inner(xs, ts, w), truth[1][0])
print("all sharded checks ran")
"""


@pytest.mark.long
def test_batch_sharding_gathers_nothing() -> None:
    flags = f"--xla_force_host_platform_device_count=8 {FLAGS}"
    env = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command, root = [sys.executable, "-c", SHARDED], Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "all sharded checks ran"


def test_eager_gradients_trace_the_rules_once() -> None:
    traced: list[str] = []

    def fwd(x: Any) -> Any:
        traced.append("fwd")
        return x * x, x

    def bwd(x: Any, dy: Any) -> Any:
        traced.append("bwd")
        return (2.0 * x * dy,)

    square = analytic(fwd, bwd)
    assert jax.grad(square)(jnp.float32(2.0)) == 4.0
    assert set(traced) == {"fwd", "bwd"}
    traced.clear()
    assert jax.grad(square)(jnp.float32(3.0)) == 6.0
    assert traced == []
