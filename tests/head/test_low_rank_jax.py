"""JAX: low-rank heads and scales that are arrays, against the joined weight and logits, in every mode."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ops
from tests.head.problems import MEMORY
from tests.judging import quick

N, D, V, R = 5, 4, 7, 2


@pytest.fixture(autouse=True)
def _wide() -> Any:
    with jax.enable_x64(True):
        yield


def given(lead: tuple[int, ...] = (N,), inner: tuple[int, ...] = ()) -> dict[str, Any]:
    r = np.random.default_rng(3)
    shapes = {"x": (*lead, D), "w": (V, *inner, D), "b": (V, *inner), "down": (R, D), "up": (V, *inner, R)}
    found = {k: jnp.asarray(r.standard_normal(s)) for k, s in shapes.items()}
    return found | {"s": jnp.asarray(0.3 + r.random((*lead, *inner)))}


def ours(a: dict[str, Any], t: Any, **options: Any) -> Any:
    low = (a["down"], a["up"]) if "up" in a else None
    scale = a.get("s", 1.0)
    return jax_ops.linear_cross_entropy(
        a["x"], a["w"], t, linear_bias=a.get("b"), low_rank=low, logit_scale=scale, **options
    )


def joined(a: dict[str, Any], t: Any, **options: Any) -> Any:
    z = a["x"] @ (a["w"] + (a["up"] @ a["down"] if "up" in a else 0.0)).T + a.get("b", 0.0)
    s = a.get("s", jnp.ones(()))
    return jax_ops.cross_entropy(z * (s[..., None] if s.ndim else s), t, **options)


def same(f: Any, g: Any, a: dict[str, Any]) -> None:
    """Values, gradients, both modes, and second derivatives."""

    def everything(f: Any) -> Any:
        along = jax.tree.map(jnp.cos, a)
        first, second = jax.jvp(jax.grad(f), (a,), (along,))
        return f(a), first, second, jax.jvp(f, (a,), (along,))[1]

    found, want = (jax.jit(lambda f=f: everything(f), **quick.QUICK)() for f in (f, g))
    for p, q in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(p, q, rtol=1e-9, atol=1e-11)


HEADS = ["x w down up", "x w b s", "x w b down up s", "x w b one"]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("names", HEADS)
def test_every_derivative(memory: Any, names: str) -> None:
    """In both memories, the options of the loss or chunks by turns."""
    a = {k: v for k, v in given().items() if k in names.split()}
    if "one" in names:
        a["s"] = given()["s"][1]
    t = jnp.array([0, 6, -100, 3, 2])
    turn = (HEADS.index(names) + MEMORY.index(memory)) % 2
    plain: dict[str, Any] = ({}, {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.1})[turn]
    chunks: dict[str, Any] = ({"chunk_size": 3}, {})[turn]
    same(lambda a: ours(a, t, memory=memory, **plain, **chunks), lambda a: joined(a, t, **plain), a)


@pytest.mark.parametrize("memory", MEMORY)
def test_shift_positions_and_ignored_rows(memory: str) -> None:
    """Rows that reach no result may be NaN, in both arrays; so may those that a shift leaves out."""
    a, t = given((2, 4)), jnp.arange(8).reshape(2, 4) % V
    t = t.at[1, 1].set(-100)
    cut = a | {"x": a["x"][:, :-1], "s": a["s"][:, :-1]}
    spoilt = a | {"x": a["x"].at[:, -1].set(jnp.nan).at[1, 0].set(jnp.nan), "s": a["s"].at[1, 0].set(jnp.nan)}
    f = jax.jit(jax.grad(lambda a: ours(a, t, shift=1, memory=memory)), **quick.QUICK)
    grads = [f(a), f(spoilt)]
    want = jax.jit(jax.grad(lambda a: joined(a, t[:, 1:])), **quick.QUICK)(cut)
    for g in grads:
        for name, right in want.items():
            part = g[name][:, :-1] if name in ("x", "s") else g[name]
            np.testing.assert_allclose(part, right, rtol=1e-9, atol=1e-12, err_msg=name)
    soft = jax.nn.softmax(jnp.cos(jnp.arange(2.0 * 4 * V)).reshape(2, 4, V))
    found = jax.jit(jax.grad(lambda a: ours(a, soft, shift=1, memory=memory)), **quick.QUICK)(a)
    want = jax.jit(jax.grad(lambda a: joined(a, soft[:, 1:], axis=-1)), **quick.QUICK)(cut)
    np.testing.assert_allclose(found["s"][:, :-1], want["s"], rtol=1e-9)
    a, t = given(inner=(2,)), jnp.arange(2 * N).reshape(N, 2) % V
    t = t.at[2, 1].set(-100)

    def parts(a: Any) -> Any:
        each = [{k: v if k in ("x", "down") else v[:, p] for k, v in a.items()} for p in range(2)]
        return sum(joined(v, t[:, p], reduction="sum") for p, v in enumerate(each))

    same(lambda a: ours(a, t, reduction="sum", memory=memory), parts, a)


def test_mapped_and_exported() -> None:
    a, t = given(), jnp.arange(N)
    two = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), {"x": a["x"], "s": a["s"]})
    rest = {k: v for k, v in a.items() if k not in two}
    found = jax.vmap(jax.grad(lambda b: ours({**rest, **b}, t)))(two)
    want = jax.grad(lambda b: joined({**rest, **b}, t))(jax.tree.map(lambda v: v[1], two))
    np.testing.assert_allclose(found["s"][1], want["s"], rtol=1e-9)
    program = jax.export.export(jax.jit(jax.grad(lambda a: ours(a, t))))(a)
    again = jax.export.deserialize(program.serialize()).call(a)
    for name, g in jax.grad(lambda a: ours(a, t))(a).items():
        np.testing.assert_allclose(again[name], g, rtol=1e-9, atol=1e-12)


def test_nothing_of_a_frozen_weight_is_made() -> None:
    """No result of the weight's size, and no third matmul over the classes."""
    n, d, v = 8, 32, 400
    r = np.random.default_rng(1)
    x, w, down, up = (jnp.asarray(r.standard_normal(s), jnp.float32) for s in ((n, d), (v, d), (2, d), (v, 2)))
    t = jnp.arange(n)
    f = lambda x, down, up: jax_ops.linear_cross_entropy(x, w, t, low_rank=(down, up))  # noqa: E731
    text = jax.jit(jax.grad(f, (0, 1, 2))).lower(x, down, up).compile().as_text() or ""
    made = [line for line in text.splitlines() if f" = f32[{v},{d}]" in line]
    assert all("parameter" in line or "constant" in line for line in made), made
    g = lambda x, down, up: jax_ops.linear_cross_entropy(x, w + up @ down, t)  # noqa: E731
    text = jax.jit(jax.grad(g, (0, 1, 2))).lower(x, down, up).compile().as_text() or ""
    made = [line for line in text.splitlines() if f" = f32[{v},{d}]" in line]
    assert not all("parameter" in line or "constant" in line for line in made), "the measurement sees a joined weight"
