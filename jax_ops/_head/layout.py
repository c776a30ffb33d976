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
from jax_ops._head.columns import apart, in_parts
from jax_ops._head.judged import How
from jax_ops._head.linear import Linear, wide
from jax_ops._head.per_row import argmax, per_row
from jax_ops._head.sampled import sampled_rows
from jax_ops._head.statistics import head_statistics
from jax_ops._head.sum import weighted_sum
from jax_ops._reduction import Coefficients
from jax_ops._rows.dispatch import IGNORED, is_soft, of_rows


class Layout(NamedTuple):
    """What a linear loss is the loss of."""

    x: Array  # (n, D); with `up` (n, D + r); (n, P, D..) where each position's rows are scaled by themselves
    w: Array  # (V, D), or (V, P, D)
    b: Array | None
    up: Array | None  # (V, r), or (V, P, r): of rows (x, u) it multiplies u
    target: Array  # (n,) or (n, P) class indices, canonical, (n, K) or (n, K, P); (n, V) or (n, V, P) probabilities
    probabilities: Array | None  # of K class indices a row
    token_weight: Array | None  # (n,) or (n, P)
    shape: tuple[int, ...]  # of the rows
    inner: int  # how many of its dimensions are the weight's
    outside: int | None  # how many of the last rows the results have

    @property
    def rows(self) -> tuple[int, ...]:
        """(n,) or (n, P)."""
        return (self.x.shape[0], *self.w.shape[1:-1])

    @property
    def kind(self) -> Any:
        """The compute type."""
        return wide(self.x.dtype)

    def as_given(self, value: Array) -> Array:
        """The rows' numbers in the losses' shape; with K a row, where the logits have V."""
        lead, inner = self.shape[: len(self.shape) - self.inner], self.shape[len(self.shape) - self.inner :]
        several = value.shape[1:2] if value.ndim > len(self.rows) else ()
        value = value.reshape(*lead, *several, *inner)
        if self.outside is None:
            return value
        return value[..., : self.outside, :] if several else value[..., : self.outside]

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
    probabilities: Array | None,
    token_weight: Array | None,
    *,
    shift: int,
    scale: Array | None = None,
    low_rank: Sequence[Array] | None = None,
) -> Layout:
    """The layout of checked arguments with canonical targets."""
    length = x.shape[:-1]
    x, target, probabilities, token_weight, outside = _shifted(x, target, probabilities, token_weight, shift)
    if scale is not None and scale.ndim and x.shape[:-1] != length:  # it goes with the input's rows
        scale = scale[..., : x.shape[-2]]
    (*lead, features), (classes, *inner, _) = x.shape, w.shape
    n = math.prod(lead)
    x, flat = x.reshape(n, features), (n,)
    if inner:  # as one dimension, over which the head is mapped
        flat = (n, math.prod(inner))
        w = w.reshape(classes, flat[1], w.shape[-1])
        b = None if b is None else b.reshape(classes, flat[1])
    each = () if not is_soft(target) and probabilities is None else target.shape[len(lead) :][:1]  # V or K
    target = target.reshape(n, *each, *flat[1:])
    probabilities = None if probabilities is None else probabilities.reshape(target.shape)
    token_weight = None if token_weight is None else token_weight.reshape(flat)
    of = Layout(x, w, b, None, target, probabilities, token_weight, (*lead, *inner), len(inner), outside)
    if scale is None is low_rank:
        return of
    scale = scale if scale is None or not scale.ndim else scale.reshape(flat)
    low_rank = None if low_rank is None else (low_rank[0], low_rank[1].reshape(*w.shape[:-1], -1))
    return _side_by_side(of, scale, low_rank)


