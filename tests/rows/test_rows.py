"""The row functions themselves: one table of names and arguments, canonical targets, any axis, any set of upstreams."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import numpy as np
import pytest

from softmax_ext import reference
from tests.judging import cases, checks
from tests.judging.frameworks import HERE, both, each

TABLE = {
    "softmax_fwd": "x",
    "softmax_bwd": "dy y",
    "log_softmax_fwd": "x",
    "log_softmax_bwd": "dy x m rest",
    "cross_entropy_fwd": "logits target weight",
    "cross_entropy_bwd": "logits target weight m rest d_nll d_lse d_smooth d_entropy",
}


def call(fw: Any, name: str, *arrays: Any, axis: int = 1, dtype: str = "float32", **options: Any) -> Any:
    """A row function, NumPy in and out."""
    at = {"dim" if fw.name == "torch" else "axis": axis}
    with fw.bits(dtype):
        given = [None if a is None else fw.array(a, d) for a, d in _types(name, arrays, dtype)]
        out = getattr(fw.rows, name)(*given, **at, **options)
    return tuple(fw.numpy(o) for o in out) if isinstance(out, tuple) else fw.numpy(out)


def _types(name: str, arrays: Any, dtype: str) -> Any:
    """Statistics, weights and upstream gradients of a row come in the compute type."""
    wide = {"m", "rest", "weight", "d_nll", "d_lse", "d_smooth", "d_entropy"}
    names = TABLE[name].split()
    return [(a, "float32" if n in wide and dtype != "float64" else dtype) for n, a in zip(names, arrays, strict=True)]


@both
@pytest.mark.parametrize("name", TABLE)
def test_the_table(fw, name):
    """Arrays positional in one order; everything after them keyword-only."""
    parameters = inspect.signature(getattr(fw.rows, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == TABLE[name].split()
    axis = "dim" if fw.name == "torch" else "axis"
    extra = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    options = {
        "cross_entropy_fwd": ["scale", "softcap", "smooth", "entropy"],
        "cross_entropy_bwd": ["scale", "softcap"],
    }
    # `out`, the in-place backward, is torch's alone.
    assert [n for n in extra if n != "out"] == [axis, *options.get(name, [])]


PLAIN = {"scale": 1.0, "softcap": None}


@each(
    ("axis", "dtype"),
    torch=product([0, 1, 2], ["float32", "bfloat16"]),
    jax=[(0, "float32"), (1, "bfloat16"), (2, "float32")],
)
def test_statistics_of_a_row(fw, axis, dtype):
    """lse = m + log1p(rest); rest counts every position but one of the maximum."""
    r = cases.rows(17, dtype)
    x = np.moveaxis(r.x[:16].reshape(8, 2, 17), -1, axis)
    target = np.maximum(r.target[:16], 0).reshape(8, 2)
    y, m, rest = call(fw, "log_softmax_fwd", x, axis=axis, dtype=dtype)
    assert y.shape == x.shape
    assert m.shape == rest.shape == (8, 2)
    np.testing.assert_array_equal(m, x.max(axis))
    e = np.sort(np.exp(x - x.max(axis, keepdims=True)), axis)
    np.testing.assert_allclose(rest, np.delete(e, -1, axis).sum(axis), rtol=1e-6, atol=1e-35)
    out = call(fw, "cross_entropy_fwd", x, target, None, axis=axis, dtype=dtype, **PLAIN, smooth=True, entropy=True)
    nll, lse, smooth, entropy, m1, rest1 = out
    np.testing.assert_array_equal(m1, m)
    np.testing.assert_array_equal(rest1, rest)
    np.testing.assert_allclose(lse, m + np.log1p(rest), rtol=1e-6)
    logp = reference.log_softmax(x, axis=axis)
    np.testing.assert_allclose(
        nll, -np.take_along_axis(logp, np.expand_dims(target, axis), axis).squeeze(axis), rtol=1e-6
    )
    np.testing.assert_allclose(smooth, -logp.sum(axis), rtol=1e-6)
    p = np.exp(logp)
    want = -np.where(p > 0, p * np.where(p > 0, logp, 0), 0).sum(axis)
    np.testing.assert_allclose(entropy, want, rtol=1e-5, atol=1e-20)


@both
@pytest.mark.parametrize("row", [[-np.inf] * 3, [1.0, np.inf, 2.0], [1.0, np.nan, 2.0]], ids=str)
def test_rest_is_nan_where_the_maximum_is_not_finite(fw, row):
    x = np.array([row, [1.0, 2.0, 3.0]])
    *_, rest = call(fw, "log_softmax_fwd", x)
    np.testing.assert_array_equal(np.isnan(rest), [True, False])
    nll, lse, m, rest = call(fw, "cross_entropy_fwd", x, np.array([0, 0]), None, **PLAIN, smooth=False, entropy=False)
    for a in (nll, lse, rest):
        np.testing.assert_array_equal(np.isnan(a), [True, False])
    ups = [np.ones(2), None, None, None]
    dx = call(fw, "cross_entropy_bwd", x, np.array([0, 0]), None, m, rest, *ups, **PLAIN)
    np.testing.assert_array_equal(np.isnan(dx), [[True] * 3, [False] * 3])


@both
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_backward_is_linear_in_every_upstream(fw, soft):
    """The gradient for all four together is the sum of the four alone; absent is the same as zero."""
    r = cases.rows(9, "float64")
    keep = [0, 1, 6, 7, 10, 11]
    x = r.x[keep]
    target = cases.soft(9, "float64", len(x)) if soft else r.target[keep]
    weight = cases.class_weight(9, "float64")
    options = {"scale": 0.7, "softcap": 9.0, "dtype": "float64"}
    *_, m, rest = call(fw, "cross_entropy_fwd", x, target, weight, **options, smooth=True, entropy=True)
    ups = list(np.random.default_rng(0).standard_normal((4, len(x))))

    def run(*ups: Any) -> Any:
        return call(fw, "cross_entropy_bwd", x, target, weight, m, rest, *ups, **options)

    alone = [run(*(u if i == j else None for j, u in enumerate(ups))) for i in range(4)]
    np.testing.assert_allclose(run(*ups), sum(alone), rtol=1e-12, atol=1e-14)
    for i, one in enumerate(alone):
        assert np.abs(one).max() > 1e-3
        filled = run(*(u if i == j else np.zeros(len(x)) for j, u in enumerate(ups)))
        np.testing.assert_allclose(filled, one, rtol=1e-12, atol=1e-15)
        scaled = run(*(-3 * u if i == j else None for j, u in enumerate(ups)))
        np.testing.assert_allclose(scaled, -3 * one, rtol=1e-12)


@both
def test_canonical_targets(fw):
    """-1 reaches no result, -2 is NaN in nll and gradient and in no other row's."""
    x = np.array([[1.0, 2.0, 4.0], [np.nan, 0.0, np.inf], [3.0, 2.0, 1.0]])
    target = np.array([2, -1, -2])
    out = call(fw, "cross_entropy_fwd", x, target, None, **PLAIN, smooth=True, entropy=True)
    nll, lse, smooth, entropy, m, rest = out
    for a in (nll, lse, smooth, entropy):
        assert a[1] == 0
        assert np.isfinite(a[0])
    assert np.isnan(nll[2])
    np.testing.assert_allclose(lse[2], np.log(np.exp([3.0, 2.0, 1.0]).sum()), rtol=1e-6)
    ones = np.ones(3)
    for ups in ((ones, None, None, None), (None, ones, None, None), (ones, ones, ones, ones)):
        dx = call(fw, "cross_entropy_bwd", x, target, None, m, rest, *ups, **PLAIN)
        assert np.isfinite(dx[0]).all()
        np.testing.assert_array_equal(dx[1], 0)
        assert np.isnan(dx[2]).all()


@each(("dtype",), torch=[(d,) for d in cases.DTYPES], jax=[("float64",), ("bfloat16",)])
def test_softmax_rows_agree_with_the_public_ops(fw, dtype):
    """What a kernel slides under: the same bits through the public functions."""
    r = cases.rows(33, dtype)
    y = call(fw, "softmax_fwd", r.x, dtype=dtype)
    dx = call(fw, "softmax_bwd", r.dy, y, dtype=dtype)
    values, grads = fw("softmax", dtype, {"input": r.x}, {"value": r.dy})
    arrays, up = {"input": r.x}, {"value": r.dy}
    truth = checks.oracle("softmax", arrays, up)
    scale = checks.scales("softmax", arrays, up, dtype=dtype)
    checks.judge("softmax", dtype, ({"value": y}, {"input": dx}), truth, scale)
    if fw.name == "torch":
        np.testing.assert_array_equal(values["value"], y)
        np.testing.assert_array_equal(grads["input"], dx)


def test_there_is_a_framework():
    assert HERE, "neither torch_ops nor jax_ops can be imported: every other test here was skipped"
