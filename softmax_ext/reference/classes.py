"""K classes a row: sparse targets as dense ones, logits of K classes, the points of a sampled gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from softmax_ext.reference.arithmetic import WIDE, Array, quiet, wide


class Pair(NamedTuple):
    """A sparse target (ids, probabilities) with its K last."""

    ids: Array  # (.., K)
    y: Array  # (.., K)

    def dense(self, classes: int, ignored: int) -> tuple[Array, Array, Array]:
        """The soft target that adds the pairs up (.., V), which rows are kept, which name no class."""
        kept = self.ids != ignored
        valid = kept & (self.ids >= 0) & (self.ids < classes)
        y = np.zeros((*self.ids.shape[:-1], classes), WIDE)
        for *row, k in np.argwhere(valid):
            y[(*row, int(self.ids[(*row, k)]))] += wide(self.y)[(*row, k)]
        return y, kept.any(-1), (kept & ~valid).any(-1)

    def slots(self, classes: int, ignored: int) -> tuple[Array, Array, Array]:
        """Places to read for each slot, which slots are kept, which name no class."""
        kept = self.ids != ignored
        valid = kept & (self.ids >= 0) & (self.ids < classes)
        return np.where(valid, self.ids, 0).astype(np.int64), kept, kept & ~valid


def pair_of(target: Any, axis: int) -> Pair | None:
    """A sparse target, two arrays, with its K last; None for any other."""
    if not (isinstance(target, tuple | list) and len(target) == 2 and all(isinstance(a, np.ndarray) for a in target)):
        return None
    ids, y = (np.moveaxis(np.atleast_1d(np.asarray(a)), axis, -1) for a in target)
    return Pair(ids, y)


@quiet
def linear_at(
    input: ArrayLike,
    linear_weight: ArrayLike,
    ids: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    ignore_index: int = -100,
) -> Array:
    """Logits of K classes a row: x . W[id] + b[id], no unit.

    Args:
        input: (..., D).
        linear_weight: (V, D).
        ids: (..., K); ignore_index gives -inf, any other id outside [0, V) NaN.
        linear_bias: (V,).
        ignore_index: the id of a slot without a class.

    Returns:
        The shape of ids.

    Source: document 3's z = x w + b, of the classes named.
    """
    x, w, ids = wide(input), wide(linear_weight), np.asarray(ids)
    at, kept, bad = Pair(ids, ids).slots(len(w), ignore_index)
    z = np.sum(x[..., None, :] * w[at], -1)
    if linear_bias is not None:
        z = z + wide(linear_bias)[at]
    return np.where(bad, np.nan, np.where(kept, z, -np.inf)).astype(np.float64)


@quiet
def linear_at_grad(
    input: ArrayLike,
    linear_weight: ArrayLike,
    ids: ArrayLike,
    dz: ArrayLike,
    *,
    ignore_index: int = -100,
) -> tuple[Array, Array, Array]:
    """Gradients of linear_at at input, linear_weight and linear_bias.

    dX_i = sum_k dz_ik W[id_ik],  dW[v] = sum of dz_ik x_i over id_ik = v,  db[v] = sum of dz_ik over id_ik = v

    Args:
        input: as in linear_at, and so what is not named here.
        dz: dL/d(logits), the shape of ids.

    Returns:
        (dX, dW, db). A slot that names no class makes its row of dX NaN and adds nothing to dW and db.

    Source: the chain rule in document 3, dE/dw = dE/da da/dz dz/dw.
    """
    x, w, ids = wide(input), wide(linear_weight), np.asarray(ids)
    at, kept, bad = Pair(ids, ids).slots(len(w), ignore_index)
    c = np.where(kept & ~bad, wide(dz), 0)
    dx = np.where(bad.any(-1, keepdims=True), np.nan, np.sum(c[..., None] * w[at], -2))
    dw, db = np.zeros_like(w), np.zeros(len(w), WIDE)
    np.add.at(dw, at.reshape(-1), (c[..., None] * x[..., None, :]).reshape(-1, x.shape[-1]))
    np.add.at(db, at.reshape(-1), c.reshape(-1))
    return dx.astype(np.float64), dw.astype(np.float64), db.astype(np.float64)


@quiet
def points(logits: ArrayLike, excepted: ArrayLike, u: ArrayLike) -> tuple[Array, Array]:
    """K stratified points a row of what is left of its distribution without some classes.

    Point k is the first class j with sum_{i <= j} r_i > (k + u_k) / K,  r_i = p_i / q off the excepted, q their sum.

    Args:
        logits: (N, V), scaled and capped.
        excepted: (N, E) classes left out; -1 is no class.
        u: (N, K), uniform in [0, 1).

    Returns:
        (ids (N, K), q (N,)): where q is 0 there is no point and its ids are -1.

    Source: stratified sampling of r, the softmax of documents 1-4 without its target.
    """
    z, u, excepted = wide(logits), wide(u), np.asarray(excepted)
    p = np.exp(z - z.max(-1, keepdims=True))
    total = p.sum(-1, keepdims=True)
    for row, classes in zip(p, excepted, strict=True):
        row[classes[classes >= 0]] = 0
    sums = np.cumsum(p, -1)
    at = (np.arange(u.shape[-1]) + u) / max(u.shape[-1], 1) * sums[:, -1:]
    ids = np.array([np.searchsorted(s, t, "right") for s, t in zip(sums, at, strict=True)]).reshape(u.shape)
    last = np.array([np.flatnonzero(row)[-1] if row.any() else -1 for row in p]).reshape(-1, 1)
    ids = np.where(sums[:, -1:] > 0, np.minimum(ids, last), -1)
    return ids, (sums[:, -1] / total[:, 0]).astype(np.float64)
