"""The interpreter's fused product and sum, where a version of Triton has none of its own: rounded once."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.rows.gpu import interpreter


class Handle:
    """A tensor of the interpreter."""

    def __init__(self, data: np.ndarray, dtype: Any = None) -> None:
        self.data, self.dtype = data, SimpleNamespace(scalar=dtype)


def _near(exact: Fraction, dtype: Any) -> float:
    """The nearest number of the type, ties to even: from a float64 that cannot round twice."""
    near = float(exact)
    if dtype is np.float64:
        return near
    found = np.float32(near)
    both = [found, np.nextafter(found, np.float32(np.inf)), np.nextafter(found, np.float32(-np.inf))]
    return float(min(both, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.int32)) & 1)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_rounds_once(dtype: Any) -> None:
    r = np.random.default_rng(0)
    x, y = (r.standard_normal(2000).astype(dtype) for _ in range(2))
    z = (-(x * y) * (1 + r.integers(-3, 4, 2000) * np.finfo(dtype).eps)).astype(dtype)  # almost all cancels
    z[::2] = (r.standard_normal(1000) * 10.0 ** r.integers(-9, 9, 1000)).astype(dtype)
    found = interpreter._fused(None, Handle(x), Handle(y), Handle(z)).data
    exact = [Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)) for a, b, c in zip(x, y, z, strict=True)]
    want = np.array([_near(e, dtype) for e in exact])
    off = np.abs(found - want) / np.maximum(np.spacing(np.abs(want).astype(dtype)), np.finfo(dtype).tiny)
    assert off.max() <= (0 if dtype is np.float32 else 1), (
        "one unit at most in float64, where the error terms round too"
    )
    twice = np.abs((x * y + z) - want) / np.maximum(np.spacing(np.abs(want).astype(dtype)), np.finfo(dtype).tiny)
    assert twice.max() > 1e3, "put back: a product that is rounded"


def test_what_is_not_finite_stays_so() -> None:
    x = np.array([np.inf, np.nan, 3e38, -np.inf], np.float32)
    found = interpreter._fused(None, *map(Handle, (x, np.full(4, 2, np.float32), np.zeros(4, np.float32)))).data
    np.testing.assert_array_equal(found, [np.inf, np.nan, np.inf, -np.inf])
