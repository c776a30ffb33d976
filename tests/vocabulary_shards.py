"""Checks of sharded classes on 8 forced host devices, run as a program: `python -m tests.vocabulary_shards`."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ops

N, D, V = 6, 4, 16
R = np.random.default_rng(7)
# Loud rows: one logit of about half of its row's mass, and of 40 in one of them.
X = R.normal(size=(N, D)) * 1.5
X[1] *= 20
TARGET = np.array([1, 14, -100, 15, 0, 7])
ARRAYS: dict[str, np.ndarray] = {
    "x": X,
    "w": R.normal(size=(V, D)),
    "b": R.normal(size=V),
    "y": R.uniform(0.1, 1.1, (N, V)),
    "cw": R.uniform(0.5, 1.5, V),
    "tw": R.uniform(0.5, 1.5, N),
}
FULL: dict[str, Any] = {"label_smoothing": 0.2, "logit_scale": 0.7, "softcap": 9.0, "z_loss": 0.1}
STATS = ("lse", "logprob", "entropy", "argmax")


def total(out: Any) -> Any:
    """One number that every differentiable result enters, unevenly."""
    loss, stats = out if isinstance(out, tuple) else (out, {})
    loss = (loss * jnp.linspace(0.5, 1.5, loss.size).reshape(loss.shape)).sum()
    return loss + sum((0.3 + 0.2 * i) * v.sum() for i, (k, v) in enumerate(sorted(stats.items())) if k != "argmax")


class Case:
    """One call: which arrays it gets, and options."""

    def __init__(self, op: str, names: str, soft: bool = False, **options: Any) -> None:
        self.op, self.names, self.soft, self.options = op, names.split(), soft, options

    def arrays(self) -> dict[str, Any]:
        given = dict(ARRAYS)
        given["z"] = np.asarray(X @ ARRAYS["w"].T)
        return {name: jnp.asarray(given[name]) for name in self.names}

    def specs(self, axis: Any, rows: Any = None) -> dict[str, P]:
        by = {"x": P(rows), "w": P(axis), "b": P(axis), "y": P(rows, axis), "cw": P(axis), "tw": P(rows)}
        by["z"] = P(rows, axis)
        return {name: by[name] for name in self.names}

    def call(self, a: dict[str, Any], t: Any, axis_name: Any = None) -> Any:
        given = {"weight": a.get("cw"), "token_weight": a.get("tw"), **self.options}
        if axis_name is not None:
            given["axis_name"] = axis_name
        target = a["y"] if self.soft else t
        if self.op == "cross_entropy":
            return jax_ops.cross_entropy(a["z"], target, **given)
        return jax_ops.linear_cross_entropy(a["x"], a["w"], target, linear_bias=a.get("b"), **given)


CASES = {
    "logits": Case("cross_entropy", "z"),
    "logits, all": Case("cross_entropy", "z cw tw", **FULL, stats=STATS),
    "logits, soft": Case("cross_entropy", "z y cw tw", True, **FULL, stats=("entropy",)),
    "fast": Case("linear_cross_entropy", "x w", chunk_size=3),
    "fast, all": Case("linear_cross_entropy", "x w b cw tw", **FULL, chunk_size=4),
    "fast, soft": Case("linear_cross_entropy", "x w b y cw tw", True, **FULL, chunk_size=4),
    "fast, rows": Case("linear_cross_entropy", "x w b cw tw", **FULL, chunk_size=4, stats=STATS, reduction="none"),
    "lean": Case("linear_cross_entropy", "x w b cw tw", **FULL, chunk_size=1, stats=STATS, memory="lean"),
    "lean, soft": Case("linear_cross_entropy", "x w b y cw tw", True, **FULL, memory="lean", stats=("lse",)),
}


def same(ours: Any, truth: Any, what: str, tol: float = 1e-11) -> None:
    flat = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(truth), strict=True)
    for (path, a), b in flat:
        label = f"{what}{jax.tree_util.keystr(path)}"
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, label
        assert np.isfinite(b).all(), label
        assert np.abs(b).max() > 1e-3, f"{label}: the truth is too small for the comparison to see anything"
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol * np.abs(b).max(), err_msg=label)


def along(a: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.cos(3.0 * v) for name, v in a.items()}


def derivatives(f: Callable[[dict[str, Any]], Any], a: dict[str, Any]) -> dict[str, Any]:
    g = jax.grad(lambda a: total(f(a)))
    out = {"value": f(a), "grad": g(a), "jvp": jax.jvp(lambda a: total(f(a)), (a,), (along(a),))[1]}
    return out | {"hvp": jax.jvp(g, (a,), (along(a),))[1]}


def main() -> None:
    import sys

    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((8,), ("v",), axis_types=(AxisType.Auto,))
    for name, case in CASES.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        a = case.arrays()
        truth = jax.jit(lambda a, case=case: derivatives(lambda a: case.call(a, TARGET), a))(a)
        for check in (True, False):
            print(name, check, flush=True)
            sharded = jax.shard_map(
                lambda a, case=case: case.call(a, TARGET, "v"),
                mesh=mesh,
                in_specs=(case.specs("v"),),
                out_specs=P(),
                check_vma=check,
            )
            same(jax.jit(lambda a, f=sharded: derivatives(f, a))(a), truth, f"{name}, check_vma={check}: ")
    print("all sharded checks ran")


if __name__ == "__main__":
    main()
