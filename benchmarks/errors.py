"""What `make accuracy` measures: one call's errors, as measured, kept and drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Error:
    """One call's errors on one case, or on all of them."""

    quantity: str
    dtype: str
    call: str
    case: str
    worst_ulp: float
    mean_ulp: float
