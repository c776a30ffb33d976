"""The head's exact rows with a sampled gradient: one matmul, then K classes a row.

legend:  S a row's targets, q its mass off S, r_j = p_j / q there (sums to 1), A all that multiplies p_j,
         a_j the upstream mass at class j, K points j_k stratified on the cumulative sum of r
formula: dz_j = A p_j - a_j; on S exact, as (A - a_j) p_j - a_j q_j: nothing cancels; off S  A q r^_j  with
         r^ = 1/K sum_k e_(j_k), so E[r^] = r and its sum is 1: a row's sum is that of the exact gradient
         -d_entropy p_j (log p_j + H) is taken on S and at the same points; -d_smooth w_j is an outer product
source:  Bengio and Senecal 2003; stratified points: Gerber, Chopin and Whiteley 2019
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jax_ops._head.chunks import Part
from jax_ops._head.judged import How, Judged
from jax_ops._head.linear import Linear, ignored_rows, wide, without
from jax_ops._head.per_row import per_row
from jax_ops._head.smoothed import smoothed
from jax_ops._parallel.points import here
from jax_ops._parallel.points import sharded_points as points
from jax_ops._parallel.shard import Shard
from jax_ops._rows import dispatch as rows
from jax_ops._rows import slices
from jax_ops._rows.picked import picked_fwd, picked_input_bwd, picked_weight_bwd
from jax_ops._rows.sparse import by_class
from jax_ops._rules.replaced import replaced
from jax_ops._rules.varying import alike
from softmax_ext import contract


def sampled_rows(
    x: Array,
    w: Array,
    b: Array | None,
    up: None,
    target: Array,
    weight: Array | None,
    nothing: None,
    u: Array,
    how: How,
) -> tuple[Array, ...]:
    """per_row's results, their gradient sampled at K points a row: u (n, K) says where in each stratum."""
    shard = how.shard
    return _sampled(how)(*shard.own(*alike(shard.wide(x), w, b, target, weight, u, but=shard.names)))


@cache
def _sampled(how: How) -> Any:
    """The named numbers of each row. Saves its arguments but u, the rows' numbers, and the points' ids."""
    _, shard, plan = how

    def fwd(x: Any, w: Any, b: Any, target: Any, weight: Any, u: Any) -> Any:
        x = x.astype(w.dtype)
        out = _forward(Judged(x, Linear(w, b), target, weight), u, how)
        kept = (out["nll"], out["lse"], out.get("entropy"), out["ids"], out["q"])
        return tuple(out[name] for name in plan.names), (x, w, b, target, weight, *kept)

    def bwd(wanted: tuple[int, ...], saved: Any, cotangents: Any) -> Any:
        if 4 in wanted:
            rule = "be None with label_smoothing and a weight whose gradient is wanted"
            contract.fail_value("linear_cross_entropy", "grad_samples", rule, "a number")
        x, *others = saved
        w, b, target, weight, *kept = shard.own(*others)
        ups = plan.upstream(shard.cotangents(*cotangents, like=x))
        return _backward(Judged(x, Linear(w, b), target, weight), kept, ups, wanted, how)

    def exact(x: Any, w: Any, b: Any, target: Any, weight: Any, u: Any) -> Any:
        return per_row(x, w, b, None, target, weight, how)

    return replaced(fwd, bwd, exact, partial(contract.second_derivative_of_samples, "linear_cross_entropy"))


def _forward(of: Judged, u: Array, how: How) -> dict[str, Array]:
    """Each row's numbers by name as `fast.fwd` has them, its points' ids and its mass q off its targets."""
    (x, head, target, weight), (cut, shard, plan) = of, how

    def step(out: dict[str, Array], part: Part) -> dict[str, Array]:
        t = cut.take(target, part)
        z = head.logits(without(cut.take(x, part), ignored_rows(t)))
        if shard.names:  # a point's device is known only from whole rows: the devices speak once a chunk
            state = slices.of(z, *shard.local(t), weight, names=("nll", *plan.names), layout=plan.row())
            found = slices.numbers(shard.joined(state), t)
        else:
            found = dict(zip(plan.computed, rows.cross_entropy_fwd(z, t, weight, **plan.wanted()), strict=True))
        several = t if t.ndim > 1 else t[:, None]
        found["ids"], found["q"] = points(z, found["m"], found["rest"], several, cut.take(u, part), shard, plan)
        return {name: cut.put(out[name], found[name], part) for name in out}

    kind = wide(x.dtype)
    shapes = {"nll": target.shape, "ids": u.shape}
    names = dict.fromkeys(("nll", "lse", *plan.names, "q", "ids"))
    # as x where each device has its own, as the targets where all have the same
    start = {
        n: jnp.zeros_like(x if n in ("q", "ids") else target, shape=shapes.get(n, x.shape[:1]), dtype=kind)
        for n in names
    }
    start["ids"] = start["ids"].astype(jnp.int32)
    return cut.loop(step, start)


