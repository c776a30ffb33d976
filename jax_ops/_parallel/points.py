"""Points of rows whose classes are sharded over devices: the same on every device, whatever their number.

Each device's off-target mass is told to the others, so each knows where in the whole sum its own classes stand, and
takes the points that fall there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_ops._lowering import loops_are_to_come
from jax_ops._parallel.shard import Shard
from jax_ops._rows.classes import IGNORED, INVALID
from jax_ops._rows.points import points, points_and_mass
from jax_ops._rules.plan import Plan


def first_key(key: Array, shard: Shard) -> Array:
    """The key of the first device that holds classes: of other keys the devices would have points of their own."""
    if not shard.names:
        return key
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    data = shard.of_first(jax.random.key_data(key) if typed else key)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key)) if typed else data


def here(ids: Array, shard: Shard, elsewhere: int = IGNORED) -> Array:
    """Ids (N, K) of all classes as this device's, markers as they are; another's are `elsewhere`."""
    if not shard.names:
        return ids
    local, inside = shard.local(ids)
    return jnp.where(inside, local, jnp.where(ids < 0, ids, elsewhere)).astype(ids.dtype)


def sharded_points(
    z: Array, m: Array, rest: Array, targets: Array, u: Array, shard: Shard, plan: Plan
) -> tuple[Array, Array]:
    """`points` of whole rows: q is theirs, ids are those of this device's classes, IGNORED where another's."""
    layout = {"scale": plan.scale, "softcap": plan.softcap}
    if not shard.names:
        return points(z, m, rest, targets, u, **layout)
    given = shard.own(z, m, rest, here(targets, shard, INVALID), u)
    mass = points_and_mass(*given[:4], given[4][:, :1], **layout)[1]
    spans = _spans(mass, shard)
    ids, _ = points(*given, **layout, span=spans)
    return ids, spans[:, 2].sum(1) / (1.0 + given[2])


def _spans(own: Array, shard: Shard) -> Array:
    """(N, 3, 2): where in the sum over all devices this one's begins and ends, and all of it, as pairs of numbers."""
    each = lax.all_gather(own, shard.names)
    # One after the other: what one device ends with is to the last bit what the next one begins with, and no point
    # falls between the two, nor on a device without any mass.
    whole = jnp.zeros_like(own)
    if loops_are_to_come():
        parts = []
        for mass in each:
            parts.append(whole)
            whole = _added(whole, mass)
        begins = jnp.stack(parts)
    else:
        whole, begins = lax.scan(lambda total, mass: (_added(total, mass), total), whole, each)
    ends = jnp.concatenate([begins[1:], whole[None]])
    at = lax.axis_index(shard.names)
    return jnp.stack([begins[at], ends[at], whole], 1)


def _added(a: Array, b: Array) -> Array:
    """The sum of two pairs (N, 2), as a pair."""
    # Knuth's TwoSum of the large parts: what it rounds off goes to the small ones.
    x, x_low, y, y_low = a[:, 0], a[:, 1], b[:, 0], b[:, 1]
    total = x + y
    of_y = total - x
    low = (x - (total - of_y)) + (y - of_y) + (x_low + y_low)
    high = total + low
    return jnp.stack([high, low - (high - total)], 1)
