"""The reference: masked classes, bad rows, ignored rows, targets."""

from typing import Any

import mpmath
import numpy as np
import pytest

from softmax_ext import reference
from tests.truth.exact import INF, NAN, OPTIONS, WEIGHT, close, exact, loud, plain_loss

pytestmark = pytest.mark.filterwarnings("error")  # no NumPy warning may escape


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(80):
        yield


def test_minus_infinity_without_mass():
    x, target = loud()
    x[0, 3] = x[1, 5] = x[4, 0] = -INF
    everything: dict[str, Any] = {"softcap": 5.0, "logit_scale": 0.5, "z_loss": 0.1}
    for options in ({}, everything):
        for t in (target, np.eye(7)[target]):
            close(reference.cross_entropy(x, t, **options), plain_loss(exact(x), t, **options))
            grad = reference.cross_entropy_grad(x, t, dstats={"entropy": np.ones(6), "lse": np.ones(6)}, **options)
            assert np.isfinite(grad).all()
            assert (grad[np.isneginf(x)] == 0).all()
    assert reference.softmax(x)[0, 3] == 0
    assert reference.log_softmax(x)[0, 3] == -INF
    d = np.ones((6, 7))
    assert reference.log_softmax_vjp(x, d)[0, 3] == 1.0
    assert reference.softmax_vjp(reference.softmax(x), d)[0, 3] == 0.0


def test_minus_infinity_with_mass():
    x = np.array([[1.0, -INF, 2.0], [0.0, 1.0, 2.0]])
    p = reference.softmax(x)
    loss = reference.cross_entropy(x, [1, 1], reduction="none")
    assert loss[0] == INF
    assert np.isfinite(loss[1])
    close(reference.cross_entropy_grad(x, [1, 1], reduction="sum"), p - np.eye(3)[[1, 1]], 1e-15)
    for s in (0.1, 1.0):
        for t in ([0, 0], np.eye(3)[[0, 0]]):
            loss = reference.cross_entropy(x, t, reduction="none", label_smoothing=s)
            assert loss[0] == INF
            grad = reference.cross_entropy_grad(x, t, reduction="sum", label_smoothing=s)
            close(grad[0], p[0] - (1 - s) * np.eye(3)[0] - s / 3, 2e-15)
    masked = np.array([1.0, 0.0, 1.0])  # no class weight, so no smoothing mass
    loss = reference.cross_entropy(x, [0, 0], masked, reduction="none", label_smoothing=0.1)
    assert np.isfinite(loss).all()


@pytest.mark.parametrize("bad", [[-INF] * 3, [INF, 0.0, 1.0], [NAN, 0.0, 1.0], [INF, NAN, -INF]])
def test_a_bad_row_is_nan_and_alone(bad):
    x = np.array([[1.0, 2.0, 0.5], bad, [0.0, -1.0, 3.0]])
    good = [0, 2]
    for out in (reference.softmax(x), reference.log_softmax(x)):
        assert np.isnan(out[1]).all()
        assert np.isfinite(out[good]).all()
    for t in (np.array([0, 1, 2]), np.eye(3)):
        loss, stats = reference.cross_entropy(x, t, reduction="none", stats=("lse", "entropy"))
        grad = reference.cross_entropy_grad(x, t)
        for out in (loss, grad, stats["lse"], stats["entropy"]):
            assert np.isnan(out[1]).all()
        np.testing.assert_array_equal(loss[good], reference.cross_entropy(x[good], t[good], reduction="none"))
        alone = reference.cross_entropy_grad(x[good], t[good], dloss=2 / 3)
        np.testing.assert_allclose(grad[good], alone, rtol=1e-15)


@pytest.mark.parametrize("bad", [-INF, INF, NAN])
def test_a_bad_row_of_one_class(bad):
    loss, stats = reference.cross_entropy([[bad]], [0], stats=("lse", "entropy"))
    assert np.isnan([loss, stats["lse"][0], stats["entropy"][0]]).all()
    assert np.isnan(reference.softmax([bad])).all()
    assert np.isnan(reference.cross_entropy_grad([[bad]], [0])).all()


