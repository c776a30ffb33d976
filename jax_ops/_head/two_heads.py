"""Two heads over the same rows as one value: a student's, and a teacher's that is a constant."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jax_ops._head.linear import wide
from jax_ops._parallel.shard import Shard
from jax_ops._rules.varying import alike


class Heads(NamedTuple):
    """What a divergence of two heads is of."""

    x: Array  # (N, D)
    w: Array  # (V, D)
    b: Array | None  # (V,)
    teacher_x: Array  # (N, E)
    teacher_w: Array  # (V, E)
    teacher_b: Array | None  # (V,)
    keep: Array | None  # (N,): other rows reach no result

    def own(self, shard: Shard, *rows: Array) -> tuple[Any, ...]:
        """The seven as each device's own, and more numbers of the rows, which vary as they do."""
        arrays = alike(shard.wide(self.x), *self[1:], *rows, but=shard.names)
        return *shard.own(*arrays[:7]), *arrays[7:]

    @property
    def kind(self) -> Any:
        """The type of both's logits."""
        return wide(jnp.promote_types(self.w.dtype, self.teacher_x.dtype))

    @property
    def gone(self) -> Array | None:
        """The rows that reach no result; None where all do."""
        return None if self.keep is None else ~self.keep
