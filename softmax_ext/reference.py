"""The maths of the source documents in NumPy float64, nothing fast: what the tests judge by.

docs/derivation.md walks through the sources and says which step each function comes from:
  1. MLDawn, "The Derivative of Softmax(z) Function w.r.t z"
  2. John Purcell, "Derivative of the Softmax Function" (2021)
  3. a question with its answer: why the derivative is written in the output a, not in z
  4. Thomas Kurbiel, "Derivative of the Softmax Function and the Categorical Cross-Entropy Loss"

Sums run in long double where the machine has one, so the float64 handed back is right to its last
digits. Losses are in nats. Nothing here checks its arguments: contract.py does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from softmax_ext.contract import LossOptions

Array = np.ndarray[Any, np.dtype[Any]]

# One float64 step near 1e4 is 2e-12: exp of a difference that lost that much is wrong in digit 12.
_WIDE = np.longdouble

# +-inf and NaN are data here (a masked class, a bad row), so no function may warn about them.
_quiet = np.errstate(all="ignore")


def _wide(x: ArrayLike) -> Array:
    return np.asarray(x, np.float64).astype(_WIDE)


def _last(x: ArrayLike, axis: int) -> Array:
    return np.moveaxis(np.atleast_1d(_wide(x)), axis, -1)


def _back(out: Array, axis: int, shape: tuple[int, ...]) -> Array:
    return np.moveaxis(out, -1, axis).astype(np.float64).reshape(shape)


def _others(x: Array) -> Array:
    """Sum of a row's entries but the one in question: prefix plus suffix, never a subtraction."""
    zero = np.zeros_like(x[..., :1])
    before = np.concatenate([zero, np.cumsum(x[..., :-1], -1)], -1)
    after = np.concatenate([np.cumsum(x[..., :0:-1], -1)[..., ::-1], zero], -1)
    return before + after


def _sum(mass: Array, value: Array) -> Array:
    """sum_j mass_j value_j where no mass contributes 0, also against an infinite value."""
    return np.sum(np.where(mass == 0, 0, mass * value), -1)


def _parts(z: Array) -> tuple[Array, Array, Array, Array]:
    """The probabilities p, their complements q = 1 - p, log p and lse of rows z."""
    # Legend: m = max z, e_j = exp(z_j - m), rest = sum of e but one maximum, total = 1 + rest.
    # p_j = e_j / total                            documents 1-4, shifted by m (same quotient)
    # q_j = sum_{k != j} e_k / total               not 1 - p_j: that is 0 once p_j rounds to 1
    # log p_j = (z_j - m) - log1p(rest)            documents 2 and 4: z_i - ln sum e^z_n
    # lse = m + log1p(rest)
    m = np.max(z, -1, keepdims=True, initial=-np.inf)
    m = np.where(np.isfinite(m), m, np.nan)  # a row all -inf, or holding +inf or NaN, is NaN
    e = np.exp(z - m)
    others = _others(e)
    rest = np.min(others, -1, keepdims=True, initial=np.inf)  # smallest where e is largest
    log_total = np.log1p(rest)
    return e / (1 + rest), others / (1 + rest), z - m - log_total, (m + log_total)[..., 0]


@_quiet
def softmax(x: ArrayLike, *, axis: int = -1) -> Array:
    """Probabilities of the logits along one axis.

    a_i = exp(x_i) / sum_j exp(x_j)

    Args:
        x: logits, any shape.
        axis: the class axis.

    Returns:
        The shape of x, each row summing to 1.

    Source: documents 1-4, their first formula.
    """
    return _back(_parts(_last(x, axis))[0], axis, np.shape(x))


@_quiet
def log_softmax(x: ArrayLike, *, axis: int = -1) -> Array:
    """Log-probabilities of the logits along one axis, in nats.

    ln a_i = x_i - ln sum_n exp(x_n)

    Args:
        x: logits, any shape.
        axis: the class axis.

    Returns:
        The shape of x.

    Source: document 2 before its (5); document 4, "the logarithm of s".
    """
    return _back(_parts(_last(x, axis))[2], axis, np.shape(x))


