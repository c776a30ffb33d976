"""The checks themselves: they pass the rounded truth and reject every wrong answer, for every op and type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.judging import cases, checks
from tests.judging.cases import DTYPES, NAN, STATS
from tests.judging.frameworks import Answer, Named, loss_dtype

OPS = ("softmax", "log_softmax", "cross_entropy")
ALL: Named = {"reduction": "none", **cases.OPTIONS["all"]}
PLAIN: Named = {"reduction": "none"}
CLASSES = 129  # no multiple of any tile


def problem(op: str, dtype: str, kind: str = "hard") -> tuple[Named, Named]:
    r = cases.rows(CLASSES, dtype)
    if op != "cross_entropy":
        return {"input": r.x}, {"value": r.dy}
    arrays = {"input": r.x, "target": r.target if kind == "hard" else cases.soft(CLASSES, dtype, len(r.x))}
    arrays["weight"] = cases.class_weight(CLASSES, dtype)
    arrays["token_weight"] = cases.token_weight(len(r.x), dtype)
    return arrays, {"value": r.dloss}


def stored(op: str, dtype: str, answer: Answer) -> Answer:
    """The answer in the types an op would return it in."""
    values, grads = answer
    kind = loss_dtype(dtype) if op == "cross_entropy" else dtype
    return (
        {k: v if k == "argmax" else cases.rounded(v, kind) for k, v in values.items()},
        {k: cases.rounded(g, dtype) for k, g in grads.items()},
    )


def judged(op: str, dtype: str, answer: Answer, arrays: Named, upstream: Named, **options: Any) -> None:
    truth = checks.oracle(op, arrays, upstream, **options)
    scale = checks.scales(op, arrays, upstream, dtype=dtype, **options)
    checks.judge(op, dtype, stored(op, dtype, answer), truth, scale)


def rejected(op: str, dtype: str, answer: Answer, arrays: Named, upstream: Named, **options: Any) -> None:
    with pytest.raises(AssertionError):
        judged(op, dtype, answer, arrays, upstream, **options)


def one_entry(a: Any, value: Callable[[Any], Any]) -> Any:
    """The array with one finite entry changed, the largest of its middle third."""
    out = np.array(a, np.float64)
    at = np.flatnonzero(np.isfinite(out) & (out != 0))
    at = at[len(at) // 3 : 2 * len(at) // 3 + 1]
    at = at[np.argmax(np.abs(out.flat[at]))]
    out.flat[at] = value(out.flat[at])
    return out


# What can be done to any array.
WRONG: dict[str, Callable[[Any], Any]] = {
    "zeros": np.zeros_like,
    "all NaN": lambda a: np.full_like(a, NAN),
    "all inf": lambda a: np.full_like(a, np.inf),
    "sign flipped": np.negative,
    "one NaN": lambda a: one_entry(a, lambda v: NAN),
    "one zero": lambda a: one_entry(a, lambda v: 0.0),
    "one sign": lambda a: one_entry(a, np.negative),
    "one entry 2 % off": lambda a: one_entry(a, lambda v: 1.02 * v),
    "last unwritten": lambda a: np.concatenate([a[..., :-1], np.zeros_like(a[..., -1:])], -1),
    "last written twice": lambda a: np.concatenate([a[..., :-1], 2 * a[..., -1:]], -1),
    "rows shifted": lambda a: np.roll(a, 1, 0),
    "reversed": lambda a: a[..., ::-1],
    "doubled": lambda a: 2 * a,
    "2 % off": lambda a: 1.02 * a,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("part", [0, 1], ids=["value", "gradient"])
@pytest.mark.parametrize("wrong", WRONG)
def test_no_damaged_array_passes(op, dtype, part, wrong):
    arrays, upstream = problem(op, dtype)
    options: Named = PLAIN if op == "cross_entropy" else {}
    right = checks.oracle(op, arrays, upstream, **options)
    judged(op, dtype, right, arrays, upstream, **options)
    name = ("value", "input")[part]
    damaged = [dict(d) for d in right]
    damaged[part][name] = WRONG[wrong](right[part][name])
    rejected(op, dtype, tuple(damaged), arrays, upstream, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lse", "logprob", "entropy", "argmax"])
@pytest.mark.parametrize("wrong", ["zeros", "sign flipped", "one zero", "last unwritten", "rows shifted", "doubled"])
def test_no_damaged_statistic_passes(dtype, name, wrong):
    arrays, upstream = problem("cross_entropy", dtype)
    options: Named = {"reduction": "none", "stats": STATS}
    values, grads = checks.oracle("cross_entropy", arrays, upstream, **options)
    judged("cross_entropy", dtype, (values, grads), arrays, upstream, **options)
    damaged = {**values, name: WRONG[wrong](values[name])}
    rejected("cross_entropy", dtype, (damaged, grads), arrays, upstream, **options)


def ulps(a: Any, dtype: str) -> Any:
    return a + 20 * cases.ulp(a, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("part", [0, 1], ids=["value", "gradient"])
def test_an_error_of_twenty_ulp_is_seen(op, dtype, part):
    arrays, upstream = problem(op, dtype)
    options: Named = PLAIN if op == "cross_entropy" else {}
    answer = [dict(d) for d in checks.oracle(op, arrays, upstream, **options)]
    name = ("value", "input")[part]
    answer[part][name] = ulps(answer[part][name], dtype)
    rejected(op, dtype, tuple(answer), arrays, upstream, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_terms_of_softmax_gradients(dtype):
    arrays, upstream = problem("softmax", dtype)
    x, dy = arrays["input"], upstream["value"]
    p, logp = reference.softmax(x), reference.log_softmax(x)
    total = dy.sum(-1, keepdims=True)
    mean = (p * dy).sum(-1, keepdims=True)
    wrong = {
        "softmax": {
            "sum dropped": p * dy,
            "own term dropped": -p * mean,
            "sum without p": p * (dy - total),
            "factor p dropped": dy - mean,
            "first row's upstream": reference.softmax_vjp(p, np.broadcast_to(dy[:1], dy.shape)),
        },
        "log_softmax": {
            "sum dropped": dy,
            "p of another row": dy - np.roll(p, 1, 0) * total,
            "p not normalised": dy - np.exp(x - x.max(-1, keepdims=True)) * total,
            "sum of p dy": dy - p * mean,
        },
    }
    for op, answers in wrong.items():
        value = p if op == "softmax" else logp
        for grad in answers.values():
            rejected(op, dtype, ({"value": value}, {"input": grad}), arrays, upstream)


def without(name: str, **changed: Any) -> tuple[str, Named]:
    return name, changed


# Options an implementation may forget, in value and gradient: the truth of another question.
FORGOTTEN = dict(
    [
        without("smoothing", label_smoothing=0.0),
        without("scale", logit_scale=1.0),
        without("cap", softcap=None),
        without("z-loss", z_loss=0.0),
        without("half of z-loss", z_loss=0.05),
        without("scale after cap", logit_scale=1.0, softcap=20.0 * 1.3),
    ]
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("part", [0, 1], ids=["value", "gradient"])
def test_forgotten_options(dtype, kind, part):
    arrays, upstream = problem("cross_entropy", dtype, kind)
    right = checks.oracle("cross_entropy", arrays, upstream, **ALL)
    judged("cross_entropy", dtype, right, arrays, upstream, **ALL)

    def swapped(other: Answer) -> Answer:
        return (other[0], right[1]) if part == 0 else (right[0], other[1])

    for changed in FORGOTTEN.values():
        other = checks.oracle("cross_entropy", arrays, upstream, **{**ALL, **changed})
        rejected("cross_entropy", dtype, swapped(other), arrays, upstream, **ALL)
    for name in ("weight", "token_weight"):
        rest = {k: v for k, v in arrays.items() if k != name}
        rejected(
            "cross_entropy",
            dtype,
            swapped(checks.oracle("cross_entropy", rest, upstream, **ALL)),
            arrays,
            upstream,
            **ALL,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_dropped_terms_of_the_loss_gradient(dtype, kind):
    arrays, upstream = problem("cross_entropy", dtype, kind)
    x, target = arrays["input"], arrays["target"]
    p = reference.softmax(x)
    g = (upstream["value"] * arrays["token_weight"])[:, None]
    if kind == "hard":
        keep = (target != -100)[:, None]
        y = (target[:, None] == np.arange(CLASSES)) * arrays["weight"]
    else:
        keep, y = np.ones((len(x), 1), bool), target * arrays["weight"]
    mass = y.sum(-1, keepdims=True)
    values, right = checks.oracle("cross_entropy", arrays, upstream, **PLAIN)
    dlosses = upstream["value"]
    first = {"value": np.full_like(dlosses, dlosses[0])}
    wrong = {
        "one-hot term dropped": keep * g * mass * p,
        "probability dropped": -(keep * g * y),
        "first upstream for all": checks.oracle("cross_entropy", arrays, first, **PLAIN)[1]["input"],
        "upstream dropped": checks.oracle("cross_entropy", arrays, {"value": np.ones_like(dlosses)}, **PLAIN)[1][
            "input"
        ],
    }
    if kind == "hard":
        shifted = {**arrays, "target": np.where(target >= 0, (target + 1) % CLASSES, target)}
        wrong["neighbour's target"] = checks.oracle("cross_entropy", shifted, upstream, **PLAIN)[1]["input"]
        last = {**arrays, "target": np.where(target >= 0, target, CLASSES - 1)}
        wrong["ignored row taken for the last class"] = checks.oracle("cross_entropy", last, upstream, **PLAIN)[1][
            "input"
        ]
    else:
        wrong["mass taken to be 1"] = g * (p - y)
    for grad in wrong.values():
        assert not np.array_equal(grad, right["input"])
        rejected("cross_entropy", dtype, (values, {"input": grad}), arrays, upstream, **PLAIN)


@pytest.mark.parametrize("dtype", DTYPES)
def test_missing_slope_of_the_cap(dtype):
    arrays, upstream = problem("cross_entropy", dtype)
    options: Named = {"reduction": "none", "softcap": 5.0}
    values, grads = checks.oracle("cross_entropy", arrays, upstream, **options)
    with np.errstate(all="ignore"):
        slope = 1 / np.cosh(arrays["input"] / 5.0) ** 2
        grad = np.where(slope == 0, 0, grads["input"] / slope)
    rejected("cross_entropy", dtype, (values, {"input": grad}), arrays, upstream, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lse", "logprob", "entropy"])
def test_dropped_gradients_of_statistics(dtype, name):
    arrays, upstream = problem("cross_entropy", dtype)
    options: Named = {"reduction": "none", "stats": (name,)}
    full = {**upstream, name: upstream["value"][::-1].copy()}
    values, _ = checks.oracle("cross_entropy", arrays, full, **options)
    _, grads = checks.oracle("cross_entropy", arrays, upstream, **options)
    rejected("cross_entropy", dtype, (values, grads), arrays, full, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_naive_arithmetic_is_seen(dtype):
    """What libraries really compute: log of a rounded p, p_t - 1, a loss without the shift, sums that cancel."""
    arrays, upstream = problem("log_softmax", dtype)
    x = arrays["input"].astype(np.float32)
    _, right = checks.oracle("log_softmax", arrays, upstream)
    with np.errstate(all="ignore"):
        p = np.exp(x - x.max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True)
        rejected("log_softmax", dtype, ({"value": np.log(p)}, right), arrays, upstream)

    arrays, upstream = problem("cross_entropy", dtype)
    del arrays["weight"], arrays["token_weight"]
    values, grads = checks.oracle("cross_entropy", arrays, upstream, **PLAIN)
    hot = arrays["target"][:, None] == np.arange(CLASSES)
    keep = arrays["target"][:, None] != -100
    g = upstream["value"].astype(np.float32)[:, None]
    naive = np.where(keep, np.where(hot, p - np.float32(1), p) * g, 0)
    rejected("cross_entropy", dtype, (values, {"input": naive}), arrays, upstream, **PLAIN)
    early = np.where(keep, (cases.rounded(p, "bfloat16") - hot) * g, 0)  # p rounded before the -1
    rejected("cross_entropy", dtype, (values, {"input": early}), arrays, upstream, **PLAIN)
    lse = reference.cross_entropy(x, arrays["target"], reduction="none", stats=("lse",))[1]["lse"]
    loss = np.where(keep[:, 0], np.float32(lse) - x[np.arange(len(x)), np.maximum(arrays["target"], 0)], 0)
    rejected("cross_entropy", dtype, ({"value": loss}, grads), arrays, upstream, **PLAIN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("classes", [5, 17, 1025])
def test_inputs_are_loud(op, dtype, classes):
    """Zeros would be seen in every row whose answer the type can hold, far beyond the bound."""
    r = cases.rows(classes, dtype)
    arrays, upstream = {"input": r.x}, {"value": r.dy}
    options: Named = {}
    if op == "cross_entropy":
        arrays, upstream, options = {**arrays, "target": r.target}, {"value": r.dloss}, PLAIN
    truth = checks.oracle(op, arrays, upstream, **options)
    scale = checks.scales(op, arrays, upstream, dtype=dtype, **options)
    for kind, right, size in zip(("", " gradient"), truth, scale, strict=True):
        name = "input" if kind else "value"
        out = dtype if kind or op != "cross_entropy" else loss_dtype(dtype)
        units = checks.excess(np.zeros_like(right[name]), right[name], size[name], out)
        held = np.where(np.isfinite(right[name]), cases.rounded(right[name], out), 0) != 0
        shape = (len(r.x), -1)
        worst = np.where(held, units, 0).reshape(shape).max(-1)
        some = held.reshape(shape).any(-1)
        assert some.sum() >= len(r.x) - 3
        quiet = [n for n, w, s in zip(r.names, worst, some, strict=True) if s and w < 30 * checks.C[f"{op}{kind}"]]
        assert not quiet, f"zeros would pass in {quiet}"


def test_cancelling_gradients_of_softmax_are_seen():
    """y (dy - sum(y dy)) and dy - p sum(dy), if only their last subtraction is rounded: 0 at a confident maximum."""
    arrays, upstream = problem("softmax", "float32")
    p, dy = reference.softmax(arrays["input"]), upstream["value"]
    mean = np.sum(p * dy, -1, keepdims=True).astype(np.float32)
    naive = p * (dy.astype(np.float32) - mean)
    rejected("softmax", "float32", ({"value": p}, {"input": naive}), arrays, upstream)
    offset = {"value": dy + 1000.0}
    naive = p * ((dy + 1000.0) - np.sum(p * (dy + 1000.0), -1, keepdims=True).astype(np.float32))
    rejected("softmax", "float32", ({"value": p}, {"input": naive}), arrays, offset)
    dy = (arrays["input"].argmax(-1)[:, None] == np.arange(CLASSES)).astype(np.float32)  # a negative log-likelihood's
    naive = dy - (p * dy.sum(-1, keepdims=True)).astype(np.float32)
    logp = reference.log_softmax(arrays["input"])
    rejected("log_softmax", "float32", ({"value": logp}, {"input": naive}), arrays, {"value": dy})


def test_the_worst_entry_is_named():
    truth = np.array([[1.0, 2.0], [3.0, 4.0]])
    ours = truth.copy()
    ours[1, 0] = 3.5
    with pytest.raises(AssertionError, match=r"lse float32 at \(1, 0\): .*3\.5.*truth.*3\.0.*1 of 4 wrong"):
        checks.close(ours, truth, np.abs(truth), dtype="float32", c=4, what="lse")


@pytest.mark.parametrize(
    ("ours", "truth"),
    [(NAN, 1.0), (1.0, NAN), (np.inf, NAN), (-np.inf, np.inf), (1e308, np.inf), (0.0, -np.inf), (NAN, np.inf)],
)
def test_special_values_must_meet(ours, truth):
    with pytest.raises(AssertionError):
        checks.close([ours], [truth], [1.0], dtype="float64", c=4)
    checks.close([truth], [truth], [1.0], dtype="float64", c=4)


def test_shapes_must_match():
    with pytest.raises(AssertionError, match="shape"):
        checks.close(np.ones((2, 1)), np.ones(2), np.ones(2), dtype="float64", c=4)
