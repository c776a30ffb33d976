"""The public ops against the reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softmax_ext import reference
from tests.judging import cases, checks
from tests.judging.cases import DTYPES, INF, NAN, OPTIONS, STATS
from tests.judging.frameworks import HALF, Named, both, each, only
from tests.ops.arrays import KINDS, SOFTMAXES, loss_arrays

# Every size in float32, the edges of the others.
SIZED = [(d, v) for d in DTYPES for v in (cases.SIZES if d == "float32" else cases.FEW)]
COMPILED = [("float32", v) for v in (1, 2, 257, 1025, 4099)] + [(d, 129) for d in DTYPES if d != "float32"]


def check(fw: Any, op: str, dtype: str, arrays: Named, upstream: Named, **options: Any) -> None:
    truth = checks.oracle(op, arrays, upstream, **options)
    scale = checks.scales(op, arrays, upstream, dtype=dtype, **options)
    checks.judge(op, dtype, fw(op, dtype, arrays, upstream, **options), truth, scale)


def check_all(fw: Any, dtype: str, r: cases.Rows) -> None:
    for op in SOFTMAXES:
        check(fw, op, dtype, {"input": r.x}, {"value": r.dy})
    every = {"reduction": "none", "stats": STATS}
    check(fw, "cross_entropy", dtype, {"input": r.x, "target": r.target}, {"value": r.dloss}, **every)


@each(("dtype", "classes"), torch=SIZED, jax=COMPILED)
def test_accuracy(fw, dtype, classes):
    check_all(fw, dtype, cases.rows(classes, dtype))


@each(
    ("dtype", "classes"),
    torch=[("float32", 32000), ("bfloat16", 128256), ("float16", 1 << 17)],
    jax=[("float32", 32000), ("bfloat16", 128256)],
)
@pytest.mark.long
def test_accuracy_of_large_vocabularies(fw, dtype, classes):
    r = cases.rows(classes, dtype)
    pick = [2, 7, 15]
    check_all(fw, dtype, cases.Rows(r.x[pick], r.target[pick], r.dy[pick], r.dloss[pick], r.names))


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("at", [0, 9], ids=["five classes", "ten classes"])
@pytest.mark.parametrize("kind", ["hard", "one-hot", "weighted one-hot"])
def test_confident_row_keeps_its_loss_and_gradient(fw, dtype, at, kind):
    x = np.array([[0.0] * at + [60.0] + [0.0] * (9 - at) if at else [60.0, 0, 0, 0, 0]])
    arrays: Named = {"input": x, "target": np.array([at]) if kind == "hard" else np.eye(x.shape[1])[[at]]}
    if kind == "weighted one-hot":
        arrays["weight"] = np.where(np.arange(x.shape[1]) == at, 1.0, 2.0)
    values, grads = fw("cross_entropy", dtype, arrays, {"value": 1.0})
    others = x.shape[1] - 1
    np.testing.assert_allclose(values["value"], others * np.exp(-60), rtol=1e-6)
    want = np.full(x.shape, np.exp(-60))
    want[0, at] *= -others
    np.testing.assert_allclose(grads["input"], want, rtol=1e-6)


@each(
    ("dtype", "axis"),
    torch=product(["float32", "bfloat16"], [0, 1, 2, -2]),
    jax=[("float32", 0), ("float32", 1), ("bfloat16", -2)],
)
def test_softmax_along_any_axis(fw, dtype, axis):
    r = cases.rows(33, dtype)
    for op in SOFTMAXES:
        x, dy = (np.moveaxis(a[:15].reshape(5, 3, 33), -1, axis) for a in (r.x, r.dy))
        check(fw, op, dtype, {"input": x}, {"value": dy}, axis=axis)


@each(
    ("dtype", "shape"),
    torch=product(["float32", "bfloat16"], [(6,), (3, 2), (3, 1, 2), ()]),
    jax=[("float32", (3, 2)), ("float32", ()), ("bfloat16", (3, 1, 2))],
)
def test_cross_entropy_of_any_shape(fw, dtype, shape):
    r = cases.rows(65, dtype)
    n = int(np.prod(shape)) if shape else 1
    axis = 1 if shape else 0

    def rows(a: Any) -> Any:
        return np.moveaxis(a[4 : 4 + n].reshape(*shape, 65), -1, axis)

    every = {"reduction": "none", "stats": STATS}
    up = {"value": r.dloss[4 : 4 + n].reshape(shape)}
    check(fw, "cross_entropy", dtype, {"input": rows(r.x), "target": r.target[4 : 4 + n].reshape(shape)}, up, **every)
    dense = {"input": rows(r.x), "target": rows(cases.soft(65, dtype, len(r.x)))}
    check(fw, "cross_entropy", dtype, dense, up, reduction="none")


def strided(a: Any) -> dict[str, Any]:
    """The same numbers in other layouts."""
    wide = np.repeat(a, 2, -1)
    tall = np.concatenate([a, a])
    return {
        "transposed": np.asfortranarray(a),
        "every other column": wide[..., ::2],
        "rows of a larger array": tall[: len(a)],
        "inner dimension": np.stack([a, a], -1)[..., 0],
    }


@only("torch")
@pytest.mark.parametrize("layout", strided(np.zeros((2, 2))))
def test_layout_changes_no_number(fw, layout):
    r = cases.rows(33, "float32")
    x, dy = strided(r.x)[layout], strided(r.dy)[layout]
    assert layout == "rows of a larger array" or not x.flags.c_contiguous
    target = np.repeat(r.target, 2)[::2]
    dloss = np.repeat(r.dloss, 2)[::2]
    for op in SOFTMAXES:
        check(fw, op, "float32", {"input": x}, {"value": dy})
    arrays = {"input": x, "target": target, "weight": np.repeat(cases.class_weight(33, "float32"), 2)[::2]}
    check(fw, "cross_entropy", "float32", arrays, {"value": dloss}, reduction="none")
    arrays["target"] = strided(cases.soft(33, "float32", len(x)))[layout]
    check(fw, "cross_entropy", "float32", arrays, {"value": dloss}, reduction="none")


@only("torch")
def test_expanded_input_and_upstream(fw):
    r = cases.rows(17, "float32")
    one = np.broadcast_to(np.float64(2.5), r.x.shape)
    column = np.broadcast_to(r.dy[:, :1], r.x.shape)
    row = np.broadcast_to(r.x[7], r.x.shape)
    for op in SOFTMAXES:
        for dy in (one, column):
            check(fw, op, "float32", {"input": r.x}, {"value": dy})
        check(fw, op, "float32", {"input": row}, {"value": r.dy})
    up = {"value": np.broadcast_to(np.float64(2.5), r.dloss.shape)}
    assert up["value"].strides == (0,)
    arrays = {"input": row, "target": np.broadcast_to(np.int64(3), r.target.shape)}
    check(fw, "cross_entropy", "float32", arrays, up, reduction="none")


@each(
    ("dtype", "kind", "name"),
    torch=product(["float32", "bfloat16"], KINDS, OPTIONS),
    jax=[
        *product(["float32"], ["hard"], ["smooth", "cap", "z-loss"]),
        *product(["float32"], ["hard weighted"], ["uniform", "all"]),
        *product(["float32"], ["soft"], ["plain", "scale", "uniform"]),
        *product(["float32"], ["soft weighted"], ["smooth", "all"]),
        *product(["bfloat16"], ["hard weighted", "soft weighted"], ["all"]),
    ],
)
def test_accuracy_of_loss_options(fw, dtype, kind, name):
    arrays, r = loss_arrays(kind, 257 if dtype == "float32" else 33, dtype)
    check(fw, "cross_entropy", dtype, arrays, {"value": r.dloss}, reduction="none", **OPTIONS[name])


@each(
    ("kind", "name"),
    torch=product(KINDS, OPTIONS),
    jax=[("hard", "plain"), ("hard weighted", "all"), ("soft", "cap"), ("soft weighted", "all")],
)
def test_accuracy_of_statistics(fw, kind, name):
    arrays, r = loss_arrays(kind, 257, "float32")
    stats = STATS if "hard" in kind else ("lse", "entropy", "argmax")
    ups = {"value": r.dloss, "lse": r.dloss[::-1].copy(), "entropy": 0.5 * r.dloss}
    if "hard" in kind:
        ups["logprob"] = -2 * r.dloss
    check(fw, "cross_entropy", "float32", arrays, ups, reduction="none", stats=stats, **OPTIONS[name])


@each(
    ("dtype", "kind", "reduction"),
    torch=product(["float32", "float16"], KINDS, ["mean", "sum"]),
    jax=[("float32", "soft weighted", "mean"), ("float16", "hard weighted", "mean"), ("float32", "hard", "sum")],
)
def test_accuracy_of_reductions(fw, dtype, kind, reduction):
    arrays, _ = loss_arrays(kind, 31, dtype)
    check(fw, "cross_entropy", dtype, arrays, {"value": 1.5}, reduction=reduction)
    arrays["input"] = np.where(np.isinf(arrays["input"]), -9.0, arrays["input"])  # else the loss is inf
    check(fw, "cross_entropy", dtype, arrays, {"value": 1.5}, reduction=reduction, **OPTIONS["all"])


@each(
    ("kind", "name", "reduction"),
    torch=product(KINDS, OPTIONS, ["none", "sum", "mean"]),
    jax=[*product(KINDS, ["all"], ["mean"]), ("hard", "plain", "mean"), ("soft weighted", "smooth", "none")],
)
def test_gradients_of_targets_and_weights(fw, kind, name, reduction):
    """The loss is linear in each of them ("mean": a ratio of linear), so a difference is the derivative."""
    r = np.random.default_rng(5)
    arrays: Named = {"input": 3 * r.standard_normal((4, 5)), "target": np.array([4, 0, -100, 2])}
    if "soft" in kind:
        arrays["target"] = cases.soft(5, "float64", 4)
    arrays["weight"] = np.array([0.5, 1.5, 0.0, 2.0, 0.75]) + ("weighted" not in kind)
    arrays["token_weight"] = np.array([1.5, 0.5, 1.0, 2.0])
    up = r.standard_normal(4) if reduction == "none" else np.float64(1.5)
    options: Named = {"reduction": reduction, **OPTIONS[name]}
    _, grads = fw("cross_entropy", "float64", arrays, {"value": up}, **options)

    def total(**changed: Any) -> Any:
        out = reference.cross_entropy(**{**arrays, **changed}, axis=1, **options)
        return np.sum(up * out)

    for name in [n for n in ("target", "weight", "token_weight") if arrays[n].dtype.kind == "f"]:
        # Linear: a step of 1 is exact. A ratio: central differences of step h err by h^2.
        h = 1e-5 if reduction == "mean" else 1.0
        want = np.zeros(arrays[name].shape)
        for at in np.ndindex(want.shape):
            e = np.zeros(want.shape)
            e[at] = h
            want[at] = (total(**{name: arrays[name] + e}) - total(**{name: arrays[name] - e})) / (2 * h)
        np.testing.assert_allclose(grads[name], want, rtol=1e-8, atol=1e-8 if h < 1 else 1e-12)


SPECIAL = st.sampled_from([0.0, -0.0, 1e-30, 60.0, -60.0, 3e4, -3e4, -INF, INF, NAN])
NUMBERS = st.floats(-30, 30, width=32) | SPECIAL


@st.composite
def problems(draw: Any) -> Named:
    n, v = draw(st.integers(0, 4)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from(DTYPES))
    x = np.array(draw(st.lists(NUMBERS, min_size=n * v, max_size=n * v)), np.float64).reshape(n, v)
    target = np.array(draw(st.lists(st.integers(-1, v - 1), min_size=n, max_size=n)), np.int64)
    layout = draw(st.sampled_from(["plain", *strided(np.zeros((1, 1)))]))
    dloss = np.linspace(-1, 2, n) if n else np.zeros(0)
    x = cases.rounded(x, dtype)
    options = dict(draw(st.sampled_from(list(OPTIONS.values()))))
    return {
        "dtype": dtype,
        "x": x if layout == "plain" else strided(x)[layout],
        "target": target,
        "dloss": cases.rounded(dloss, "float32"),
        "dy": cases.rounded(np.linspace(-3, 7, n * v).reshape(n, v), dtype),
        "options": {**options, "reduction": draw(st.sampled_from(["none", "sum"])), "ignore_index": -1},
    }


@both
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(p=problems())
def test_anything(fw, p):
    """Random shapes, layouts, types, options and values, NaN and the infinities among them."""
    if fw.name == "jax":  # every new shape, type and option compiles: keep to a few there
        p["x"], p["dy"] = (np.resize(cases.rounded(p[k], "bfloat16"), (2, 3)) for k in ("x", "dy"))
        p["dloss"], p["target"] = np.array([0.5, -1.5]), np.resize(p["target"], 2) % 4 - 1
        p["dtype"] = "bfloat16" if p["dtype"] in HALF else "float32"
        p["options"] = {
            "reduction": "none",
            "ignore_index": -1,
            **OPTIONS["all" if p["options"].get("softcap") else "plain"],
        }
    for op in SOFTMAXES:
        check(fw, op, p["dtype"], {"input": p["x"]}, {"value": p["dy"]})
    up = p["dloss"] if p["options"]["reduction"] == "none" else 1.5
    arrays = {"input": p["x"], "target": p["target"]}
    check(fw, "cross_entropy", p["dtype"], arrays, {"value": up}, **p["options"])


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_of_results(fw, dtype):
    """softmax keeps the type, losses and statistics of half precision are float32 (asserted on every call)."""
    r = cases.rows(3, dtype)
    w = {"weight": np.ones(3), "token_weight": np.ones(len(r.x))}
    values, _ = fw("cross_entropy", dtype, {"input": r.x, "target": r.target, **w}, stats=STATS)
    assert values["argmax"].dtype.kind == "i"
    fw("softmax", dtype, {"input": r.x})
