"""A student's rows against a teacher's, the classes of both sharded over devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_ops._parallel.shard import Shard
from jax_ops._rows import divergence_slices as slices
from jax_ops._rows.ratios import Pair
from jax_ops._rules.autodiff import analytic
from jax_ops._rules.varying import alike


def sharded_divergence(student: Array, teacher: Array, keep: Array | None, pair: Pair, shard: Shard) -> Array:
    """As `divergence_row` of _rules/divergence, of the whole rows."""
    arrays = shard.own(*alike(student, teacher, keep, but=shard.names))
    return _sharded_divergence(pair, shard)(*arrays)


@cache
def _sharded_divergence(pair: Pair, shard: Shard) -> Any:
    """The divergences. Saves both arrays of logits, keep and the states."""

    def fwd(student: Any, teacher: Any, keep: Any) -> Any:
        value, state = whole(student, teacher, keep, pair, shard)
        return value, (student, teacher, keep, state)

    def bwd(saved: tuple[Any, Any, Any, Any], ct: Any) -> Any:
        student, teacher, keep, state = saved
        (up,), (known,) = shard.cotangents(ct, like=student), shard.own(state)
        return slices.part_bwd(student, teacher, keep, known, up, pair=pair), None, None

    return analytic(fwd, bwd)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def whole(student: Array, teacher: Array, keep: Array | None, pair: Pair, shard: Shard) -> tuple[Array, Array]:
    """(the divergence of each row, its state), the same on every device."""
    state = slices.of(student, teacher, keep, pair)
    return completed(state, keep, pair, shard, lambda known: slices.sums(student, teacher, keep, known, pair))


@whole.defjvp
def _whole_jvp(pair: Pair, shard: Shard, primals: Any, moved: Any) -> Any:
    (student, teacher, keep), out = primals, whole(*primals, pair=pair, shard=shard)
    (known,) = shard.own(out[1])
    found = slices.pushed(student, teacher, keep, known, moved[0], pair)
    return out, slices.tangents(out[1], total(shard)(*found), pair)


def completed(
    state: slices.State, keep: Array | None, pair: Pair, shard: Shard, sums: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """(the divergences, the rows' states) from what a device's classes say; `sums(state)` are sums over them."""
    if shard.names:
        state = slices.over(state, pair, lambda *x: list(shard.largest(jnp.stack(x))), total(shard))
    value, known = slices.numbers(state, pair)
    if pair.kind not in slices.ENTROPIES:
        value, known = slices.finished(known, shard.sum(sums(*shard.own(known))), pair)
    return (value if keep is None else jnp.where(keep, value, 0.0)), known


def total(shard: Shard) -> Callable[..., Any]:
    """What sums row numbers over the devices, in one message."""
    return lambda *x: list(shard.sum(jnp.stack(x)))
