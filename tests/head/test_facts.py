"""linear_cross_entropy in both frameworks: facts of the data, and faults found in other libraries, by their number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.head.problems import MEMORY, oracle
from tests.judging import cases
from tests.judging.cases import INF, NAN
from tests.judging.frameworks import HALF, Named, both, each


def small(fw: Any, dtype: str = "float32", up: Any = None, **given: Any) -> Any:
    """(loss, gradients, statistics) of a small problem; arrays and options by name."""
    arrays = {k: np.asarray(given.pop(k)) for k in list(given) if k in _ARRAYS}
    values, grads = fw("linear_cross_entropy", dtype, arrays, up or {"value": np.float32(1)}, **given)
    return values.pop("value"), grads, values


_ARRAYS = ("input", "linear_weight", "linear_bias", "target", "weight", "token_weight")
X = np.random.default_rng(2).standard_normal((5, 3))
W = np.random.default_rng(3).standard_normal((7, 3))
T = np.array([0, 6, 3, 1, 5])


@both
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_reach_nothing(fw, memory, reduction):
    """Not even where their input is NaN or infinite (bug 4: 0 * inf)."""
    x, t = X.copy(), T.copy()
    x[1], x[4], t[[1, 4]] = NAN, INF, -100
    keep = [0, 2, 3]
    options = {"memory": memory, "reduction": reduction, "chunk_size": 2, "label_smoothing": 0.1, "z_loss": 0.1}
    ups = [{"value": u if reduction == "none" else np.float32(1)} for u in (np.ones(5), np.ones(3))]
    args = {"linear_weight": W, "linear_bias": W[:, 0], "weight": np.arange(1.0, 8.0)}
    loss, grads, _ = small(fw, up=ups[0], input=x, target=t, **args, **options)
    alone, want, _ = small(fw, up=ups[1], input=x[keep], target=t[keep], **args, **options)
    np.testing.assert_allclose(loss[keep] if reduction == "none" else loss, alone, rtol=1e-6)
    assert (grads["input"][[1, 4]] == 0).all()
    np.testing.assert_allclose(grads["input"][keep], want["input"], rtol=1e-5, atol=1e-7)
    for name in ("linear_weight", "linear_bias", "weight"):
        np.testing.assert_allclose(grads[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)


@both
@pytest.mark.parametrize("memory", MEMORY)
def test_all_ignored_and_no_rows(fw, memory):
    for x, t in ((X, np.full(5, -100)), (X[:0], T[:0])):
        for mode, want in (("nan", NAN), ("zero", 0.0)):
            options = {"memory": memory, "on_all_ignored": mode}
            loss, grads, _ = small(fw, input=x, target=t, linear_weight=W, linear_bias=W[:, 0], **options)
            np.testing.assert_array_equal(loss, want)
            for g in grads.values():
                np.testing.assert_array_equal(g, 0)
        loss, grads, _ = small(fw, input=x, target=t, linear_weight=W, memory=memory, reduction="sum")
        assert loss == 0
        assert (grads["linear_weight"] == 0).all()


SLICES = [(m, s, c) for m in MEMORY for s in (False, True) for c in (1, 2, 3, None)]


# In JAX chunks of rows know no classes: one of them.
@each(("memory", "soft", "chunk"), torch=SLICES, jax=[(m, s, c) for m, s, c in SLICES if m == "lean" or c == 2])
def test_masked_classes_in_any_slice(fw, memory, soft, chunk):
    """A bias of -inf: as the head without those classes (bug 3: a first slice that is all -inf; bug 2: the cap)."""
    bias, live = np.full(7, -INF), [3, 5, 6]
    bias[live] = [0.3, 0.0, -0.2]
    t = np.array([3, 6, 5, 3, 5])
    y = np.random.default_rng(0).random((5, 3))
    full = np.zeros((5, 7))
    full[:, live] = y
    options: dict[str, Any] = {"reduction": "none", "softcap": 2.0, "stats": ("lse", "entropy", "argmax")}
    up = {"value": np.ones(5), "entropy": np.ones(5)}
    few = {"input": X, "linear_weight": W[live], "linear_bias": bias[live]}
    few = {k: cases.rounded(v, "float32") for k, v in few.items()}
    few["target"] = cases.rounded(y, "float32") if soft else np.searchsorted(live, t)
    (alone, want), given = oracle(few, up, **options), {"linear_weight": W, "linear_bias": bias}
    target = full if soft else t
    loss, grads, stats = small(fw, up=up, input=X, target=target, memory=memory, chunk_size=chunk, **given, **options)
    np.testing.assert_allclose(loss, alone["value"], rtol=2e-6)
    np.testing.assert_array_equal(stats["argmax"], np.array(live)[alone["argmax"]])
    for name in ("lse", "entropy"):
        np.testing.assert_allclose(stats[name], alone[name], rtol=2e-6, err_msg=name)
    np.testing.assert_allclose(grads["input"], want["input"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(grads["linear_weight"][live], want["linear_weight"], rtol=2e-5, atol=1e-6)
    dead = [j for j in range(7) if j not in live]
    assert (grads["linear_weight"][dead] == 0).all()
    assert (grads["linear_bias"][dead] == 0).all()


@both
@pytest.mark.parametrize("memory", MEMORY)
def test_mass_on_a_masked_class_is_an_infinite_loss(fw, memory):
    bias = np.zeros(7)
    bias[2] = -INF
    args = {"input": X, "linear_weight": W, "linear_bias": bias, "memory": memory, "chunk_size": 2}
    for target, smoothing in ((np.array([0, 2, 1, 1, 1]), 0.0), (np.array([0, 1, 1, 1, 1]), 0.1)):
        loss, _, _ = small(
            fw, target=target, **args, reduction="none", label_smoothing=smoothing, up={"value": np.ones(5)}
        )
        want = reference.linear_cross_entropy(
            X, W, target, linear_bias=bias, reduction="none", label_smoothing=smoothing
        )
        np.testing.assert_array_equal(np.isinf(loss), np.isinf(want))
        assert np.isinf(want).any()


@both
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_row_without_a_distribution_is_nan_alone(fw, memory, bad):
    x = X.copy()
    x[2, 0] = bad
    args = {
        "linear_weight": np.abs(W),
        "memory": memory,
        "chunk_size": 2,
        "reduction": "none",
        "stats": ("lse", "entropy"),
    }
    loss, grads, stats = small(fw, up={"value": np.ones(5)}, input=x, target=T, **args)
    for v in (loss, *stats.values(), grads["input"].sum(1)):
        assert np.isnan(v).tolist() == [False, False, True, False, False]


@both
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("bad", [7, -1, 10**6])
def test_14_15_class_index_out_of_range(fw, memory, bad):
    """An exception or NaN in loss, dX, dW and db; -1 is not the last class."""
    t = T.copy()
    t[2] = bad
    args = {"input": X, "linear_weight": W, "target": t, "linear_bias": W[:, 0], "memory": memory, "chunk_size": 2}
    if fw.name == "torch":
        with pytest.raises(IndexError, match=rf"got {bad} at row 2\.$"):
            small(fw, **args)
        return
    loss, grads, _ = small(fw, up={"value": np.ones(5)}, reduction="none", **args)
    assert np.isnan(loss).tolist() == [False, False, True, False, False]
    assert np.isnan(grads["input"]).all(1).tolist() == [False, False, True, False, False]
    assert np.isnan(grads["linear_weight"]).all()
    assert np.isnan(grads["linear_bias"]).all()


@both
@pytest.mark.parametrize("classes", [1, 2, 31, 257])
def test_01_vocabulary_of_any_size(fw, classes):
    """Nothing pads the last slice: zeros there would enter lse."""
    r = np.random.default_rng(classes)
    x, w, t = r.standard_normal((4, 3)) - 2.0, r.random((classes, 3)), r.integers(0, classes, 4)
    want = reference.linear_cross_entropy(x, w, t, reduction="none", stats=("lse", "logprob"))
    for memory in MEMORY:
        for chunk in (4, 100):
            options: dict[str, Any] = {"memory": memory, "chunk_size": chunk, "reduction": "none"}
            values, _ = fw(
                "linear_cross_entropy",
                "float64",
                {"input": x, "linear_weight": w, "target": t},
                None,
                **options,
                stats=("lse", "logprob"),
            )
            np.testing.assert_allclose(values["value"], want[0], rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(values["lse"], want[1]["lse"], rtol=1e-12)
            assert (values["logprob"] <= 0).all()


@both
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_05_confident_row_keeps_its_gradient(fw, memory, dtype):
    """p_t is 1 in float32 there; the gradient at the target is minus the others' sum, never 1 subtracted."""
    x, w = np.eye(2)[:1] * 8.0, np.array([[2.5, 0.0], [0.0, 1.0], [0.0, -1.0]])
    _, grads, _ = small(fw, dtype, input=x, linear_weight=w, target=[0], reduction="sum", memory=memory, chunk_size=1)
    others = 2 * np.exp(-20.0)
    np.testing.assert_allclose(grads["linear_weight"][0, 0], -8 * others, rtol=1e-5 if dtype == "float32" else 1e-2)


