"""A linear loss laid out as rows: shift, leading dimensions and K-dimensional weights are seen to here.

n judged rows of x, P positions of a K-dimensional weight (none without).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._head.chunks import Cut, cut, that_fit
from jax_ops._head.linear import Linear, wide
from jax_ops._head.per_row import argmax, per_row
from jax_ops._head.sum import weighted_sum
from jax_ops._parallel.shard import Shard
from jax_ops._reduction import Coefficients
from jax_ops._rows.dispatch import IGNORED, is_soft
from jax_ops._rules.plan import Plan


class Layout(NamedTuple):
    """What a linear loss is the loss of."""

    x: Array  # (n, D); with `up` (n, D + r); (n, P, D..) where each position's rows are scaled by themselves
    w: Array  # (V, D), or (V, P, D)
    b: Array | None
    up: Array | None  # (V, r), or (V, P, r): of rows (x, u) it multiplies u
    target: Array  # (n,) or (n, P) class indices, canonical; (n, V) or (n, V, P) probabilities
    token_weight: Array | None  # (n,) or (n, P)
    shape: tuple[int, ...]  # of the rows
    outside: Any  # which of them the results have

    @property
    def rows(self) -> tuple[int, ...]:
        """(n,) or (n, P)."""
        return (self.x.shape[0], *self.w.shape[1:-1])

    @property
    def kind(self) -> Any:
        """The compute type."""
        return wide(self.x.dtype)

    def as_given(self, value: Array) -> Array:
        """The rows' numbers in the losses' shape."""
        return value.reshape(self.shape)[self.outside]

    def cut(self, lean: bool, chunk_size: int | None, blocks: int) -> Cut:
        """The rows (lean: the classes) in chunks; `blocks` of the rows are on devices of their own."""
        n, classes = self.x.shape[0], self.w.shape[0]
        size, other = (classes, n) if lean else (n, classes)
        itemsize = self.kind.itemsize * math.prod(self.w.shape[1:-1])
        fits = that_fit(chunk_size, other, itemsize, by_rows=not lean)
        return cut(size, fits) if lean else cut(size, fits, strided=True, blocks=blocks)


def lay_out(
    x: Array,
    w: Array,
    b: Array | None,
    target: Array,
    token_weight: Array | None,
    *,
    shift: int,
    scale: Array | None = None,
    low_rank: Sequence[Array] | None = None,
) -> Layout:
    """The layout of checked arguments with canonical targets."""
    length = x.shape[:-1]
    x, target, token_weight, outside = _shifted(x, target, token_weight, shift)
    if scale is not None and scale.ndim and x.shape[:-1] != length:  # it goes with the input's rows
        scale = scale[..., : x.shape[-2]]
    (*lead, features), (classes, *inner, _) = x.shape, w.shape
    n = math.prod(lead)
    x, flat = x.reshape(n, features), (n,)
    if inner:  # as one dimension, over which the head is mapped
        flat = (n, math.prod(inner))
        w = w.reshape(classes, flat[1], w.shape[-1])
        b = None if b is None else b.reshape(classes, flat[1])
    target = target.reshape((n, classes, *flat[1:]) if is_soft(target) else flat)
    token_weight = None if token_weight is None else token_weight.reshape(flat)
    of = Layout(x, w, b, None, target, token_weight, (*lead, *inner), outside)
    if scale is None is low_rank:
        return of
    scale = scale if scale is None or not scale.ndim else scale.reshape(flat)
    low_rank = None if low_rank is None else (low_rank[0], low_rank[1].reshape(*w.shape[:-1], -1))
    return _side_by_side(of, scale, low_rank)


def _side_by_side(of: Layout, scale: Array | None, low_rank: Sequence[Array] | None) -> Layout:
    """The same head over rows (x, u) that hold the scale and what A makes of x: its gradients are plain products.

    s (x WT + (x AT) BT + b) = (s x) WT + (s x AT) BT + s bT, so x grows by r numbers a row, or by one for the bias, and
    neither W nor the logits are touched: dL/ds is <dL/d(x, u), (x, u)>, from the gradient that there is anyway.
    """
    x = of.x
    if not is_soft(of.target):  # such a row reaches no result, not even through 0 * NaN in what multiplies its gradient
        nothing = of.target == IGNORED
        x = jnp.where(nothing.reshape(x.shape[0], -1).all(1)[:, None], jnp.zeros((), x.dtype), x)
        scale = scale if scale is None or not scale.ndim else jnp.where(nothing, jnp.ones((), scale.dtype), scale)
    more, ups = [], []
    if low_rank is not None:
        more.append(Linear(low_rank[0], None).logits(x).astype(x.dtype))
        ups.append(low_rank[1])
    if scale is not None and of.b is not None:
        more.append(jnp.ones_like(x, shape=(x.shape[0], 1)))
        ups.append(of.b[..., None])
        of = of._replace(b=None)
    x = jnp.concatenate([x, *more], 1) if more else x
    of = of._replace(up=jnp.concatenate(ups, -1) if len(ups) > 1 else ups[0] if ups else None)
    if scale is None:
        return of._replace(x=x)
    if scale.ndim > 1 and not is_soft(of.target):
        x = jnp.where((of.target == IGNORED)[..., None], jnp.zeros((), x.dtype), x[:, None])
    elif scale.ndim > 1:
        x = x[:, None]
    kind = wide(x.dtype)
    product = x.astype(kind) * (scale[..., None] if scale.ndim else scale).astype(kind)
    return of._replace(x=product.astype(x.dtype))


def total(of: Layout, weight: Array | None, by: Coefficients, cut: Cut, shard: Shard, plan: Plan) -> Array:
    """The sum of the rows' losses over rows and positions."""
    vectors = [None if c is None else jnp.broadcast_to(c, of.rows).astype(of.kind) for c in by[:3]]
    sums = _over_positions(of, partial(weighted_sum, cut=cut, shard=shard, plan=plan), of.target, weight, *vectors)
    return sums.sum()


