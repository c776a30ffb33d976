"""Rows of logits whose scale is an array, by pieces: none of the logits' size holds their product with it.

legend:  s the row's scale, u = s x its logits, g = dL/du
formula: dL/dx = s g;  dL/ds = sum_j g_j x_j
By pieces where one CPU runs the program: its kernels read the product from memory. Elsewhere XLA multiplies on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._head.chunks import Cut, Part, cut
from jax_ops._lowering import all_when_alone
from jax_ops._parallel.divergence import sharded_divergence
from jax_ops._parallel.shard import Shard
from jax_ops._rows import dispatch as rows
from jax_ops._rows.divergence import divergence_bwd_over, divergence_fwd
from jax_ops._rows.ratios import Pair
from jax_ops._rules.autodiff import selective
from jax_ops._rules.divergence import divergence_row
from jax_ops._rules.plan import Plan
from jax_ops._rules.scaled import along, ignored, of_lost, operands, times
from jax_ops._rules.varying import alike, as_rows
from softmax_ext.contract import DivergenceOptions

# Logits that are multiplied at a time: 4 MiB of float32, which a CPU's cache holds.
_PIECE = 1 << 20


def scaled_row(
    scale: Array, logits: Array, target: Array, weight: Array | None, axis: int, plan: Plan
) -> dict[str, Array]:
    """`row` of _rules/cross_entropy, of logits times their rows' scale."""
    arrays = alike(logits, scale, as_rows(target, logits, axis), weight)
    return dict(zip(plan.names, _loss(axis, plan)(*arrays), strict=True))


def scaled_divergence(scale: Array, student: Array, teacher: Array, keep: Array | None, pair: Pair) -> Array:
    """`divergence_row` of _rules/divergence, of a student's logits times their rows' scale."""
    return _divergence(pair)(*alike(student, scale, teacher, keep))


def each_divergence(
    x: Array, t: Array, keep: Array | None, scale: Array | None, options: DivergenceOptions, axis: int, shard: Shard
) -> Array:
    """The divergence of each row, scaled or not, whoever has its classes."""
    kind = jnp.promote_types(x.dtype, t.dtype)
    if scale is not None and not shard.names:
        return scaled_divergence(scale, x, t, keep, Pair.of(options, axis, kind))
    if scale is not None:
        (own,) = shard.own(scale)
        x = times(x, own, axis, None if keep is None else ~keep)
        kind = jnp.promote_types(x.dtype, kind)
    arrays = x.astype(kind), t.astype(kind), keep, Pair.of(options, axis, kind)
    return sharded_divergence(*arrays, shard) if shard.names else divergence_row(*arrays)


@cache
def _loss(axis: int, plan: Plan) -> Any:
    """The named numbers of each row. Saves its arguments, m and rest."""

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(*arrays: Any) -> Any:
            values = _cut(_loss_fwd, (axis, plan), axis, arrays, _kinds(arrays[1], "row", "all"))
            found = dict(zip(plan.computed, values, strict=True))
            return tuple(found[name] for name in plan.names), (*arrays, found["m"], found["rest"])

        def bwd(saved: Any, cotangents: Any) -> Any:
            ups = plan.upstream(cotangents)
            kinds = _kinds(saved[1], "row", "all", "row", "row", *["up"] * 4)
            out = ("row", "row" if saved[1].ndim else "sum", "row", "sum")
            out = tuple(kind for kind, on in zip(out, wanted, strict=True) if on)
            found = iter(_cut(_loss_bwd, (axis, plan, wanted), axis, (*saved, *ups), kinds, out))
            return tuple(next(found).astype(of.dtype) if on else None for of, on in zip(saved, wanted, strict=False))

        return fwd, bwd

    return selective(rules)


def _loss_fwd(how: Any, logits: Array, scale: Array, target: Array, weight: Array | None) -> Sequence[Array]:
    axis, plan = how
    z = times(logits, scale, axis, ignored(logits, target, axis))
    return rows.cross_entropy_fwd(z, target, weight, **plan.wanted(axis))


def _loss_bwd(how: Any, logits: Array, scale: Array, target: Array, weight: Any, *row: Any) -> list[Array]:
    axis, plan, wanted = how
    m, rest, d_nll, d_lse, d_smooth, d_entropy = row
    nothing, found = ignored(logits, target, axis), []
    z = times(logits, scale, axis, nothing)
    if any(wanted[:2]):
        over = rows.cross_entropy_bwd if any(wanted[2:]) else rows.cross_entropy_bwd_over
        g = over(z, target, weight, m, rest, d_nll, d_lse, d_smooth, d_entropy, **plan.row(axis))
        found += _scaled_bwd(logits, scale, g, d_lse, axis, nothing, wanted, plan.softcap is None)
    if any(wanted[2:]):
        more = rows.cross_entropy_mass_bwd(z, target, weight, m, rest, d_nll, d_smooth, **plan.row(axis))
        given = zip(more, (target, weight), wanted[2:], strict=True)
        found += [jnp.zeros_like(of) if d is None else d for d, of, on in given if on]
    return found


