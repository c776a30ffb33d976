"""JAX: rows whose scale is an array: values, gradients of every order, and what is never formed, beside the product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ops
from jax_ops._head import chunks, scaled_rows
from jax_ops._rows import native
from tests.judging.quick import QUICK
from tests.ops.test_divergence_jax import composed

R = np.random.default_rng(4)
X, W, B, Y, U = (R.standard_normal(s) for s in ((2, 5, 3), (7, 3), (7,), (2, 5, 4), (7, 4)))
SCALES = {"one": np.asarray(1.3), "rows": 0.5 + R.random((2, 5))}
Moving = tuple[Any, ...]


def product(x: Any, w: Any, b: Any, s: Any) -> Any:
    return (x @ w.T + b) * (s[..., None] if s.ndim else s)


def both(memory: Any, kind: Any) -> tuple[Any, Any, Any]:
    """The loss of two heads, of their rows, and the formula as it stands of the plain product, shifted by one."""
    t = jnp.asarray(Y) @ jnp.asarray(U).T

    def of_heads(x: Any, w: Any, b: Any, s: Any) -> Any:
        how: dict[str, Any] = {"kind": kind, "shift": 1, "memory": memory, "chunk_size": 3}
        return jax_ops.linear_divergence(x, w, Y, U, linear_bias=b, logit_scale=s, **how)

    def of_rows(x: Any, w: Any, b: Any, s: Any) -> Any:
        z = (x @ w.T + b)[:, :-1]
        return jax_ops.divergence(z, t[:, :-1], kind=kind, logit_scale=s if not s.ndim else s[:, :-1])

    def plain(x: Any, w: Any, b: Any, s: Any) -> Any:
        return composed(product(x, w, b, s)[:, :-1], t[:, :-1], kind).mean()

    return of_heads, of_rows, plain


@pytest.mark.parametrize(("memory", "kind"), [("fast", "forward_kl"), ("lean", "jsd")])
@pytest.mark.parametrize("shape", SCALES)
def test_values_and_derivatives(shape: str, memory: str, kind: str) -> None:
    with jax.enable_x64(True):
        at: Moving = tuple(map(jnp.asarray, (X, W, B, SCALES[shape])))
        along: Moving = tuple(jnp.cos(3.0 * a) for a in at)
        every = tuple(range(4))

        def answers(f: Any) -> Any:
            def both_ways(*at: Any) -> Any:
                pushed = jax.jvp(f, at, along)[1]
                gradient = jax.grad(f, every)
                return f(*at), pushed, gradient(*at), jax.jvp(gradient, at, along)[1]

            return jax.jit(both_ways, **QUICK)(*at)

        *ours, plain = both(memory, kind)
        truth = answers(plain)
        assert all(np.abs(np.asarray(g)).max() > 1e-3 for g in jax.tree.leaves(truth))
        for f in ours:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), answers(f), truth)


def test_what_is_no_part_of_a_row_moves_no_scale() -> None:
    """A row that is not kept may hold NaN, in the scale too; a masked class adds nothing, not even 0 * -inf."""
    x, s, keep = X.copy(), SCALES["rows"].copy(), np.ones((2, 5), bool)
    x[0, 1], s[0, 1], keep[0, 1] = np.nan, np.nan, False
    b = np.where(np.arange(7) == 3, -np.inf, B)
    clean = [np.nan_to_num(a) for a in (x, s)]
    with jax.enable_x64(True):

        def of_heads(w: Any, s: Any) -> Any:
            heads: dict[str, Any] = {"linear_bias": b, "teacher_bias": b}
            return jax_ops.linear_divergence(x, w, Y, U, **heads, keep=keep, logit_scale=s)

        def of_rows(z: Any, s: Any) -> Any:
            return jax_ops.divergence(z, Y @ U.T + b, keep=keep, logit_scale=s)

        def plain(w: Any, s: Any) -> Any:
            some = np.arange(7) != 3
            z, t = (jnp.asarray(a)[..., some] for a in (product(clean[0], w, B, s), Y @ U.T + B))
            return (composed(z, t, "forward_kl") * keep).sum() / keep.sum()

        want = jax.grad(plain, (0, 1))(jnp.asarray(W), jnp.asarray(clean[1]))
        found = jax.grad(of_heads, (0, 1))(jnp.asarray(W), jnp.asarray(s))
        (of_row,) = jax.grad(of_rows, (1,))(jnp.asarray(x @ W.T + b), jnp.asarray(s))
        answers = [*map(np.asarray, (*found, of_row))]
    for a, b in zip(answers, (*want, want[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert answers[1][0, 1] == 0 == answers[2][0, 1]


def test_a_bias_in_half_precision_is_not_scaled_by_a_rounded_number() -> None:
    """As columns (s, b) the scale stands in two parts: the bias alone moves the logits here."""
    x, w, y = np.zeros((4, 3)), np.zeros((7, 3)), np.zeros((4, 3))
    b = np.asarray(jnp.asarray(8.0 * B, jnp.bfloat16), np.float32)
    s = np.linspace(0.9, 1.1, 4)

    def loss(s: Any) -> Any:
        given = [jnp.asarray(a, jnp.bfloat16) for a in (x, w, y, w)]
        return jax_ops.linear_divergence(*given, linear_bias=jnp.asarray(b, jnp.bfloat16), logit_scale=s).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(s, jnp.float32))
    with jax.enable_x64(True):
        plain = lambda s: composed(s[:, None] * b.astype(np.float64), jnp.zeros((4, 7)), "forward_kl").mean()  # noqa: E731
        truth, right = jax.value_and_grad(plain)(jnp.asarray(np.float32(s), jnp.float64))
    np.testing.assert_allclose(value, truth, rtol=3e-5)
    np.testing.assert_allclose(gradient, right, rtol=2.0**-8)  # as a column of the input it is rounded once


def test_a_scale_that_is_no_scale_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"must be a Python number or have shape \(\) or \(2, 5\); got \(5,\)\."):
        jax_ops.divergence(X, X, logit_scale=np.ones(5))
    with pytest.raises(TypeError, match=r"linear_divergence: logit_scale must have type float16"):
        jax_ops.linear_divergence(X, W, Y, U, logit_scale=np.ones((2, 5), int))


# By pieces of the product


def temporary(f: Any, *arrays: Any) -> int:
    """Bytes beside arguments and results."""
    found: Any = jax.jit(f, **QUICK).lower(*arrays).compile().memory_analysis()
    return found.temp_size_in_bytes


def of_loss(x: Any, s: Any, t: Any) -> Any:
    return jax_ops.cross_entropy(x, t, logit_scale=s, z_loss=0.1)


def of_teacher(x: Any, s: Any, t: Any) -> Any:
    return jax_ops.divergence(x, t, kind="jsd", logit_scale=s)


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("f", [of_loss, of_teacher])
def test_no_array_of_the_product(f: Any, one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the gradients there is a piece of the product, in the rows' own time."""
    rows, classes = 251, 4096
    x, s = jnp.ones((rows, classes)), jnp.float32(0.5) if one else jnp.full((rows,), 0.5)
    t = jnp.zeros((rows,), int) if f is of_loss else x * 2.0
    for way in (f, jax.value_and_grad(f, (0, 1))):
        monkeypatch.setattr(scaled_rows, "_PIECE", 1 << 15)
        assert temporary(way, x, s, t) < x.nbytes / 4
        monkeypatch.setattr(scaled_rows, "_PIECE", 1 << 30)  # the saboteur: one piece of all
        jax.clear_caches()
        assert native.missing or temporary(way, x, s, t) >= x.nbytes
        jax.clear_caches()