def each_row(of: Layout, weight: Array | None, cut: Cut, shard: Shard, plan: Plan) -> dict[str, Array]:
    """The rows' numbers by name."""
    values = _over_positions(of, partial(per_row, cut=cut, shard=shard, plan=plan), of.target, weight)
    return dict(zip(plan.names, values, strict=True))


def largest(of: Layout, cut: Cut, shard: Shard, plan: Plan) -> Array:
    """Each row's class with the largest logit; -1 where there are no classes."""
    if isinstance(shard.total, int) and not shard.total:  # as far as an export leaves their number open, there are some
        return jnp.full(of.rows, -1)
    return _over_positions(of, partial(argmax, cut=cut, shard=shard, plan=plan))


def _shifted(x: Array, target: Array, tokens: Array | None, shift: int) -> tuple[Any, ...]:
    """Each row beside the target `shift` further on, and which rows of the results are asked for."""
    if not shift:
        return x, target, tokens, ...
    length = x.shape[-2]
    shift = min(shift, length) if isinstance(length, int) else shift  # exported for any length
    if target.ndim == x.ndim:
        tokens = None if tokens is None else tokens[..., shift:]
        return x[..., : length - shift, :], target[..., shift:, :], tokens, ...
    # The last rows stay, ignored: without them the input would be copied, and a batch spread over devices cut
    # at other places than its blocks.
    lead = [(0, 0)] * (target.ndim - 1)
    target = jnp.pad(target[..., shift:], [*lead, (0, shift)], constant_values=IGNORED)
    tokens = None if tokens is None else jnp.pad(tokens[..., shift:], [*lead, (0, shift)])
    return x, target, tokens, (..., slice(length - shift))


def _over_positions(of: Layout, fn: Callable[..., Any], *more: Any) -> Any:
    """fn(x, w, b, up, *more), mapped over the positions of a K-dimensional weight: the input is not repeated."""
    args = (of.x, of.w, of.b, of.up, *more)
    if of.w.ndim == 2:
        return fn(*args)
    # more: target, weight per class, and coefficients per row
    axes = [1 if of.x.ndim > 2 else None, 1, 1, 1, 2 if is_soft(of.target) else 1, None, 1, 1, 1][: len(args)]
    axes = [None if a is None else axis for a, axis in zip(args, axes, strict=True)]
    return jax.vmap(fn, in_axes=axes, out_axes=-1)(*args)
