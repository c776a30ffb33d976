"""Second derivatives of rows that vmap has mapped inside a program: results lie where JAX was told that they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import jax_ops
from jax_ops._rows import classes

RNG = np.random.default_rng(0)


def _hvp(f: Callable[..., Any], x: Any, v: Any) -> Any:
    return jax.jvp(jax.grad(f), (x,), (v,))[1]


def _lean(rows: int) -> float:
    """How far a lean head of K-d soft targets is off, in a Hessian's product; where rows = K no shape tells."""
    x, w = RNG.standard_normal((rows, 5)), RNG.standard_normal((8, 2, 5))
    y = np.moveaxis(RNG.dirichlet(np.ones(8), (rows, 2)), -1, 1)
    v = RNG.standard_normal(x.shape)

    def ours(x: Any) -> Any:
        return jax_ops.linear_cross_entropy(x, w, y, memory="lean", chunk_size=4)

    def plain(x: Any) -> Any:
        return -(y * jax.nn.log_softmax(jnp.einsum("nd,vkd->nvk", x, w), axis=1)).sum(1).mean()

    return float(np.abs(_hvp(ours, jnp.asarray(x), v) - _hvp(plain, jnp.asarray(x), v)).max())


@pytest.mark.parametrize("rows", [2, 6])
def test_lean_heads_of_soft_targets_along_dimensions(rows: int) -> None:
    with jax.enable_x64(True):
        assert _lean(rows) < 1e-14


def test_results_left_where_they_were_mapped_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes.alive, "fun", lambda axis, z, dead, *others: z)
    jax.clear_caches()
    with jax.enable_x64(True):
        try:
            off = _lean(2)
        except TypeError:
            return
        finally:
            jax.clear_caches()
        assert off > 1e-3
