"""What a vmap knows of the mesh axis it maps over: run by tests/rules/test_jax_elsewhere.py on four CPU devices."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ops

R = np.random.default_rng(0)
E, N, V, D = 4, 8, 12, 5
X, H, W = (R.normal(size=s).astype("f") for s in ((E, N, V), (E, N, D), (E, V, D)))
T, CW = R.integers(0, V, N), R.uniform(0.5, 1.5, V).astype("f")


def _nll(z: Any, t: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(z), t[..., None], -1).mean()


def _agree(ours: Any, theirs: Any, what: str) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(np.asarray(b)).max() > 1e-4, what
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6, err_msg=what)


def shared_operands(mesh: Any) -> None:
    """vmap over an axis that is sharded in types, where only some of the operands are mapped."""
    head = lambda h, w, t, **o: jax_ops.linear_cross_entropy(h, w, t, **o)  # noqa: E731
    cases: dict[str, tuple[Any, Any, Any, Any, int]] = {
        "targets": (lambda x, t: jax_ops.cross_entropy(x, t), _nll, (0, None), (X, T), 0),
        "logits": (
            lambda x, y: jax_ops.cross_entropy(x, y),
            lambda x, y: -(jax.nn.log_softmax(x) * y).sum(-1).mean(),
            (None, 0),
            (X[0], np.abs(X)),
            0,
        ),
        "head": (head, lambda h, w, t: _nll(h @ w.T, t), (0, None, None), (H, W[0], T), 0),
        "heads": (
            lambda h, w, t: head(h, w, t, memory="lean", chunk_size=4),
            lambda h, w, t: _nll(h @ w.T, t),
            (None, 0, None),
            (H[0], W, T),
            1,
        ),
    }
    with jax.set_mesh(mesh):
        for name, (ours, theirs, axes, arrays, wrt) in cases.items():
            specs = [P() if i is None else P("b") for i in axes]
            given = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
            truth = jax.vmap(jax.grad(theirs, wrt), axes)(*arrays)
            _agree(jax.jit(jax.vmap(jax.grad(ours, wrt), axes))(*given), truth, name)


def class_weights(mesh: Any) -> None:
    """Of class indices, with rows or classes over Explicit axes."""
    f = lambda x, w: jax_ops.cross_entropy(x, T, w, label_smoothing=0.1)  # noqa: E731
    x, truth = X[0], jax.grad(f, (0, 1))(X[0], CW)
    with jax.set_mesh(mesh):
        for x_spec, w_spec in ((P("b"), P()), (P(None, "b"), P("b")), (P(None, "b"), P())):
            given = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, x_spec), (CW, w_spec))]
            ours = jax.jit(jax.grad(f, (0, 1)))(*given)
            assert [jax.typeof(g).sharding.spec for g in ours] == [jax.typeof(g).sharding.spec for g in given]
            _agree(ours, truth, f"{x_spec}, {w_spec}")


def labels_on_every_device(mesh: Any) -> None:
    """Rows over Explicit axes, their class indices not cut."""
    f = lambda x: jax_ops.softmax_cross_entropy_with_integer_labels(x, T).sum()  # noqa: E731
    with jax.set_mesh(mesh):
        ours = jax.jit(jax.grad(f))(jax.device_put(X[0], NamedSharding(mesh, P("b"))))
    _agree(ours, jax.grad(f)(X[0]), "labels on every device")


def sharded_classes_of_a_batch(grid: Any) -> None:
    """axis_name= under a vmap that lies on another axis of the mesh."""

    def by_hand(x: Any, t: Any) -> Any:
        m = lax.pmax(lax.stop_gradient(x.max(-1)), "v")
        total = lax.psum(jnp.exp(x - m[:, None]).sum(-1), "v")
        first = lax.axis_index("v") * x.shape[-1]
        z = lax.psum(jnp.where(jnp.arange(x.shape[-1]) + first == t[:, None], x, 0.0).sum(-1), "v")
        return (m + jnp.log(total) - z).mean()

    logits = lambda f: jax.shard_map(f, mesh=grid, in_specs=(P(None, "v"), P()), out_specs=P())  # noqa: E731

    def head(f: Any) -> Any:
        mapped = jax.shard_map(f, mesh=grid, in_specs=(P(), P("v"), P()), out_specs=P())
        return lambda h, t: mapped(h, W[0], t)

    linear = lambda **o: head(lambda h, w, t: jax_ops.linear_cross_entropy(h, w, t, axis_name="v", **o))  # noqa: E731
    theirs = head(lambda h, w, t: by_hand(h @ w.T, t))
    losses: dict[str, tuple[Any, Any, Any]] = {
        "logits": (logits(lambda x, t: jax_ops.cross_entropy(x, t, axis_name="v")), logits(by_hand), X[:2]),
        "fast": (linear(), theirs, H[:2]),
        "lean": (linear(memory="lean"), theirs, H[:2]),
    }
    each = lambda f: jax.vmap(f, spmd_axis_name="r")  # noqa: E731
    t = np.stack([T, T[::-1]])
    uses: dict[str, Callable[[Any], Any]] = {
        "vmap(grad)": lambda f: lambda x: each(jax.grad(f))(x, t),
        "grad(vmap)": lambda f: jax.grad(lambda x: each(f)(x, t).sum()),
        "vmap(jvp)": lambda f: lambda x: each(lambda x, t: jax.jvp(lambda x: f(x, t), (x,), (x,))[1])(x, t),
    }
    with jax.set_mesh(grid):
        for name, (ours, truth, x) in losses.items():
            for use, of in uses.items():
                _agree(jax.jit(of(ours))(x), jax.jit(of(truth))(x), f"{name}, {use}")


def main() -> None:
    line = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Explicit,))
    grid = jax.make_mesh((2, 2), ("r", "v"), axis_types=(AxisType.Auto,) * 2)
    ours = ((shared_operands, line), (class_weights, line), (labels_on_every_device, line))
    for check, where in (*ours, (sharded_classes_of_a_batch, grid)):
        check(where)
        print(check.__name__, flush=True)
    print("all checks on meshes ran")


if __name__ == "__main__":
    main()
