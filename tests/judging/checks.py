"""What counts as right: each entry within c units of roundoff of its own scale; the table of every c.

|ours - truth| <= c u scale (+ half a step of the output where that type is narrower than the arithmetic),
u the unit roundoff of the arithmetic. The truth is softmax_ext.reference on the rounded input. A scale is
the sum of the magnitudes that the formula adds, so what cancels in truth is not what the bound hides behind.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softmax_ext import reference
from tests.judging.cases import Array, ulp
from tests.judging.frameworks import HALF, Answer, Named, loss_dtype

# c for each quantity (8 u is 4 ulp); beside it the worst measured over all rows, sizes and types, (torch, jax).
C = {
    "softmax": 6.0,  # (4.6, 4.2)
    "softmax gradient": 8.0,  # (6.3, 6.3); half precision, where the rounded output decides: (7.5, 7.5)
    "log_softmax": 6.0,  # (4.7, 3.2)
    "log_softmax gradient": 5.0,  # (3.2, 4.2)
    "cross_entropy": 6.0,  # (4.7, 3.2)
    "cross_entropy lse": 3.0,  # (2.0, 2.0)
    "cross_entropy logprob": 6.0,  # (4.7, 3.2)
    "cross_entropy entropy": 8.0,  # (5.7, 5.0)
    "cross_entropy gradient": 8.0,  # (5.9, 6.2)
    "cross_entropy logit_scale": 8.0,
    "cross_entropy log_sum_sq": 8.0,
    "cross_entropy mean_logit": 4.0,
}

# What the exps of half-precision rows in the Triton kernels are good for; tests of those set FAST_HALVES to it. log2 of
# an exp is rounded once: at most 2^-18 where it is no subnormal, 44 u of the exp; then the hardware's 2^-22.5.
FAST = 64.0
FAST_HALVES = 0.0

U = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# Arithmetic that flushes subnormals to zero loses this much, times the factor it is multiplied by later.
_FLUSHED = {"float64": 2.0**-1010, "float32": 2.0**-114}


def excess(ours: Any, truth: Any, scale: Any, dtype: str) -> Array:
    """Error in units of u scale, after half a step of a half type: NaN or inf where the special values differ."""
    ours, truth, scale = (np.asarray(a, np.float64) for a in (ours, truth, scale))
    assert ours.shape == truth.shape, f"shape {ours.shape}, not {truth.shape}"
    kind = loss_dtype(dtype)
    # the larger half step: an answer within its bound may lie one binade above the truth and round there
    free = _FLUSHED[kind] + (0.5 * np.maximum(ulp(truth, dtype), ulp(ours, dtype)) if dtype in HALF else 0.0)
    with np.errstate(all="ignore"):
        error = np.maximum(np.abs(ours - truth) - free, 0.0)
        units = np.where(error == 0, 0.0, error / (U[kind] * scale))
    same = (np.isnan(ours) & np.isnan(truth)) | (ours == truth)
    return np.where(np.isfinite(truth), units, np.where(same, 0.0, np.inf))


def close(ours: Any, truth: Any, scale: Any, *, dtype: str, c: float, what: str = "") -> None:
    """Fail, naming the worst entry, unless every entry is within its bound."""
    units = excess(ours, truth, scale, dtype)
    bad = ~(units <= c)  # NaN is not within any bound
    if bad.any():
        at = np.unravel_index(np.argmax(np.where(np.isnan(units), np.inf, units)), units.shape)
        raise AssertionError(
            f"{what or 'entry'} {dtype} at {tuple(map(int, at))}: {np.asarray(ours)[at]!r}, truth "
            f"{np.asarray(truth)[at]!r}, {units[at]:.3g} units (bound {c}); {bad.sum()} of {bad.size} wrong"
        )


def along(a: Any, axis: int) -> Array:
    return np.moveaxis(np.asarray(a, np.float64), axis, -1)


def judge(op: str, dtype: str, answer: Answer, truth: Answer, scale: Answer) -> None:
    """`close` for every value and the gradient at the input, each with its c."""
    for kind, ours, right, size in zip(("", " gradient"), answer, truth, scale, strict=True):
        for name in size:
            known = f"{op}{kind}" if name in ("value", "input") else f"{op} {name}"
            c = max(C[known], FAST_HALVES if dtype in HALF else 0.0)
            close(ours[name], right[name], size[name], dtype=_type(op, dtype, kind), c=c, what=known)
    for name in {"argmax", "rank"} & truth[0].keys():
        np.testing.assert_array_equal(answer[0][name], truth[0][name])


def _type(op: str, dtype: str, kind: str) -> str:
    return loss_dtype(dtype) if op == "cross_entropy" and not kind else dtype


def oracle(op: str, arrays: Named, upstream: Named, *, axis: int = -1, **options: Any) -> Answer:
    """The truth for `judge`: values and the gradient at the input."""
    x = arrays["input"]
    if op == "softmax":
        y = reference.softmax(x, axis=axis)
        return {"value": y}, {"input": reference.softmax_vjp(y, upstream["value"], axis=axis)}
    if op == "log_softmax":
        y = reference.log_softmax(x, axis=axis)
        return {"value": y}, {"input": reference.log_softmax_vjp(x, upstream["value"], axis=axis)}
    axis = 1 if np.ndim(x) > 1 else 0
    given: list[Any] = [arrays.get(k) for k in ("input", "target", "weight")]
    s = arrays.get("logit_scale")  # an array
    options = {"axis": axis, "token_weight": arrays.get("token_weight"), **options}
    options |= {} if s is None else {"logit_scale": s}
    out = reference.cross_entropy(*given, **options)
    loss, stats = out if isinstance(out, tuple) else (out, {})
    dstats = {k: v for k, v in upstream.items() if k != "value"}
    grad = reference.cross_entropy_grad(*given, dloss=upstream["value"], dstats=dstats, **options)
    more = {} if s is None else {"logit_scale": reference.logit_scale_grad(x, grad, s, axis=axis)}
    return {"value": loss, **stats}, {"input": grad, **more}


def scales(op: str, arrays: Named, upstream: Named, *, axis: int = -1, dtype: str, **options: Any) -> Answer:
    """The scale of every entry of `oracle`'s answer."""
    with np.errstate(all="ignore"):
        if op == "cross_entropy":
            return _loss_scales(arrays, upstream, **options)
        x, dy = along(arrays["input"], axis), along(upstream["value"], axis)
        p = reference.softmax(x)
        q = _others(p)
        if op == "softmax":  # about the mean of dy: neither what all dy have in common nor a confident row's own hides
            g = dy - np.sum(p * dy, -1, keepdims=True)
            away = np.abs(g * q - _others(p * g))
            value, size = p, p * (away + np.sum(p * away, -1, keepdims=True))
            if dtype in HALF:  # the backward starts from the rounded output, off by up to h
                h = 0.51 * ulp(p, dtype)
                size = size + (h * away + p * np.sum(h * away, -1, keepdims=True)) / (
                    C["softmax gradient"] * U["float32"]
                )
        else:
            value, size = np.abs(reference.log_softmax(x)), q * np.abs(dy) + p * _others(np.abs(dy))
        return {"value": np.moveaxis(value, -1, axis)}, {"input": np.moveaxis(size, -1, axis)}


