"""The ops as functions of one array, and their arrays: for tests of where JAX takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_ops

R = np.random.default_rng(0)
N, V, D = 4, 7, 5
X, H, W, B = (R.normal(size=s).astype("f") for s in ((N, V), (N, D), (V, D), (V,)))
CW, T = R.uniform(0.5, 1.5, V).astype("f"), np.array([0, 6, -100, 3])
SOFT = R.uniform(0.1, 1.0, (N, V)).astype("f")


def _head(x: Any, w: Any = W, **options: Any) -> Any:
    return jax_ops.linear_cross_entropy(x, jnp.asarray(w, x.dtype), T, **options)


def _bias(x: Any, memory: Any) -> Any:
    bias, cw = jnp.asarray(B, x.dtype), CW
    return _head(x, linear_bias=bias, weight=cw, label_smoothing=0.1, softcap=4.0, memory=memory, chunk_size=3)


def _stats(x: Any) -> Any:
    names = ("lse", "entropy", "logprob")
    loss, stats = jax_ops.cross_entropy(x, T, CW, label_smoothing=0.1, z_loss=0.1, softcap=3.0, stats=names)
    return loss + sum(s.sum() for s in stats.values())


ZOO: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "softmax": (lambda x: (jax_ops.softmax(x, where=X < 1.5) ** 2).sum(), X),
    "log_softmax": (lambda x: (jax_ops.log_softmax(x, (0, 1)) ** 2).sum(), X),
    "cross_entropy": (lambda x: jax_ops.cross_entropy(x, jnp.asarray(T)), X),
    "every option": (_stats, X),
    "soft targets": (lambda x: jax_ops.cross_entropy(x, SOFT, CW, token_weight=CW[:N]), X),
    "optax, labels": (lambda x: jax_ops.softmax_cross_entropy_with_integer_labels(x, T % V, where=X < 2).sum(), X),
    "optax, dense": (lambda x: jax_ops.softmax_cross_entropy(x, SOFT, where=X < 2).sum(), X),
    "head": (_head, H),
    "head, bias": (lambda x: _bias(x, "fast"), H),
    "lean head, bias": (lambda x: _bias(x, "lean"), H),
}


def agree(a: Any, b: Any, tol: float = 2e-4) -> None:
    assert np.abs(np.asarray(b, float)).max() > 1e-3
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=tol, atol=tol)
