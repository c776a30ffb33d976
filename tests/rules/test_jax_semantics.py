"""JAX's ops: targets, and the semantics of jax.nn's and optax's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

import jax_ops  # noqa: E402
from softmax_ext import reference  # noqa: E402
from tests.judging.quick import QUICK  # noqa: E402
from tests.rules.jax_arrays import IN, RNG, S, _same  # noqa: E402


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture
def _x32() -> Iterator[None]:
    with jax.enable_x64(False):
        yield


def test_invalid_targets_are_nan_rows_and_only_those() -> None:
    target = np.array([0, 9, -1])
    loss, stats = jax_ops.cross_entropy(IN["x"], target, reduction="none", stats=("lse", "logprob"))
    assert np.isnan(loss).tolist() == np.isnan(stats["logprob"]).tolist() == [False, True, True]
    assert np.isfinite(stats["lse"]).all()
    dx = jax.grad(lambda x: jax_ops.cross_entropy(x, target, reduction="sum"))(IN["x"])
    assert np.isnan(dx).all(1).tolist() == [False, True, True]
    assert np.isfinite(dx[0]).all()
    rows = jax_ops.softmax_cross_entropy_with_integer_labels(IN["x"], target)
    assert np.isnan(rows).tolist() == [False, True, True]


@pytest.mark.usefixtures("_x32")
@pytest.mark.parametrize(
    ("target", "ignore", "kinds"),
    [
        (np.array([2**40, 2**32 + 1, 1]), -100, "nn."),
        (np.array([2**40, -(2**40), 1]), 2**40, "in."),
        (np.array([156, 200, 1], np.uint8), -100, "nn."),
        (np.array([156, 200, 1], np.uint8), 156, "in."),
        (np.array([2**32 - 100, 2**31, 1], np.uint32), -100, "nn."),
        (np.array([2**64 - 100, 2**63, 1], np.uint64), -100, "nn."),
        (np.array([-100, -128, 1], np.int8), -100, "in."),
    ],
)
def test_targets_of_every_type(target: Any, ignore: int, kinds: str) -> None:
    x = IN["x"].astype(np.float32)
    arrays = [target]
    if target.itemsize < 8:
        arrays.append(jnp.asarray(target))
    for t in arrays:
        loss = np.asarray(jax_ops.cross_entropy(x, t, reduction="none", ignore_index=ignore))
        assert "".join("n" if np.isnan(v) else "i" if v == 0 else "." for v in loss) == kinds
        assert loss.dtype == np.float32
        np.testing.assert_allclose(loss[2], reference.cross_entropy(x[2:], np.array([1])), rtol=1e-6)


def test_wider_targets_and_weights_change_no_type() -> None:
    x = jnp.asarray(IN["x"], jnp.bfloat16)
    f = lambda x, y, w: jax_ops.cross_entropy(x, y, w, token_weight=IN["tw"], label_smoothing=S)  # noqa: E731
    loss, (dx, dy, dw) = jax.value_and_grad(f, (0, 1, 2))(x, IN["y"], IN["w"])
    assert (loss.dtype, dx.dtype, dy.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float64, jnp.float64)
    np.testing.assert_allclose(loss, f(x.astype(float), IN["y"], IN["w"]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint64, np.int64])
def test_wide_targets_with_x64_on(dtype: Any) -> None:
    target = jnp.asarray(np.array([2**63 - 1, 4, 0], dtype))
    loss = jax_ops.cross_entropy(IN["x"], target, reduction="none", ignore_index=4)
    assert np.isnan(loss).tolist() == [True, False, False]
    assert loss[1] == 0 < loss[2]


@pytest.mark.usefixtures("_x32")
def test_scaling_that_a_compiler_contracts_into_the_shift() -> None:
    x = np.random.default_rng(0).uniform(2.9e10, 3.1e10, (64, 1000)).astype(np.float32)
    z = np.asarray(jax.jit(lambda x: x / 0.7)(x))
    p = jax.jit(lambda x: jax_ops.softmax(x / 0.7))(x)
    np.testing.assert_allclose(p, reference.softmax(z), rtol=1e-6)
    y = jax.jit(lambda x: jax_ops.log_softmax(x / 0.7))(x)
    np.testing.assert_allclose(y, reference.log_softmax(z), rtol=1e-6)
    scaled = jax.jit(jax.grad(lambda x: jax_ops.cross_entropy(x, np.arange(64), logit_scale=1 / 0.7)))(x)
    assert np.isfinite(scaled).all()


LABELS = np.array([[0, 3, 1, 2], [4, 2, 0, 1]])
BIG = RNG.normal(size=(2, 4, 5))
WHERES = {
    "no mask": None,
    "entries": RNG.random((2, 4, 5)) < 0.7,
    "a row left out": np.arange(4)[:, None] != 1,
}


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("axis", [-1, 0, (1, 2), [2, 0], None, ()], ids=str)
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_softmax_has_the_semantics_of_jax_nn(op: str, axis: Any, where: str) -> None:
    mask = WHERES[where]

    def answer(fn: Any) -> Any:
        def run(x: Any) -> Any:
            y = fn(x, axis if axis != [2, 0] or fn.__module__.startswith("jax_ops") else (2, 0), mask)
            return jnp.where(jnp.isfinite(y), y * jnp.arange(5.0), 0.0).sum(), y

        return jax.jit(jax.grad(run, has_aux=True), **QUICK)(BIG)

    (dx, y), (dx_, y_) = answer(getattr(jax_ops, op)), answer(getattr(jax.nn, op))
    np.testing.assert_allclose(y, y_, rtol=1e-12, atol=1e-14)
    # In a row left out altogether jax.nn's gradient is NaN or 0, ours 0.
    np.testing.assert_allclose(dx, np.where(np.isnan(dx_), 0, dx_), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "x", [3, np.arange(4), np.arange(4, dtype=np.int8), np.float32(2), np.array([1, 2], np.float16)], ids=str
)
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_softmax_promotes_as_jax_nn(op: str, x: Any) -> None:
    for on in (True, False):
        with jax.enable_x64(on):
            theirs = getattr(jax.nn, op)(jnp.asarray(x).astype(jnp.exp(x).dtype), None)
            ours = getattr(jax_ops, op)(x, None)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            np.testing.assert_allclose(ours, theirs, rtol=1e-2 if ours.dtype == np.float16 else 1e-6)


OPTAX = {
    "plain": {},
    "entries": {"where": WHERES["entries"]},
    "rows": {"where": np.array([[True, False, True, True], [False, True, True, True]])},
    "axis": {"axis": 1},
    "axes": {"axis": (2, 1)},
    "axes, entries": {"axis": (1, 2), "where": WHERES["entries"]},
}


@pytest.mark.parametrize("case", OPTAX)
@pytest.mark.parametrize("kind", ["labels", "dense", "broadcast"])
def test_optax_names_have_the_semantics_of_optax(kind: str, case: str) -> None:
    options = OPTAX[case]
    axis = options.get("axis", -1)
    if kind == "labels":
        name = "softmax_cross_entropy_with_integer_labels"
        shape = np.zeros(BIG.shape).sum(axis).shape
        labels = np.resize(LABELS, shape) % BIG.shape[axis if isinstance(axis, int) else -1]
    else:
        name = "softmax_cross_entropy"
        labels = np.abs(BIG[..., ::-1]) if kind == "dense" else np.abs(BIG[0])

    def answer(module: Any) -> Any:
        def run(x: Any) -> Any:
            rows = getattr(module, name)(x, labels, **options)
            return (rows * jnp.arange(1.0, rows.size + 1).reshape(rows.shape)).sum(), rows

        return jax.jit(jax.grad(run, has_aux=True), **QUICK)(BIG)

    for ours, theirs in zip(answer(jax_ops), answer(optax), strict=True):
        _same(ours, theirs)


def test_optax_names_keep_their_types_and_the_exceptions() -> None:
    x, y = jnp.asarray(BIG[0], jnp.bfloat16), jnp.abs(jnp.asarray(BIG[1], jnp.float32))
    for a, b in ((x, y), (x, y.astype(jnp.bfloat16)), (x, (y > 1).astype(jnp.int32)), (x, y > 1)):
        ours, theirs = (m.softmax_cross_entropy(a, b) for m in (jax_ops, optax))
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=5e-2)
    assert jax_ops.softmax_cross_entropy_with_integer_labels(x, LABELS[0]).dtype == x.dtype
    wide = jax_ops.softmax_cross_entropy(BIG[0, 0], np.abs(BIG))
    _same(wide, optax.softmax_cross_entropy(BIG[0, 0], np.abs(BIG)))
    hidden = np.where(np.arange(5) == 2, -np.inf, BIG[0])
    once = jax_ops.softmax_cross_entropy(hidden, np.eye(5)[LABELS[0] % 2])
    assert np.isfinite(once).all()
    assert np.isnan(optax.softmax_cross_entropy(hidden, np.eye(5)[LABELS[0] % 2])).all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 1), (0, 0), (0,), (1,)], ids=str)
def test_empty_and_single(shape: tuple[int, ...], reduction: str) -> None:
    x, target = np.ones(shape), np.zeros(shape[:-1], int)
    for op in ("softmax", "log_softmax"):
        np.testing.assert_array_equal(getattr(jax_ops, op)(x), getattr(reference, op)(x))
    f = lambda x: jax_ops.cross_entropy(x, target, reduction=reduction)  # noqa: E731
    with np.errstate(all="ignore"):
        want = np.full(shape[:-1], 0.0 if shape[-1] else np.nan)
        want = {"none": want, "sum": want.sum(), "mean": want.sum() / np.float64(want.size)}[reduction]
    np.testing.assert_array_equal(jax.jit(f)(x), want)
    assert jax.grad(lambda x: f(x).sum())(x).shape == shape
