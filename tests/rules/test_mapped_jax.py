"""Second derivatives of rows that vmap has mapped inside a program: results lie where JAX was told that they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax.interpreters import batching

import jax_ops
from jax_ops._rows import alive, plain

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
    """The saboteur: rows that are mapped, their class axis counted as before."""
    monkeypatch.setitem(batching.fancy_primitive_batchers, alive._alive, _as_before)
    jax.clear_caches()
    with jax.enable_x64(True):
        try:
            off = _lean(2)
        except (TypeError, ValueError):
            return
        finally:
            jax.clear_caches()
        assert off > 1e-3


def _as_before(mapping: Any, arrays: Any, dims: Any, *, axis: int, weighted: bool) -> Any:
    moved = alive._batch(mapping, arrays, dims, axis=axis - 1, weighted=weighted)
    return moved if moved[1] == 0 else alive._batch(mapping, arrays, dims, axis=axis, weighted=weighted)


# Many targets of the same logits: whatever is made of one of them, it may lie in rows that are ignored

Z, V = RNG.standard_normal((3, 4)), RNG.standard_normal((3, 4))
TARGETS = RNG.integers(-1, 4, (3, 3))
HEAD, CLASS_WEIGHTS = RNG.standard_normal((6, 4)), RNG.uniform(0.5, 2.0, 4)

Call = Callable[[Any, Any], Any]
CALLS: dict[str, Call] = {
    "loss": lambda z, t: jax_ops.cross_entropy(z, t, ignore_index=-1, reduction="sum"),
    "labels": lambda z, t: jax_ops.softmax_cross_entropy_with_integer_labels(z, abs(t)).sum(),
    "weighted": lambda z, t: jax_ops.cross_entropy(
        z, t, CLASS_WEIGHTS, ignore_index=-1, reduction="sum", label_smoothing=0.1, softcap=3.0, z_loss=0.1
    ),
    "pair": lambda z, t: jax_ops.cross_entropy(
        z, (jnp.stack([t, (t + 2) % 4], 1), jnp.full((3, 2), 0.5)), ignore_index=-1, reduction="sum"
    ),
    "entropy": lambda z, t: jax_ops.cross_entropy(z, t, ignore_index=-1, stats=("entropy",))[1]["entropy"].sum(),
    "head": lambda x, t: jax_ops.linear_cross_entropy(x, HEAD, t, ignore_index=-1, reduction="sum", chunk_size=2),
    "lean": lambda x, t: jax_ops.linear_cross_entropy(
        x, HEAD, t, ignore_index=-1, reduction="sum", memory="lean", chunk_size=4
    ),
}
WAYS: dict[str, Callable[[Call], Callable[[Any], Any]]] = {
    "vmap": lambda call: lambda z: jax.vmap(lambda t: call(z, t))(TARGETS).sum(),
    "jit of vmap": lambda call: lambda z: jax.jit(lambda z, ts: jax.vmap(lambda t: call(z, t))(ts))(z, TARGETS).sum(),
    "vmap of jit": lambda call: lambda z: jax.vmap(jax.jit(call), (None, 0))(z, TARGETS).sum(),
    "twice": lambda call: lambda z: jax.jit(jax.vmap(jax.vmap(call, (None, 0)), (None, 0)))(z, TARGETS[None]).sum(),
    "in a scan": lambda call: (
        lambda z: jax.lax.scan(
            lambda total, ts: (total + jax.vmap(call, (None, 0))(z, ts).sum(), None), 0.0, TARGETS[None]
        )[0]
    ),
}


def _second(f: Callable[..., Any]) -> list[Any]:
    """A Hessian's product, forward over reverse and reverse over forward."""
    z = jnp.asarray(Z)
    return [_hvp(f, z, V), jax.grad(lambda z: jax.jvp(f, (z,), (V,))[1])(z)]


