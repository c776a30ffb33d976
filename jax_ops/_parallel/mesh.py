"""Arrays sharded over Explicit mesh axes: an op is of Auto ones inside, its results are sharded as its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, auto_axes


@dataclass(frozen=True)
class Spread:
    """How rows lie on the Explicit axes of a mesh: the axes of each dimension of the rows."""

    mesh: AbstractMesh
    axes: tuple[tuple[str, ...], ...]

    @property
    def blocks(self) -> int:
        """Of how many devices each has other rows."""
        return math.prod(map(self._size, self.axes))

    def sharding(self, shape: Sequence[int]) -> NamedSharding:
        """The sharding of results of the rows' shape, or of a number; what devices cannot share evenly is not cut."""
        axes = (*self.axes, *[()] * len(shape))[: len(shape)]
        pairs = zip(axes, shape, strict=True)
        return NamedSharding(self.mesh, PartitionSpec(*(a if a and n % self._size(a) == 0 else None for a, n in pairs)))

    def along(self, axis: int) -> Spread:
        """The same with one more dimension, which is not cut, of what has K numbers a row."""
        return Spread(self.mesh, (*self.axes[:axis], (), *self.axes[axis:]))

    def _size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[name] for name in axes)


def spread_of(rows: Sequence[int], *arrays: jax.Array | None) -> Spread | None:
    """How the arrays lie on Explicit axes, the first by its dimensions `rows`; None where none is cut."""
    shardings: list[Any] = [jax.typeof(a).sharding for a in arrays if a is not None]
    mesh = next((s.mesh for s in shardings if any(s.spec)), None)
    if mesh is None:
        return None
    whole = (*shardings[0].spec, *[None] * (max(rows, default=0) + 1))
    spec = [whole[i] for i in rows]
    return Spread(mesh, tuple(() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in spec))


def lies_otherwise(axis: int, logits: jax.Array, *others: jax.Array | None) -> bool:
    """Whether Explicit mesh axes cut the logits along `axis`, or another array not as the logits or their rows."""

    def spec(a: jax.Array) -> tuple[Any, ...]:
        return (*jax.typeof(a).sharding.spec, *[None] * a.ndim)[: a.ndim]

    whole = spec(logits)
    rows = tuple(s for i, s in enumerate(whole) if i != axis)
    known = {logits.ndim: whole, logits.ndim - 1: rows}
    given = [a for a in others if a is not None]
    return whole[axis] is not None or any(spec(a) != known.get(a.ndim, (None,) * a.ndim) for a in given)


def under_auto_axes(fn: Callable[..., Any], *arrays: jax.Array | None, spread: Spread, out: Any, **how: Any) -> Any:
    """fn(*arrays, **how) with its results sharded as `out` says.

    An op's chunks and sums over rows have no sharding that JAX can tell from the arguments' types: it would ask for
    each. Under Auto axes XLA's partitioner finds them, and a derivative still has its argument's sharding.
    """
    leaves, structure = jax.tree.flatten(out)
    return _jitted(*arrays, fn=fn, axes=spread.mesh.explicit_axes, out=(structure, *leaves), how=tuple(how.items()))


# Eagerly JAX does not know which devices a mesh has that is no argument's.
@partial(jax.jit, static_argnames=("fn", "axes", "out", "how"), inline=True)
def _jitted(*arrays: Any, fn: Any, axes: tuple[str, ...], out: tuple[Any, ...], how: tuple[Any, ...]) -> Any:
    structure, *leaves = out
    return auto_axes(partial(fn, **dict(how)), axes=axes, out_sharding=structure.unflatten(leaves))(*arrays)