def softmax_jacobian(a: ArrayLike) -> Array:
    """Jacobian of softmax, from its output alone.

    da_i / dz_j = a_i (delta_ij - a_j), that is diag(a) - a aT

    Args:
        a: softmax's output, (V,).

    Returns:
        (V, V): row i the output, column j the input; symmetric.

    Source: document 1 cell by cell, document 2 (5), document 3's matrix form, document 4.
    """
    a = np.asarray(a, np.float64)
    return np.diag(a) - np.outer(a, a)


@_quiet
def softmax_vjp(a: ArrayLike, dy: ArrayLike, *, axis: int = -1) -> Array:
    """Gradient at softmax's input, from its output and the gradient there.

    dx_j = sum_i dy_i a_i (delta_ij - a_j) = a_j (dy_j - sum_i a_i dy_i)

    Args:
        a: softmax's output, any shape.
        dy: dL/da, the shape of a.
        axis: the class axis.

    Returns:
        dL/dx, the shape of a.

    Source: document 1's reader: weighted by dy, the contributions of all outputs add.
    """
    wide, dwide = _last(a, axis), _last(dy, axis)
    return _back(wide * (dwide - np.sum(wide * dwide, -1, keepdims=True)), axis, np.shape(a))


def softmax_jvp(a: ArrayLike, dx: ArrayLike, *, axis: int = -1) -> Array:
    """Change of softmax's output along a change dx of its input.

    da_i = sum_j a_i (delta_ij - a_j) dx_j = a_i (dx_i - sum_j a_j dx_j)

    Args:
        a: softmax's output, any shape.
        dx: the direction, the shape of a.
        axis: the class axis.

    Returns:
        The shape of a. The Jacobian is symmetric, so this is softmax_vjp.

    Source: document 2 (5).
    """
    return softmax_vjp(a, dx, axis=axis)


@_quiet
def log_softmax_vjp(x: ArrayLike, dy: ArrayLike, *, axis: int = -1) -> Array:
    """Gradient at log_softmax's input.

    dx_j = sum_i dy_i (delta_ij - p_j) = dy_j - p_j sum_i dy_i

    Args:
        x: logits, any shape.
        dy: dL/d(log p), the shape of x.
        axis: the class axis.

    Returns:
        dL/dx, the shape of x.

    Source: document 2, ds/dz_j = delta_ij - sigma(z_j); document 4, its second step.
    """
    p, q, _, _ = _parts(_last(x, axis))
    dwide = _last(dy, axis)
    # Split sum_i dy_i into dy_j and the others: dy_j (1 - p_j) - p_j (others), without 1 - p.
    return _back(q * dwide - p * _others(dwide), axis, np.shape(x))


class _Rows(NamedTuple):
    """Everything the loss and its gradient need, class axis last, row-shaped where not (.., V)."""

    z: Array  # C(scale x)
    dz: Array  # dz/dx
    p: Array
    q: Array
    logp: Array
    lse: Array
    entropy: Array
    nll: Array  # -sum_j y_j log p_j, weighted by class for soft targets only
    y: Array  # its mass, (.., V): one-hot, or y * weight
    w: Array  # class weights (V,)
    wt: Array  # the class weight of the row's target; 1 for soft targets
    tw: Array  # token weights
    keep: Array  # not ignored
    bad: Array  # target names no class


