"""Class weights of which one class, on one device of eight, has nearly all: run by tests.parallel.jax_sampled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_ops
from tests.judging.heavy import TARGETS, Problem

OPS: Any = jax_ops
V = 16
WAYS: dict[str, dict[str, Any]] = {
    "rows": {},
    "fast": {"memory": "fast", "chunk_size": 5},
    "each": {"memory": "fast", "stats": ("entropy",)},
    "lean": {"memory": "lean", "chunk_size": 3},
    "sampled": {"grad_samples": 4},
}


def gradient(mesh: Any, p: Problem, way: str) -> Any:
    """Of the summed losses, classes sharded over the mesh."""
    options: dict[str, Any] = {"label_smoothing": p.smoothing, "reduction": "sum", "axis_name": "v", **WAYS[way]}
    if way == "sampled":
        options["key"] = jax.random.key(0)

    def loss(x: Any, head: Any, w: Any, target: Any) -> Any:
        if way == "rows":
            return OPS.cross_entropy(x, target, w, **options)
        found = OPS.linear_cross_entropy(x, head, target, weight=w, **options)
        return found[0] if way == "each" else found

    rows = P(None, "v") if way == "rows" else P()
    targets = P(None, "v") if isinstance(p.target, np.ndarray) and p.target.dtype.kind == "f" else P()
    specs = (rows, P("v"), P("v"), targets)
    f = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
    given = jnp.asarray(p.x), jnp.eye(V, dtype=p.x.dtype), jnp.asarray(p.w), jax.tree.map(jnp.asarray, p.target)
    return jax.jit(jax.grad(f))(*given)


def heavy_weights_keep_their_digits(mesh: Any) -> None:
    for target in TARGETS:
        for smoothing in (1e-3, 1.0):
            p = Problem(V, "float32", target, smoothing)
            for way in WAYS:
                if way != "sampled":
                    p.judge(gradient(mesh, p, way))
                elif target != "soft":  # exact at a target's class
                    named = p.target == p.heavy if target == "indices" else (p.target[0] == p.heavy).any(1)
                    p.judge(gradient(mesh, p, way), only=(named & (p.x.argmax(1) == p.heavy), p.heavy))