def _loss_scales(
    arrays: Named,
    upstream: Named,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: Any = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    stats: tuple[str, ...] = (),
    on_all_ignored: str = "nan",
) -> Answer:
    axis = 1 if np.ndim(arrays["input"]) > 1 else 0
    x, target = along(arrays["input"], axis), np.asarray(arrays["target"])
    hard = target.dtype.kind in "iu"
    classes, rows = x.shape[-1], x.shape[:-1]
    w = np.asarray(arrays.get("weight", np.ones(classes)), np.float64)
    tw = np.asarray(arrays.get("token_weight", np.ones(rows)), np.float64)
    keep = (target != ignore_index) if hard else np.ones(rows, bool)
    index = np.clip(np.where(keep, target, 0), 0, classes - 1).astype(int) if hard else np.zeros(rows, int)
    wt = w[index] if hard else np.ones(rows)
    y = (index[..., None] == np.arange(classes)) * 1.0 if hard else np.abs(along(target, axis)) * w

    of_rows = "logit_scale" in arrays
    s_x = np.asarray(arrays.get("logit_scale", logit_scale), np.float64)
    s_x = s_x[..., None] if s_x.ndim else s_x
    u = np.where(np.isneginf(x), x, s_x * x)
    z = u if softcap is None else np.where(np.isneginf(u), u, softcap * np.tanh(u / softcap))
    p, logp = reference.softmax(z), np.abs(reference.log_softmax(z))
    q = _others(p)
    m = np.max(z, -1, keepdims=True)
    size = np.where(np.isfinite(z), np.abs(z), 0)
    # Scaled or capped logits are rounded: e_j = exp(z_j - m) is off by r_j more units, p_j by r_j + mean.
    r = (size + np.abs(m)) * bool(np.any(s_x != 1.0) or softcap is not None)
    mean = np.sum(p * r, -1, keepdims=True)
    lse = (np.abs(m) + np.log1p(np.expm1(logp.min(-1, keepdims=True))) + mean)[..., 0]
    entropy = _dot(p, logp)[..., None]
    value = {"lse": lse, "logprob": _dot(y, logp + r + mean)}
    p2 = reference.softmax(2 * z)
    value["log_sum_sq"] = np.log1p(np.expm1(logp.min(-1))) * 3 + 2 * (mean + np.sum(p2 * r, -1, keepdims=True))[..., 0]
    value["mean_logit"] = np.mean(np.abs(z) * (1 + classes / 256), -1)
    value["entropy"] = (entropy + _dot(p, (r + mean) * (logp + entropy))[..., None])[..., 0]

    s = label_smoothing
    mass = (1 - s) * wt[..., None] * y + s / classes * w
    squared = 2 * z_loss * np.abs(np.log(np.sum(np.exp(z - m), -1)) + m[..., 0]) * lse
    loss = np.where(keep, tw * (_dot(mass, logp + r + mean) + squared), 0)
    share = 1.0
    if reduction == "mean":
        share = 1 / np.sum(np.where(keep, tw * wt, 0))
    up = {k: np.abs(v)[..., None] for k, v in upstream.items()}
    g = up["value"] * share * tw[..., None]
    a = g * mass + up.get("logprob", 0) * y
    if hard and s == 0:
        d = a.sum(-1, keepdims=True) * np.where(y > 0, q + _dot(p, r)[..., None] - p * r, p * (1 + r)) + a * q * mean
        d = np.where(y > 0, d, d + a.sum(-1, keepdims=True) * p * mean)
    else:
        d = a.sum(-1, keepdims=True) * p * (1 + r + mean) + a
    d = d + p * (1 + r + mean) * (2 * z_loss * g * lse[..., None] + up.get("lse", 0))
    surprise = np.where(p > 0, logp + entropy + r + mean, 0)
    d = d + up.get("entropy", 0) * p * (1 + r + mean) * surprise
    d = d + up.get("log_sum_sq", 0) * 2 * np.where(p > 0.5, q, p) * (2 + 2 * r + 2 * mean) * 2
    d = d + up.get("mean_logit", 0) / classes
    if softcap is not None:
        bend = np.abs(u / softcap)
        d = np.where(np.isneginf(u), 0, d * (1 + 2 * bend) / np.cosh(bend) ** 2)
    d = np.where(keep[..., None], s_x * d, 0)
    value = {k: np.where(keep, v, 0) for k, v in value.items() if k in stats}
    total = loss if reduction == "none" else np.sum(loss) * share
    more = {}
    if of_rows:
        each = np.sum(np.where(np.isneginf(x), 0, np.abs(x) * d), -1)
        more["logit_scale"] = each / s_x[..., 0] if s_x.ndim else np.sum(each) / s_x
    return {"value": total, **value}, {"input": np.moveaxis(d, -1, axis), **more}


def _others(p: Array) -> Array:
    """The sum of a row without each entry in turn, by prefix and suffix: 1 - p would cancel."""
    zero = np.zeros_like(p[..., :1])
    before = np.concatenate([zero, np.cumsum(p[..., :-1], -1)], -1)
    return before + np.concatenate([np.cumsum(p[..., :0:-1], -1)[..., ::-1], zero], -1)


def _dot(mass: Array, value: Array) -> Array:
    return np.sum(np.where(mass == 0, 0, mass * value), -1)