def _side_by_side(of: Layout, scale: Array | None, low_rank: Sequence[Array] | None) -> Layout:
    """The same head over rows (x, u) that hold the scale and what A makes of x: its gradients are plain products.

    s (x WT + (x AT) BT + b) = (s x) WT + (s x AT) BT + s bT, so x grows by r numbers a row, or two for the bias, and
    neither W nor the logits are touched: dL/ds is <dL/d(x, u), (x, u)>, from the gradient that there is anyway.
    """
    x = of.x
    if not is_soft(of.target):  # such a row reaches no result, not even through 0 * NaN in what multiplies its gradient
        nothing = of_rows(of.target, len(of.rows) + 1, 1) == IGNORED
        unjudged = nothing if nothing.ndim == 1 else nothing.all(tuple(range(1, nothing.ndim)))
        x = jnp.where(unjudged.reshape(x.shape[0])[:, None], jnp.zeros((), x.dtype), x)
        scale = scale if scale is None or not scale.ndim else jnp.where(nothing, jnp.ones((), scale.dtype), scale)
    more, ups = [], []
    if low_rank is not None:
        more.append(Linear(low_rank[0], None).logits(x).astype(x.dtype))
        ups.append(low_rank[1])
    columns = 0
    if scale is not None and of.b is not None:
        columns = 1 if x.dtype == of.kind else 2  # as many as `in_parts` makes
        finite, b = apart(of.b)
        ups += [finite[..., None]] * columns
        of = of._replace(b=b)
    x = jnp.concatenate([x, *more], 1) if more else x
    of = of._replace(up=jnp.concatenate(ups, -1) if len(ups) > 1 else ups[0] if ups else None)
    if scale is None:
        return of._replace(x=x)
    if scale.ndim > 1 and not is_soft(of.target):
        x = jnp.where(nothing[..., None], jnp.zeros((), x.dtype), x[:, None])
    elif scale.ndim > 1:
        x = x[:, None]
    by = (scale[..., None] if scale.ndim else scale).astype(of.kind)
    product = (x.astype(of.kind) * by).astype(x.dtype)
    if columns:
        product = jnp.concatenate([product, *in_parts(scale, product)], -1)
    return of._replace(x=product)


def total(of: Layout, weight: Array | None, by: Coefficients, how: How) -> Array:
    """The sum of the rows' losses over rows and positions."""
    of_nll = of.rows if of.probabilities is None else of.target.shape
    shapes = (of_nll, of.rows, of.rows)
    vectors = [c if c is None else jnp.broadcast_to(c, s).astype(of.kind) for c, s in zip(by, shapes, strict=False)]
    sums = _over_positions(of, partial(weighted_sum, how=how), of.target, weight, *vectors)
    return sums.sum()


def each_row(of: Layout, weight: Array | None, how: How, u: Array | None = None) -> dict[str, Array]:
    """The rows' numbers by name; with `u` (n P, K) their gradient is sampled at K points."""
    if u is None:
        values = _over_positions(of, partial(per_row, how=how), of.target, weight)
    else:
        u = u.reshape(*of.rows, u.shape[-1])
        values = _over_positions(of, partial(sampled_rows, how=how), of.target, weight, None, u)
    return dict(zip(how.plan.names, values, strict=True))


def more(of: Layout, names: Sequence[str], how: How) -> dict[str, Array]:
    """The statistics that the loss has no use for, by name."""
    values = _over_positions(of, partial(head_statistics, names=names, how=how), of.target)
    return dict(zip(names, values, strict=True))


def largest(of: Layout, how: How) -> Array:
    """Each row's class with the largest logit; -1 where there are no classes."""
    classes = how.shard.total
    if isinstance(classes, int) and not classes:  # as far as an export leaves their number open, there are some
        return jnp.full(of.rows, -1)
    return _over_positions(of, partial(argmax, how=how))


def _shifted(x: Array, target: Array, probabilities: Array | None, tokens: Array | None, shift: int) -> tuple[Any, ...]:
    """Each row beside the target `shift` further on, and how many rows of the results are asked for."""
    if not shift:
        return x, target, probabilities, tokens, None
    length = x.shape[-2]
    shift = min(shift, length) if isinstance(length, int) else shift  # exported for any length
    if is_soft(target):
        tokens = None if tokens is None else tokens[..., shift:]
        return x[..., : length - shift, :], target[..., shift:, :], None, tokens, None
    # The last rows stay, ignored: without them the input would be copied, and a batch spread over devices cut
    # at other places than its blocks.
    ahead = [(0, 0)] * (x.ndim - 2)

    def moved(a: Array | None, fill: float) -> Any:
        if a is None:
            return None
        later = a[(*[slice(None)] * len(ahead), slice(shift, None))]
        return jnp.pad(later, [*ahead, (0, shift), *[(0, 0)] * (a.ndim - 1 - len(ahead))], constant_values=fill)

    return x, moved(target, IGNORED), moved(probabilities, 0), moved(tokens, 0), length - shift


def _over_positions(of: Layout, fn: Callable[..., Any], *more: Any) -> Any:
    """fn(x, w, b, up, *more), mapped over the positions of a K-dimensional weight: the input is not repeated."""
    args = (of.x, of.w, of.b, of.up, *more)
    if of.w.ndim == 2:
        return fn(*args)
    # more: target, weight per class, and coefficients per row
    several = 1 if of.probabilities is None else 2
    of_target = 2 if is_soft(of.target) else several
    axes = [1 if of.x.ndim > 2 else None, 1, 1, 1, of_target, None, several, 1, 1][: len(args)]
    axes = [None if a is None else axis for a, axis in zip(args, axes, strict=True)]
    return jax.vmap(fn, in_axes=axes, out_axes=-1)(*args)