IDS, MASS = R.integers(0, 5, (6, 3, 7)), R.random((6, 3, 7))
IDS[2, :, 4] = IDS[0, 1, 0] = -100
TARGETS: dict[str, Any] = {
    "indices": IDS[:, 0],
    "soft": R.random((6, 5, 7)),
    "pairs": (IDS, MASS),
}
LOUD = 2.0 * R.standard_normal((6, 5, 7))
LOUD[1, 4, 2] = -np.inf


@pytest.mark.parametrize(("target", "one"), [("indices", False), ("soft", True), ("pairs", False), ("indices", True)])
def test_a_loss_by_pieces(target: str, one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose last piece overlaps the one before it count once; each array is cut along its own axis."""
    monkeypatch.setattr(scaled_rows, "_PIECE", 100)
    jax.clear_caches()
    more: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "stats": ("entropy", "lse", "argmax")}
    for options in ({**more, "softcap": 3.0}, {"reduction": "none"}) if target != "pairs" else (more,):
        with jax.enable_x64(True):
            x, s = jnp.asarray(LOUD), jnp.asarray(1.3 if one else 0.5 + R.random((6, 7)))
            w, t = jnp.asarray(0.5 + R.random(5)), TARGETS[target]

            def answer(loss: Any) -> Any:
                return sum(jnp.where(jnp.isfinite(v), v, 0.0).sum() for v in jax.tree.leaves(loss))

            def ours(x: Any, s: Any, w: Any, options: Any = options, t: Any = t) -> Any:
                return answer(jax_ops.cross_entropy(x, t, w, axis=1, logit_scale=s, **options))

            def plain(x: Any, s: Any, w: Any, options: Any = options, t: Any = t) -> Any:
                by = s if one else s[:, None]
                lost = x == -jnp.inf
                z = jnp.where(lost, x * jax.lax.stop_gradient(by), jnp.where(lost, 0.0, x) * by)
                return answer(jax_ops.cross_entropy(z, t, w, axis=1, **options))

            found, due = (jax.jit(jax.value_and_grad(f, (0, 1, 2)), **QUICK)(x, s, w) for f in (ours, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), found, due)


@pytest.mark.parametrize(("kind", "one"), [("forward_kl", True), ("jsd", False)])
def test_a_divergence_by_pieces(kind: Any, one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_rows, "_PIECE", 100)
    jax.clear_caches()
    keep = R.random((6, 7)) < 0.7
    with jax.enable_x64(True):
        x, t = jnp.asarray(np.where(np.isinf(LOUD), 1.0, LOUD)), jnp.asarray(R.standard_normal((6, 5, 7)))
        s = jnp.asarray(1.3 if one else 0.5 + R.random((6, 7)))
        spoilt = jnp.where(keep[:, None], x, jnp.nan)

        def ours(x: Any, s: Any) -> Any:
            return jax_ops.divergence(x, t, kind=kind, keep=keep, axis=1, logit_scale=s, softcap=4.0)

        def plain(x: Any, s: Any) -> Any:
            z = x * (s if one else s[:, None])
            return jax_ops.divergence(z, t, kind=kind, keep=keep, axis=1, softcap=4.0)

        found = jax.jit(jax.value_and_grad(ours, (0, 1)), **QUICK)(spoilt, s)
        due = jax.jit(jax.value_and_grad(plain, (0, 1)), **QUICK)(x, s)
        twice = [jax.jvp(jax.grad(f, (0, 1)), (x, s), (jnp.cos(x), jnp.sin(s))) for f in (ours, plain)]
        mapped = jax.vmap(jax.grad(ours, 1), (None, 0))(x, jnp.stack([s, 2.0 * s]))
        alone = jnp.stack([jax.grad(plain, 1)(x, v) for v in (s, 2.0 * s)])
    for a, b in ((found, due), twice, (mapped, alone)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), a, b)


@pytest.mark.parametrize("fault", ["stale rows count", "no gradient of the scale"])
def test_saboteurs_of_pieces_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "stale rows count":
        monkeypatch.setattr(chunks.Cut, "take_fresh", chunks.Cut.take)
    else:
        monkeypatch.setattr(scaled_rows, "along", lambda x, lost, g, *_, **__: jnp.zeros_like(g).sum(1))
    jax.clear_caches()
    caches = (scaled_rows._loss, scaled_rows._divergence)
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.raises(AssertionError):
            test_a_divergence_by_pieces("forward_kl", True, monkeypatch)
    finally:
        jax.clear_caches()
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize("op", ["cross_entropy", "divergence"])
@pytest.mark.parametrize("rounded", [False, True])
def test_one_half_precision_scale_is_summed_in_float32(op: str, rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 2048 pieces, each of half a unit of their sum and less; the saboteur rounds each piece's part."""
    monkeypatch.setattr(scaled_rows, "_PIECE", 8)
    if rounded:
        right = scaled_rows._scaled_bwd

        def each(logits: Any, scale: Any, *more: Any) -> list[Any]:
            return [d.astype(scale.dtype) for d in right(logits, scale, *more)]

        monkeypatch.setattr(scaled_rows, "_scaled_bwd", each)
    jax.clear_caches()
    r, s = np.random.default_rng(0), 0.75
    x, y = (3 * r.standard_normal((2048, 8)) for _ in range(2))
    p = np.exp(s * x)
    p /= p.sum(1, keepdims=True)
    q = np.eye(8)[r.integers(0, 8, 2048)] if op == "cross_entropy" else np.exp(y) / np.exp(y).sum(1, keepdims=True)
    due = ((p - q) * x).sum()
    other: Any = jnp.asarray(
        q.argmax(1) if op == "cross_entropy" else y, None if op == "cross_entropy" else jnp.float32
    )

    def loss(s: Any) -> Any:
        return getattr(jax_ops, op)(jnp.asarray(x, jnp.float32), other, logit_scale=s, reduction="sum")

    found = float(jax.jit(jax.grad(loss))(jnp.asarray(s, jnp.bfloat16)))
    jax.clear_caches()
    assert (abs(found - due) <= 2.0**-8 * abs(due)) != rounded, (found, due)
