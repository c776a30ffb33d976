"""Divergences in JAX: every derivative under every transform, the kernels in the program, a constant teacher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ops
from jax_ops._rows import divergence as rows
from jax_ops._rows import native, ratios
from softmax_ext.contract import KINDS
from tests.judging import quick
from tests.judging.divergences import BETA, Jax, judged, of_logits, pairs
from tests.ops.test_divergence import test_the_mean_of_no_row_moves_nothing as of_no_row

CAPPED: dict[str, Any] = {"logit_scale": 1.2, "softcap": 3.0, "teacher_scale": 0.9, "teacher_softcap": 2.0}
S = np.sin(np.linspace(-2.0, 2.0, 18)).reshape(3, 6) * 3.0
T = np.cos(np.linspace(1.0, 4.0, 18)).reshape(3, 6) * 2.0
KEEP = np.array([True, False, True])


def composed(s: jax.Array, t: jax.Array, kind: str, beta: float = 0.5) -> jax.Array:
    """Each row's divergence as the formula stands, in the framework's own ops."""
    lp, lq = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
    p, q = jnp.exp(lp), jnp.exp(lq)
    m = beta * q + (1 - beta) * p
    return {
        "forward_kl": q * (lq - lp),
        "reverse_kl": p * (lp - lq),
        "tv": 0.5 * jnp.abs(p - q),
        "jsd": beta * q * (lq - jnp.log(m)) + (1 - beta) * p * (lp - jnp.log(m)),
    }[kind].sum(-1)


def test_which_kernels_are_in_the_program() -> None:
    if native.missing:
        pytest.skip(f"no native kernels: {native.missing}")
    text = jax.jit(jax.grad(jax_ops.divergence)).lower(jnp.ones((3, 5)), jnp.ones((3, 5))).as_text()
    assert "softmax_ext_divergence_fwd" in text
    assert "softmax_ext_divergence_bwd" in text


def test_rows_that_a_library_lacks_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "served", [row for row in native.served if "divergence" not in row])
    jax.clear_caches()
    text = jax.jit(jax.grad(jax_ops.divergence)).lower(jnp.ones((3, 5)), jnp.ones((3, 5))).as_text()
    assert "softmax_ext_divergence" not in text
    jax.clear_caches()


@pytest.mark.parametrize("part", ["less", "_log1p"])
def test_formulas_that_lose_digits_are_seen(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift that is not corrected, and XLA's own log1p."""
    monkeypatch.setattr(native, "missing", "asked for by a test")
    about: dict[str, tuple[str, str, Any, dict[str, Any]]] = {
        "less": ("a millionth", "float32", lambda d, p, q: jnp.zeros_like(d), {}),
        "_log1p": ("elsewhere", "float64", jnp.log1p, {"kind": "jsd", "beta": BETA}),
    }
    distance, dtype, wrong, options = about[part]
    s, t = pairs(17, dtype)[distance]
    jax.clear_caches()
    judged(*of_logits(Jax(), s, t, dtype, **options), s, t, dtype, **options)
    monkeypatch.setattr(ratios, part, wrong)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        judged(*of_logits(Jax(), s, t, dtype, **options), s, t, dtype, **options)
    jax.clear_caches()


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_every_order(kind: str) -> None:
    with jax.enable_x64(True):
        s, t, keep = jnp.asarray(S), jnp.asarray(T), jnp.asarray(KEEP)
        options: dict[str, Any] = {"kind": kind, "beta": BETA, "keep": keep, **CAPPED}

        def f(s: jax.Array) -> jax.Array:
            return jax_ops.divergence(s, t, **options)

        def g(s: jax.Array) -> jax.Array:
            each = composed(3.0 * jnp.tanh(1.2 * s / 3.0), 2.0 * jnp.tanh(0.9 * t / 2.0), kind, BETA)
            return (each * keep).sum() / keep.sum()

        third = [lambda h: jax.jacfwd(jax.hessian(h))] if kind in ("reverse_kl", "jsd") else []

        def everything(h: Any, s: jax.Array) -> Any:
            along = [jax.jvp(g, (s,), (t,))[1] for g in (h, jax.grad(h))]
            return [derive(h)(s) for derive in (jax.grad, jax.hessian, *third)], along

        both = (jax.jit(lambda s, h=h: everything(h, s), **quick.QUICK)(s) for h in (f, g))
        for mine, right in zip(*map(jax.tree.leaves, both), strict=True):
            np.testing.assert_allclose(mine, right, rtol=1e-8, atol=1e-12)
        each = jax.vmap(jax.grad(lambda a, b: jax_ops.divergence(a, b, kind=kind)))(s, t)  # pyright: ignore
        shared = jax.vmap(jax.grad(lambda a: jax_ops.divergence(a, t[0], kind=kind)))(s)  # pyright: ignore
        whole, one = (
            jax.grad(lambda s, t=t: jax_ops.divergence(s, t, kind=kind, reduction="sum"))(s)  # pyright: ignore
            for t in (t, jnp.broadcast_to(t[0], s.shape))
        )
        np.testing.assert_allclose(each, whole, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(shared, one, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_wherever_jax_goes(kind: Any) -> None:
    """Checkpointed, scanned, without jit, a pullback and a program of one x64 scope used in another."""
    s, t = jnp.asarray(S, jnp.float32), jnp.asarray(T, jnp.float32)

    def f(s: jax.Array) -> jax.Array:
        return jax_ops.divergence(s, t, kind=kind)

    want = jax.grad(f)(s)
    everything = jax.checkpoint_policies.everything_saveable
    for again in (jax.checkpoint(f), jax.checkpoint(f, policy=everything), jax.jit(f)):
        np.testing.assert_allclose(jax.grad(again)(s), want, rtol=1e-6, atol=1e-7)
    steps = jax.lax.scan(lambda c, _: (c - jax.grad(f)(c), f(c)), s, jnp.arange(3))[1]
    assert (jnp.diff(steps) < 0).all()
    with jax.disable_jit():
        np.testing.assert_allclose(jax.grad(f)(s), want, rtol=1e-6, atol=1e-7)
    with jax.enable_x64(True):
        wide, pull = jax.vjp(lambda s: jax_ops.divergence(s, jnp.asarray(T), kind=kind), jnp.asarray(S))
        found = jax.linearize(lambda s: jax_ops.divergence(s, jnp.asarray(T), kind=kind), jnp.asarray(S))[1]
    assert wide.dtype == jnp.float64
    (gradient,) = pull(jnp.ones_like(wide))
    assert gradient.dtype == jnp.float64
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found(jnp.ones_like(gradient)), np.asarray(gradient).sum(), atol=1e-6)
    exported = jax.export.export(jax.jit(jax.grad(f)), platforms=("cpu", "cuda"))(s)
    np.testing.assert_allclose(exported.call(s), want, rtol=1e-6, atol=1e-7)


OPEN: dict[str, Callable[..., Any]] = {
    "jsd": lambda s, t: jax_ops.divergence(s, t, kind="jsd"),
    "tv": lambda s, t: jax_ops.divergence(s, t, kind="tv"),
    "fast": lambda s, t: jax_ops.linear_divergence(s, WEIGHT, t, WEIGHT, reduction="none").sum(),
    "lean": lambda s, t: jax_ops.linear_divergence(s, WEIGHT, t, 2 * WEIGHT, kind="jsd", memory="lean"),
}
WEIGHT = np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(4, 6) ** 3


@pytest.mark.parametrize("name", OPEN)
def test_one_export_for_all_platforms_and_numbers_of_rows(name: str) -> None:
    s, t = jnp.asarray(S, jnp.float32), jnp.asarray(T, jnp.float32)
    step = jax.jit(jax.value_and_grad(OPEN[name]))
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 6"), jnp.float32)
    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(shape, shape)
    assert "@softmax_ext" not in exported.mlir_module()  # no kernel of this machine
    again = jax.export.deserialize(exported.serialize())
    found, due = again.call(s, t), step(s, t)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True):
        assert np.abs(b).max() > 1e-2
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_donated_logits() -> None:
    """The gradient may lie where the logits did; and logits that are not donated stay."""
    s, t = jnp.asarray(S, jnp.float32), jnp.asarray(T, jnp.float32)
    step = jax.value_and_grad(jax_ops.divergence)
    due = jax.jit(step)(s, t)
    np.testing.assert_array_equal(s, S.astype(np.float32))
    found = jax.jit(step, donate_argnums=0)(s + 0.0, t)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_teacher_is_a_constant() -> None:
    s, t, w = jnp.asarray(S), jnp.asarray(T), jnp.asarray(0.5 * S.reshape(6, 3))
    x = s[:, :3]
    calls: list[Callable[[], Any]] = [
        lambda: jax.grad(lambda t: jax_ops.divergence(s, t))(t),
        lambda: jax.jit(jax.grad(lambda t: jax_ops.divergence(s, t)))(t),
        lambda: jax.jvp(lambda t: jax_ops.divergence(s, t), (t,), (t,)),
        lambda: jax.jacfwd(lambda t: jax.grad(lambda s: jax_ops.divergence(s, t))(s))(t),
        lambda: jax.vmap(jax.grad(lambda t: jax_ops.divergence(s[0], t)))(t),
        lambda: jax.grad(lambda s: jax_ops.divergence(s, 2.0 * s))(s),
        lambda: jax.grad(lambda u: jax_ops.linear_divergence(x, w, x, u))(w),
        lambda: jax.grad(lambda y: jax_ops.linear_divergence(x, w, y, w))(x),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"teacher\w* must be a constant.*; got an array that is differentiated\."):
            call()
    own = jax.grad(lambda s: jax_ops.divergence(s, jax.lax.stop_gradient(2.0 * s)))(s)  # its own, held still
    np.testing.assert_allclose(own, jax.grad(lambda a: jax_ops.divergence(a, 2.0 * s))(s), rtol=1e-6)
    jax.checkpoint(jax.grad(lambda s: jax_ops.divergence(s, t)))(s)
    jax.lax.scan(lambda c, _: (c - jax.grad(lambda s: jax_ops.divergence(s, t))(c), None), s, jnp.arange(2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_told_no_state_gives_nan(kind: str) -> None:
    """Forward by jax.numpy and backward by a kernel, as where a pullback moves to another device: never a number."""
    if native.missing:
        pytest.skip(f"no native kernels: {native.missing}")
    pair = ratios.Pair(1, kind, BETA, 1.0, None, 1.0, None)
    s, t = (jnp.asarray(np.random.default_rng(i).standard_normal((3, 20)), jnp.float32) for i in (0, 1))
    value, state = rows._plain_fwd(s, t, None, **pair._asdict())
    own, known = rows.divergence_fwd(s, t, None, pair=pair)
    np.testing.assert_allclose(value, own, rtol=1e-5)
    assert jnp.isfinite(rows.divergence_bwd(s, t, None, known, jnp.ones(3), pair=pair)).all()
    assert jnp.isnan(rows.divergence_bwd(s, t, None, state, jnp.ones(3), pair=pair)).all()


def test_a_plain_quotient_of_no_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules["jax_ops.divergence"], "divergence_mean", lambda total, weight, *_: total / weight.sum()
    )
    jax.clear_caches()
    try:
        with pytest.raises(AssertionError):
            of_no_row("fast", False, Jax())
    finally:
        jax.clear_caches()