def _rows(
    x: Array,
    target: Array,
    weight: ArrayLike | None,
    token_weight: ArrayLike | None,
    o: LossOptions,
) -> _Rows:
    rows, classes = x.shape[:-1], x.shape[-1]
    w = np.ones(classes, _WIDE) if weight is None else _wide(weight)
    tw = np.ones(rows, _WIDE) if token_weight is None else _wide(token_weight)
    keep, bad, wt = np.ones(rows, bool), np.zeros(rows, bool), np.ones(rows, _WIDE)
    if target.dtype.kind in "iu":
        keep = target != o.ignored  # before any conversion: uint8 156 is not -100
        valid = (target >= 0) & (target < classes)
        bad = keep & ~valid
        index = np.where(valid, target, 0).astype(np.int64)
        y = (valid[..., None] & (index[..., None] == np.arange(classes))).astype(_WIDE)
        wt = w[index]  # a bad row, NaN anyway, counts in the mean's denominator as class 0
    else:
        y = _wide(target) * w
    # u = scale x, z = C(u) = c tanh(u/c), C'(u) = 1 - tanh^2 = 1/cosh^2
    u = o.logit_scale * np.where(keep[..., None], x, 0)
    z, dz = u, np.full_like(u, o.logit_scale)
    if o.softcap is not None:
        z = np.where(np.isneginf(u), u, o.softcap * np.tanh(u / o.softcap))
        dz = o.logit_scale / np.cosh(u / o.softcap) ** 2
    p, q, logp, lse = _parts(z)
    nll = np.where(bad, np.nan, -_sum(y, logp))
    return _Rows(z, dz, p, q, logp, lse, -_sum(p, logp), nll, y, w, wt, tw, keep, bad)


def _smoothed(r: _Rows, o: LossOptions) -> tuple[Any, Any]:
    s = _WIDE(o.label_smoothing)
    return 1 - s, s / max(r.p.shape[-1], 1)  # what y and the uniform target are multiplied by


def _share(r: _Rows, o: LossOptions) -> Any:
    """What the summed loss is multiplied by: 1, or 1/denominator, or the 0 of on_all_ignored."""
    if o.reduction != "mean":
        return 1
    total = np.sum(np.where(r.keep, r.tw * r.wt, 0), dtype=_WIDE)
    return 0 if total == 0 and o.on_all_ignored == "zero" else 1 / total


def _loss(r: _Rows, o: LossOptions) -> Any:
    # loss_i = tw_i ((1-s) w_t nll_i + s/V smooth_i + z_loss lse_i^2), smooth = -sum_j w_j log p_j:
    # document 4's -sum y log s on the smoothed target (1-s) y + s/V, plus the z-loss.
    of_y, of_uniform = _smoothed(r, o)
    loss = o.z_loss * r.lse**2
    if of_y:  # where s is 0 or 1 one of the two has no mass: 0 * inf is not formed
        loss = loss + of_y * r.wt * r.nll
    if of_uniform:
        loss = loss - of_uniform * _sum(np.broadcast_to(r.w, r.logp.shape), r.logp)
    loss = np.where(r.keep, np.where(r.bad, np.nan, r.tw * loss), 0)
    if o.reduction == "none":
        return loss
    share = _share(r, o)
    return np.sum(loss, dtype=_WIDE) * share if share != 0 else 0


def _stats(r: _Rows, o: LossOptions) -> dict[str, Array]:
    values = {"lse": r.lse, "logprob": -r.nll, "entropy": r.entropy}
    stats = {n: np.where(r.keep, v, 0).astype(np.float64) for n, v in values.items()}
    if "argmax" in o.stats:
        stats["argmax"] = np.where(r.keep, np.argmax(r.z.astype(np.float64), -1), -1)
    return {name: stats[name] for name in o.stats}


def _gradient(r: _Rows, o: LossOptions, dloss: ArrayLike, dstats: Mapping[str, ArrayLike]) -> Array:
    up = {name: _wide(d)[..., None] for name, d in dstats.items()}
    g = (_wide(dloss) * _share(r, o) * r.tw)[..., None]  # dL/dloss_i
    # The mass a_j that L puts on -log p_j; L also holds d_lse lse + d_h H (H the entropy).
    of_y, of_uniform = _smoothed(r, o)
    a = g * (of_y * r.wt[..., None] * r.y + of_uniform * r.w)
    a = a - up.get("logprob", 0) * r.y
    d_lse = 2 * o.z_loss * g * r.lse[..., None] + up.get("lse", 0)
    # Document 4 without its last step (sum(y) = 1): -sum_i a_i (delta_ij - p_j) = p_j sum(a) - a_j.
    # Splitting a_j from the sum gives p_j sum_{k != j} a_k - a_j (1 - p_j): no cancellation.
    # d lse/dz_j = p_j (document 2, d ln sum/dz_j);  dH/dz_j = -p_j (log p_j + H), 0 where p_j = 0.
    d = r.p * _others(a) - a * r.q + d_lse * r.p
    if "entropy" in up:
        h = r.p * (r.logp + r.entropy[..., None])
        d = d - up["entropy"] * np.where(r.p == 0, 0, h)
    d = np.where(r.bad[..., None], np.nan, d * r.dz)  # chain rule through C(scale x)
    return np.where(r.keep[..., None], d, 0)


