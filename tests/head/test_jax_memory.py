"""jax_ops.linear_cross_entropy: its temporaries, matmuls and kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

import jax_ops  # noqa: E402
from jax_ops._rows import native  # noqa: E402
from tests.head.jax_arrays import IN, MODES, TARGET, D, N, V, _head, _total  # noqa: E402
from tests.judging.quick import QUICK  # noqa: E402


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _primitives(f: Any, *args: Any) -> list[tuple[str, int, Any]]:
    """(name, times it runs, equation) of everything in the program, loops counted."""
    found = []

    def walk(jaxpr: Any, times: int) -> None:
        for eqn in jaxpr.eqns:
            found.append((eqn.primitive.name, times, eqn))
            inner = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
            for sub in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
            ):
                if hasattr(sub, "jaxpr"):
                    walk(sub.jaxpr, inner)
                elif hasattr(sub, "eqns"):
                    walk(sub, inner)
            if eqn.primitive.name == "softmax_ext_either":
                walk(jax.make_jaxpr(eqn.params["whole"])(*[v.aval for v in eqn.invars]).jaxpr, inner)

    walk(jax.make_jaxpr(f)(*args).jaxpr, 1)
    return found


def _compiled(f: Any, *args: Any) -> Any:
    return jax.jit(f, **QUICK).lower(*args).compile()  # its temporary memory is to the byte that of a real compilation


MIB = 2**20


def _shapes(dtype: str, rows: int = 1024, features: int = 64, classes: int = 16384) -> list[Any]:
    """Of 64 MiB of float32 logits, and a weight of 4."""
    kinds = (((rows, features), dtype), ((classes, features), dtype), ((classes,), dtype), ((rows,), "int32"))
    return [jax.ShapeDtypeStruct(s, k) for s, k in kinds]


# Half of the logits at a time; in primes of rows and classes the halves overlap.
HALVES: dict[str, dict[str, Any]] = {
    "fast": {"chunk_size": 512},
    "fast, z-loss": {"chunk_size": 512, "z_loss": 1e-4},
    "fast, none": {"chunk_size": 512, "reduction": "none"},
    "lean": {"memory": "lean", "chunk_size": 8192},
    "lean, entropy": {"memory": "lean", "chunk_size": 8192, "stats": ("entropy",)},
}


def _halved(name: str, wrt: tuple[int, ...]) -> Callable[..., Any]:
    def f(x: Any, w: Any, b: Any, t: Any) -> Any:
        return _total(jax_ops.linear_cross_entropy(x, w, t, linear_bias=b, **HALVES[name]))

    return jax.value_and_grad(f, wrt)


def _temporary(f: Any, *args: Any) -> float:
    return _compiled(f, *args).memory_analysis().temp_size_in_bytes / MIB


@pytest.mark.skipif(bool(native.missing), reason=native.missing)
@pytest.mark.parametrize(
    ("name", "uneven", "dtype"),  # each way even and uneven, in both types, by turns
    [(n, k, ("float32", "bfloat16")[(i + k) % 2]) for i, n in enumerate(HALVES) for k in (False, True)],
)
@pytest.mark.long
def test_temporary_memory_is_a_chunk_and_one_weight(name: str, uneven: bool, dtype: str) -> None:
    """A second chunk or a second weight would be seen: each is larger than the 16 MiB left over."""
    with jax.enable_x64(False):
        args = _shapes(dtype, 1021 if uneven else 1024, 320, 16381 if uneven else 16384)
        chunk, weight = 32, 20
        slices = weight / 2 if "lean" in name else 0  # of the weight itself, beside those of the logits
        assert _temporary(_halved(name, (0, 1, 2)), *args) <= chunk + weight + 16
        assert _temporary(_halved(name, (0,)), *args) <= chunk + slices + 16


def test_pairs_without_a_kernel_go_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mass that a pair adds up at its classes is an array of a chunk's logits: of all rows it would be 64 MiB."""

    def ours(x: Any, w: Any, v: Any, ids: Any) -> Any:
        return jax_ops.linear_cross_entropy(x, w, (ids, v), chunk_size=64)

    monkeypatch.setattr(native, "missing", "taken away")
    jax.clear_caches()
    with jax.enable_x64(False):
        x, w, _, _ = _shapes("float32")
        v, ids = (jax.ShapeDtypeStruct((1024, 3), kind) for kind in ("float32", "int32"))
        found = _temporary(jax.value_and_grad(ours, (0, 1, 2)), x, w, v, ids)
        monkeypatch.undo()
        jax.clear_caches()
    assert found <= 48


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporary_memory_with_a_frozen_weight(dtype: str) -> None:
    def ours(x: Any, w: Any, b: Any, t: Any) -> Any:
        return jax_ops.linear_cross_entropy(x, w, t, linear_bias=b, chunk_size=64)

    def built_in(x: Any, w: Any, b: Any, t: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(x @ w.T + b, t).mean()

    with jax.enable_x64(False):
        args = _shapes(dtype)
        used, theirs = (_temporary(jax.value_and_grad(f), *args) for f in (ours, built_in))
        assert used <= theirs / 10


ORDER_2: dict[str, Callable[[Any], Any]] = {
    "jvp(grad)": lambda g: lambda x, w: jax.jvp(jax.grad(g, (0, 1)), (x, w), (x, w))[1],
    "grad(grad)": lambda g: jax.grad(lambda x, w: sum((v**2).sum() for v in jax.grad(g, (0, 1))(x, w)), (0, 1)),
}


@pytest.mark.parametrize("order", ORDER_2)
@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_keep_no_logits(mode: str, order: str) -> None:
    given: dict[str, Any] = MODES[mode] | {"chunk_size": 512 if "lean" in mode else 32}

    def run(x: Any, w: Any, t: Any) -> Any:
        return ORDER_2[order](lambda x, w: _total(jax_ops.linear_cross_entropy(x, w, t, **given)))(x, w)

    with jax.enable_x64(False):
        x, w, _, t = _shapes("float32")
        assert _temporary(run, x, w, t) <= 48  # the logits alone are 64, a chunk of them 2 and the weight 4


def test_frozen_arguments_cost_no_matmul() -> None:
    """Outside of jit too: two matmuls for the input's gradient, one for none."""
    x, w = jnp.asarray(IN["x"]), jnp.asarray(IN["w"])
    f = lambda x, w: jax_ops.linear_cross_entropy(x, w, TARGET)  # noqa: E731

    def matmuls(g: Any) -> int:
        return sum(times for name, times, _ in _primitives(g, x, w) if name == "dot_general")

    assert matmuls(f) == 1
    assert matmuls(jax.grad(f)) == 2
    assert matmuls(jax.grad(f, 1)) == 2
    assert matmuls(jax.grad(f, (0, 1))) == 3
    none = lambda x, w: jax_ops.linear_cross_entropy(x, w, TARGET, reduction="none").sum()  # noqa: E731
    assert matmuls(jax.grad(none)) == 3
    assert matmuls(jax.grad(none, (0, 1))) == 4
    lean = lambda x, w: jax_ops.linear_cross_entropy(x, w, TARGET, memory="lean")  # noqa: E731
    assert matmuls(jax.grad(lean, (0, 1))) == 4


@pytest.mark.parametrize("mode", MODES)
def test_examples_under_vmap_share_the_weight(mode: str) -> None:
    """No array of the examples times the weight but the per-example gradients of it."""
    xs, t = jnp.ones((6, N, D)), TARGET
    f = jax.vmap(jax.grad(lambda x, w: _head(mode, x, w, t=t)), (0, None))
    for _, _, eqn in _primitives(f, xs, jnp.asarray(IN["w"])):
        assert not [v for v in eqn.outvars if getattr(v.aval, "shape", ())[-3:] == (6, V, D)]


@pytest.mark.skipif(bool(native.missing), reason=native.missing)
def test_the_kernels_run() -> None:
    with jax.enable_x64(False):
        args = _shapes("float32")
        texts = {name: _compiled(_halved(name, (0, 1)), *args).as_text() for name in ("fast", "fast, z-loss", "lean")}
        assert 'custom_call_target="softmax_ext_cross_entropy_fwd_bwd"' in texts["fast"]
        for name in ("fast, z-loss", "lean"):
            assert 'custom_call_target="softmax_ext_cross_entropy_fwd"' in texts[name]
            assert 'custom_call_target="softmax_ext_cross_entropy_bwd"' in texts[name]
