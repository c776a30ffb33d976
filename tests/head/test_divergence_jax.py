"""Divergences between two linear heads in JAX: every derivative, what lives at a time, rows over devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

import jax_ops
from jax_ops._rows import native
from tests.head.test_divergence import HEAD, ROWS
from tests.judging import quick


@pytest.mark.long
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_head_derivatives(memory: Any) -> None:
    with jax.enable_x64(True):
        a: dict[str, Any] = {k: jnp.asarray(v) for k, v in HEAD.items()}

        def f(x: jax.Array, w: jax.Array) -> jax.Array:
            given = {**a, "input": x, "linear_weight": w}
            return jax_ops.linear_divergence(**given, kind="jsd", memory=memory, chunk_size=2)

        def g(x: jax.Array, w: jax.Array) -> jax.Array:
            t = a["teacher_input"] @ a["teacher_weight"].T + a["teacher_bias"]
            return jax_ops.divergence(x @ w.T + a["linear_bias"], t, kind="jsd")

        at = (a["input"], a["linear_weight"])
        stacked = jnp.stack([at[1], 2 * at[1]])

        def everything(h: Any, x: jax.Array, w: jax.Array) -> Any:
            found = [derive(h, k)(x, w) for derive in (jax.grad, jax.hessian) for k in (0, 1)]
            return found, jax.vmap(jax.grad(h, 1), (None, 0))(x, stacked)

        both = (jax.jit(lambda *at, h=h: everything(h, *at), **quick.QUICK)(*at) for h in (f, g))
        for mine, right in zip(*map(jax.tree.leaves, both), strict=True):
            np.testing.assert_allclose(mine, right, rtol=1e-8, atol=1e-12)
        check_grads(jax.jit(f), at, order=1, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


def test_no_array_of_all_logits() -> None:
    n, v, d = 64, 4096, 8
    args = [jnp.ones(s) for s in ((n, d), (v, d), (n, d), (v, d))]

    def used(f: Any) -> int:
        found: Any = jax.jit(jax.grad(f, (0, 1))).lower(*args).compile().memory_analysis()
        return found.temp_size_in_bytes

    memory: Any
    for memory in ("fast", "lean"):
        head = lambda x, w, y, u, m=memory: jax_ops.linear_divergence(x, w, y, u, memory=m, chunk_size=4)  # noqa: E731
        assert used(head) < n * v * 4
    assert used(lambda x, w, y, u: jax_ops.divergence(x @ w.T, y @ u.T)) > n * v * 4


MIB = 2**20
# Half of both heads' logits at a time; in primes of rows and classes the halves overlap.
HALVES: dict[str, dict[str, Any]] = {
    "fast": {"chunk_size": 512},
    "fast, none": {"chunk_size": 512, "reduction": "none"},
    "lean": {"memory": "lean", "chunk_size": 8192},
    "lean, jsd": {"memory": "lean", "chunk_size": 8192, "kind": "jsd"},
}


def _temporary(name: str, wrt: tuple[int, ...], dtype: str, uneven: bool) -> float:
    """MiB beside arguments and gradients, of 64 MiB of float32 logits of each head and weights of 20."""
    n, v, d = (1021, 16381, 320) if uneven else (1024, 16384, 320)
    given = [jax.ShapeDtypeStruct(s, dtype) for s in ((n, d), (v, d), (n, d), (v, d))]
    f = lambda x, w, y, u: jax_ops.linear_divergence(x, w, y, u, **HALVES[name]).sum()  # noqa: E731
    found: Any = jax.jit(jax.value_and_grad(f, wrt), **quick.QUICK).lower(*given).compile().memory_analysis()
    return found.temp_size_in_bytes / MIB


@pytest.mark.skipif(bool(native.missing), reason=native.missing)
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", HALVES)
def test_temporary_memory_is_two_chunks_and_one_weight(name: str, uneven: bool, dtype: str) -> None:
    """Another chunk or weight would be seen: each is larger than the 16 MiB left over."""
    chunks, weight, lean = 64, 20, "lean" in name
    slices = weight if lean else 0  # halves of both weights, beside those of the logits
    assert _temporary(name, (0, 1), dtype, uneven) <= chunks + (slices if lean else weight) + 16
    assert _temporary(name, (0,), dtype, uneven) <= chunks + slices + 16


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_arrays_that_lie_on_a_mesh(kind: Any) -> None:
    mesh = jax.make_mesh((1,), ("b",), axis_types=(kind,))
    rows = NamedSharding(mesh, PartitionSpec("b"))
    with jax.set_mesh(mesh):
        given: dict[str, Any] = {
            k: jax.device_put(jnp.asarray(v), rows) if "input" in k else jnp.asarray(v) for k, v in HEAD.items()
        }
        more = {k: jax.device_put(jnp.asarray(v), rows) for k, v in ROWS.items()}

        def f(x: jax.Array) -> jax.Array:
            return jax_ops.linear_divergence(**{**given, "input": x}, **more, shift=1)

        loss, gradient = jax.value_and_grad(f)(given["input"])
        each = jax_ops.divergence(given["input"], 2.0 * given["input"], keep=more["keep"], reduction="none")
    plain: dict[str, Any] = {k: jnp.asarray(v) for k, v in {**HEAD, **ROWS}.items()}
    one = jax.value_and_grad(lambda x: jax_ops.linear_divergence(**{**plain, "input": x}, shift=1))(plain["input"])
    np.testing.assert_allclose(loss, one[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, one[1], rtol=1e-5, atol=1e-7)
    assert each.shape == (2, 3)
