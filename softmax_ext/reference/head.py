"""Cross-entropy of a linear layer's logits, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from softmax_ext.contract import LossOptions
from softmax_ext.reference.arithmetic import WIDE, Array, quiet, wide
from softmax_ext.reference.rows import Rows, gradient_of, loss_of, rows_of, stats_of


class _Head(NamedTuple):
    """The linear loss flattened to R rows, P positions of a K-d weight (1 without), V classes."""

    x: Array  # (R, D)
    w: Array  # (V, P, D)
    rows: Rows  # of logits (R, P, V)
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
    x, w, t = wide(input), wide(linear_weight), np.asarray(target)
    soft = t.dtype.kind not in "iu"
    if shift:  # position i is judged by the target k further on
        x = x[..., : max(x.shape[-2] - shift, 0), :]
        t = t[..., shift:, :] if soft else t[..., shift:]
        token_weight = None if token_weight is None else np.asarray(token_weight)[..., shift:]
    lead, (classes, *inner, features) = x.shape[:-1], w.shape
    flat = (math.prod(lead), math.prod(inner))
    x, w = x.reshape(flat[0], features), w.reshape(classes, flat[1], features)
    z = x @ w.reshape(-1, features).T if features else np.zeros((len(x), classes * flat[1]), WIDE)
    z = z.reshape(flat[0], classes, flat[1])
    if bias is not None:
        z = z + wide(bias).reshape(classes, flat[1])
    t = np.moveaxis(t.reshape(z.shape), 1, -1) if soft else t.reshape(flat)
    tw = None if token_weight is None else wide(token_weight).reshape(flat)
    return _Head(x, w, rows_of(np.moveaxis(z, 1, -1), t, weight, tw, o), (*lead, *inner))


@quiet
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
    loss = np.asarray(loss_of(h.rows, o), np.float64)
    loss = loss.reshape(h.shape) if o.reduction == "none" else loss
    stats = {name: s.reshape(h.shape) for name, s in stats_of(h.rows, o).items()}
    return (loss, stats) if o.stats else loss


@quiet
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