def _target(target: ArrayLike, axis: int) -> Array:
    t = np.asarray(target)
    return t if t.dtype.kind in "iu" else np.moveaxis(t, axis, -1)


@_quiet
def cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = -1,
    token_weight: ArrayLike | None = None,
    **options: Any,
) -> Any:
    """Cross-entropy of the softmax of logits against class indices or probabilities, in nats.

    loss = -sum_j w_j ((1-s) y_j + s/V) log p_j + z_loss lse^2,  p = softmax(C(scale input))

    Args:
        input: logits; rows of V classes along `axis`.
        target: integers of the row shape (y one-hot), or floating of input's shape (any sum).
        weight: per class, (V,).
        axis: the class axis.
        token_weight: per row, the row shape.
        **options: the fields of contract.LossOptions.

    Returns:
        The loss, a scalar or (reduction "none") row-shaped; with stats, (loss, {name: array}).

    Source: document 4, "Categorical Cross-Entropy Loss"; the options are ours.
    """
    o = LossOptions(**options)
    r = _rows(_last(input, axis), _target(target, axis), weight, token_weight, o)
    loss = np.asarray(_loss(r, o), np.float64)
    return (loss, _stats(r, o)) if o.stats else loss


@_quiet
def cross_entropy_grad(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = -1,
    token_weight: ArrayLike | None = None,
    dloss: ArrayLike = 1.0,
    dstats: Mapping[str, ArrayLike] | None = None,
    **options: Any,
) -> Array:
    """Gradient of cross_entropy at its logits.

    dz_j = p_j sum_k a_k - a_j + 2 z_loss lse p_j,  a_j = w_j ((1-s) y_j + s/V);  dx = C' scale dz

    Args:
        input: as in cross_entropy, and so what is not named here.
        dloss: dL/dloss, of the loss's shape.
        dstats: dL/d(stat) by name ("lse", "logprob", "entropy"), row-shaped.

    Returns:
        dL/dinput, the shape of input.

    Source: document 4, its last section, before sum(y) is taken to be 1.
    """
    o = LossOptions(**options)
    r = _rows(_last(input, axis), _target(target, axis), weight, token_weight, o)
    return _back(_gradient(r, o, dloss, dstats or {}), axis, np.shape(input))


class _Head(NamedTuple):
    """The linear loss flattened to R rows, P positions of a K-d weight (1 without), V classes."""

    x: Array  # (R, D)
    w: Array  # (V, P, D)
    rows: _Rows  # of logits (R, P, V)
    shape: tuple[int, ...]  # of the losses


def _head(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    bias: ArrayLike | None,
    weight: ArrayLike | None,
    token_weight: ArrayLike | None,
    shift: int,
    o: LossOptions,
) -> _Head:
    x, w, t = _wide(input), _wide(linear_weight), np.asarray(target)
    soft = t.dtype.kind not in "iu"
    if shift:  # position i is judged by the target k further on
        x = x[..., : max(x.shape[-2] - shift, 0), :]
        t = t[..., shift:, :] if soft else t[..., shift:]
        token_weight = None if token_weight is None else np.asarray(token_weight)[..., shift:]
    lead, (classes, *inner, features) = x.shape[:-1], w.shape
    flat = (math.prod(lead), math.prod(inner))
    x, w = x.reshape(flat[0], features), w.reshape(classes, flat[1], features)
    z = x @ w.reshape(-1, features).T if features else np.zeros((len(x), classes * flat[1]), _WIDE)
    z = z.reshape(flat[0], classes, flat[1])
    if bias is not None:
        z = z + _wide(bias).reshape(classes, flat[1])
    t = np.moveaxis(t.reshape(z.shape), 1, -1) if soft else t.reshape(flat)
    tw = None if token_weight is None else _wide(token_weight).reshape(flat)
    return _Head(x, w, _rows(np.moveaxis(z, 1, -1), t, weight, tw, o), (*lead, *inner))


