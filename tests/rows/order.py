"""The order in which dW is summed: each class's pairs in that of their rows, which is what makes runs repeat.

Factors are powers of two: each term is exact, and a float32 sum in another order has other bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

N, K, D, V = 60, 9, 5, 11
R = np.random.default_rng(5)
C = np.float32(2.0) ** R.integers(-3, 4, (N, K)).astype(np.float32)
X = (R.normal(size=(N, D)) * 2.0 ** R.integers(-9, 10, (N, 1))).astype(np.float32)
IDS = R.integers(-1, V, (N, K)).astype(np.int32)
WeightBwd = Callable[[Any, Any, Any], np.ndarray]


def judge(weight_bwd: WeightBwd) -> None:
    """Bit for bit the float32 sums in the order of the rows, and of a row's ids."""
    due = np.zeros((V, D), np.float32)
    for i, k in np.argwhere(IDS >= 0):
        due[IDS[i, k]] += C[i, k] * X[i]
    assert np.isfinite(due).all()
    np.testing.assert_array_equal(weight_bwd(C, X, IDS), due)


def column_by_column(right: WeightBwd) -> WeightBwd:
    """Sorted by slot before row."""
    return lambda c, x, ids: right(c.T.reshape(-1, 1), np.tile(x, (K, 1)), ids.T.reshape(-1, 1))


def one_moved(right: WeightBwd) -> WeightBwd:
    def wrong(c: Any, x: Any, ids: Any) -> np.ndarray:
        ids = ids.copy()
        i, k = np.argwhere(ids == 3)[-1]
        ids[i, k] = 4
        return right(c, x, ids)

    return wrong


def last_dropped(right: WeightBwd) -> WeightBwd:
    def wrong(c: Any, x: Any, ids: Any) -> np.ndarray:
        ids = ids.copy()
        i, k = np.argwhere(ids == 3)[-1]
        ids[i, k] = -1
        return right(c, x, ids)

    return wrong


SABOTEURS: dict[str, Callable[[WeightBwd], WeightBwd]] = {
    "a sort that is not stable": lambda right: lambda c, x, ids: right(c[::-1], x[::-1], ids[::-1]),
    "slots before rows": column_by_column,
    "a class begins a pair too early": one_moved,
    "a class's last pair dropped": last_dropped,
    "rows exchanged": lambda right: lambda c, x, ids: right(c, x[[1, 0, *range(2, N)]], ids),
}
