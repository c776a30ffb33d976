"""Section 7 of the contract for JAX: every transform, for all three ops and their options; and what only JAX has."""

from __future__ import annotations

import functools
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
from jax import Array, export, lax  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import jax_ops  # noqa: E402
from jax_ops._autodiff import analytic  # noqa: E402
from softmax_ext import reference  # noqa: E402
from tests.judging.quick import FLAGS, QUICK, run  # noqa: E402

N, V = 3, 5
TARGET = np.array([1, -100, 4])
SCALE, CAP, Z, S = 0.7, 3.0, 0.1, 0.2
RNG = np.random.default_rng(7)
IN = {
    "x": RNG.uniform(-2, 2, (N, V)),
    "y": RNG.uniform(0.1, 1.1, (N, V)),
    "w": RNG.uniform(0.5, 1.5, V),
    "tw": RNG.uniform(0.5, 1.5, N),
}
UP = np.linspace(-1.0, 2.0, N * V).reshape(N, V)


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture
def _x32() -> Iterator[None]:
    with jax.enable_x64(False):
        yield


def _composed(x: Any, y: Any, w: Any, tw: Any) -> Any:
    """The loss with every option as a composition of JAX's own functions."""
    z = CAP * jnp.tanh(SCALE * x / CAP)
    logp, kept = jax.nn.log_softmax(z), TARGET != -100
    if y is None:
        wt = jnp.asarray(w)[TARGET.clip(0)]
        share = jnp.where(kept, wt, 0.0) * tw
        rows = optax.softmax_cross_entropy_with_integer_labels(z, TARGET.clip(0)) * wt
    else:
        kept, share = np.ones(N, bool), tw
        rows = -(logp * y * w).sum(-1)
    lse = jax.nn.logsumexp(z, -1)
    rows = (1 - S) * rows - S / V * (logp * w).sum(-1) + Z * lse**2
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    return jnp.where(kept, rows * tw, 0.0).sum() / share.sum() + jnp.where(kept, 0.5 * entropy + 0.3 * lse, 0.0).sum()


def _full(x: Any, y: Any, w: Any, tw: Any) -> Any:
    loss, stats = jax_ops.cross_entropy(
        x,
        TARGET if y is None else y,
        w,
        label_smoothing=S,
        logit_scale=SCALE,
        softcap=CAP,
        z_loss=Z,
        token_weight=tw,
        stats=("entropy", "lse"),
    )
    return loss + 0.5 * stats["entropy"].sum() + 0.3 * stats["lse"].sum()


def _mean(x: Any) -> Any:
    rows = optax.softmax_cross_entropy_with_integer_labels(x, TARGET.clip(0))
    return rows[np.flatnonzero(TARGET >= 0)].mean()


# name: (ours, the composition), functions of the logits with a scalar result
SCALAR: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "softmax": (lambda x: (jax_ops.softmax(x) * UP).sum(), lambda x: (jax.nn.softmax(x) * UP).sum()),
    "log_softmax": (lambda x: (jax_ops.log_softmax(x) * UP).sum(), lambda x: (jax.nn.log_softmax(x) * UP).sum()),
    "cross_entropy": (lambda x: jax_ops.cross_entropy(x, TARGET), _mean),
    "every option": (
        lambda x: _full(x, None, IN["w"], IN["tw"]),
        lambda x: _composed(x, None, IN["w"], IN["tw"]),
    ),
    "soft, every option": (
        lambda x: _full(x, IN["y"], IN["w"], IN["tw"]),
        lambda x: _composed(x, IN["y"], IN["w"], IN["tw"]),
    ),
}


