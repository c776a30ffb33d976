"""Sums and exponentials of rows that lose no digits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, np.dtype[Any]]

# One float64 step near 1e4 is 2e-12: exp of a difference that lost that much is wrong in digit 12.
WIDE = np.longdouble

# +-inf and NaN are data here (a masked class, a bad row), so no function may warn about them.
quiet = np.errstate(all="ignore")


def wide(x: ArrayLike) -> Array:
    """In the widest type there is."""
    return np.asarray(x, np.float64).astype(WIDE)


def last(x: ArrayLike, axis: int) -> Array:
    """The class axis last, wide."""
    return np.moveaxis(np.atleast_1d(wide(x)), axis, -1)


def back(out: Array, axis: int, shape: tuple[int, ...]) -> Array:
    """The class axis where it was, in float64."""
    return np.moveaxis(out, -1, axis).astype(np.float64).reshape(shape)


def others(x: Array) -> Array:
    """Sum of a row's entries but the one in question: prefix plus suffix, never a subtraction."""
    zero = np.zeros_like(x[..., :1])
    before = np.concatenate([zero, np.cumsum(x[..., :-1], -1)], -1)
    after = np.concatenate([np.cumsum(x[..., :0:-1], -1)[..., ::-1], zero], -1)
    return before + after


def mass_sum(mass: Array, value: Array) -> Array:
    """sum_j mass_j value_j where no mass contributes 0, also against an infinite value."""
    return np.sum(np.where(mass == 0, 0, mass * value), -1)


def parts(z: Array) -> tuple[Array, Array, Array, Array]:
    """The probabilities p, their complements q = 1 - p, log p and lse of rows z."""
    # Legend: m = max z, e_j = exp(z_j - m), rest = sum of e but one maximum, total = 1 + rest.
    # p_j = e_j / total                            documents 1-4, shifted by m (same quotient)
    # q_j = sum_{k != j} e_k / total               not 1 - p_j: that is 0 once p_j rounds to 1
    # log p_j = (z_j - m) - log1p(rest)            documents 2 and 4: z_i - ln sum e^z_n
    # lse = m + log1p(rest)
    m = np.max(z, -1, keepdims=True, initial=-np.inf)
    m = np.where(np.isfinite(m), m, np.nan)  # a row all -inf, or holding +inf or NaN, is NaN
    e = np.exp(z - m)
    rests = others(e)
    rest = np.min(rests, -1, keepdims=True, initial=np.inf)  # smallest where e is largest
    log_total = np.log1p(rest)
    return e / (1 + rest), rests / (1 + rest), z - m - log_total, (m + log_total)[..., 0]
