"""linear_cross_entropy in both frameworks: values and gradients against the reference, wrong answers, shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.head.problems import MEMORY, oracle
from tests.judging import cases, checks
from tests.judging.cases import NAN, OPTIONS
from tests.judging.frameworks import HALF, Named, each, loss_dtype, only

N, D, V = 17, 6, 29


STATS = ("lse", "logprob", "entropy", "argmax")


def problem(dtype: str, *, soft: bool = False, weights: bool = False, seed: int = 0) -> Named:
    """A loud head: rows of several sizes, one confident, one ignored, targets at both ends."""
    r = np.random.default_rng(seed)
    x = r.standard_normal((N, D)) * np.linspace(0.2, 3.0, N)[:, None]
    w = r.standard_normal((V, D))
    x[3] = 4.0 * w[5]
    target = r.integers(0, V, N)
    target[[0, 1, 2, 3]] = 0, V - 1, -100, 5
    arrays: Named = {"input": x, "linear_weight": w, "target": cases.soft(V, dtype, N) if soft else target}
    if weights:
        arrays["linear_bias"] = r.standard_normal(V)
        arrays["weight"] = cases.class_weight(V, dtype)
        arrays["token_weight"] = cases.token_weight(N, dtype)
    return {k: v if v.dtype.kind in "iu" else cases.rounded(v, dtype) for k, v in arrays.items()}


def scales(arrays: Named, upstream: Named, dtype: str, **options: Any) -> Any:
    """The scale of every entry of `oracle`'s answer for 2-d arrays: G's own, through the matmuls' magnitudes."""
    x, w, b = (np.abs(arrays.get(k, np.zeros(V))) for k in ("input", "linear_weight", "linear_bias"))
    z = arrays["input"] @ arrays["linear_weight"].T + arrays.get("linear_bias", 0.0)
    few = {k: v for k, v in arrays.items() if k in ("target", "weight", "token_weight")}
    value, grad = checks.scales("cross_entropy", {"input": z, **few}, upstream, dtype=dtype, **options)
    # A logit is off by the rounding of its D + 1 terms; a half-precision one is rounded, and so is G.
    off = options.get("logit_scale", 1.0) * (x @ w.T + b).max(1) * (D + 2)
    if dtype in HALF:
        off = off + checks.U[dtype] / checks.U[loss_dtype(dtype)] * (np.abs(z).max(1) + 4)
    g = grad["input"] * (1 + off[:, None])
    full = {"input": g @ w, "linear_weight": g.T @ x, "linear_bias": g.sum(0)}
    weights = np.abs(arrays.get("token_weight", np.ones(N))) * 3.0
    share = 1.0 if options.get("reduction") != "mean" else 1 / N
    far = {k: v + off for k, v in value.items() if k != "value"}
    lse = np.abs(z).max(1) + 4
    lost = off * (weights + 2 * options.get("z_loss", 0.0) * weights * lse)
    far["value"] = value["value"] + (lost if np.ndim(value["value"]) else lost.sum() * share)
    return far, full


def judge(answer: Any, truth: Any, scale: Any, dtype: str) -> None:
    kinds = (loss_dtype(dtype), dtype)
    for ours, right, size, kind in zip(answer, truth, scale, kinds, strict=True):
        for name in right:
            if name == "argmax":
                np.testing.assert_array_equal(ours[name], right[name])
            else:
                checks.close(ours[name], right[name], size[name], dtype=kind, c=8.0, what=name)


def upstream_of(options: dict[str, Any], n: int = N) -> Named:
    r = np.random.default_rng(5)
    ups: Named = {k: r.standard_normal(n).astype(np.float32) for k in options.get("stats", ()) if k != "argmax"}
    none = options.get("reduction") == "none"
    return {"value": (1 + r.random(n)).astype(np.float32) if none else np.float32(1.5), **ups}


FULL = [
    (d, m, c, s, o) for d in cases.DTYPES for m in MEMORY for c in (None, 4) for s in (False, True) for o in OPTIONS
]
FEW = [(d, m, c, s, "all") for d, m, c, s in (("float64", "lean", 4, False), ("bfloat16", "fast", 4, True))]
FEW += [("float32", m, c, s, "all") for m in MEMORY for c in (None, 4) for s in (False, True)]