def _scanned(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def total(x: Any) -> Any:
        return lax.scan(lambda c, s: (c + f(s * x), None), jnp.zeros(()), jnp.arange(1.0, 3.0))[0]

    return total


def _linearized(f: Callable[[Any], Any], x: Any) -> Any:
    out, push = jax.linearize(f, x)
    return out + push(jnp.cos(x))


def _along_cos(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1]


TRANSFORMS: dict[str, Callable[[Callable[[Any], Any]], Callable[[Any], Any]]] = {
    "value": lambda f: f,
    "grad": jax.grad,
    "vjp": lambda f: lambda x: jax.vjp(f, x)[1](jnp.asarray(1.5, x.dtype))[0],
    "jvp": _along_cos,
    "linearize": lambda f: functools.partial(_linearized, f),
    "jacfwd": jax.jacfwd,
    "hessian": jax.hessian,
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f)),
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "hvp": lambda f: _along_cos(jax.grad(f)),
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
    "vmap(grad)": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])),
    "grad(vmap)": lambda f: jax.grad(lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])).sum()),
    "vmap(jvp)": lambda f: lambda x: jax.vmap(lambda v: jax.jvp(f, (x,), (v,))[1])(jnp.stack([x, jnp.cos(x)])),
    "grad(checkpoint)": lambda f: jax.grad(jax.checkpoint(f)),
    "hvp(checkpoint)": lambda f: _along_cos(jax.grad(jax.checkpoint(f))),
    "scan": _scanned,
    "grad(scan)": lambda f: jax.grad(_scanned(f)),
    "jvp(scan)": lambda f: _along_cos(_scanned(f)),
    "grad(scan(checkpoint))": lambda f: jax.grad(_scanned(jax.checkpoint(f))),
    "grad(jit)": lambda f: jax.grad(jax.jit(f)),
    "forward 3": lambda f: _along_cos(_along_cos(_along_cos(f))),
    "reverse 3": lambda f: jax.grad(lambda x: (jax.grad(lambda x: (jax.grad(f)(x) * UP).sum())(x) * UP).sum()),
}


def _same(ours: Any, theirs: Any, tol: float = 1e-11) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert np.isfinite(theirs).all()
    assert np.abs(theirs).max() > 1e-3, "the truth is too small for the comparison to see anything"
    np.testing.assert_allclose(ours, theirs, rtol=tol, atol=tol)


# The options change the row, not how it is transformed: these few tell.
FEW = ("value", "grad", "jvp", "linearize", "hessian", "jacrev of jacrev", "jacfwd of jacfwd", "hvp", "vmap(grad)")
CASES = [(op, transform) for op in SCALAR for transform in (FEW if "option" in op else TRANSFORMS)]


@functools.cache
def _answers(op: str) -> list[dict[str, Any]]:
    """Every transform of ours and of the composition, each in one program."""
    x = jnp.asarray(IN["x"])
    names = [transform for case, transform in CASES if case == op]
    return [jax.jit(lambda x, f=f: {k: TRANSFORMS[k](f)(x) for k in names}, **QUICK)(x) for f in SCALAR[op]]


@pytest.mark.parametrize(("op", "transform"), CASES)
@pytest.mark.long
def test_transform_agrees_with_the_compositions(op: str, transform: str) -> None:
    ours, theirs = _answers(op)
    _same(ours[transform], theirs[transform])


@pytest.mark.parametrize("transform", ["value", "grad", "jvp", "hvp"])
@pytest.mark.parametrize("op", ["softmax", "every option"])
def test_transform_without_jit(op: str, transform: str) -> None:
    _same(TRANSFORMS[transform](SCALAR[op][0])(jnp.asarray(IN["x"])), _answers(op)[1][transform])


def _flat(result: tuple[Array, dict[str, Array]]) -> tuple[Array, ...]:
    return (result[0], *result[1].values())


MASK = np.arange(N * V).reshape(N, V) % 3 != 1
# Functions of every differentiable argument: (function, arguments)
CHECKED: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "softmax": (jax_ops.softmax, ["x"]),
    "softmax, all axes": (lambda x: jax_ops.softmax(x, None), ["x"]),
    "softmax, where": (lambda x: jax_ops.softmax(x, 0, MASK), ["x"]),
    "log_softmax": (lambda x: jax_ops.log_softmax(x, 0), ["x"]),
    "log_softmax, where": (lambda x: jnp.where(MASK, jax_ops.log_softmax(x, (0, 1), MASK), 0.0), ["x"]),
    "middle axis": (
        lambda x: jax_ops.cross_entropy(x.T[None], TARGET[None], axis=1, reduction="none"),
        ["x"],
    ),
    "1-d": (lambda x: jax_ops.cross_entropy(x[0], TARGET[0]), ["x"]),
    "weights": (
        lambda x, w, tw: jax_ops.cross_entropy(x, TARGET, w, token_weight=tw, label_smoothing=S),
        ["x", "w", "tw"],
    ),
    "stats": (
        lambda x: _flat(jax_ops.cross_entropy(x, TARGET, reduction="none", stats=("lse", "logprob", "entropy"))),
        ["x"],
    ),
    "soft": (lambda x, y: jax_ops.cross_entropy(x, y), ["x", "y"]),
    "soft, every option": (_full, ["x", "y", "w", "tw"]),
    "every option": (lambda x, w, tw: _full(x, None, w, tw), ["x", "w", "tw"]),
    "optax, dense": (lambda x, y: jax_ops.softmax_cross_entropy(x, y, where=MASK), ["x", "y"]),
    "optax, labels": (
        lambda x: jax_ops.softmax_cross_entropy_with_integer_labels(x, TARGET.clip(0), where=MASK),
        ["x"],
    ),
}


