"""Second derivatives of confident rows on one device and on several, run as `python -m tests.parallel.jax_curved`.

Forward over reverse and reverse over reverse; each entry has the digits of its own terms.
"""

from __future__ import annotations

import os
import sys

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {os.environ.get('XLA_FLAGS', '')}"
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_ops
from jax_ops._rows import arithmetic

V, LOGIT = 6, 20.0
F32, BOUND = 2.0**-24, 96.0
Z = np.tile(0.25 * np.arange(1.0, V + 1), (V, 1))
ALONG = 3.0 + 0.125 * np.arange(1.0, V * V + 1).reshape(V, V)
SOFT = np.full((V, V), 1e-6)
np.fill_diagonal(Z, LOGIT)
np.fill_diagonal(ALONG, 3.0)
np.fill_diagonal(SOFT, 1.0)
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 30.0}, {"label_smoothing": 0.1, "z_loss": 0.1}]


def products(z: Any, v: Any, target: Any, memory: str | None, **options: Any) -> tuple[Any, Any]:
    """The Hessian's product with v of the summed rows, both ways; of a head, whose weight the logits are."""

    def loss(z: Any) -> Any:
        if memory is None:
            return jax_ops.cross_entropy(z, target, reduction="sum", **options)
        x = jnp.eye(V, dtype=z.dtype)
        return jax_ops.linear_cross_entropy(x, z.T, target, reduction="sum", memory=memory, chunk_size=2, **options)

    return jax.jvp(jax.grad(loss), (z,), (v,))[1], jax.vjp(jax.grad(loss), z)[1](v)[0]


def worst(memory: str | None, soft: bool, sharded: bool, options: dict[str, Any]) -> list[float]:
    """How many roundings an entry is off at most, each way."""
    target: Any = SOFT if soft else np.arange(V)
    with jax.enable_x64(True):
        right = np.asarray(jax.jit(lambda z, v, t: products(z, v, t, None, **options)[0])(Z, ALONG, target))
    z, v = Z.astype(np.float32), ALONG.astype(np.float32)
    target = target.astype(np.float32) if soft else target

    def call(z: Any, v: Any, target: Any) -> Any:
        return products(z, v, target, memory, **options, **({"axis_name": "v"} if sharded else {}))

    if sharded:
        mesh, by = jax.make_mesh((2,), ("v",), axis_types=(jax.sharding.AxisType.Auto,)), P(None, "v")
        call = jax.shard_map(call, mesh=mesh, in_specs=(by, by, by if soft else P()), out_specs=(by, by))
    found = jax.jit(call)(z, v, target)
    assert right.all()
    return [float(np.abs((np.asarray(f, np.float64) - right) / right).max() / F32) for f in found]


def keep_their_digits() -> None:
    cases = [(memory, options) for memory in (None, "fast", "lean") for options in OPTIONS]
    for i, (memory, options) in enumerate(cases):
        for sharded in (False, True):
            soft = (i + sharded) % 2 == 0
            off = worst(memory, soft, sharded, options)
            assert max(off) <= BOUND, f"{memory} soft={soft} sharded={sharded} {options}: {off} roundings"


def _still(axis: int, primals: Any, tangents: Any) -> Any:
    (_, e, m, _), (dz,) = (out := arithmetic.exponentials(*primals, axis)), tangents
    return out, (dz, e * dz, jnp.zeros_like(m), (e * dz).sum(axis, keepdims=True))


def _seen(at: int) -> None:
    jax.clear_caches()
    for sharded in (False, True):
        off = worst(None, False, sharded, {})
        assert off[at] > 100 * BOUND, f"sharded={sharded}: nobody saw it: {off}"


def a_shift_that_stands_still_is_seen() -> None:
    """The saboteur: all moves beside the shift, the maximum's own nearly as much as the row's mean."""
    right = arithmetic._relative
    arithmetic._relative = lambda d, rest, dz, dm: dz - dm
    arithmetic.exponentials.defjvp(_still)
    try:
        _seen(0)
    finally:
        arithmetic._relative = right
        arithmetic.exponentials.defjvp(arithmetic._exponentials_jvp)


def a_maximum_less_itself_is_seen() -> None:
    """The saboteur: dz - dm at the maximum too, 0 forwards; transposed it is a difference of what all sum up to."""
    right = arithmetic._relative
    arithmetic._relative = lambda d, rest, dz, dm: dz - dm
    try:
        _seen(1)
    finally:
        arithmetic._relative = right
        jax.clear_caches()


CHECKS: list[Callable[[], None]] = [
    keep_their_digits,
    a_shift_that_stands_still_is_seen,
    a_maximum_less_itself_is_seen,
]


def main() -> None:
    for check in CHECKS:
        check()
        print(check.__name__, file=sys.stderr, flush=True)
    print("all sharded checks ran")


if __name__ == "__main__":
    main()
