"""Loud inputs: rows whose every term would be missed, rounded to the tested type before the truth is taken."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# Around every vector and tile edge; none a multiple of anything for long.
SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 100, 127, 129, 257, 1000, 1025, 4099)
FEW = (1, 2, 5, 17, 257, 1025)
LARGE = (32000, 128256)
DTYPES = ("float64", "float32", "bfloat16", "float16")
INF, NAN = np.inf, np.nan

# Significant bits and smallest normal exponent of each type.
_FORM = {"float64": (53, -1022), "float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}


def ulp(x: Array, dtype: str) -> Array:
    """The distance between neighbouring numbers of the type at x (subnormals included)."""
    bits, low = _FORM[dtype]
    exponent = np.frexp(np.where(np.isfinite(x), x, 0))[1] - 1
    return np.ldexp(1.0, np.maximum(np.where(x == 0, low, exponent), low) - bits + 1)


def rounded(x: Any, dtype: str) -> Array:
    """The nearest number of the type (ties to even), as float64."""
    x = np.asarray(x, np.float64)
    if dtype == "float64":
        return x
    if dtype != "bfloat16":
        return x.astype(dtype).astype(np.float64)
    step = ulp(x, dtype)
    return np.where(np.isfinite(x), np.rint(x / step) * step, x)


class Rows(NamedTuple):
    """Logits (R, V), a target and upstream gradients for each row, and each row's name."""

    x: Array
    target: Array
    dy: Array  # (R, V)
    dloss: Array  # (R,)
    names: list[str]


def rows(classes: int, dtype: str, *, seed: int = 0) -> Rows:
    """One row of each kind. No target sits on a -inf logit; one row is ignored."""
    r = np.random.default_rng((classes, seed))
    last, peak, some = classes - 1, int(r.integers(classes)), int(r.integers(classes))

    def normal(scale: float = 1.0, shift: float = 0.0) -> Array:
        return shift + scale * r.standard_normal(classes)

    def planted(x: Array, at: int, value: float) -> Array:
        x[at] = value
        return x

    half = normal()  # p[peak] is about 1/2
    if classes > 1:
        half[peak] = np.log(np.exp(np.delete(half, peak)).sum())
    tied = normal()
    tied[[0, last]] = tied.max() + 1
    hidden = np.where(r.random(classes) < 0.5, -INF, normal())
    late = np.where(np.arange(classes) < classes * 3 // 4, -INF, normal())  # its first tiles are all -inf
    early = np.where(np.arange(classes) > classes // 4, -INF, normal())  # its last tiles are all -inf
    found = {
        "randn": (normal(), some),
        "randn x 5, last class": (normal(5), last),
        "randn x 20, first class": (normal(20), 0),
        "offset 1000": (normal(1, 1000), some),
        "offset 1e4": (normal(3, 1e4), last),
        "offset -1e4": (normal(3, -1e4), 0),
        "half, elsewhere": (half.copy(), some),
        "half, at it": (half, peak),
        "confident": (planted(np.zeros(classes), 0, 60.0), 0),
        "confident, not at it": (planted(np.zeros(classes), 0, 60.0), last),
        "ties": (np.full(classes, 0.75), some),
        "two maxima": (tied, last),
        "ignored": (normal(), -100),  # not the last: its zeros would hide a last row never written
        "spike of 40": (planted(normal(), last, 40.0), last),
        "some -inf": (planted(hidden, some, 0.5), some),
        "first tiles -inf": (planted(late, last, 1.0), last),
        "last tiles -inf": (planted(early, 0, 0.25), 0),
    }
    x = rounded(np.stack([x for x, _ in found.values()]), dtype)
    target = np.array([t for _, t in found.values()])
    dy = r.standard_normal(x.shape)
    dy[np.arange(len(x)), r.integers(classes, size=len(x))] += 10  # no two rows pull alike
    dloss = np.linspace(0.5, 3.0, len(x)) * np.where(np.arange(len(x)) % 3 == 1, -1, 1)
    return Rows(x, target, rounded(dy, dtype), rounded(dloss, "float32"), list(found))


def soft(classes: int, dtype: str, number: int, *, seed: int = 0) -> Array:
    """Targets that sum to anything: general, one-hot, with exact zeros, summing to 3, all zero."""
    r = np.random.default_rng((classes, seed, 1))
    y = r.random((number, classes)) * np.array([1.0, 3.0, 0.1])[np.arange(number) % 3, None]
    y[1::4] *= r.random(y[1::4].shape) < 0.5
    y[2::8] = r.integers(classes, size=(len(y[2::8]), 1)) == np.arange(classes)
    y[3::16] = 0
    return rounded(y / np.maximum(y.sum(-1, keepdims=True), 1) * np.linspace(0.5, 3, number)[:, None], dtype)


def class_weight(classes: int, dtype: str) -> Array:
    """Weights in [1/4, 2] but for one class that weighs nothing."""
    r = np.random.default_rng((classes, 2))
    w = 0.25 + 1.75 * r.random(classes)
    w[classes // 2] = 0.0 if classes > 1 else 1.0
    return rounded(w, dtype)


def token_weight(number: int, dtype: str) -> Array:
    """One weight per row, a zero among them."""
    w = np.linspace(0.25, 2.0, number)
    w[number // 2] = 0.0
    return rounded(w, dtype)


# One of each alone, then together; used with every kind of weight and target.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "uniform": {"label_smoothing": 1.0},
    "scale": {"logit_scale": 0.7},
    "cap": {"softcap": 30.0},
    "z-loss": {"z_loss": 0.01},
    "all": {"label_smoothing": 0.3, "logit_scale": 1.3, "softcap": 20.0, "z_loss": 0.1},
}
STATS = ("lse", "logprob", "entropy", "argmax")