@each(("dtype", "memory", "chunk", "soft", "name"), torch=FULL, jax=FEW)
def test_values_and_gradients(fw, dtype, memory, chunk, soft, name):
    """Every reduction, with and without weights and statistics."""
    for reduction, weights, stats in (("mean", True, ()), ("sum", False, ()), ("none", True, STATS)):
        stats = tuple(s for s in stats if not (soft and s == "logprob"))
        options = {**OPTIONS[name], "reduction": reduction, "stats": stats}
        arrays, ups = problem(dtype, soft=soft, weights=weights), upstream_of(options)
        answer = fw("linear_cross_entropy", dtype, arrays, ups, **options, memory=memory, chunk_size=chunk)
        judge(answer, oracle(arrays, ups, **options), scales(arrays, ups, dtype, **options), dtype)


SABOTAGE = {
    "zeros": lambda g: g * 0,
    "sign": lambda g: -g,
    "one NaN": lambda g: np.where(np.arange(g.size).reshape(g.shape) == 3, NAN, g),
    "last row unwritten": lambda g: np.where(np.arange(len(g)).reshape(-1, *[1] * (g.ndim - 1)) == len(g) - 1, 0, g),
    "rows shifted": lambda g: np.roll(g, 1, 0),
    "a little off": lambda g: g * (1 + 1e-3),
}


@only("torch")
@pytest.mark.parametrize("wrong", SABOTAGE)
@pytest.mark.parametrize("name", ["value", "input", "linear_weight", "linear_bias"])
def test_wrong_answers_are_rejected(fw, name, wrong):
    options: dict[str, Any] = {"reduction": "none"}
    arrays, ups = problem("float32", weights=True), upstream_of(options)
    answer = fw("linear_cross_entropy", "float32", arrays, ups, **options)
    values, grads = (dict(part) for part in answer)
    part = values if name in values else grads
    part[name] = SABOTAGE[wrong](part[name])
    truth, scale = oracle(arrays, ups, **options), scales(arrays, ups, "float32", **options)
    with pytest.raises(AssertionError):
        judge((values, grads), truth, scale, "float32")


SHAPES: dict[str, dict[str, Any]] = {
    "leading": {"x": (2, 3, D), "w": (V, D), "t": (2, 3), "soft": (2, 3, V)},
    "K-d": {"x": (3, D), "w": (V, 2, 3, D), "t": (3, 2, 3), "soft": (3, V, 2, 3)},
    "1-d": {"x": (D,), "w": (V, D), "t": (), "soft": (V,)},
    "shift 1": {"x": (2, 5, D), "w": (V, D), "t": (2, 5), "soft": (2, 5, V), "shift": 1},
    "shift 2, one sequence": {"x": (6, D), "w": (V, D), "t": (6,), "soft": (6, V), "shift": 2},
    "shift 1 of three": {"x": (2, 2, 3, D), "w": (V, D), "t": (2, 2, 3), "soft": (2, 2, 3, V), "shift": 1},
    "shift beyond": {"x": (2, 3, D), "w": (V, D), "t": (2, 3), "soft": (2, 3, V), "shift": 7},
}


@each(
    ("name", "memory", "soft", "reduction"),
    torch=[(n, m, s, r) for n in SHAPES for m in MEMORY for s in (False, True) for r in ("sum", "none")],
    jax=[(n, m, False, r) for n in SHAPES for m, r in zip(MEMORY, ("sum", "none"), strict=True)],
)
def test_shapes(fw, name, memory, soft, reduction):
    shape, r = SHAPES[name], np.random.default_rng(1)
    target = r.random(shape["soft"]) if soft else r.integers(0, V, shape["t"])
    if not soft and target.size > 1:
        target.reshape(-1)[1] = -100
    arrays = {
        "input": r.standard_normal(shape["x"]),
        "linear_weight": r.standard_normal(shape["w"]),
        "linear_bias": r.standard_normal(shape["w"][:-1]),
        "target": target,
        "weight": 0.5 + r.random(V),
        "token_weight": 0.5 + r.random(shape["t"]),
    }
    options = {"reduction": reduction, "stats": ("lse",), "shift": shape.get("shift", 0), "label_smoothing": 0.1}
    value = reference.linear_cross_entropy(*(arrays[k] for k in ("input", "linear_weight", "target")), **options)[0]
    up = {"value": r.standard_normal(np.shape(value))}
    answer = fw("linear_cross_entropy", "float64", arrays, up, **options, memory=memory, chunk_size=2)
    for ours, right in zip(answer, oracle(arrays, up, **options), strict=True):
        for k in right:
            assert ours[k].shape == np.shape(right[k])
            np.testing.assert_allclose(ours[k], right[k], rtol=1e-11, atol=1e-13, err_msg=k)
