"""Cross-entropy of a linear layer's logits, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from softmax_ext.contract import LossOptions
from softmax_ext.reference.arithmetic import WIDE, Array, quiet, wide
from softmax_ext.reference.classes import Pair, pair_of
from softmax_ext.reference.rows import Rows, gradient_of, loss_of, rows_of, stats_of


class _Head(NamedTuple):
    """The linear loss flattened to R rows, P positions of a K-d weight (1 without), V classes."""

    x: Array  # (R, D)
    w: Array  # (V, P, D)
    rows: Rows  # of logits (R, P, V)
    lead: tuple[int, ...]  # the losses' shape: the rows', then the positions'
    inner: tuple[int, ...]


def _head(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: Any,
    bias: ArrayLike | None,
    weight: ArrayLike | None,
    token_weight: ArrayLike | None,
    shift: int,
    o: LossOptions,
    low_rank: Any = None,
) -> _Head:
    x, w, s = wide(input), wide(linear_weight), np.asarray(o.logit_scale)
    if low_rank is not None:  # x WT + (x AT) BT is a head of W + B A
        w = w + wide(low_rank[1]) @ wide(low_rank[0])
    if shift:  # position i is judged by the target k further on
        x = x[..., : max(x.shape[-2] - shift, 0), :]
        token_weight = None if token_weight is None else np.asarray(token_weight)[..., shift:]
        s = s[..., : x.shape[-2]] if s.ndim else s
    lead, (classes, *inner, features) = x.shape[:-1], w.shape
    flat = (math.prod(lead), math.prod(inner))
    x, w = x.reshape(flat[0], features), w.reshape(classes, flat[1], features)
    z = x @ w.reshape(-1, features).T if features else np.zeros((len(x), classes * flat[1]), WIDE)
    z = z.reshape(flat[0], classes, flat[1])
    if bias is not None:
        z = z + wide(bias).reshape(classes, flat[1])

    def laid_out(t: Array, soft: bool) -> Array:
        if shift:
            t = t[..., shift:, :] if soft else t[..., shift:]
        return np.moveaxis(t.reshape(flat[0], t.shape[len(lead)], flat[1]), 1, -1) if soft else t.reshape(flat)

    if pair_of(target, -1) is not None:
        t = Pair(*(laid_out(a, True) for a in target))
    else:
        t = laid_out(np.asarray(target), np.asarray(target).dtype.kind not in "iu")
    tw = None if token_weight is None else wide(token_weight).reshape(flat)
    o = replace(o, logit_scale=s.reshape(flat) if s.ndim else o.logit_scale)  # pyright: ignore[reportArgumentType]
    return _Head(x, w, rows_of(np.moveaxis(z, 1, -1), t, weight, tw, o), lead, tuple(inner))


def _as_given(value: Array, h: _Head) -> Array:
    """(R, P) in the losses' shape; (R, P, K) with K where the target had it."""
    if value.ndim == 2:
        return value.reshape((*h.lead, *h.inner))
    return np.moveaxis(value, -1, 1).reshape(*h.lead, value.shape[-1], *h.inner)


def _laid_out(value: Array, h: _Head, k: bool) -> Array:
    """`_as_given`, the other way."""
    flat = (math.prod(h.lead), math.prod(h.inner))
    return np.moveaxis(value.reshape(flat[0], -1, flat[1]), 1, -1) if k else value.reshape(flat)


@quiet
def linear_cross_entropy(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: Any,
    *,
    linear_bias: ArrayLike | None = None,
    low_rank: Any = None,
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
        target: (...) integers or (..., V) floating; K-d: (N, d1, .., dK) or (N, V, d1, .., dK); or a pair, ids and
            their probabilities, with K where the floating one has V.
        linear_bias: linear_weight's shape without D.
        low_rank: (A, B) of shapes (r, D) and (V, r), which add (input AT) BT.
        weight: per class, (V,).
        token_weight: per row, the shape of the integer target.
        shift: k judges input[..., :-k, :] by target[..., k:].
        **options: the fields of contract.LossOptions.

    Returns:
        As cross_entropy.

    Source: document 3's z = x w + b, then document 4.
    """
    o = LossOptions(**options)
    h = _head(input, linear_weight, target, linear_bias, weight, token_weight, shift, o, low_rank)
    loss = np.asarray(loss_of(h.rows, o), np.float64)
    loss = loss.reshape((*h.lead, *h.inner)) if o.reduction == "none" else loss
    stats = {name: _as_given(s, h) for name, s in stats_of(h.rows, o).items()}
    return (loss, stats) if o.stats else loss


@quiet
def linear_cross_entropy_grad(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: Any,
    *,
    linear_bias: ArrayLike | None = None,
    low_rank: Any = None,
    weight: ArrayLike | None = None,
    token_weight: ArrayLike | None = None,
    shift: int = 0,
    dloss: ArrayLike = 1.0,
    dstats: Mapping[str, ArrayLike] | None = None,
    **options: Any,
) -> tuple[Array, Array, Array | None]:
    """Gradients of linear_cross_entropy at input, linear_weight and linear_bias.

    dX = G W,  dW = GT X,  db = sum_i G_i,  G = dL/dlogits; of low_rank dA = BT dW and dB = dW AT

    Args:
        input: as in linear_cross_entropy, and so what is not named here.
        dloss: dL/dloss, of the loss's shape.
        dstats: dL/d(stat) by name, of the losses' shape.

    Returns:
        (dX, dW, db or None), each of its argument's shape.

    Source: the chain rule in document 3, dE/dw = dE/da da/dz dz/dw.
    """
    o = LossOptions(**options)
    h = _head(input, linear_weight, target, linear_bias, weight, token_weight, shift, o, low_rank)
    flat = h.rows.lse.shape
    dloss = np.reshape(dloss, flat) if o.reduction == "none" and np.ndim(dloss) else dloss
    slots = h.rows.slots is not None
    ups = {name: _laid_out(np.asarray(d), h, name == "logprob" and slots) for name, d in (dstats or {}).items()}
    g = gradient_of(h.rows, o, dloss, ups)
    dx, dw = np.zeros_like(h.x), np.zeros_like(h.w)
    db = np.zeros(h.w.shape[:2], WIDE)
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