def test_plus_infinity_is_finite_under_a_soft_cap():
    x = np.array([[INF, 0.0, -INF]])
    loss = reference.cross_entropy(x, [0], softcap=2.0)
    assert float(loss) == pytest.approx(np.log1p(np.exp(-2.0)), rel=1e-15)
    grad = reference.cross_entropy_grad(x, [0], softcap=2.0)
    assert grad[0, 0] == grad[0, 2] == 0  # flat
    assert grad[0, 1] == pytest.approx(1 / (1 + np.exp(2.0)), rel=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_reach_nothing(reduction):
    x, target = loud()
    options = {**OPTIONS["everything"], "reduction": reduction, "ignore_index": -100}
    tw = options.pop("token_weight")
    kept = [0, 2, 3, 5]
    target[[1, 4]] = -100
    x[1], x[4] = NAN, INF
    holes = tw.copy()
    holes[[1, 4]] = NAN
    loss = reference.cross_entropy(x, target, token_weight=holes, **options)
    alone = reference.cross_entropy(x[kept], target[kept], token_weight=tw[kept], **options)
    np.testing.assert_allclose(loss if loss.ndim == 0 else loss[kept], alone, rtol=1e-15)
    grad = reference.cross_entropy_grad(x, target, token_weight=holes, **options)
    alone = reference.cross_entropy_grad(x[kept], target[kept], token_weight=tw[kept], **options)
    np.testing.assert_allclose(grad[kept], alone, rtol=1e-15)
    np.testing.assert_array_equal(grad[[1, 4]], np.zeros((2, 7)))
    if reduction == "none":
        np.testing.assert_array_equal(loss[[1, 4]], [0, 0])


PLAIN_SMOOTH_WEIGHT: list[dict[str, Any]] = [{}, {"label_smoothing": 1.0}, {"weight": WEIGHT}]


def test_out_of_range_targets_are_nan_rows():
    x, target = loud()
    for value in (-1, 7, 2**40, -(2**63)):
        t = target.copy()
        t[1] = value
        for options in PLAIN_SMOOTH_WEIGHT:
            loss, stats = reference.cross_entropy(x, t, reduction="none", stats=("logprob", "lse", "argmax"), **options)
            np.testing.assert_array_equal(np.isnan(loss), np.arange(6) == 1)
            np.testing.assert_array_equal(np.isnan(stats["logprob"]), np.arange(6) == 1)
            assert np.isfinite(stats["lse"]).all()
            assert stats["argmax"][1] == 0
            grad = reference.cross_entropy_grad(x, t, **options)
            assert np.isnan(grad[1]).all()
            stand_in = np.where(np.arange(6) == 1, 0, target)  # in the denominator: class 0
            right = reference.cross_entropy_grad(x, stand_in, **options)
            np.testing.assert_array_equal(np.delete(grad, 1, 0), np.delete(right, 1, 0))


def test_target_types():
    x, target = loud()
    right = reference.cross_entropy(x, target)
    for kind in ("u1", "i1", "u2", "i4", "u4", "u8"):
        assert reference.cross_entropy(x, target.astype(kind)) == right
    for value in (np.uint8(156), np.uint64(2**64 - 100)):  # both are -100 if the type wraps
        t = target.astype(value.dtype)
        t[2] = value
        assert np.isnan(reference.cross_entropy(x, t, reduction="none")[2])
    t = target.astype(np.uint8)
    t[2] = 200
    grad = reference.cross_entropy_grad(x, t, ignore_index=200)
    assert (grad[2] == 0).all()
    t = np.where(target == 3, -100, target)
    assert reference.cross_entropy(x, t, ignore_index=None) == reference.cross_entropy(x, t)


def test_empty_and_all_ignored():
    empty = np.zeros((0, 7)), np.zeros(0, int)
    ignored = np.full((2, 7), NAN), np.full(2, -100)
    for x, t in (empty, ignored):
        assert float(reference.cross_entropy(x, t, reduction="sum")) == 0.0
        assert reference.cross_entropy(x, t, reduction="none").tolist() == [0.0] * len(t)
        assert np.isnan(reference.cross_entropy(x, t))
        assert float(reference.cross_entropy(x, t, on_all_ignored="zero")) == 0.0
        for rule in ("nan", "zero"):
            grad = reference.cross_entropy_grad(x, t, on_all_ignored=rule)
            np.testing.assert_array_equal(grad, np.zeros(x.shape))
    y = np.zeros((0, 7))
    assert np.isnan(reference.cross_entropy(y, y))
    assert float(reference.cross_entropy(y, y, on_all_ignored="zero")) == 0.0


def test_weights_summing_to_zero():
    x, target = loud()
    tw = np.array([1.0, -1.0, 2.0, -2.0, 0.0, 0.0])
    cases: list[dict[str, Any]] = [{"token_weight": tw}, {"token_weight": 0 * tw}]
    for options in [*cases, {"weight": np.zeros(7)}]:
        assert not np.isfinite(reference.cross_entropy(x, target, **options))
        assert not np.isfinite(reference.cross_entropy_grad(x, target, **options)).all()
        options = {**options, "on_all_ignored": "zero"}
        assert float(reference.cross_entropy(x, target, **options)) == 0.0
        grad = reference.cross_entropy_grad(x, target, **options)
        np.testing.assert_array_equal(grad, np.zeros((6, 7)))
