"""jax_ops.linear_cross_entropy: numbers, masks, chunks, export and eight devices."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

import jax_ops  # noqa: E402
from jax_ops._head import chunks  # noqa: E402
from softmax_ext import reference  # noqa: E402
from tests.head.jax_arrays import IN, MODES, STATS, TARGET, TRANSFORMS, D, N, V, _head, _same, _total  # noqa: E402
from tests.judging.quick import FLAGS, QUICK  # noqa: E402


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _random(n: int, d: int, v: int, dtype: str, scale: float = 1.0) -> tuple[Any, Any, Any]:
    r = np.random.default_rng(n)
    x, w = jnp.asarray(r.normal(size=(n, d)), dtype), jnp.asarray(r.normal(size=(v, d)) * scale, dtype)
    return x, w, jnp.asarray(r.integers(v, size=n))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weight_gradient_is_as_exact_in_many_chunks(dtype: str) -> None:
    """Accumulated in float32 (bug 6): 128 chunks err as one."""
    with jax.enable_x64(False):
        x, w, t = _random(256, 16, 33, dtype)
    wide = [np.asarray(a, np.float64) for a in (x, w)]
    _, truth, _ = reference.linear_cross_entropy_grad(wide[0], wide[1], np.asarray(t))
    errors = []
    with jax.enable_x64(False):
        for size in (256, 2):
            f = jax.jit(jax.grad(lambda w, size=size: jax_ops.linear_cross_entropy(x, w, t, chunk_size=size)))
            errors.append(np.abs(np.asarray(f(w), np.float64) - truth).max() / np.abs(truth).max())
    assert errors[1] <= 1.2 * errors[0] + 2.0**-22
    assert errors[0] < {"float32": 1e-6, "bfloat16": 4e-3, "float16": 6e-4}[dtype]


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_float16_gradients_are_scaled_after_the_matmul(memory: str) -> None:
    """1/N folded into float16 dlogits would flush most of them to zero."""
    with jax.enable_x64(False):
        x, w, t = _random(2048, 4, 600, "float16", 0.1)
        f = lambda x, w: jax_ops.linear_cross_entropy(x, w, t, memory=memory) * 4096.0  # noqa: E731
        dx, dw = jax.jit(jax.grad(f, (0, 1)), **QUICK)(x, w)
    tx, tw, _ = reference.linear_cross_entropy_grad(
        np.asarray(x, float), np.asarray(w, float), np.asarray(t), dloss=4096.0
    )
    np.testing.assert_allclose(np.asarray(dx, float), tx, atol=4e-3 * np.abs(tx).max())
    np.testing.assert_allclose(np.asarray(dw, float), tw, atol=2e-3 * np.abs(tw).max())


@functools.cache
def _by_chunks(size: int | None, memory: Any, stats: Any) -> Any:
    def f(x: Any, w: Any) -> Any:
        return _total(jax_ops.linear_cross_entropy(x, w, TARGET, memory=memory, chunk_size=size, stats=stats))

    return jax.jit(jax.value_and_grad(f, (0, 1)), **QUICK)(IN["x"], IN["w"])


@pytest.mark.parametrize(
    ("memory", "stats", "sizes"), [("fast", (), (1, 3, 100)), ("fast", STATS, (4,)), ("lean", STATS, (1, 3, 4, 100))]
)
def test_chunk_sizes_change_nothing(memory: str, stats: tuple[Any, ...], sizes: tuple[int, ...]) -> None:
    for size in sizes:
        _same(_by_chunks(size, memory, stats), _by_chunks(None, memory, stats), 1e-13)


def test_lean_is_bitwise_reproducible() -> None:
    with jax.enable_x64(False):
        x, w, t = _random(64, 16, 300, "float32")
        f = jax.jit(jax.grad(lambda x, w: jax_ops.linear_cross_entropy(x, w, t, memory="lean", chunk_size=70), (0, 1)))
        first = f(x, w)
        for _ in range(3):
            for a, b in zip(f(x, w), first, strict=True):
                np.testing.assert_array_equal(a, b)


def _masked(classes: list[int]) -> Any:
    return np.where(np.isin(np.arange(V), classes), -np.inf, IN["b"])


@functools.cache
def _capped(mode: str) -> Any:
    """Derivatives of the loss over some of the classes, in one program for all biases and targets."""

    def run(x: Any, w: Any, classes: Any, b: Any, t: Any) -> Any:
        f = lambda x, w: _head(mode, x, w[classes], b, t, softcap=3.0)  # noqa: E731
        return {k: TRANSFORMS[k](f)(x, w) for k in ("grad", "hvp", "jacrev of jacrev")}

    return jax.jit(run, **QUICK)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gone", [[2, 3], [5, 6], [0, 1]], ids=str)
@pytest.mark.long
def test_masked_classes_are_as_absent(gone: list[int], mode: str) -> None:
    """A whole slice of them too, the first, a middle or the last one (bug 3)."""
    few = np.setdiff1d(np.arange(V), gone)
    target = np.array([few[0], -100, few[1], few[-1], few[2]])
    fewer = np.array([0, -100, 1, len(few) - 1, 2])
    ours = _capped(mode)(IN["x"], IN["w"], np.arange(V), _masked(gone), target)
    theirs = _capped(mode)(IN["x"], IN["w"], few, IN["b"][few], fewer)
    for transform, truth in theirs.items():
        _same(ours[transform], truth)


def test_a_masked_slice_and_what_holds_the_value() -> None:
    """Derivatives of the value by soft targets and class weights: a slice of -inf makes none of them NaN."""
    b, y = _masked([0, 1, 2, 4]), np.where(np.isin(np.arange(V), [0, 1, 2, 4]), 0.0, IN["y"])

    def second(mode: str) -> Any:
        def of_both(y: Any, cw: Any) -> Any:
            f = lambda y, cw: _head(mode, IN["x"], IN["w"], b, y, cw)  # noqa: E731
            value, gradient = jax.value_and_grad(f, (0, 1))(y, cw)
            return value + sum(jnp.square(g).sum() for g in gradient)

        return jax.jit(jax.grad(of_both, (0, 1)), **QUICK)(y, IN["cw"])

    _same(second("lean"), second("fast, rows"))


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_bad_rows_stay_alone(memory: str) -> None:
    x = IN["x"].copy()
    x[2] = np.nan
    x[3] = np.inf  # its logits are +-inf
    target = np.array([1, 0, 4, 6, 99])
    run = lambda x: jax_ops.linear_cross_entropy(  # noqa: E731
        x, IN["w"], target, reduction="none", stats=("lse", "entropy", "argmax"), memory=memory, chunk_size=2
    )
    loss, stats = jax.jit(run)(x)
    assert np.isnan(loss).tolist() == [False, False, True, True, True]
    assert np.isnan(stats["lse"]).tolist() == [False, False, True, True, False]
    assert np.isnan(stats["entropy"]).tolist() == [False, False, True, True, False]
    dx = jax.jit(jax.grad(lambda x: run(x)[0].sum()))(x)
    assert np.isnan(dx).any(1).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_confident_rows_keep_loss_and_gradient(memory: str) -> None:
    """exp(-60), not 0, wherever the slices of the classes lie; under an offset of 1e4 as well (bug 7)."""
    with jax.enable_x64(False):
        for offset in (0.0, 1e4):
            w = np.zeros((V, D), np.float32)
            w[3, 0] = 60.0
            b = np.full(V, offset, np.float32)
            x = np.ones((1, D), np.float32)
            f = jax.value_and_grad(
                lambda b, x=x, w=w: jax_ops.linear_cross_entropy(
                    x, w, np.array([3]), linear_bias=b, memory=memory, chunk_size=2
                )
            )
            loss, db = jax.jit(f)(b)
            want = 6 * np.exp(-60.0)
            np.testing.assert_allclose(loss, want, rtol=1e-5)
            np.testing.assert_allclose(db[3], -want, rtol=1e-5)


def test_argmax_of_ties_is_the_first() -> None:
    w = np.zeros((V, D))
    w[[2, 5]] = 1.0
    modes: list[dict[str, Any]] = [{"memory": m, "chunk_size": c} for m, c in (("fast", 2), ("lean", 2), ("lean", 3))]
    for mode in modes:
        _, stats = jax_ops.linear_cross_entropy(np.ones((N, D)), w, TARGET, stats=("argmax",), **mode)
        np.testing.assert_array_equal(stats["argmax"], [2, -1, 2, 2, 2])


@pytest.mark.long
def test_chunks_cover_everything_once() -> None:
    for size in range(9):
        for largest in range(1, 10):
            for strided in (False, True):
                cut = chunks.cut(size, largest, strided=strided)
                x = jnp.arange(size)
                out = cut.loop(lambda c, p, cut=cut, x=x: cut.put(c, cut.take(c, p) + 1 + cut.take(x, p), p), x * 0)
                np.testing.assert_array_equal(out, np.arange(size) + 1)
                assert cut.each <= largest
    # On 4 devices each has as many rows of every chunk, be they fewer than asked for, or one where those were too few.
    sizes = {(7, 30): (28, 1), (6, 14): (12, 2), (6, 3): (4, 6), (7, 12): (12, 3)}
    for (own, largest), (each, count) in sizes.items():
        strided = each * count == 4 * own
        assert chunks.cut(4 * own, largest, strided=True, blocks=4) == chunks.Cut(4 * own, each, count, strided)
    assert chunks.cut(2048, 1000).each == 512
    assert chunks.cut(7, 3) == chunks.Cut(7, 3, 3)


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax import shard_map
from jax.sharding import NamedSharding, PartitionSpec as P
import jax_ops
from jax_ops._head import linear

assert jax.device_count() == 8
linear._TILE = 2000  # of rows and classes several pieces, as at real sizes
r = np.random.default_rng(0)
n, d, v = 64, 8, 24
x, w, b = (jnp.asarray(r.normal(size=s), jnp.float32) for s in ((n, d), (v, d), (v,)))
t = jnp.asarray(r.integers(v, size=n)).at[3].set(-100)
CASES = {
    "fast": {"chunk_size": 16},
    "fast, all": {"chunk_size": 32, "label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.1, "stats": ("entropy", "lse")},
    "none": {"chunk_size": 16, "reduction": "none"},
    "lean": {"memory": "lean", "chunk_size": 10, "stats": ("entropy",), "label_smoothing": 0.1},
}

def loss(k, x, w, b, t, **more):
    out = jax_ops.linear_cross_entropy(x, w, t, linear_bias=b, **{**CASES[k], **more})
    value, stats = out if isinstance(out, tuple) else (out, {})
    return value.sum() + 0.1 * sum(s.sum() for s in stats.values())

def same(a, c):
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(c), strict=True):
        assert np.abs(q).max() > 1e-3
        np.testing.assert_allclose(p, q, rtol=3e-5, atol=3e-5)

def gathers_nothing(f, *args):
    compiled = jax.jit(f).lower(*args).compile()
    text = compiled.as_text()
    used = set(re.findall(r"(all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)", text))
    assert used <= {"all-reduce"}, (k, used)
    return compiled(*args), text

mesh = jax.make_mesh((8,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
explicit = jax.make_mesh((8,), ("b",))
xs, ts = (jax.device_put(a, NamedSharding(mesh, P("b"))) for a in (x, t))
on = lambda a, spec: jax.device_put(a, NamedSharding(explicit, spec))
xe, te, we, be = on(x, P("b")), on(t, P("b")), on(w, P()), on(b, P())
for k in CASES:
    f = jax.value_and_grad(lambda x, w, b, t: loss(k, x, w, b, t), (0, 1, 2))
    truth = jax.jit(f)(x, w, b, t)
    out, text = gathers_nothing(f, xs, w, b, ts)
    shapes = re.findall(r"= f32\\[([\\d,]*)\\]\\S* all-reduce\\(", text)
    sizes = {int(np.prod([int(i) for i in s.split(",") if i])) for s in shapes}
    assert k != "fast" or sizes <= {1, v, v * d, d}, (k, sizes)  # the loss, dW (by pieces or columns) and db
    same(out, truth)
    assert out[1][0].sharding.is_equivalent_to(xs.sharding, 2), k
    if k in ("fast", "none"):
        out, _ = gathers_nothing(f, xe, we, be, te)
        same(out, truth)
        assert [jax.typeof(g).sharding.spec for g in out[1]] == [P("b", None), P(None, None), P(None)], k
    total = jax.value_and_grad(lambda x, w, b, t: loss(k, x, w, b, t, reduction="sum"), (0, 1, 2))
    truth = jax.jit(total)(x, w, b, t)
    for vma in (True, False):
        specs = dict(mesh=mesh, in_specs=(P("b"), P(), P(), P("b")), check_vma=vma)
        outer = shard_map(lambda *a: jax.lax.psum(loss(k, *a, reduction="sum"), "b"), out_specs=P(), **specs)
        same(jax.jit(jax.value_and_grad(outer, (0, 1, 2)))(xs, w, b, ts), truth)

# Explicit axes: fewer rows in a chunk than devices, smoothed weights, soft targets, second derivatives.
k, cw, y = "more", *(jnp.asarray(r.uniform(0.5, 1.5, s), jnp.float32) for s in (v, (n, v)))
def hard(x, w, cw, t):
    return jax_ops.linear_cross_entropy(x, w, t, weight=cw, label_smoothing=0.1, chunk_size=3)
def soft(x, w, cw, y):
    return jax_ops.linear_cross_entropy(x, w, y, weight=cw, memory="lean", chunk_size=10)
def more(x, w, cw, t, y):
    hessian_vector = jax.jvp(lambda w: jax.grad(hard, (0, 1))(x, w, cw, t), (w,), (w,))
    return hessian_vector, jax.grad(soft, (0, 1, 2, 3))(x, w, cw, y)
same(gathers_nothing(more, xe, we, on(cw, P()), te, on(y, P("b")))[0], jax.jit(more)(x, w, cw, t, y))
none = lambda x, w, t: jax_ops.linear_cross_entropy(x, w, t, reduction="none", stats=["lse"])
rows = jax.eval_shape(none, xe, we, te)
assert [a.sharding.spec for a in jax.tree.leaves(rows)] == [P("b"), P("b")], rows
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
