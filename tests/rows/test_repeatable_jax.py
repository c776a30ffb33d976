"""Runs that repeat: in what a GPU is given no scatter adds at equal indices, where the docs promise the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import jax_ops  # noqa: E402
from jax_ops._rows import picked, sparse  # noqa: E402

N, D, V, K = 5, 4, 30, 6
R = np.random.default_rng(0)
X, W, B = (jnp.asarray(R.normal(size=s), jnp.float32) for s in ((N, D), (V, D), (V,)))
TARGET = np.array([3, 0, -100, 29, 7])
PAIR = (np.array([[3, 1, 3], [0, 0, 0], [-100] * 3, [29, 2, 5], [7, 7, 1]]), jnp.asarray(R.uniform(size=(N, 3)), "f"))


def sampled(target: Any, **options: Any) -> Callable[..., Any]:
    return lambda x, w, b, key: jax_ops.linear_cross_entropy(
        x, w, target, linear_bias=b, grad_samples=K, key=key, **options
    )


def at_ids(x: Any, w: Any, b: Any, key: Any) -> Any:
    return jnp.sin(jax_ops.linear_at(x, w, PAIR[0], linear_bias=b)).sum(where=PAIR[0] >= 0)


CALLS: dict[str, Callable[..., Any]] = {
    "sampled": sampled(TARGET),
    "sampled, chunks": sampled(TARGET, chunk_size=2, z_loss=0.1, label_smoothing=0.1),
    "sampled, pair": sampled(PAIR, softcap=3.0),
    "linear_at": at_ids,
}


def program(f: Any) -> str:
    """A gradient's program for a CUDA device."""
    given = (X, W, B, jax.random.key(0))
    return jax.export.export(jax.jit(jax.grad(f, (0, 1, 2))), platforms=("cuda",))(*given).mlir_module()


def adding_scatters(f: Any) -> list[bool]:
    """Of each scatter that adds whether its indices are known to differ."""
    text = program(f)
    # what is false is not printed
    found = re.findall(r'"stablehlo\.scatter"\([^)]*\) <\{(.*?)\}> \(\{(.*?)stablehlo\.return', text, re.DOTALL)
    assert len(found) == text.count('"stablehlo.scatter"(')
    return ["unique_indices = true" in how for how, body in found if "stablehlo.add" in body]


@pytest.mark.parametrize("call", CALLS)
def test_no_scatter_adds_in_any_order(call: str) -> None:
    found = adding_scatters(CALLS[call])
    assert found, "nothing is added: what is looked for has another name"
    assert all(found)


@pytest.mark.parametrize("call", ["sampled", "linear_at"])
def test_saboteur_a_scatter_that_adds_in_any_order(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picked, "alone", lambda ctx: False)
    assert not all(adding_scatters(CALLS[call]))


def sorts(f: Any) -> list[bool]:
    """Of each sort whether it is stable: if not, a class's rows may stand in another order in each run."""
    text = program(f)
    found = re.findall(r'"stablehlo\.sort"\([^)]*\) <\{(.*?)\}>', text)
    assert len(found) == text.count('"stablehlo.sort"(') > 0
    return ["is_stable = true" in how for how in found]


@pytest.mark.parametrize("call", CALLS)
def test_every_sort_is_stable(call: str) -> None:
    assert all(sorts(CALLS[call]))


ARGSORT = jnp.argsort


def test_saboteur_a_sort_that_is_not_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jnp, "argsort", lambda a, axis=-1, **_: ARGSORT(a, axis, stable=False))
    assert not all(sorts(CALLS["sampled"]))


def judge_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each class is one run, and written once: what is told of the scatter's indices."""
    ids, seen = np.array([[3, 1, 3, -1], [7, 0, 1, 3], [3, -1, 7, 7]]), []
    run_sums = sparse.run_sums
    monkeypatch.setattr(
        picked, "run_sums", lambda begins, a, axis: seen.append(int(begins.sum())) or run_sums(begins, a, axis)
    )
    c, x = R.normal(size=ids.shape).astype("f"), R.normal(size=(3, D)).astype("f")
    found = picked._ordered_weight_bwd(*map(jnp.asarray, (c, x, ids)), classes=9, wide=True)
    truth = np.zeros((10, D))
    np.add.at(truth, ids, c[:, :, None] * x[:, None])
    np.testing.assert_allclose(found, truth[:9], rtol=1e-5, atol=1e-6)
    assert seen == [len(np.unique(ids))]


def test_each_class_is_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_runs(monkeypatch)


UNSORTED = {
    "as they come": lambda a, axis=-1, **_: jnp.arange(a.shape[axis]),
    "two exchanged": lambda a, axis=-1, **_: (
        ARGSORT(a, axis).at[jnp.array([0, 4])].set(ARGSORT(a, axis)[jnp.array([4, 0])])
    ),
    "one twice": lambda a, axis=-1, **_: ARGSORT(a, axis).at[4].set(ARGSORT(a, axis)[5]),
}


@pytest.mark.parametrize("name", UNSORTED)
def test_saboteur_a_broken_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jnp, "argsort", UNSORTED[name])
    with pytest.raises(AssertionError):
        judge_runs(monkeypatch)


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_in_order_is_the_same_sum(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of equal ids within pieces and over several of them; what names no class takes nothing, not even NaN."""
    monkeypatch.setattr(picked, "_WORKSPACE", piece * 4 * D * 4)
    ids = R.integers(0, 6, (40, 5))
    ids[:, 0], ids[3], ids[8, 1:3] = 2, -1, -2
    c, x = R.normal(size=(40, 5)), R.normal(size=(40, D))
    c[3] = np.nan
    truth = np.zeros((9, D))
    np.add.at(truth, np.where(ids < 0, 8, ids), c[:, :, None] * x[:, None])
    truth[8] = 0.0
    for kind in ("float32", "bfloat16"):
        given = (jnp.asarray(c, jnp.float32), jnp.asarray(x, kind), jnp.asarray(ids, jnp.int32))
        found = picked._ordered_weight_bwd(*given, classes=9, wide=True)
        assert found.dtype == jnp.float32
        due = truth if kind == "float32" else picked._plain_weight_bwd(*given, classes=9, wide=True)
        np.testing.assert_allclose(found, due, rtol=1e-4, atol=1e-4)
    empty = jnp.zeros((3, 0)), jnp.zeros((3, D)), jnp.zeros((3, 0), jnp.int32)
    assert picked._ordered_weight_bwd(*empty, classes=9, wide=False).tolist() == np.zeros((9, D)).tolist()


def test_sums_by_class() -> None:
    ids = np.array([[4, 1, 4, -1, 4, 1], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0], [-1] * 6])
    a = R.normal(size=ids.shape) * (ids >= 0)
    own, others, first = sparse.by_class(jnp.asarray(ids), jnp.asarray(a, jnp.float32))
    equal = ids[:, :, None] == ids[:, None]
    np.testing.assert_allclose(own, (equal * a[:, None]).sum(2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(others, (~equal * a[:, None]).sum(2), rtol=1e-5, atol=1e-6)
    before = np.tril(np.ones((6, 6)), -1)
    np.testing.assert_array_equal(first, (ids >= 0) & ~(equal & (before > 0)).any(2))
