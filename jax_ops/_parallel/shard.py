"""Classes sharded over the devices of one or more mesh axes: in the order of the devices, of each as many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_ops._rows import slices, weights
from jax_ops._rows.dispatch import is_soft
from jax_ops._rules.varying import varying
from softmax_ext import contract


@dataclass(frozen=True)
class Shard:
    """The `classes` of this device among the `total` of the mesh axes `names`; of no axes, all of them."""

    names: tuple[str, ...]
    classes: int
    total: int

    def own(self, *arrays: Any) -> tuple[Any, ...]:
        """The arrays as each device's own: their gradients are summed over the devices that hold them alike."""
        return tuple(a if a is None or not jnp.issubdtype(a.dtype, jnp.inexact) else self._cast(a) for a in arrays)

    def wide(self, x: Array) -> Array:
        """x in the type that its gradient is summed over the devices in; the op itself takes it back."""
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if self.names else x

    def sum(self, x: Array) -> Array:
        """The sum over the devices, which all of them get."""
        return lax.psum(self._cast(x), self.names) if self.names else x

    def sum_of_others(self, x: Array) -> Array:
        """The sum over the other devices, which is no difference."""
        if not self.names:
            return jnp.zeros_like(x)
        each = lax.all_gather(self._cast(x), self.names)
        here = jnp.arange(len(each)) == lax.axis_index(self.names)
        return jnp.where(here.reshape(-1, *[1] * x.ndim), 0.0, each).sum(0)

    def weights(self, weight: Any) -> Any:
        """What slices ask of the weights of all classes; without any the number of classes."""
        if weight is None:
            return self.total
        largest = self.largest(weight.max(initial=-jnp.inf))
        total, aside, held = self.sum(weights.sums_of(weight, largest))
        return weights.Weights(total, largest, aside, held)

    def of_first(self, x: Array) -> Array:
        """What the first device has, of integers; where shard_map knows that all have the same nothing is told."""
        if not self.names:
            return x
        place = lax.axis_index(self.names)
        if varying(place) and not varying(x) & set(self.names):
            return x
        return self.sum(jnp.where(place == 0, x, jnp.zeros_like(x)))

    def largest(self, x: Array) -> Array:
        """The maximum over the devices, held constant; whether it is NaN where a device has one is not said."""
        return lax.pmax(self._cast(lax.stop_gradient(x)), self.names) if self.names else lax.stop_gradient(x)

    def joined(self, state: slices.State, axis: int = 1) -> slices.State:
        """What the devices' slices say together; of K classes a row nll has them along `axis`."""
        return slices.over(state, partial(_top, self), self.sum, axis) if self.names else state

    def first_largest(self, top: Array, at: Array) -> Array:
        """The first class whose logit is largest, or NaN, from the largest of each device and its class there."""
        if not self.names:
            return at
        nan = jnp.isnan(top)
        some_nan, best = self.largest(jnp.stack([nan.astype(top.dtype), jnp.where(nan, -jnp.inf, top)]))
        holds = jnp.where(some_nan > 0, nan, top == best)
        index = jnp.where(holds, at + self.first(at.dtype), jnp.iinfo(at.dtype).max)
        return lax.pmin(self._cast(index), self.names)

    def cotangents(self, *cts: Array | None, like: Array) -> tuple[Any, ...]:
        """Cotangents of numbers that came from `sum`, as those of each device's summand (which vary as `like`).

        Where shard_map checks which values vary (check_vma) they are the same; where not, a device has its part of
        them only. What JAX's own psum makes of them is right in both.
        """

        def summand(ct: Array) -> Array:
            own = jnp.zeros_like(like, shape=ct.shape, dtype=ct.dtype)
            return jax.linear_transpose(self.sum, own)(ct)[0]

        return tuple(ct if ct is None or not self.names else summand(ct) for ct in cts)

    def local(self, target: Array, start: Any = 0, size: int | None = None) -> tuple[Array, Any]:
        """Targets in a part of this device's classes and, of class indices, which are in it.

        The others name its class 0.
        """
        if is_soft(target):
            return target, None
        first = self.first(target.dtype) + start
        inside = (target >= first) & (target < first + (self.classes if size is None else size))
        return jnp.where(inside, target - first, jnp.minimum(target, 0)).astype(target.dtype), inside

    def first(self, dtype: Any) -> Array | int:
        """The index of this device's first class."""
        return lax.axis_index(self.names).astype(dtype) * self.classes if self.names else 0

    def _cast(self, x: Array) -> Array:
        missing = tuple(name for name in self.names if name not in varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _top(shard: Shard, m: Array) -> tuple[Array, Array]:
    """The maximum over the devices, which moves as that of the one device that has it, and how far below each is."""
    top = shard.largest(m)
    return top, slices.below(m, top)


@_top.defjvp
def _top_jvp(shard: Shard, primals: tuple[Array], tangents: tuple[Array]) -> Any:
    ((m,), (dm,)), out = (primals, tangents), _top(shard, *primals)
    held = m == out[0]
    alone = shard.sum(held.astype(m.dtype)) == 1.0
    moved = jnp.where(alone, shard.sum(jnp.where(held, dm, 0.0)), 0.0)
    return out, (moved, jnp.where(held & alone, 0.0, dm - moved))


def shard_of(op: str, axis_name: Any, classes: int) -> Shard:
    """The shard of a device that holds `classes` of the classes sharded over the mesh axes `axis_name`."""
    names, mesh = contract.axis_names(op, axis_name), jax.sharding.get_abstract_mesh()
    if not set(names) <= set(mesh.manual_axes):
        raise contract.axis_unbound(op, axis_name)
    return Shard(names, classes, math.prod(mesh.shape[name] for name in names) * classes)