def check(case: str, order: int) -> None:
    fn, names = CHECKED[case]
    check_grads(jax.jit(fn), [IN[name] for name in names], order, ("fwd", "rev"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", CHECKED)
def test_check_grads(case: str) -> None:
    check(case, 1)


SECOND = """
from tests.rules import test_jax_transforms as here
for case in here.CHECKED:
    print(case, flush=True)
    here.check(case, 2)
print("all checked")
"""


@pytest.mark.slow
def test_check_grads_of_order_2() -> None:
    run(SECOND)


def test_class_weights_that_differ_by_example_under_vmap() -> None:
    weights, x = np.stack([IN["w"], IN["w"][::-1]]), np.stack([IN["x"], -IN["x"]])
    f = jax.jit(jax.grad(lambda x, w: jax_ops.cross_entropy(x, TARGET, w, label_smoothing=S), (0, 1)), **QUICK)
    single = [f(a, w) for a, w in zip(x, weights, strict=True)]
    for batched, *parts in zip(jax.vmap(f)(x, weights), *single, strict=True):
        _same(batched, np.stack(parts))


# The points where a rule that picks by comparison could lose a derivative.
POINTS = {
    "zeros under the cap": np.zeros((N, V)),
    "ties": np.tile([1.0, 1.0, 0.0, 1.0, -1.0], (N, 1)),
    "one confident": np.tile([30.0, 0.0, 0.5, 1.0, -1.0], (N, 1)),
}


@functools.cache
def _higher(op: str) -> list[Callable[[Any], Any]]:
    names = ("hvp", "forward 3", "reverse 3")
    return [jax.jit(lambda x, f=f: {k: TRANSFORMS[k](f)(x) for k in names}, **QUICK) for f in SCALAR[op]]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("op", ["softmax", "soft, every option", "every option"])
@pytest.mark.long
def test_higher_orders_where_rules_change_form(op: str, point: str) -> None:
    ours, theirs = (f(POINTS[point]) for f in _higher(op))
    for transform, truth in theirs.items():
        np.testing.assert_allclose(ours[transform], truth, rtol=1e-9, atol=1e-12, err_msg=transform)


@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_masked_classes_change_no_derivative_of_the_others(kind: str) -> None:
    few = [0, 1, 3, 4]
    x, target, fewer = IN["x"].copy(), TARGET, np.array([1, -100, 3])
    x[:, 2] = -np.inf
    if kind == "soft":
        target = IN["y"] * (np.arange(V) != 2)
        fewer = target[:, few]
    v = np.cos(np.arange(N * V)).reshape(N, V)

    @functools.partial(jax.jit, **QUICK)
    def orders(x: Any, t: Any, v: Any) -> Any:
        gradient = jax.grad(lambda x: jax_ops.cross_entropy(x, t, softcap=CAP, z_loss=Z, logit_scale=SCALE))
        return gradient(x), jax.jvp(gradient, (x,), (v,))[1], jax.grad(lambda x: (gradient(x) * v).sum())(x)

    for ours, theirs in zip(orders(x, target, v), orders(x[:, few], fewer, v[:, few]), strict=True):
        assert (ours[:, 2] == 0).all()
        _same(ours[:, few], theirs)
    if kind == "soft":  # in forward mode the masked class meets the target's tangent of 0
        _, dloss = jax.jvp(jax_ops.cross_entropy, (x, target), (v, np.zeros_like(target)))
        _same(dloss, jax.jvp(lambda x: jax_ops.cross_entropy(x, fewer), (x[:, few],), (v[:, few],))[1])


def test_ignored_rows_are_reached_by_no_derivative() -> None:
    x = IN["x"].copy()
    x[1] = np.nan
    f = lambda x: jax_ops.cross_entropy(x, TARGET, label_smoothing=S, z_loss=Z, softcap=CAP)  # noqa: E731
    for transform in ("grad", "hvp", "reverse 3"):
        ours = np.asarray(jax.jit(TRANSFORMS[transform](f), **QUICK)(x))
        assert (ours[1] == 0).all()
        assert np.isfinite(ours).all()
        assert np.abs(ours[0]).min() > 0


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
