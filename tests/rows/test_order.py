"""dW is summed in the order of the rows at every door, with its kernel and without; a broken order is seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_ops._rows import native as jax_native
from jax_ops._rows import picked as jax_picked
from tests.rows.order import SABOTEURS, D, V, WeightBwd, judge
from torch_ops._rows import native as torch_native
from torch_ops._rows import picked as torch_picked


def by_torch(c: Any, x: Any, ids: Any) -> np.ndarray:
    c, x, ids = (torch.from_numpy(np.array(a)) for a in (c, x, ids))
    return torch_picked.picked_weight_bwd(c, x, ids, V, wide=True).numpy()


def by_jax(c: Any, x: Any, ids: Any) -> np.ndarray:
    c, x, ids = map(jnp.asarray, (c, x, ids))
    return np.asarray(jax_picked.picked_weight_bwd(c, x, ids, V, wide=True))


@pytest.fixture(params=["torch", "torch, plain", "torch, pieces", "jax", "jax, plain", "jax, pieces"])
def weight_bwd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightBwd]:
    """A door's product with its kernel, without, and by pieces of its pairs."""
    assert not torch_native.missing + jax_native.missing
    name, _, way = request.param.partition(", ")
    if way:
        monkeypatch.setattr(torch_picked, "_serving", lambda *_: None)
        monkeypatch.setattr(jax_native, "missing", "taken away")
        jax.clear_caches()
    if way == "pieces":  # of 4 pairs of a row, the rows one by one
        monkeypatch.setattr(torch_picked, "_WORKSPACE", 4 * 4 * D)
        monkeypatch.setattr(jax_picked, "_WORKSPACE", 4 * 4 * D * 9)
    yield by_torch if name == "torch" else by_jax
    monkeypatch.undo()
    if way:
        jax.clear_caches()


def test_pairs_are_summed_in_the_order_of_their_rows(weight_bwd: WeightBwd) -> None:
    judge(weight_bwd)


@pytest.mark.parametrize("name", SABOTEURS)
def test_a_broken_order_is_seen(name: str, weight_bwd: WeightBwd) -> None:
    with pytest.raises(AssertionError):
        judge(SABOTEURS[name](weight_bwd))