@both
@pytest.mark.parametrize("memory", MEMORY)
def test_06_weight_gradient_is_as_good_in_many_chunks(fw, memory):
    """dW of 128 chunks against 1, in half precision: summed in float32, rounded once."""
    r = np.random.default_rng(0)
    n, classes = 1024, 24
    arrays = {
        "input": cases.rounded(r.standard_normal((n, 8)), "bfloat16"),
        "linear_weight": cases.rounded(r.standard_normal((classes, 8)), "bfloat16"),
        "target": r.integers(0, classes, n),
    }
    want = oracle(arrays, {"value": np.float32(1)}, reduction="sum")[1]["linear_weight"]
    size = np.linalg.norm(want)
    error = []
    for chunk in (n, n // 128) if memory == "fast" else (classes, 1):
        options: dict[str, Any] = {"reduction": "sum", "memory": memory, "chunk_size": chunk}
        got = fw("linear_cross_entropy", "bfloat16", arrays, {"value": np.float32(1)}, **options)[1]["linear_weight"]
        error.append(np.linalg.norm(got - want) / size)
    assert error[0] < 4e-3
    assert error[1] < 1.3 * error[0] + 5e-4
    # Put back: a sum of 128 rounded sums.
    assert _half_sum_error(arrays, want) > 2 * error[1]


def _half_sum_error(arrays: Named, want: Any) -> float:
    total = np.zeros_like(want)
    for part in np.split(np.arange(len(arrays["input"])), 128):
        few = {**arrays, "input": arrays["input"][part], "target": arrays["target"][part]}
        step = oracle(few, {"value": np.float32(1)}, reduction="sum")[1]["linear_weight"]
        total = cases.rounded(total + cases.rounded(step, "bfloat16"), "bfloat16")
    return float(np.linalg.norm(total - want) / np.linalg.norm(want))


@both
@pytest.mark.parametrize("memory", MEMORY)
def test_08_every_row_has_its_own_upstream_gradient(fw, memory):
    ups = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    args = {"input": X, "linear_weight": W, "target": T, "reduction": "none", "memory": memory, "chunk_size": 2}
    _, got, _ = small(fw, "float64", up={"value": ups}, **args)
    rows = []
    for i, u in enumerate(ups):
        one = {"input": X[i : i + 1], "linear_weight": W, "target": T[i : i + 1]}
        rows.append(oracle(one, {"value": u}, reduction="sum")[1])
    np.testing.assert_allclose(got["input"], np.concatenate([g["input"] for g in rows]), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(got["linear_weight"], sum(g["linear_weight"] for g in rows), rtol=1e-12, atol=1e-15)


@both
@pytest.mark.parametrize("memory", MEMORY)
def test_13_no_gradient_is_dropped(fw, memory):
    """z-loss through the option or the statistic; entropy; token and class weights."""
    args = {"input": X, "linear_weight": W, "target": T, "memory": memory, "chunk_size": 2, "reduction": "none"}
    ups = np.linspace(0.5, 2.0, 5)
    _, option, _ = small(fw, "float64", up={"value": ups}, z_loss=0.25, **args)
    _, _, stats = small(fw, "float64", up={"value": ups}, stats=("lse",), **args)
    hand = {"value": ups, "lse": 0.5 * stats["lse"] * ups}
    _, by_hand, _ = small(fw, "float64", up=hand, stats=("lse",), **args)
    np.testing.assert_allclose(option["linear_weight"], by_hand["linear_weight"], rtol=1e-12, atol=1e-14)
    _, plain, _ = small(fw, "float64", up={"value": ups}, **args)
    assert np.abs(option["input"] - plain["input"]).max(1).min() > 1e-3
    loss, grads, _ = small(fw, "float64", up={"value": ups}, token_weight=np.ones(5), **args)
    np.testing.assert_allclose(grads["token_weight"], loss * ups, rtol=1e-12)
    # The mean's derivative by class weights, smoothing included, against differences.
    w0, h = np.linspace(0.5, 2.0, 7), 1e-6
    args = {**args, "reduction": "mean", "label_smoothing": 0.2, "token_weight": np.linspace(1.0, 2.0, 5)}
    _, grads, _ = small(fw, "float64", weight=w0, **args)
    for j in range(7):
        step = h * np.eye(7)[j]
        up, down = (small(fw, "float64", weight=w0 + s, **args)[0] for s in (step, -step))
        np.testing.assert_allclose(grads["weight"][j], (up - down) / (2 * h), rtol=1e-6, atol=1e-9)


@both
def test_18_loss_is_float32_for_half_precision(fw):
    arrays = {"input": X, "linear_weight": W, "target": T}
    for dtype in HALF:
        rounded = {k: v if k == "target" else cases.rounded(v, dtype) for k, v in arrays.items()}
        values, _ = fw("linear_cross_entropy", dtype, rounded, None, reduction="none", stats=("lse",))
        assert (values["value"] != cases.rounded(values["value"], dtype)).any()


@both
@pytest.mark.parametrize("memory", MEMORY)
def test_07_common_offset_costs_no_digits(fw, memory):
    """A bias of 1e4 on every class: lse is 1e4, the loss is not formed from it."""
    x, w = np.round(X * 8) / 8, np.round(W * 8) / 8  # exact in float32
    args = {"input": x, "linear_weight": w, "target": T, "reduction": "none", "memory": memory, "chunk_size": 2}
    options: dict[str, Any] = {"label_smoothing": 0.3, "stats": ("entropy",), "up": {"value": np.ones(5)}}
    loss, grads, stats = small(fw, linear_bias=np.full(7, 8192.0), **args, **options)
    loss0, grads0, stats0 = small(fw, linear_bias=np.zeros(7), **args, **options)
    z = x @ w.T
    assert (np.float32(z + 8192) == z + 8192).all()
    np.testing.assert_allclose(loss, loss0, rtol=2e-6)
    np.testing.assert_allclose(stats["entropy"], stats0["entropy"], rtol=2e-6)
    np.testing.assert_allclose(grads["linear_weight"], grads0["linear_weight"], rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("memory", MEMORY)
def test_float16_mean_over_many_rows_keeps_its_gradient(fw, memory):
    """1/N on G itself would flush it to 0 (G is about 1e-3 / N here)."""
    r, n, classes = np.random.default_rng(0), 512, 4
    x, w = np.abs(r.standard_normal((n, 2))) + 1, np.zeros((classes, 2))
    w[0] = 5.0
    arrays = {k: cases.rounded(v, "float16") for k, v in (("input", x), ("linear_weight", w))}
    arrays["target"] = np.zeros(n, int)
    want = oracle(arrays, {"value": np.float32(1024)})[1]["linear_weight"]
    got = fw("linear_cross_entropy", "float16", arrays, {"value": np.float32(1024)}, memory=memory, chunk_size=3)[1]
    np.testing.assert_allclose(got["linear_weight"], want, rtol=2e-2, atol=1e-7)
    assert np.abs(want).max() > 1e-4


@pytest.mark.slow
@both
def test_19_more_than_2_to_the_31_logits(fw):
    """They never exist, but rows and classes are counted: three kinds of row, so that the truth is short."""
    rows, classes = (1 << 15) + 4, 1 << 16
    w, x = np.linspace(-3, 3, classes), np.ones(rows)
    x[[-3, -2, -1]] = 2.0, -1.0, 2.0
    target = np.arange(rows) * 5 % classes
    target[[-3, -2, -1]] = classes - 1, classes - 1, 7
    values, grads = fw(
        "linear_cross_entropy",
        "float32",
        {"input": x[:, None], "linear_weight": w[:, None], "target": target},
        {"value": np.float32(1)},
    )
    kinds, kind = np.unique(x, return_inverse=True)
    z = np.outer(kinds, w)
    lse = np.log(np.exp(z).sum(1))
    p = np.exp(z - lse[:, None])
    np.testing.assert_allclose(values["value"], np.mean(lse[kind] - x * w[target]), rtol=1e-6)
    dx = ((p @ w)[kind] - w[target]) / rows
    dw = (np.bincount(kind) * kinds) @ p / rows
    np.subtract.at(dw, target, x / rows)
    np.testing.assert_allclose(np.ravel(grads["input"]), dx, rtol=1e-4, atol=1e-4 / rows)
    # equal terms round the same way: a matmul's sum of 32768 of them is off by as many roundings
    np.testing.assert_allclose(np.ravel(grads["linear_weight"]), dw, rtol=2e-3, atol=2e-3 / rows)