def _apart(call: Call, way: str) -> float:
    """How far the mapped call is from one call after the other."""
    with jax.enable_x64(True):
        one_by_one = jax.jit(lambda z, ts: sum(call(z, t) for t in ts))
        found, want = _second(WAYS[way](call)), _second(lambda z: one_by_one(z, TARGETS))
        return max(float(jnp.abs(a - b).max()) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize(
    ("name", "way"), [("loss", way) for way in WAYS] + [(n, "jit of vmap") for n in CALLS if n != "loss"]
)
def test_many_targets_of_the_same_logits(name: str, way: str) -> None:
    assert _apart(CALLS[name], way) < 1e-13


def test_saboteur_a_function_that_does_not_ask_for_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A custom_jvp: the tangent has more examples than the value."""

    @jax.custom_jvp
    def same(z: Any, dead: Any) -> Any:
        return z

    def tangent(primals: Any, tangents: Any) -> Any:
        (z, dead), axis = primals, -1
        gone = dead if z.ndim == dead.ndim else jnp.expand_dims(dead, axis)
        return jnp.where(gone, 0.0, z), jnp.where(gone, 0.0, tangents[0])

    same.defjvp(tangent)
    faulty = lambda axis, z, dead, *others: same(z, dead)  # noqa: E731
    monkeypatch.setattr(alive, "alive", faulty)
    monkeypatch.setattr(plain, "alive", faulty)
    jax.clear_caches()
    try:
        with pytest.raises(TypeError):
            _apart(CALLS["loss"], "jit of vmap")
    finally:
        jax.clear_caches()


# Where the logits that targets share are NaN: their gradient is 0 if all targets are ignored, and NaN otherwise; a
# weight of each target's own has its own gradient


def _of_nan(ignored: list[bool]) -> list[Any]:
    """Gradients of first and second order of NaN logits by them, and by a weight for each of two targets."""
    t, z, w = jnp.where(jnp.asarray(ignored), -1, 1)[:, None], jnp.full((1, 4), jnp.nan), jnp.ones((2, 4))

    @jax.jit
    def loss(z: Any, w: Any) -> Any:
        def one(t: Any, w: Any) -> Any:
            options: dict[str, Any] = {"ignore_index": -1, "reduction": "sum", "label_smoothing": 0.1}
            return jax_ops.cross_entropy(z, t, w, **options)

        return jax.vmap(one)(t, w).sum()

    def first(z: Any, w: Any) -> Any:
        return sum(g.sum() for g in jax.grad(loss, (0, 1))(z, w))

    by_row = lambda w: jnp.isnan(w).any(1)  # noqa: E731
    found = []
    for f in (loss, lambda z, w: jax.jvp(first, (z, w), (jnp.ones_like(z), jnp.ones_like(w)))[1]):
        to_z, to_w = jax.grad(f, (0, 1))(z, w)
        found.append([bool(jnp.isnan(to_z).any()), *map(bool, by_row(to_w))])
    return found


@pytest.mark.parametrize("ignored", [[True, True], [True, False]])
def test_shared_logits_of_nan(ignored: list[bool]) -> None:
    some = not all(ignored)
    assert _of_nan(ignored) == [[some, not ignored[0], not ignored[1]]] * 2


@pytest.mark.parametrize("fault", ["any", "shared"])
def test_saboteurs_of_shared_logits_of_nan(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead where any target is; weights taken for one of all targets."""

    def batch(mapping: Any, arrays: Any, dims: Any, *, axis: int, weighted: bool) -> Any:
        if fault == "shared":
            return alive._batch(mapping, arrays, dims, axis=axis, weighted=False)
        z, dead, *others = arrays
        if dims[0] is None and dims[1] is not None:
            return alive._alive.bind(z, dead.any(dims[1]), *others, axis=axis, weighted=weighted), None
        return alive._batch(mapping, arrays, dims, axis=axis, weighted=weighted)

    monkeypatch.setitem(batching.fancy_primitive_batchers, alive._alive, batch)
    jax.clear_caches()
    try:
        with pytest.raises(AssertionError):
            test_shared_logits_of_nan([True, False])
    finally:
        jax.clear_caches()
