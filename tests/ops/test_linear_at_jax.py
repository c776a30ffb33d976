"""linear_at in JAX: against the reference, every derivative and transform, its memory, what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ops
from jax_ops._rows import native
from jax_ops._rows import picked as rows
from softmax_ext import reference
from tests.judging import checks, quick

OPS: Any = jax_ops
REFERENCE: Any = reference


@pytest.fixture(params=["native", "plain", "plain by pieces"])
def served(request, monkeypatch, programs_for):
    """Every way to serve a product."""
    if request.param == "native":
        assert not native.missing, native.missing
    else:
        monkeypatch.setattr(native, "missing", "taken away")
    if request.param == "plain by pieces":
        monkeypatch.setattr(rows, "_WORKSPACE", 150)
    programs_for(request.param)
    return request.param


def problem(dtype: str, lead: tuple[int, ...] = (2, 5), D: int = 7, V: int = 11, K: int = 4) -> Any:
    rng = np.random.default_rng(K)
    x, w, b = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((*lead, D), (V, D), (V,)))
    ids = rng.integers(0, V, (*lead, K))
    if ids.size:
        ids.reshape(-1, K)[0] = 3  # one class, K times
        ids.reshape(-1)[-1] = -100
    return x, w, b, ids


def judge(dtype: str, lead: tuple[int, ...], K: int) -> None:
    with jax.enable_x64(dtype == "float64"):
        x, w, b, ids = problem(dtype, lead, K=K)
        wide = [np.float64(np.asarray(a, np.float32) if dtype != "float64" else a) for a in (x, w, b)]
        truth = REFERENCE.linear_at(*wide[:2], ids, linear_bias=wide[2])
        kind = "float64" if dtype == "float64" else "float32"
        up = np.random.default_rng(1).standard_normal(truth.shape).astype(kind)
        up[np.isneginf(truth)] = np.nan  # no gradient passes a slot without a class, whatever comes back to it

        @jax.jit  # one program: eager steps are compiled one by one
        def numbers(x: Any, w: Any, b: Any) -> Any:
            z, pull = jax.vjp(lambda x, w, b: OPS.linear_at(x, w, ids, linear_bias=b), x, w, b)
            return z, pull(up)

        z, grads = numbers(x, w, b)
        assert z.dtype == kind
        checks.close(np.array(z), truth, np.where(np.isfinite(truth), np.abs(truth), 0) + 7 * 9, dtype=kind, c=4)
        right = REFERENCE.linear_at_grad(*wide[:2], ids, np.float64(up))
        for g, t, leaf in zip(grads, right, (x, w, b), strict=True):
            assert g.dtype == leaf.dtype
            checks.close(np.asarray(g, np.float64), t, np.abs(t) + 40, dtype=dtype, c=4)


@pytest.mark.parametrize(("dtype", "lead", "K"), [
    ("float64", (2, 5), 4), ("float32", (5,), 4), ("bfloat16", (2, 5), 4), ("float16", (5,), 1), ("float32", (), 4),
    ("float32", (0,), 4), ("float32", (5,), 0),
], ids=str)  # fmt: skip
def test_values_and_gradients(served, dtype, lead, K):
    judge(dtype, lead, K)


def once(c: Any, x: Any, ids: Any, classes: int) -> Any:
    """dW that takes a class named K times as named once."""
    again = (ids[:, :, None] == ids[:, None, :]) & jnp.tri(ids.shape[1], k=-1, dtype=bool)
    return WEIGHT_BWD(jnp.where(again.any(2), 0.0, c), x, ids, classes)


WEIGHT_BWD, INPUT_BWD, READ = rows.picked_weight_bwd, rows.picked_input_bwd, rows._rows
SABOTEURS: dict[str, Any] = {
    "a neighbour's row of W": ("_rows", lambda w, ids, kind: READ(w, (ids + 1) % len(w), kind)),
    "repeated ids count once": ("picked_weight_bwd", once),
    "dX without its last id": ("picked_input_bwd", lambda c, w, ids: INPUT_BWD(c.at[:, -1].set(0.0), w, ids)),
}


@pytest.mark.parametrize("name", SABOTEURS)
def test_wrong_products_are_seen(name, monkeypatch):
    monkeypatch.setattr(native, "missing", "taken away")
    monkeypatch.setattr(rows, *SABOTEURS[name])
    jax.clear_caches()
    with pytest.raises(AssertionError):
        judge("float32", (5,), 4)
    monkeypatch.undo()
    jax.clear_caches()


def fn(x: Any, w: Any, b: Any, ids: Any) -> Any:
    return jnp.where(ids == -100, 0.0, OPS.linear_at(x, w, ids, linear_bias=b))


def test_transforms():
    with jax.enable_x64(True):
        x, w, b, ids = problem("float64", (3,), D=2, V=4, K=3)
        ours = lambda x, w, b: fn(x, w, b, ids)  # noqa: E731

        def dense(x: Any, w: Any, b: Any) -> Any:
            return jnp.where(ids == -100, 0.0, jnp.take_along_axis(x @ w.T + b, ids.clip(0), 1))

        rng = np.random.default_rng(0)
        xs, ws, bs = (jnp.asarray(rng.standard_normal((5, *a.shape))) for a in (x, w, b))
        square = lambda g: lambda *a: jnp.square(g(*a)).sum()  # noqa: E731
        every = (0, 1, 2)
        each = jnp.stack([jnp.asarray(ids), ids[::-1], ids[:, ::-1]])

        def everything(g: Any, x: Any, w: Any, b: Any) -> Any:
            yield jax.jvp(g, (x, w, b), (xs[0], ws[0], bs[0]))
            yield jax.hessian(square(g), every)(x, w, b)
            for axes in ((0, 0, 0), (None, 0, None), (0, None, None)):
                args = [many if a == 0 else one for a, many, one in zip(axes, (xs, ws, bs), (x, w, b), strict=True)]
                yield jax.vmap(jax.grad(square(g), every), axes)(*args)
                total = lambda *a, axes=axes: jax.vmap(square(g), axes)(*a).sum()  # noqa: E731
                yield jax.grad(total, every)(*args)
            yield jax.grad(jax.checkpoint(square(g)), every)(x, w, b)

        @partial(jax.jit, **quick.QUICK)
        def all_of(x: Any, w: Any, b: Any) -> Any:
            by_id = jax.vmap(lambda i: fn(x, w, b, i))(each), jnp.stack([fn(x, w, b, i) for i in each])
            return [*everything(ours, x, w, b), by_id[0]], [*everything(dense, x, w, b), by_id[1]]

        for a, t in zip(*map(jax.tree.leaves, all_of(x, w, b)), strict=True):
            np.testing.assert_allclose(a, t, rtol=1e-10, atol=1e-12)


def test_kept_sets():
    """What it is for: a log-probability renormalised on a kept set, a loss over candidates."""
    x, w, _, ids = problem("float32", (5,))
    z = OPS.linear_at(x, w, ids)
    p = jnp.exp(OPS.log_softmax(z))
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-6)
    assert p[-1, -1] == 0
    loss = jax.grad(lambda x: OPS.cross_entropy(OPS.linear_at(x, w, ids), jnp.zeros(5, int)))(x)
    assert jnp.isfinite(loss).all()


def test_ids_of_no_class(served):
    x, w, b, ids = problem("float32")
    ids[1, 2, 1] = 11
    assert jnp.argwhere(jnp.isnan(OPS.linear_at(x, w, ids))).tolist() == [[1, 2, 1]]
    dx, dw, db = jax.jit(jax.grad(lambda x, w, b: fn(x, w, b, ids).sum(), (0, 1, 2)), **quick.QUICK)(x, w, b)
    assert jnp.argwhere(jnp.isnan(dx).any(-1)).tolist() == [[1, 2]]
    assert jnp.isfinite(dw).all()
    assert jnp.isfinite(db).all()


def test_ids_of_every_integer_type():
    x, w, _, ids = problem("float32", (5,))
    truth = OPS.linear_at(x, w, ids)
    for kind in (np.int8, np.int16, np.int32):
        assert (OPS.linear_at(x, w, ids.astype(kind)) == truth).all()
    small = np.array([[156, 3]] * 5, np.uint8)
    assert jnp.isnan(OPS.linear_at(x, w, small)[:, 0]).all()  # 156 is not -100
    assert jnp.isneginf(OPS.linear_at(x, w, small, ignore_index=156)[:, 0]).all()


def test_no_array_of_n_k_d(monkeypatch):
    """Neither in a kernel's program nor, beyond the workspace, in a plain one."""
    N, D, V, K = 64, 32, 50, 16
    x, w, _, ids = problem("float32", (N,), D, V, K)
    args, made = (x, w, jnp.asarray(ids)), jax.grad(lambda x, w, i: fn(x, w, jnp.zeros(V), i).sum(), (0, 1))

    def temp() -> int:
        program: Any = jax.jit(made).lower(*args).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temp() < 4 * N * K * D / 4
    monkeypatch.setattr(native, "missing", "taken away")
    jax.clear_caches()
    assert temp() >= 4 * N * K * D  # that would be seen
    monkeypatch.setattr(rows, "_WORKSPACE", 4 * N * K * D // 16)
    jax.clear_caches()
    assert temp() < 4 * N * K * D / 2
    monkeypatch.undo()
    jax.clear_caches()


MISTAKES = {
    "linear_at: input must have type float16, bfloat16, float32 or float64; got int64.": lambda x, w, b, i: (i, w, i),
    "linear_at: linear_weight must have the input's type float32; got bfloat16.": lambda x, w, b, i: (
        x, w.astype(jnp.bfloat16), i),
    "linear_at: linear_weight must have 2 dimensions, the last 7 (the input's); got (11, 6).": lambda x, w, b, i: (
        x, w[:, :6], i),
    "linear_at: ids must have an integer type; got float32.": lambda x, w, b, i: (x, w, np.float32(i)),
    "linear_at: ids must have shape (2, 5, K); got (10, 4).": lambda x, w, b, i: (x, w, i.reshape(10, 4)),
    "linear_at: ids must be an array; got list object.": lambda x, w, b, i: (x, w, i.tolist()),
}  # fmt: skip


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes(sentence):
    with pytest.raises((TypeError, ValueError)) as error:
        OPS.linear_at(*MISTAKES[sentence](*problem("float32")))
    assert str(error.value) == sentence
    with pytest.raises(ValueError, match="linear_bias must have shape"):
        OPS.linear_at(*problem("float32")[:2], problem("float32")[3], linear_bias=jnp.zeros(3))
