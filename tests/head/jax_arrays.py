"""Arrays, options and compositions of JAX's linear head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402

import jax_ops  # noqa: E402

N, D, V = 5, 3, 7
TARGET = np.array([1, -100, 4, 6, 0])
R = np.random.default_rng(11)
IN = {
    "x": R.uniform(-1, 1, (N, D)),
    "w": R.uniform(-1, 1, (V, D)),
    "b": R.uniform(-1, 1, V),
    "y": R.uniform(0.1, 1.1, (N, V)),
    "cw": R.uniform(0.5, 1.5, V),
    "tw": R.uniform(0.5, 1.5, N),
}


STATS = ("lse", "entropy")
UP = np.linspace(-1.0, 2.0, N * D).reshape(N, D)
# Chunks of 3 overlap in 5 rows and in 7 classes.
MODES: dict[str, dict[str, Any]] = {
    "fast": {"memory": "fast", "chunk_size": 3},
    "fast, rows": {"memory": "fast", "chunk_size": 3, "stats": STATS},
    "lean": {"memory": "lean", "chunk_size": 3, "stats": STATS},
}


def _total(out: Any) -> Any:
    """One number that every result enters."""
    loss, stats = out if isinstance(out, tuple) else (out, {})
    return loss.sum() + sum((0.3 + 0.2 * i) * v.sum() for i, v in enumerate(stats.values()))


def _head(
    mode: str, x: Any, w: Any, b: Any = None, t: Any = TARGET, cw: Any = None, tw: Any = None, **options: Any
) -> Any:
    given = {"linear_bias": b, "weight": cw, "token_weight": tw}
    return _total(jax_ops.linear_cross_entropy(x, w, t, **given, **MODES[mode], **options))


def _along(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w: jax.jvp(f, (x, w), (jnp.cos(x), jnp.sin(w)))[1]


def _scanned(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w: lax.scan(lambda c, s: (c + f(s * x, w), None), jnp.zeros(()), jnp.arange(1.0, 3.0))[0]


def _linearized(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Any, w: Any) -> Any:
        out, push = jax.linearize(f, x, w)
        return out + push(jnp.cos(x), jnp.sin(w))

    return run


def _both(f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(f, (0, 1))


def _two(x: Any) -> Any:
    return jnp.stack([x, 2 * x])


Transform = Callable[[Callable[..., Any]], Callable[..., Any]]
TRANSFORMS: dict[str, Transform] = {
    "value": lambda f: f,
    "grad": _both,
    "jvp": _along,
    "linearize": _linearized,
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1)),
    "hessian": lambda f: jax.hessian(f, (0, 1)),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f, (0, 1)), (0, 1)),
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f, (0, 1)), (0, 1)),
    "hvp": lambda f: _along(_both(f)),
    "vmap": lambda f: lambda x, w: jax.vmap(f, (0, None))(_two(x), w),
    "vmap(grad)": lambda f: lambda x, w: jax.vmap(_both(f), (0, None))(_two(x), w),
    "vmap(grad) of heads": lambda f: lambda x, w: jax.vmap(_both(f), (None, 0))(x, _two(w)),
    "vmap(jvp)": lambda f: lambda x, w: jax.vmap(lambda v: jax.jvp(f, (x, w), (v, w))[1])(_two(x)),
    "grad(vmap)": lambda f: _both(lambda x, w: jax.vmap(f, (0, None))(_two(x), w).sum()),
    "grad(checkpoint)": lambda f: _both(jax.checkpoint(f)),
    "hvp(checkpoint)": lambda f: _along(_both(jax.checkpoint(f))),
    "scan": _scanned,
    "grad(scan)": lambda f: _both(_scanned(f)),
    "jvp(scan)": lambda f: _along(_scanned(f)),
    "grad(jit)": lambda f: _both(jax.jit(f)),
    "forward 3": lambda f: _along(_along(_along(f))),
    "reverse 3": lambda f: _both(
        lambda x, w: (jax.grad(lambda x: (jax.grad(f)(x, w) * UP).sum())(x) * UP).sum(),
    ),
}


def _same(ours: Any, theirs: Any, tol: float = 1e-10) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.isfinite(b).all()
        assert np.abs(b).max() > 1e-3, "the truth is too small for the comparison to see anything"
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)
