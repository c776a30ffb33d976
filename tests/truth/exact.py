"""Rows in mpmath's digits and plain formulas, to judge the reference by."""

from typing import Any

import mpmath
import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("error")  # no NumPy warning may escape


H = mpmath.mpf(10) ** -25  # step of the central differences, taken with 80 digits
WIDE = float(np.finfo(np.longdouble).eps)
RTOL = 1e-15 if WIDE < 1e-18 else 1e-11  # an offset of 1e4 costs digits where long double is double


NAN, INF = np.nan, np.inf


def close(ours, truth, rtol=RTOL):
    """Each entry relative to itself; its row may add 16 long-double steps of the row's peak."""
    ours = np.asarray(ours)
    with np.errstate(all="ignore"):
        truth = np.asarray(truth).astype(np.float64)
    assert ours.dtype == np.float64
    assert ours.shape == truth.shape
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(truth))
    infinite = np.isinf(ours) | np.isinf(truth)
    np.testing.assert_array_equal(ours[infinite], truth[infinite])
    finite = np.isfinite(truth)
    a, b = np.where(finite, ours, 0), np.where(finite, truth, 0)
    peak = np.max(np.abs(b), -1, keepdims=True, initial=0) if b.ndim else np.abs(b)
    excess = np.abs(a - b) - (rtol * np.abs(b) + 16 * WIDE * peak)
    assert excess.size == 0 or excess.max() <= 0, f"off by {np.abs(a - b).max()}"


def exact(x):
    """The same numbers with 80 digits."""
    return np.vectorize(mpmath.mpf, otypes=[object])(np.asarray(x, np.float64))


def plain_rows(
    x,
    target,
    weight=None,
    *,
    token_weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    stat=None,
):
    """The definition, row by row with no care for rounding; "mean" is divided here, summed later.

    With `stat`, that statistic of each row instead.
    """
    rows, classes = x.shape
    w = exact(np.ones(classes) if weight is None else weight)
    tw = exact(np.ones(rows) if token_weight is None else token_weight)
    s = mpmath.mpf(label_smoothing)
    soft = np.asarray(target).dtype.kind == "f"
    losses, stats, den = [], [], mpmath.mpf(0)
    for i in range(rows):
        if not soft and target[i] == ignore_index:
            losses.append(mpmath.mpf(0))
            stats.append(mpmath.mpf(0))
            continue
        z = [mpmath.mpf(logit_scale) * v for v in x[i]]
        if softcap is not None:
            z = [v if v == -mpmath.inf else softcap * mpmath.tanh(v / softcap) for v in z]
        total = mpmath.fsum(mpmath.exp(v) for v in z)
        p = [mpmath.exp(v) / total for v in z]
        y = exact(target[i]) if soft else exact(np.arange(classes) == target[i])
        mass = w * ((1 - s) * y + s / classes)
        if not soft:
            mass = w[target[i]] * (1 - s) * y + w * s / classes
        ce = -mpmath.fsum(m * mpmath.log(q) for m, q in zip(mass, p, strict=True) if m)
        losses.append(tw[i] * (ce + mpmath.mpf(z_loss) * mpmath.log(total) ** 2))
        den += tw[i] * (1 if soft else w[target[i]])
        stats.append(
            {
                None: 0,
                "lse": mpmath.log(total),
                "logprob": None if soft else mpmath.log(p[target[i]]),
                "entropy": -mpmath.fsum(q * mpmath.log(q) for q in p if q),
            }[stat]
        )
    if stat:
        return np.array(stats, object)
    losses = np.array(losses, object)
    return losses / (den if reduction == "mean" else 1)


def plain_loss(x, target, weight=None, *, reduction="mean", **options):
    rows = plain_rows(x, target, weight, reduction=reduction, **options)
    return rows if reduction == "none" else np.sum(rows)


def slopes(f, x):
    """Central differences along the last axis, all rows at once: f must treat each row alone."""
    grad = np.empty(x.shape, object)
    for j in range(x.shape[-1]):
        up, down = x.copy(), x.copy()
        up[..., j], down[..., j] = x[..., j] + H, x[..., j] - H
        grad[..., j] = (f(up) - f(down)) / (2 * H)
    return grad


def loud(seed=0):
    """Six rows of 7: a peak of p = 1/2, confident right and wrong, offset 1e4, tie, plain."""
    rng = np.random.default_rng(seed)
    x = 2 * rng.standard_normal((6, 7))
    target = np.array([2, 0, 3, 6, 1, 5])
    x[0, 2] = np.log(np.exp(np.delete(x[0], 2)).sum())
    x[1, 0], x[2, 4] = 60.0, 60.0
    x[3] += 1e4
    x[4, [1, 5]] = 3.0
    return x, target


def soft_targets(seed=1):
    y = np.random.default_rng(seed).exponential(size=(6, 7))
    y[0, 1] = 0.0
    y[1] = np.eye(7)[0]
    y[2] *= 3 / y[2].sum()  # sums to 3
    return y


WEIGHT = np.array([0.5, 2.0, 1.5, 0.25, 3.0, 1.0, 0.75])
TOKEN = np.array([1.0, 0.5, 2.0, 0.25, 1.5, 3.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "weight": {"weight": WEIGHT},
    "token_weight": {"token_weight": TOKEN},
    "both_weights": {"weight": WEIGHT, "token_weight": TOKEN},
    "ignore": {"ignore_index": 3},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing_1": {"label_smoothing": 1.0, "weight": WEIGHT},
    "smoothing_weight": {"label_smoothing": 0.3, "weight": WEIGHT, "reduction": "sum"},
    "scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 5.0},
    "z_loss": {"z_loss": 0.125},
    "everything": {
        "weight": WEIGHT,
        "token_weight": TOKEN,
        "ignore_index": 5,
        "label_smoothing": 0.2,
        "logit_scale": 0.7,
        "softcap": 4.0,
        "z_loss": 0.01,
    },
}
