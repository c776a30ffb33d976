"""Cross-entropy of rows of logits, and its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from softmax_ext.contract import LossOptions
from softmax_ext.reference.arithmetic import WIDE, Array, back, last, mass_sum, others, parts, quiet, wide
from softmax_ext.reference.classes import Pair, pair_of


class Rows(NamedTuple):
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
    logprob: Array  # log p of the target: row-shaped, (.., K) of a sparse one
    slots: tuple[Array, Array, Array] | None = None  # of a sparse target
    index: Any = None  # of class indices, 0 where they name no class


def rows_of(
    x: Array,
    target: Array | Pair,
    weight: ArrayLike | None,
    token_weight: ArrayLike | None,
    o: LossOptions,
) -> Rows:
    """Rows of logits (.., V) with their targets and weights."""
    rows, classes = x.shape[:-1], x.shape[-1]
    w = np.ones(classes, WIDE) if weight is None else wide(weight)
    tw = np.ones(rows, WIDE) if token_weight is None else wide(token_weight)
    keep, bad, wt = np.ones(rows, bool), np.zeros(rows, bool), np.ones(rows, WIDE)
    slots = index = None
    if isinstance(target, Pair):
        y, keep, bad = target.dense(classes, o.ignored)
        y, slots = y * w, target.slots(classes, o.ignored)
    elif target.dtype.kind in "iu":
        keep = target != o.ignored  # before any conversion: uint8 156 is not -100
        valid = (target >= 0) & (target < classes)
        bad = keep & ~valid
        index = np.where(valid, target, 0).astype(np.int64)
        y = (valid[..., None] & (index[..., None] == np.arange(classes))).astype(WIDE)
        wt = w[index]  # a bad row, NaN anyway, counts in the mean's denominator as class 0
    else:
        y = wide(target) * w
    # u = scale x, z = C(u) = c tanh(u/c), C'(u) = 1 - tanh^2 = 1/cosh^2
    s: Any = wide(o.logit_scale)
    s = s[..., None] if s.ndim else s
    with_class = np.where(keep[..., None], x, 0)
    u = np.where(np.isneginf(with_class), with_class, s * with_class)
    z, dz = u, np.broadcast_to(s, u.shape)
    if o.softcap is not None:
        z = np.where(np.isneginf(u), u, o.softcap * np.tanh(u / o.softcap))
        dz = s / np.cosh(u / o.softcap) ** 2
    p, q, logp, lse = parts(z)
    nll = np.where(bad, np.nan, -mass_sum(y, logp))
    logprob = -nll
    if slots is not None:
        at, kept, no_class = slots
        logprob = np.take_along_axis(logp, at, -1) if classes else np.full(at.shape, np.nan)
        logprob = np.where(kept, np.where(no_class, np.nan, logprob), 0)
    return Rows(z, dz, p, q, logp, lse, -mass_sum(p, logp), nll, y, w, wt, tw, keep, bad, logprob, slots, index)


def _smoothed(r: Rows, o: LossOptions) -> tuple[Any, Any]:
    s = WIDE(o.label_smoothing)
    return 1 - s, s / max(r.p.shape[-1], 1)  # what y and the uniform target are multiplied by


def _share(r: Rows, o: LossOptions) -> Any:
    """What the summed loss is multiplied by: 1, or 1/denominator, or the 0 of on_all_ignored."""
    if o.reduction != "mean":
        return 1
    total = np.sum(np.where(r.keep, r.tw * r.wt, 0), dtype=WIDE)
    return 0 if total == 0 and o.on_all_ignored == "zero" else 1 / total


def loss_of(r: Rows, o: LossOptions) -> Any:
    """The loss, reduced."""
    # loss_i = tw_i ((1-s) w_t nll_i + s/V smooth_i + z_loss lse_i^2), smooth = -sum_j w_j log p_j:
    # document 4's -sum y log s on the smoothed target (1-s) y + s/V, plus the z-loss.
    of_y, of_uniform = _smoothed(r, o)
    loss = o.z_loss * r.lse**2
    if of_y:  # where s is 0 or 1 one of the two has no mass: 0 * inf is not formed
        loss = loss + of_y * r.wt * r.nll
    if of_uniform:
        loss = loss - of_uniform * mass_sum(np.broadcast_to(r.w, r.logp.shape), r.logp)
    loss = np.where(r.keep, np.where(r.bad, np.nan, r.tw * loss), 0)
    if o.reduction == "none":
        return loss
    share = _share(r, o)
    return np.sum(loss, dtype=WIDE) * share if share != 0 else 0


def stats_of(r: Rows, o: LossOptions) -> dict[str, Array]:
    """The statistics asked for."""
    # log sum_j p_j^2 = lse(2 z) - 2 lse(z), less twice the maximum in both: a confident row's is no log of 1
    top, top2 = (np.max(logp, -1, initial=-np.inf) for logp in (r.logp, parts(2 * r.z)[2]))
    values = {"lse": r.lse, "logprob": r.logprob, "entropy": r.entropy}
    values |= {"log_sum_sq": 2 * top - top2, "mean_logit": np.sum(r.z, -1) / max(r.z.shape[-1], 1)}
    stats = {n: np.where(r.keep if v.ndim == r.keep.ndim else True, v, 0) for n, v in values.items()}
    stats = {n: v.astype(np.float64) for n, v in stats.items()}
    if "argmax" in o.stats:
        stats["argmax"] = np.where(r.keep, np.argmax(r.z.astype(np.float64), -1), -1)
    if "rank" in o.stats:
        stats["rank"] = _rank(r)
    return {name: stats[name] for name in o.stats}


def _rank(r: Rows) -> Array:
    """How many logits are larger than the target's, NaN the largest; -1 where there is no such class."""
    if r.slots is None:
        at, good = r.index[..., None], (r.keep & ~r.bad)[..., None]
    else:
        at, kept, no_class = r.slots
        good = kept & ~no_class
    if not r.z.shape[-1]:
        return np.full(r.lse.shape if r.slots is None else at.shape, -1)
    z = r.z.astype(np.float64)
    mine = np.take_along_axis(z, at, -1)[..., None, :]
    count = np.sum((z[..., None] > mine) | (np.isnan(z)[..., None] & ~np.isnan(mine)), -2)
    count = np.where(good, count, -1)
    return count[..., 0] if r.slots is None else count


