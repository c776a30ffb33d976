"""The rows' numbers of a linear layer, by the loop that the plan asks for, with every derivative."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
from jax import Array

from jax_ops._head import fast, lean
from jax_ops._head.judged import How, Judged
from jax_ops._head.linear import Linear
from jax_ops._rules.autodiff import selective
from jax_ops._rules.varying import alike


def per_row(
    x: Array,
    w: Array,
    b: Array | None,
    up: Array | None,
    target: Array,
    weight: Array | None,
    how: How,
) -> tuple[Array, ...]:
    """The numbers asked for of each row, differentiable in all floats. Four matmuls with first derivatives."""
    shard = how.shard
    return _per_row(how)(*shard.own(*alike(shard.wide(x), w, b, up, target, weight, but=shard.names)))


@cache
def _per_row(how: How) -> Any:
    """The named numbers of each row. Saves the arguments, m and rest, and sharded the mass of soft targets and e."""
    _, shard, plan = how
    loop: Any = lean if plan.lean else fast

    def rules(wanted: tuple[bool, ...]) -> Any:
        def fwd(x: Any, w: Any, b: Any, up: Any, target: Any, weight: Any) -> Any:
            x = x.astype(w.dtype)
            out = loop.fwd(Judged(x, Linear(w, b, up), target, weight), how)
            whole = (out["m"], out["rest"], out.get("mass"), out.get("e"))
            return tuple(out[name] for name in plan.names), (x, w, b, up, target, weight, *whole)

        def bwd(saved: Any, cotangents: Any) -> Any:
            x, w, b, up, target, weight, *whole = saved
            ups = plan.upstream(shard.cotangents(*cotangents, like=x))
            sums = loop.bwd(Judged(x, Linear(w, b, up), target, weight), shard.own(*whole), ups, wanted, how)
            arrays = zip(("x", "w", "b", "up", "target", "weight"), (shard.wide(x), *saved[1:6]), strict=True)
            return tuple(sums[name].astype(a.dtype) if name in sums else None for name, a in arrays)

        return fwd, bwd

    return selective(rules)


def argmax(x: Array, w: Array, b: Array | None, up: Array | None, how: How) -> Array:
    """The first class with the largest logit of each row (the logits must have classes)."""
    cut, shard, plan = how
    x, *layer = jax.lax.stop_gradient(shard.own(*alike(x, w, b, up, but=shard.names)))
    loop: Any = lean if plan.lean else fast
    return shard.first_largest(*loop.largest(x, Linear(*layer), cut, plan))
