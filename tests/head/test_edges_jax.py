"""Where the fused head once went wrong in JAX: no classes, soft targets of another width, any length, float16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402

import jax_ops  # noqa: E402
from jax_ops._head import linear  # noqa: E402

MODES = pytest.mark.parametrize("memory", ["fast", "lean"])
head: Any = jax_ops.linear_cross_entropy
R = np.random.default_rng(5)


@MODES
@pytest.mark.parametrize("target", [np.full(5, -100), np.ones((5, 0), np.float32)], ids=["ignored", "soft"])
def test_no_classes(memory: str, target: np.ndarray) -> None:
    loss = head(jnp.ones((5, 3)), jnp.ones((0, 3)), target, memory=memory, reduction="none")
    np.testing.assert_array_equal(loss, np.full(5, np.nan if target.ndim == 2 else 0.0, np.float32))


@MODES
@pytest.mark.parametrize("types", [("float32", "float64"), ("float64", "float32")], ids=str)
@pytest.mark.long
def test_soft_targets_of_another_width(memory: str, types: tuple[str, str]) -> None:
    """Summed in the logits' compute type: neither refused by a loop's types nor rounded to the narrower."""
    with jax.enable_x64(True):
        x, w = (jnp.asarray(R.normal(size=(n, 3)), types[0]) for n in (5, 7))
        y = jnp.asarray(R.uniform(size=(5, 7)), types[1])
        whole = jax.value_and_grad(lambda x: jax_ops.cross_entropy(x @ w.T, y))(x)
        found = jax.value_and_grad(lambda x: head(x, w, y, memory=memory, chunk_size=3))(x)
        bound = 3e-6 if types[0] == "float32" else 1e-13
        for a, b in zip(found, whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=bound, atol=bound)


def test_a_numpy_float64_input_is_what_jax_makes_of_it() -> None:
    assert head(np.ones((5, 3)), jnp.ones((7, 3), jnp.float32), np.zeros(5, np.int64)).dtype == jnp.float32


@MODES
def test_shift_exported_for_any_length(memory: str) -> None:
    (length,) = export.symbolic_shape("t")
    w = jnp.asarray(R.normal(size=(7, 3)), jnp.float32)
    shapes = jax.ShapeDtypeStruct((length, 3), jnp.float32), jax.ShapeDtypeStruct((length,), jnp.int32)
    exported = export.export(jax.jit(lambda x, y: head(x, w, y, shift=2, memory=memory)))(*shapes)
    x, y = jnp.asarray(R.normal(size=(6, 3)), jnp.float32), jnp.arange(6, dtype=jnp.int32)
    np.testing.assert_allclose(exported.call(x, y), jax_ops.cross_entropy(x[:-2] @ w.T, y[2:]), rtol=1e-6)


@pytest.mark.parametrize("options", [{"memory": "lean"}, {"stats": ("lse",)}], ids=str)
def test_float16_mean_of_many_rows_off_the_cpu(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where matmuls take half-precision operands, dlogits by 1/N in float16 would be 0."""
    monkeypatch.setattr(linear.lax, "platform_dependent", lambda *a, default, **_: default(*a))
    rows, classes = 4096, 640
    x, w = (jnp.asarray(R.normal(size=(n, 4)) * 0.3 + 1.0, jnp.float16) for n in (rows, classes))
    target = R.integers(0, classes // 2, rows)

    def loss(w: Any, **more: Any) -> Any:
        found = head(x, w, target, **more)
        return found[0] if isinstance(found, tuple) else found

    truth = jax.grad(lambda w: jax_ops.cross_entropy(x.astype(jnp.float32) @ w.T, target))(w.astype(jnp.float32))
    unseen = slice(classes // 2, None)  # classes that are no row's target
    found = jax.grad(lambda w: loss(w, **options))(w)[unseen].astype(jnp.float32)
    np.testing.assert_allclose(found, truth[unseen], rtol=5e-3)


@pytest.mark.parametrize("size", [3, 7])
def test_a_stale_logit_that_overflowed_takes_no_part(size: int) -> None:
    """The last of overlapping slices has classes of the one before: +inf there, which a bias of -inf makes NaN."""
    w = jnp.asarray([1e-20, 2e-20, 3e-20, 1e20, 1e20, 2.0, 0.5], jnp.float32)[:, None] * jnp.asarray([1.0, 0.5])
    # Of two features: a single product and the bias would be contracted to an fma, which does not overflow.
    x = jnp.asarray([[1e20, 0.0], [1.0, 0.0]], jnp.float32)
    more: dict[str, Any] = {"softcap": 5.0, "reduction": "none", "stats": ("argmax",)}
    found, stats = head(x, w, jnp.asarray([3, 2]), memory="lean", chunk_size=size, **more)
    truth, theirs = jax_ops.cross_entropy(x @ w.T, jnp.asarray([3, 2]), **more)
    assert np.isfinite(truth).all()
    np.testing.assert_allclose(found, truth, rtol=1e-6)
    np.testing.assert_array_equal(stats["argmax"], theirs["argmax"])
