"""On which mesh axes arrays lie: derivatives have their argument's type, which tells over which it varies."""

from __future__ import annotations

from typing import Any

import jax
from jax.core import ShapedArray
from jax.sharding import NamedSharding, PartitionSpec, reshard


def alike(*arrays: Any, but: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """The arrays, varying over the same mesh axes: inside shard_map a derivative has its argument's type.

    Of the axes `but` each keeps what it has.
    """
    axes = [frozenset() if x is None else varying(x) for x in arrays]
    joint = frozenset().union(*axes) - set(but)
    return tuple(
        x if x is None or joint <= has else jax.lax.pcast(x, tuple(joint - has), to="varying")
        for x, has in zip(arrays, axes, strict=True)
    )


def varying(x: Any) -> frozenset[Any]:
    """The mesh axes x, or a type, varies over, as far as a shard_map checks it."""
    kind: Any = x if isinstance(x, ShapedArray) else jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma  # renamed between releases


def varying_as(x: jax.Array, kind: Any) -> jax.Array:
    """x, varying over more mesh axes, or over those of a type: examples of a batch may share what others do not."""
    missing = tuple((kind if isinstance(kind, frozenset) else varying(kind)) - varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def as_rows(target: jax.Array, logits: jax.Array, axis: int) -> jax.Array:
    """Class indices on the devices of their rows, where Explicit axes cut the rows and not the indices."""
    kind = jax.typeof(logits).sharding
    whole = (*kind.spec, *[None] * logits.ndim)[: logits.ndim]
    rows = PartitionSpec(*whole[:axis], *whole[axis + 1 :])
    if target.ndim == logits.ndim or not any(rows) or any(jax.typeof(target).sharding.spec):
        return target
    return reshard(target, NamedSharding(kind.mesh, rows))