@cache
def _divergence(pair: Pair) -> Any:
    """The divergences. Saves its arguments and the state."""

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(*arrays: Any) -> Any:
            kinds = _kinds(arrays[1], "row", "row")
            value, state = _cut(_divergence_fwd, pair, pair.axis, arrays, kinds, ("row", "state"))
            return value, (*arrays, state)

        def bwd(saved: Any, ct: Any) -> Any:
            kinds = _kinds(saved[1], "row", "row", "state", "up")
            out = tuple(
                kind for kind, on in zip(("row", "row" if saved[1].ndim else "sum"), wanted, strict=False) if on
            )
            found = iter(_cut(_divergence_bwd, (pair, wanted), pair.axis, (*saved, ct), kinds, out))
            given = zip(saved, wanted[:2], strict=False)
            return *(next(found).astype(of.dtype) if on else None for of, on in given), None, None

        return fwd, bwd

    return selective(rules)


def _divergence_fwd(pair: Pair, student: Array, scale: Array, teacher: Array, keep: Array | None) -> Sequence[Array]:
    return divergence_fwd(*_met(pair, student, scale, teacher, keep), keep, pair=pair)


def _divergence_bwd(how: Any, student: Array, scale: Array, teacher: Array, keep: Any, state: Any, up: Any) -> Any:
    pair, wanted = how
    g = divergence_bwd_over(*_met(pair, student, scale, teacher, keep), keep, state, up, pair=pair)
    nothing = None if keep is None else ~keep
    return _scaled_bwd(student, scale, g, None, pair.axis, nothing, wanted, pair.softcap is None)


def _met(pair: Pair, student: Array, scale: Array, teacher: Array, keep: Array | None) -> tuple[Array, Array]:
    z = times(student, scale, pair.axis, None if keep is None else ~keep)
    kind = jnp.promote_types(z.dtype, teacher.dtype)
    return z.astype(kind), teacher.astype(kind)


def _scaled_bwd(
    logits: Array, scale: Array, g: Array, total: Any, axis: int, nothing: Any, wanted: Any, centred: bool
) -> list[Array]:
    """Those wanted of dL/dlogits and dL/dscale, of one scale for all rows its sum, which pieces add up: not rounded."""
    (x, s, lost), found = operands(logits, scale, axis, nothing), []
    g = g.astype(jnp.promote_types(g.dtype, x.dtype))
    if wanted[0]:
        found.append((g * jnp.where(lost, of_lost(s), s)).astype(logits.dtype))
    if wanted[1]:
        d_scale = along(x, lost, g, total, axis, centred=centred)
        d_scale = d_scale if nothing is None else jnp.where(nothing, 0.0, d_scale)
        found.append(d_scale.astype(scale.dtype) if scale.ndim else d_scale.sum())
    return found


def _kinds(scale: Array, *others: str) -> tuple[str, ...]:
    return ("row", "row" if scale.ndim else "all", *others)


def _cut(
    fn: Callable[..., Any], how: Any, axis: int, arrays: Sequence[Any], kinds: Sequence[str], out: Any = None
) -> list[Array]:
    """fn(how, *arrays) whose arrays come by the row ("row", "up", "state") or are shared ("all")."""
    present = tuple(a is not None for a in arrays)
    whole = _Rows(fn, how, axis, tuple(kinds), present, out, arrays[0].ndim, whole=True)
    given = [a for a in arrays if a is not None]
    return all_when_alone(replace(whole, whole=False), whole, *given)


@dataclass(frozen=True)
class _Rows:
    """A function of rows, of all or by pieces; results come by the row or are summed. A value, for caches to tell."""

    fn: Callable[..., Any]
    how: Any
    axis: int
    kinds: tuple[str, ...]
    present: tuple[bool, ...]
    out: tuple[str, ...] | None  # None: all by the row
    ndim: int  # of the logits
    whole: bool

    def __call__(self, *arrays: Array) -> list[Array]:
        rest = iter(arrays)
        args: list[Any] = [next(rest) if on else None for on in self.present]
        at, pieces = self._pieces(args[0])
        if self.whole or pieces is None:
            return list(self.fn(self.how, *args))
        like = jax.eval_shape(lambda *arrays: list(self.fn(self.how, *arrays)), *args)
        out = self.out or ("row",) * len(like)

        def step(done: list[Array], part: Part) -> list[Array]:
            some = [self._taken(pieces, part, at, a, kind) for a, kind in zip(args, self.kinds, strict=True)]
            found = self.fn(self.how, *some)
            return [
                d + f if kind == "sum" else pieces.put(d, f, part, self._place(at, d, kind))
                for d, f, kind in zip(done, found, out, strict=True)
            ]

        return pieces.loop(step, [jnp.zeros_like(args[0], shape=v.shape, dtype=v.dtype) for v in like])

    def _pieces(self, logits: Any) -> tuple[int, Cut | None]:
        """(the longest axis that is not the classes', how it is cut)."""
        others = [i for i in range(logits.ndim) if i != self.axis]
        if not others or not all(isinstance(n, int) for n in logits.shape):  # an export leaves some sizes open
            return 0, None
        at = max(others, key=lambda i: logits.shape[i])
        each = math.prod(n for i, n in enumerate(logits.shape) if i != at)
        pieces = cut(logits.shape[at], _PIECE // max(each, 1))
        return at, pieces if pieces.count > 1 else None

    def _taken(self, pieces: Cut, part: Part, at: int, x: Any, kind: str) -> Any:
        if x is None or kind == "all":
            return x
        take = pieces.take_fresh if kind == "up" else pieces.take
        return take(x, part, self._place(at, x, kind))

    def _place(self, at: int, x: Array, kind: str) -> int:
        """That axis among x's, which may lack the classes'; a state's numbers come last."""
        full = kind != "state" and x.ndim == self.ndim
        return at if full or at < self.axis else at - 1