def _backward(of: Judged, kept: Sequence[Any], ups: Sequence[Any], wanted: tuple[int, ...], how: How) -> list[Array]:
    """The gradients wanted, of the rows' numbers that were kept and the upstream gradients."""
    (x, head, target, weight), (_, shard, plan) = of, how
    (nll, lse, h, ids, q), (d_nll, d_lse, d_smooth, d_entropy) = kept, ups
    (n, samples), targets = ids.shape, target if target.ndim > 1 else target[:, None]
    nll, marks = nll.reshape(targets.shape), rows.of_rows(targets, 2, 1)
    d_nll = jnp.zeros_like(nll) if d_nll is None else jnp.where(targets < 0, 0.0, d_nll.reshape(targets.shape))
    a, smooth, judged = jnp.zeros_like(q) if d_lse is None else d_lse, None, marks != rows.IGNORED
    more = (targets[:, :0], a[:, None][:, :0])
    if d_smooth is not None:
        of_class = jnp.ones_like(lse, shape=head.weight.shape[:1])
        if weight is None:
            added = d_smooth * shard.sum(of_class.sum())
        else:
            d_nll, added, of_class, *more = smoothed(targets, d_nll, d_smooth, weight, shard)
        a, smooth = a + added, (jnp.where(judged, d_smooth * plan.scale, 0.0), of_class)
    at, on, p = _on_targets(targets, nll, d_nll, a, q)
    off = ((d_nll.sum(1) + a) * (q / samples))[:, None]
    ids = jnp.concatenate([ids.astype(at.dtype), here(at, shard), more[0]], 1)
    slope: Any = plan.scale
    if d_entropy is not None or plan.softcap is not None:
        raw = _logits_at(x, head.weight, head.bias, ids)
        slope = rows.slope(raw, plan.scale, plan.softcap)
        if d_entropy is not None and h is not None:
            log_p = rows.capped(raw[:, :samples], plan.scale, plan.softcap) - lse[:, None]
            c = -d_entropy[:, None]
            off = off + c * (q / samples)[:, None] * (log_p + h[:, None])
            shown = jnp.where((at < 0) | (nll == jnp.inf), 0.0, nll).clip(0.0)  # there p is 0
            on = on + c * p * (h[:, None] - shown)
    c = jnp.concatenate([jnp.broadcast_to(off, (n, samples)), on, more[1]], 1) * slope
    c = jnp.where(judged[:, None], jnp.where((marks == rows.INVALID)[:, None], jnp.nan, c), 0.0)
    return _products(x, head, ids, c, smooth, judged, wanted, shard)


def _on_targets(targets: Array, nll: Array, d_nll: Array, a: Array, q: Array) -> tuple[Array, Array, Array]:
    """(each class of S once, its exact dz without entropy's part, its p), (n, E); elsewhere IGNORED, 0, 0."""
    if targets.shape[1] <= 1:
        p = jnp.where((nll < 0) | (targets < 0), 0.0, jnp.exp(-nll))
        dz = a[:, None] * p - d_nll * q[:, None]
        return targets.clip(rows.IGNORED), jnp.where(targets < 0, 0.0, dz), p
    own, others, first = by_class(targets, d_nll)
    p = jnp.where((nll < 0) | ~first, 0.0, jnp.exp(-nll))
    dz = (others + a[:, None]) * p - own * (q[:, None] + by_class(targets, p)[1])
    return jnp.where(first, targets, rows.IGNORED), jnp.where(first, dz, 0.0), p


def _logits_at(x: Array, w: Array, b: Array | None, ids: Array) -> Array:
    z = picked_fwd(x, w, ids)
    return z if b is None else z + jnp.where(ids < 0, 0.0, b.astype(z.dtype).at[ids.clip(0)].get(mode="clip"))


def _products(
    x: Array, head: Linear, ids: Array, c: Array, smooth: Any, kept: Array, wanted: tuple[int, ...], shard: Shard
) -> list[Array]:
    """dX, dW and db, those wanted, of dz_ij = sum over id_ik = j of c_ik - s_i v_j for `smooth` (s, v)."""
    w, b, _ = head
    judged, out = jnp.where(kept[:, None], x, jnp.zeros((), x.dtype)), []
    kind = c.dtype
    # A row that is NaN makes a NaN of every class.
    spoilt = jnp.isnan(c).any()
    if 0 in wanted:
        dx = picked_input_bwd(c, w, ids, wide=smooth is not None or bool(shard.names))
        if smooth is not None:
            dx = dx - smooth[0][:, None] * (smooth[1] @ w.astype(kind))
        out.append(jnp.where(kept[:, None], dx, 0.0).astype(shard.wide(x).dtype))
    if 1 in wanted:
        dw = picked_weight_bwd(c, judged, ids, w.shape[0], wide=smooth is not None)
        if smooth is not None:
            dw = dw - smooth[1][:, None] * (smooth[0] @ judged.astype(kind))
        out.append(_or_nan(dw, spoilt).astype(w.dtype))
    if 2 in wanted and b is not None:
        ones = jnp.ones_like(c, shape=(c.shape[0], 1))
        db = picked_weight_bwd(c, ones, ids, w.shape[0])[:, 0]
        db = db if smooth is None else db - smooth[1] * smooth[0].sum()
        out.append(_or_nan(db, spoilt).astype(b.dtype))
    return out


def _or_nan(a: Array, spoilt: Array) -> Array:
    """a, or NaN all over: by a branch, so that the usual case does not read and write all of a weight once more."""
    return lax.cond(spoilt, lambda a: jnp.full_like(a, jnp.nan), lambda a: a, a)