@_quiet
def linear_cross_entropy(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    token_weight: ArrayLike | None = None,
    shift: int = 0,
    **options: Any,
) -> Any:
    """Cross-entropy of a linear layer's logits, in nats.

    loss = cross_entropy(input linear_weightT + linear_bias, target)

    Args:
        input: (..., D).
        linear_weight: (V, D), or (V, d1, .., dK, D) with input (N, D).
        target: (...) integers or (..., V) floating; K-d: (N, d1, .., dK) or (N, V, d1, .., dK).
        linear_bias: linear_weight's shape without D.
        weight: per class, (V,).
        token_weight: per row, the shape of the integer target.
        shift: k judges input[..., :-k, :] by target[..., k:].
        **options: the fields of contract.LossOptions.

    Returns:
        As cross_entropy.

    Source: document 3's z = x w + b, then document 4.
    """
    o = LossOptions(**options)
    h = _head(input, linear_weight, target, linear_bias, weight, token_weight, shift, o)
    loss = np.asarray(_loss(h.rows, o), np.float64)
    loss = loss.reshape(h.shape) if o.reduction == "none" else loss
    stats = {name: s.reshape(h.shape) for name, s in _stats(h.rows, o).items()}
    return (loss, stats) if o.stats else loss


@_quiet
def linear_cross_entropy_grad(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    token_weight: ArrayLike | None = None,
    shift: int = 0,
    dloss: ArrayLike = 1.0,
    dstats: Mapping[str, ArrayLike] | None = None,
    **options: Any,
) -> tuple[Array, Array, Array | None]:
    """Gradients of linear_cross_entropy at input, linear_weight and linear_bias.

    dX = G W,  dW = GT X,  db = sum_i G_i,  G = dL/dlogits

    Args:
        input: as in linear_cross_entropy, and so what is not named here.
        dloss: dL/dloss, of the loss's shape.
        dstats: dL/d(stat) by name, of the losses' shape.

    Returns:
        (dX, dW, db or None), each of its argument's shape.

    Source: the chain rule in document 3, dE/dw = dE/da da/dz dz/dw.
    """
    o = LossOptions(**options)
    h = _head(input, linear_weight, target, linear_bias, weight, token_weight, shift, o)
    flat = h.rows.lse.shape
    dloss = np.reshape(dloss, flat) if o.reduction == "none" and np.ndim(dloss) else dloss
    ups = {name: np.reshape(d, flat) for name, d in (dstats or {}).items()}
    g = _gradient(h.rows, o, dloss, ups)
    dx, dw = np.zeros_like(h.x), np.zeros_like(h.w)
    db = np.zeros(h.w.shape[:2], _WIDE)
    for p in range(flat[1]):
        k = h.rows.keep[:, p]  # an ignored row reaches no result: 0 * NaN would
        gp = g[k, p]
        dx[k] += gp @ h.w[:, p]
        dw[:, p] = gp.T @ h.x[k]
        db[:, p] = gp.sum(0)
    full: Array = np.zeros(np.shape(input))
    at = full[..., : max(full.shape[-2] - shift, 0), :] if shift else full
    at[...] = dx.reshape(at.shape)
    bias = None if linear_bias is None else db.astype(np.float64).reshape(np.shape(linear_bias))
    return full, dw.astype(np.float64).reshape(np.shape(linear_weight)), bias
