"""The weighted sum of the rows' losses of a linear layer, its gradients formed chunk by chunk on the way."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_ops._head import fast
from jax_ops._head.judged import How, Judged
from jax_ops._head.linear import Linear
from jax_ops._rows.dispatch import finite, mass_sum
from jax_ops._rules.autodiff import selective
from jax_ops._rules.varying import alike

_HEAD = ("x", "w", "b", "up", "target", "weight")


def weighted_sum(
    x: Array,
    w: Array,
    b: Array | None,
    up: Array | None,
    target: Array,
    weight: Array | None,
    nll: Array | None,
    smooth: Array | None,
    square: Array | None,
    how: How,
) -> Array:
    """sum_i nll_i * (the row's nll) + smooth_i * (its smooth) + square_i * lse_i^2, differentiable in all floats.

    The upstream gradients of the rows are known but for one common factor: the gradients are those of the sum,
    which the backward pass multiplies by it. Three matmuls.
    """
    shard = how.shard
    arrays = alike(shard.wide(x), w, b, up, target, weight, nll, smooth, square, but=shard.names)
    arrays = (*shard.own(*arrays[:6]), *arrays[6:])
    dtypes = tuple(None if a is None else str(a.dtype) for a in arrays)
    return _weighted_sum(how, dtypes)(*arrays)


@cache
def _weighted_sum(how: How, dtypes: tuple[str | None, ...]) -> Any:
    """The sum. Saves its gradients, those wanted, without the factor."""

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(x: Any, w: Any, b: Any, up: Any, target: Any, weight: Any, nll: Any, smooth: Any, square: Any) -> Any:
            of = Judged(x.astype(w.dtype), Linear(w, b, up), target, weight)
            sums = fast.fwd_bwd(of, nll, smooth, square, wanted[:6], how)
            by = {name: c for name, c in (("nll", nll), ("smooth", smooth), ("lse", square)) if c is not None}
            if "lse" in by:
                sums["lse"] = jnp.square(sums["lse"])
            total = sum(_along(c, sums[name]).sum() for name, c in by.items())
            if nll is not None and nll.ndim > 1:
                sums["nll"] = finite(sums["nll"])
            return total, sums

        def bwd(sums: dict[str, Any], ct: Any) -> Any:
            own = [name for name in _HEAD if name in sums]
            # Of a coefficient every device has the row's whole number, and so what its own cotangent makes of it.
            (here,) = how.shard.cotangents(ct, like=sums[own[0]]) if own else (None,)
            found = zip((*_HEAD, "nll", "smooth", "lse"), wanted, dtypes, strict=True)
            return tuple(
                ((here if name in own else ct) * sums[name]).astype(dtype) if on else None for name, on, dtype in found
            )

        return fwd, bwd

    return selective(rules)


def _along(c: Array, numbers: Array) -> Array:
    """Each row's part of the sum, of K classes a row with their masses c."""
    return c * numbers if c.ndim == 1 else mass_sum(c, numbers, 1)