def gradient_of(r: Rows, o: LossOptions, dloss: ArrayLike, dstats: Mapping[str, ArrayLike]) -> Array:
    """dL/dx of every row."""
    up = {name: wide(d)[..., None] for name, d in dstats.items() if name != "logprob" or r.slots is None}
    g = (wide(dloss) * _share(r, o) * r.tw)[..., None]  # dL/dloss_i
    # The mass a_j that L puts on -log p_j; L also holds d_lse lse + d_h H (H the entropy).
    of_y, of_uniform = _smoothed(r, o)
    a = g * (of_y * r.wt[..., None] * r.y + of_uniform * r.w)
    a = a - up.get("logprob", 0) * r.y
    if r.slots is not None and "logprob" in dstats:
        at, kept, no_class = r.slots
        d_slot = np.where(kept & ~no_class, wide(dstats["logprob"]), 0)
        for place in np.ndindex(at.shape):
            a[(*place[:-1], at[place])] -= d_slot[place]
    d_lse = 2 * o.z_loss * g * r.lse[..., None] + up.get("lse", 0)
    # Document 4 without its last step (sum(y) = 1): -sum_i a_i (delta_ij - p_j) = p_j sum(a) - a_j.
    # Splitting a_j from the sum gives p_j sum_{k != j} a_k - a_j (1 - p_j): no cancellation.
    # d lse/dz_j = p_j (document 2, d ln sum/dz_j);  dH/dz_j = -p_j (log p_j + H), 0 where p_j = 0.
    d = r.p * others(a) - a * r.q + d_lse * r.p
    if "entropy" in up:
        h = r.p * (r.logp + r.entropy[..., None])
        d = d - up["entropy"] * np.where(r.p == 0, 0, h)
    if "log_sum_sq" in up:  # 2 (softmax(2 z) - p), from the others' side where one class has most
        p2, q2, _, _ = parts(2 * r.z)
        d = d + up["log_sum_sq"] * 2 * np.where(r.p > 0.5, r.q - q2, p2 - r.p)
    if "mean_logit" in up:
        d = d + up["mean_logit"] / r.p.shape[-1]
    d = np.where(r.bad[..., None], np.nan, d * r.dz)  # chain rule through C(scale x)
    return np.where(r.keep[..., None], d, 0)


def _target(target: Any, axis: int) -> Array | Pair:
    pair = pair_of(target, axis)
    if pair is not None:
        return pair
    t = np.asarray(target)
    return t if t.dtype.kind in "iu" else np.moveaxis(t, axis, -1)


@quiet
def cross_entropy(
    input: ArrayLike,
    target: Any,
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
        target: integers of the row shape (y one-hot), floating of input's shape (any sum), or a pair of both
            with K along `axis`: the ids and their probabilities.
        weight: per class, (V,).
        axis: the class axis.
        token_weight: per row, the row shape.
        **options: the fields of contract.LossOptions; logit_scale may be an array of the row shape too.

    Returns:
        The loss, a scalar or (reduction "none") row-shaped; with stats, (loss, {name: array}).

    Source: document 4, "Categorical Cross-Entropy Loss"; the options are ours.
    """
    o = LossOptions(**options)
    r = rows_of(last(input, axis), _target(target, axis), weight, token_weight, o)
    loss = np.asarray(loss_of(r, o), np.float64)
    stats = stats_of(r, o)
    for name in ("logprob", "rank"):
        if r.slots is not None and name in stats:
            stats[name] = np.moveaxis(stats[name], -1, axis)
    return (loss, stats) if o.stats else loss


@quiet
def cross_entropy_grad(
    input: ArrayLike,
    target: Any,
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
        dstats: dL/d(stat) by name ("lse", "logprob", "entropy", "log_sum_sq", "mean_logit"), of the statistics' shape.

    Returns:
        dL/dinput, the shape of input.

    Source: document 4, its last section, before sum(y) is taken to be 1.
    """
    o = LossOptions(**options)
    r = rows_of(last(input, axis), _target(target, axis), weight, token_weight, o)
    ups = dict(dstats or {})
    if r.slots is not None and "logprob" in ups:
        ups["logprob"] = np.moveaxis(np.asarray(ups["logprob"]), axis, -1)
    return back(gradient_of(r, o, dloss, ups), axis, np.shape(input))


@quiet
def logit_scale_grad(input: ArrayLike, dinput: ArrayLike, logit_scale: ArrayLike, *, axis: int = -1) -> Array:
    """Gradient of a loss of logit_scale * input at logit_scale, from that at input.

    ds = sum_j x_j dx_j / s

    Args:
        input: logits; rows of V classes along `axis`. One of -inf has no part.
        dinput: dL/dinput, the shape of input.
        logit_scale: a number, or the row shape.
        axis: the class axis.

    Returns:
        dL/dlogit_scale, the shape of logit_scale.

    Source: the chain rule, d(s x)/ds = x and d(s x)/dx = s.
    """
    x, dx, s = last(input, axis), last(dinput, axis), wide(logit_scale)
    each = np.sum(np.where(np.isneginf(x) | (dx == 0), 0, x * dx), -1)
    return np.asarray(each / s if s.ndim else np.sum(each) / s, np.float64)
